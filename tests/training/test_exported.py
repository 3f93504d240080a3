"""A real run of coordinator, daemons and agents: its export under peft alone is what the coordinator evaluated."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import pytest

pytest.importorskip("torch")
from safetensors import safe_open  # noqa: E402 - after the packages that may be missing

from coordinator.core.facts import Metrics  # noqa: E402
from coordinator.web.views import JobView  # noqa: E402
from muster.merged import merge  # noqa: E402
from muster.testbed.exported import quality  # noqa: E402
from muster.testbed.fleet import DeviceSpec, Fleet  # noqa: E402
from shared.errors import UserError  # noqa: E402
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
name = "{strategy}"
rank = 3
batch = 4
batch_min = 4
batch_max = 4
bits = 32
energy = 0.9
[training]
lr = {lr}
[evaluation]
data = "{held_out}"
rows = 20
worse_by = 10.0
"""
CLASSES = 'kind = "classification"\nlabels = ["red", "green", "blue"]'


class Run(NamedTuple):
    """A finished job and what it left."""

    spec: JobSpec
    base: Path
    held_out: Path
    adapter: Path
    job: JobView


def run(folder: Path, make: Make, task: str, strategy: str, lr: float = 0.01) -> Run:
    """Two devices' rounds over a broker, and the exported folder."""
    rows = story_rows if make is make_gpt2 else colour_rows
    held_out = write_jsonl(folder / "held-out.jsonl", rows(24))
    devices = [
        DeviceSpec(
            name,
            data={"texts": write_jsonl(folder / f"{name}.jsonl", rows(48)[number::2])},
            settings={"policy": {"foreign_limit": 1000.0}, "agent": {"threads": 1}},
        )
        for number, name in enumerate(("edge-01", "edge-02"))
    ]
    base = make(folder / "tiny")
    text = JOB.format(task=task, rounds=ROUNDS, held_out=held_out, strategy=strategy, lr=lr)
    with Fleet(folder / "fleet", devices, {"tiny": base}, limits=False) as fleet:
        assert fleet.wait_until_able() == []
        job = wait_for(fleet, fleet.client.submit(text).id, ended, seconds=200)
        assert job.state == "finished", job.reason
        adapter = fleet.client.export(job.id, folder / "adapter")
    return Run(check(JobSpec, parse_toml(text, "job"), "job"), base, held_out, adapter, job)


def reproduced(made: Run) -> Metrics:
    """What the coordinator evaluated last, which the export gives again."""
    assert [view.accepted for view in made.job.rounds] == [True] * ROUNDS
    told = made.job.rounds[-1].metrics
    assert told is not None and told.rows == 20
    found = quality(made.spec, made.base, made.adapter, [made.held_out], rows=20)[0]
    assert (found.rows, found.accuracy) == (told.rows, told.accuracy)
    assert found.loss == pytest.approx(told.loss, abs=1e-5)
    # Not the untuned base, else little would be shown.
    assert abs(quality(made.spec, made.base, None, [made.held_out], rows=20)[0].loss - told.loss) > 1e-3
    return told


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("make", "task"), [(make_bert, CLASSES), (make_gpt2, 'kind = "causal"')], ids=["classification", "causal"]
)
def test_the_export_reproduces_the_coordinators_evaluation(tmp_path: Path, make: Make, task: str) -> None:
    made = run(tmp_path, make, task, "uniform")
    told = reproduced(made)
    # Merged, an ordinary model folder: no peft, nothing of the adapter beside it.
    whole = merge(made.adapter, tmp_path / "whole")
    again = quality(made.spec, whole, None, [made.held_out], rows=20)[0]
    assert (again.rows, again.accuracy) == (told.rows, told.accuracy)
    assert again.loss == pytest.approx(told.loss, abs=1e-5)
    # Not one rank for all.
    with safe_open(made.adapter / "adapter_model.safetensors", "np") as file:
        names = [name for name in file.keys() if ".lora_A." in name]  # noqa: SIM118 - no mapping
        assert len({file.get_tensor(name).shape[0] for name in names}) > 1


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("make", "task", "strategy", "lr"),
    [
        (make_bert, CLASSES, "full", 0.002), (make_gpt2, 'kind = "causal"', "fedadapter", 0.01),
        pytest.param(make_gpt2, 'kind = "causal"', "full", 0.002, marks=pytest.mark.slow),
        pytest.param(make_bert, CLASSES, "fedadapter", 0.01, marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_what_is_no_lora_is_exported_in_its_own_form(
    tmp_path: Path, make: Make, task: str, strategy: str, lr: float
) -> None:
    made = run(tmp_path, make, task, strategy, lr)
    reproduced(made)
    names = {path.name for path in made.adapter.iterdir()}
    own = {"full": {"config.json", "model.safetensors", "tokenizer.json"},
           "fedadapter": {"bottleneck_config.json", "bottleneck.safetensors"}}  # fmt: skip
    assert own[strategy] <= names and "adapter_config.json" not in names
    with pytest.raises(UserError, match="leave out --merged"):
        merge(made.adapter, tmp_path / "whole")
    assert made.job.strategy == strategy and made.job.rounds[-1].metrics is not None
