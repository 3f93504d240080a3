"""`muster emulate --strategy mergesfl`: four devices and the top worker under mutual TLS, to the end and its export."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")
from tests.training.tiny_models import colour_rows, make_bert, write_jsonl  # noqa: E402 - it needs torch

JOB = """
name = "colours"
[base]
model = "tiny"
[task]
kind = "classification"
max_tokens = 16
labels = ["red", "green", "blue"]
[rounds]
count = 2
local_steps = 12
deadline_s = 200
[strategy]
name = "uniform"
rank = 2
batch = 8
batch_min = 2
server_lr = 1.5
[training]
lr = 0.02
checkpoint_every = 4
"""


@pytest.mark.timeout(400)
@pytest.mark.parametrize("tuning", ["lora", pytest.param("full", marks=pytest.mark.slow)])
def test_four_devices_and_the_top_worker_teach_a_model(tmp_path: Path, tuning: str) -> None:
    make_bert(tmp_path / "tiny")
    data = tmp_path / "rows"
    data.mkdir()
    write_jsonl(data / "train.jsonl", colour_rows(240, seed=1))
    write_jsonl(data / "test.jsonl", colour_rows(60, seed=9))
    split = f'[strategy.split]\nblock = 1\ntuning = "{tuning}"\n[training]'
    (tmp_path / "job.toml").write_text(JOB.replace("[training]", split), encoding="utf-8")
    given = ["--devices", "4", "--strategy", "mergesfl", "--data", str(data), "--job", str(tmp_path / "job.toml")]
    more = ["--model", f"tiny={tmp_path / 'tiny'}", "--secure", "--keep", "--out", str(tmp_path / "run")]
    ran = subprocess.run(
        [sys.executable, "-m", "muster.cli.main", "emulate", *given, *more],
        capture_output=True, text=True, check=False, timeout=380,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stdout[-3000:] + ran.stderr[-2000:]
    assert "round 2 committed" in ran.stdout
    broker = (tmp_path / "run" / "fleet" / "broker" / "mosquitto.log").read_text(encoding="utf-8")
    assert "as coord-1-top (" in broker
    coordinator = (tmp_path / "run" / "fleet" / "coordinator.log").read_text(encoding="utf-8")
    assert coordinator.count("TopTrained") == 2 and "goes on without" not in coordinator
    exported = {path.name for path in (tmp_path / "run" / "adapter").iterdir()}
    assert {"lora": "adapter_model.safetensors", "full": "model.safetensors"}[tuning] in exported
