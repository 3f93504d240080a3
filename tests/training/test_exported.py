"""A real run of coordinator, daemons and agents: its export under peft alone is what the coordinator evaluated."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("torch")
from safetensors import safe_open  # noqa: E402 - after the packages that may be missing

from muster.merged import merge  # noqa: E402
from muster.testbed.exported import quality  # noqa: E402
from muster.testbed.fleet import DeviceSpec, Fleet  # noqa: E402
from shared.jobs import JobSpec  # noqa: E402
from shared.settings import check, parse_toml  # noqa: E402
from tests.live.rig import ended, wait_for  # noqa: E402
from tests.training.tiny_models import Make, colour_rows, make_bert, make_gpt2, story_rows, write_jsonl  # noqa: E402

ROUNDS = 2
JOB = """
name = "exported"
[base]
model = "tiny"
[task]
dataset = "texts"
max_tokens = 16
{task}
[rounds]
count = {rounds}
min_devices = 2
quorum = 1.0
local_steps = 12
deadline_s = 200
[strategy]
rank = 3
batch = 4
batch_min = 4
batch_max = 4
bits = 32
energy = 0.9
[training]
lr = 0.01
[evaluation]
data = "{held_out}"
rows = 20
worse_by = 10.0
"""
CLASSES = 'kind = "classification"\nlabels = ["red", "green", "blue"]'


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("make", "task"), [(make_bert, CLASSES), (make_gpt2, 'kind = "causal"')], ids=["classification", "causal"]
)
def test_the_export_reproduces_the_coordinators_evaluation(tmp_path: Path, make: Make, task: str) -> None:
    rows = story_rows if make is make_gpt2 else colour_rows
    held_out = write_jsonl(tmp_path / "held-out.jsonl", rows(24))
    devices = [
        DeviceSpec(
            name,
            data={"texts": write_jsonl(tmp_path / f"{name}.jsonl", rows(48)[number::2])},
            settings={"policy": {"foreign_limit": 1000.0}, "agent": {"threads": 1}},
        )
        for number, name in enumerate(("edge-01", "edge-02"))
    ]
    base = make(tmp_path / "tiny")
    text = JOB.format(task=task, rounds=ROUNDS, held_out=held_out)
    with Fleet(tmp_path / "fleet", devices, {"tiny": base}, limits=False) as fleet:
        assert fleet.wait_until_able() == []
        job = wait_for(fleet, fleet.client.submit(text).id, ended, seconds=200)
        assert job.state == "finished", job.reason
        adapter = fleet.client.export(job.id, tmp_path / "adapter")
    assert [view.accepted for view in job.rounds] == [True] * ROUNDS
    told = job.rounds[-1].metrics
    assert told is not None and told.rows == 20
    spec = check(JobSpec, parse_toml(text, "job"), "job")
    found = quality(spec, base, adapter, [held_out], rows=20)[0]
    assert (found.rows, found.accuracy) == (told.rows, told.accuracy)
    assert found.loss == pytest.approx(told.loss, abs=1e-5)
    # Merged, an ordinary model folder: no peft, nothing of the adapter beside it.
    whole = merge(adapter, tmp_path / "whole")
    again = quality(spec, whole, None, [held_out], rows=20)[0]
    assert (again.rows, again.accuracy) == (told.rows, told.accuracy)
    assert again.loss == pytest.approx(told.loss, abs=1e-5)
    # Not the untuned base, and not one rank for all: else little would be shown.
    assert abs(quality(spec, base, None, [held_out], rows=20)[0].loss - told.loss) > 1e-3
    with safe_open(adapter / "adapter_model.safetensors", "np") as file:
        names = [name for name in file.keys() if ".lora_A." in name]  # noqa: SIM118 - no mapping
        assert len({file.get_tensor(name).shape[0] for name in names}) > 1
