"""Every strategy over a real mosquitto, with real agents, to an export that is worth what its last round was.

One fleet of three devices takes a job of each in turn, two rounds; `muster emulate --strategy NAME` runs those whose
export has a form of its own. The log tells that the strategy asked for made the plans.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from coordinator.adapters.event_log import SqliteEventLog
from coordinator.core import records as rec
from coordinator.core.aggregation.registry import PRUNING, SPLIT
from coordinator.core.job import Job, apply
from coordinator.core.planning.registry import PLANNERS
from muster.testbed.exported import quality
from muster.testbed.fleet import DeviceSpec, Fleet
from shared.messages import Work
from shared.pruning_file import PRUNING_FILE
from tests.live.rig import ended, records_of, wait_for, wait_until_heard

pytest.importorskip("torch")
from tests.training.tiny_models import colour_rows, make_bert, write_jsonl  # noqa: E402 - it needs torch

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]
EMULATED = ("full", "fedadapter", "fedspine")
"""By the command, too, which takes as long as five jobs of the fleet: those with exports of their own form. Elsewhere:
`uniform` (`test_demo.py`) and `mergesfl` (`test_split.py`)."""
DEVICES = ("edge-01", "edge-02", "edge-03")
JOB = """
name = "colours"
[base]
model = "tiny"
[task]
kind = "classification"
dataset = "rows"
max_tokens = 16
labels = ["red", "green", "blue"]
[rounds]
count = 2
min_devices = 3
local_steps = 6
deadline_s = 100
[strategy]
name = "{name}"
rank = 2
batch = 8
batch_min = 2
warm_up_steps = 6     # fedpipe has chosen its modules in the second round
split = {{ block = 1 }}
[training]
lr = 0.02
[evaluation]
data = "{held_out}"
worse_by = 1000.0     # both rounds count
"""
FILES = {
    "full": {"config.json", "model.safetensors"},
    "fedadapter": {"bottleneck_config.json"},
    **dict.fromkeys(PRUNING, {"adapter_config.json", "adapter_model.safetensors", PRUNING_FILE}),
}
"""What is exported where it is not the ordinary PEFT folder."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny base and rows."""
    folder = tmp_path_factory.mktemp("strategies")
    make_bert(folder / "tiny")
    (folder / "rows").mkdir()
    write_jsonl(folder / "rows" / "train.jsonl", colour_rows(120, seed=1))
    write_jsonl(folder / "rows" / "test.jsonl", colour_rows(60, seed=9))
    return folder


@pytest.fixture(scope="module")
def fleet(place: Path) -> Iterator[Fleet]:
    """Three devices without limits, each with rows of its own."""
    specs = [
        DeviceSpec(name, data={"rows": write_jsonl(place / f"{name}.jsonl", colour_rows(40, seed=number))})
        for number, name in enumerate(DEVICES)
    ]
    with Fleet(place / "fleet", specs, {"tiny": make_bert(place / "tiny")}, limits=False) as fleet:
        wait_until_heard(fleet)
        yield fleet


def job_of(place: Path, name: str) -> str:
    return JOB.format(name=name, held_out=place / "rows" / "test.jsonl")


def trains(name: str, work: Work) -> bool:
    """Whether the work is of the kind that the strategy asks for."""
    if name in PRUNING:
        return work.prune is not None and any(work.ranks.values())
    if name in SPLIT:
        return work.split is not None and any(work.ranks.values())
    return (work.prune, work.split) == (None, None) and any(work.ranks.values()) == (name not in ("head", "full"))


def check(place: Path, name: str, records: Sequence[rec.AnyRecord], adapter: Path) -> None:
    """That the log tells of two rounds by the strategy with updates of all devices, and that the export fits it."""
    job: Job | None = None
    for record in records:
        if isinstance(record, rec.JobRecord):
            job = apply(job, record)
    assert job is not None and job.metrics is not None
    assert (job.phase, job.committed, job.planner.name, job.spec.strategy.name) == ("finished", 2, name, name)
    plans = [record.plan for record in records if isinstance(record, rec.RoundPlanned)]
    assert [tuple(sorted(plan.participants)) for plan in plans] == [DEVICES, DEVICES], plans
    assert all(trains(name, work) for plan in plans for work in plan.participants.values()), plans
    if name == "fedpipe":
        chosen = plans[1].weights
        assert chosen is not None and set(chosen.selected) < set(chosen.scores)
    admitted = {(one.round, one.device) for one in records if isinstance(one, rec.UpdateAdmitted)}
    assert admitted == {(round, device) for round in (1, 2) for device in DEVICES}
    wanted = FILES.get(name, {"adapter_config.json", "adapter_model.safetensors"})
    assert wanted <= {path.name for path in adapter.iterdir()}
    if name not in PRUNING:  # its model is smaller: `muster export --ratio` makes it
        found = quality(job.spec, place / "tiny", adapter, [place / "rows" / "test.jsonl"])[0]
        assert found.loss == pytest.approx(job.metrics.loss, rel=1e-3)


@pytest.mark.parametrize("name", PLANNERS)
def test_a_fleet_over_mosquitto_works_by_the_strategy_to_its_export(
    place: Path, fleet: Fleet, name: str, tmp_path: Path
) -> None:
    job = fleet.client.submit(job_of(place, name)).id
    try:
        view = wait_for(fleet, job, ended, seconds=180)
        assert view.state == "finished", view.reason
        fleet.client.export(job, tmp_path / "adapter")
        check(place, name, records_of(fleet, job), tmp_path / "adapter")
    finally:
        if fleet.client.job(job).state not in ("finished", "failed"):
            fleet.client.cancel(job)  # the next test's job waits for its end


@pytest.mark.parametrize("name", EMULATED)
def test_the_command_does(place: Path, name: str, tmp_path: Path) -> None:
    (tmp_path / "job.toml").write_text(job_of(place, "uniform"), encoding="utf-8")
    given = ["--devices", "3", "--profile", "equal", "--strategy", name, "--data", str(place / "rows"), "--keep"]
    more = ["--job", str(tmp_path / "job.toml"), "--model", f"tiny={place / 'tiny'}", "--out", str(tmp_path / "run")]
    ran = subprocess.run(
        [sys.executable, "-m", "muster.cli.main", "emulate", *given, *more],
        capture_output=True, text=True, check=False, timeout=200,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stdout[-3000:] + ran.stderr[-2000:]
    assert "round 2 committed" in ran.stdout
    log = SqliteEventLog(tmp_path / "run" / "fleet" / "coordinator" / "events.sqlite")
    records = list(log.replay())
    log.close()
    check(place, name, records, tmp_path / "run" / "adapter")
