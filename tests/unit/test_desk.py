"""The desk over a real runtime and event log: every fault of a job file at once, and then nothing was queued."""

from __future__ import annotations

import gzip
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from coordinator.core import records as rec
from coordinator.core.facts import Metrics
from coordinator.core.job import Job, apply
from coordinator.core.planning import registry
from coordinator.web import history
from coordinator.web.desk import Desk
from coordinator.web.refusals import Conflict, NotFound
from muster.testbed.memory_fleet import MemoryFleet
from shared.errors import SettingsError, UserError
from shared.jobs import JobSpec
from shared.settings import check, parse_toml

JOB = """
name = "texts"
[base]
model = "{model}"
[task]
kind = "{kind}"
dataset = "texts"
labels = [{labels}]
[strategy]
{strategy}
[evaluation]
data = "{held_out}"
"""


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    """The desk of a coordinator without devices that knows the model `minilm`."""
    with MemoryFleet(tmp_path / "fleet", []) as fleet:
        runtime = fleet.coordinator.runtime
        folder = tmp_path / "minilm"
        folder.mkdir()
        (folder / "config.json").write_text("{}", encoding="utf-8")
        runtime.settings = msgspec.structs.replace(runtime.settings, models={"minilm": str(folder)})
        # The runtime has no thread of its own here: what is posted is done at once.
        yield Desk(runtime, runtime.handle)


@pytest.fixture
def held_out(tmp_path: Path) -> Path:
    path = tmp_path / "held-out.jsonl"
    path.write_text('{"text": "a", "label": 0}\n', encoding="utf-8")
    return path


def text(
    held_out: Path | str, *, model: str = "minilm", kind: str = "classification", labels: str = '"a", "b"',
    strategy: str = "",
) -> str:  # fmt: skip
    return JOB.format(model=model, kind=kind, labels=labels, strategy=strategy, held_out=held_out)


def refused(desk: Desk, job: str) -> list[str]:
    """The faults of a job file; nothing came of it."""
    with pytest.raises(SettingsError) as caught:
        desk.submit(job)
    assert "\n" not in str(caught.value)
    assert desk.jobs() == []
    return caught.value.faults


def test_a_job_without_a_fault_is_queued(desk: Desk, held_out: Path) -> None:
    job = desk.submit(text(held_out))
    assert [one.id for one in desk.jobs()] == [job.id]
    assert desk.job(job.id).submitted > 0


@pytest.mark.parametrize(
    ("model", "told"),
    [
        ("bert", "base.model: unknown model 'bert'; in [models] of the coordinator: minilm"),
        ("/no/such/model", "base.model: /no/such/model: no such folder"),
        ("./model", "base.model: ./model: no such folder"),
    ],
)
def test_an_unknown_model(desk: Desk, held_out: Path, model: str, told: str) -> None:
    assert refused(desk, text(held_out, model=model)) == [told]


def test_a_folder_that_holds_no_model(desk: Desk, held_out: Path, tmp_path: Path) -> None:
    assert refused(desk, text(held_out, model=str(tmp_path))) == [f"base.model: {tmp_path} has no config.json"]


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("none.jsonl", None, "no such file"),
        ("empty.jsonl", b"", "no rows"),
        ("blank.jsonl.gz", gzip.compress(b"\n \n", mtime=0), "no rows"),
        ("cut.jsonl.gz", gzip.compress(b"{}\n" * 99, mtime=0)[:12], "can't be read"),
        ("plain.jsonl.gz", b'{"text": "a"}\n', "can't be read: Not a gzipped file"),
    ],
)
def test_an_evaluation_file_without_rows(
    desk: Desk, tmp_path: Path, name: str, content: bytes | None, told: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    faults = refused(desk, text(tmp_path / name))
    assert len(faults) == 1
    assert faults[0].startswith(f"evaluation.data: on the coordinator: {tmp_path / name}: {told}")


def test_every_fault_is_told_at_once(desk: Desk) -> None:
    strategy = 'name = "magic"\naggregator = "mean"\nbatch_min = 9\nbatch_max = 3'
    faults = refused(desk, text("none.jsonl", model="bert", labels='"a"', strategy=strategy))
    assert [fault.split(":")[0] for fault in faults] == [
        "strategy.name",
        "strategy.aggregator",
        "strategy.batch_min",
        "evaluation.data",
        "task.labels",
        "base.model",
    ]
    assert "unknown 'magic'; known: " in faults[0] and "uniform" in faults[0]
    assert "unknown 'mean'; known: " in faults[1] and "fsr" in faults[1]


def test_a_key_that_is_not_known(desk: Desk, held_out: Path) -> None:
    assert refused(desk, text(held_out) + "rws = 3\n") == ["evaluation.rws: unknown key, did you mean 'rows'?"]


def test_text_that_is_no_toml(desk: Desk) -> None:
    with pytest.raises(UserError, match="job: not TOML"):
        desk.submit("name = ")
    assert desk.jobs() == []


def test_a_full_disk_queues_nothing(tmp_path: Path, held_out: Path) -> None:
    with MemoryFleet(tmp_path / "fleet", []) as fleet:
        fleet.coordinator.log_full = True
        desk = Desk(fleet.coordinator.runtime, fleet.coordinator.runtime.handle)
        with pytest.raises(Conflict, match="nothing was queued: database or disk is full"):
            desk.submit(text(held_out, model="16x8", kind="least_squares"))
        assert desk.jobs() == []
        assert fleet.records("job-1") == []


def test_what_can_not_be_done_to_a_job_is_said(desk: Desk, held_out: Path) -> None:
    with pytest.raises(NotFound, match="no job 'other'"):
        desk.cancel("other")
    job = desk.submit(text(held_out)).id
    with pytest.raises(Conflict, match="is not paused: it is"):
        desk.resume(job)
    with pytest.raises(Conflict, match="there is no export yet"):
        desk.export_folder(job)
    assert desk.cancel(job).state == "cancelled"
    with pytest.raises(Conflict, match="has ended: it is cancelled"):
        desk.cancel(job)


def test_a_job_in_the_list_keeps_its_quality_before_training() -> None:
    spec = check(JobSpec, parse_toml(text("held-out.jsonl"), "job"), "job")
    base, better = Metrics(loss=2.0, rows=10), Metrics(loss=1.0, rows=10)
    job = Job(id="x", spec=spec, phase="baseline", planner=registry.create(spec.strategy))
    job = apply(job, rec.BaselineEvaluated(job="x", metrics=base))
    assert history.summary(job).baseline == base
    assert history.summary(msgspec.structs.replace(job, judged=(better,))).baseline == base
