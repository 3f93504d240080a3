"""Small fleets on a virtual clock, and the checkers that read a job's log after whatever happened to it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from coordinator.core import records as rec
from muster.testbed import least_squares
from muster.testbed.memory_fleet import MemoryFleet
from muster.testbed.memory_nodes import DATASET, Member
from muster.testbed.memory_process import Work
from muster.testbed.memory_trainer import Behaviour
from shared import jobs

MODEL = "16x8"


def members(count: int, *, step_s: float = 0.05, rows: int = 24, model: str = MODEL, **settings: Any) -> list[Member]:
    """Devices with data of their own."""
    return [
        Member(
            f"dev-{number:03d}",
            least_squares.make_rows(model, rows, number, shift=0.3),
            Behaviour(step_s=step_s),
            settings=settings,
        )
        for number in range(count)
    ]


def spec(devices: int, held_out: Path | None = None, model: str = MODEL, **rounds: Any) -> jobs.JobSpec:
    """A job whose work does not depend on what was measured: one batch, one rank."""
    given: dict[str, Any] = {
        "count": 3, "min_devices": devices, "quorum": 1.0, "deadline_s": 600.0, "local_steps": 8, **rounds,
    }  # fmt: skip
    evaluation = jobs.EvaluationSpec()
    if held_out is not None:
        if not held_out.exists():
            least_squares.write_rows(held_out, least_squares.make_rows(MODEL, 40, 999))
        evaluation = jobs.EvaluationSpec(data=str(held_out), worse_by=10.0)
    return jobs.JobSpec(
        name="fleet",
        base=jobs.BaseSpec(model=model),
        task=jobs.TaskSpec(kind="least_squares", dataset=DATASET),
        rounds=jobs.RoundsSpec(**given),
        strategy=jobs.StrategySpec(rank=4, batch=4, batch_min=4, batch_max=4),
        training=jobs.TrainingSpec(lr=0.05, checkpoint_every=2),
        evaluation=evaluation,
    )


def undisturbed(root: Path, count: int, job_spec: jobs.JobSpec) -> bytes:
    """The final adapter of a run in which nothing goes wrong."""
    with MemoryFleet(root / "undisturbed", members(count)) as fleet:
        job = fleet.finish(fleet.submit(job_spec))
        assert job.phase == "finished"
        check(fleet, job.id)
        return fleet.adapter(job.id)


def check(fleet: MemoryFleet, job_id: str, *, exact: bool = True) -> None:
    """Nothing lost, nothing counted twice, nothing strange; `exact`: nobody trained what the log held already."""
    records = fleet.records(job_id)
    taken = Counter(_work(r) for r in records if isinstance(r, rec.UpdateAdmitted))
    assert not [work for work, times in taken.items() if times > 1], "an update was admitted twice"
    assert not fleet.history.strange
    assert [work for work, held in fleet.history.ordered if held] == []
    _check_rounds(records)
    if exact:
        assert all(len(shas) == 1 for shas in fleet.history.trained.values()), "one work gave two different updates"


def check_none_lost(fleet: MemoryFleet, job_id: str) -> Counter[str]:
    """Of every update that was ever trained its device was told what became of it, and the log agrees: `stored` are
    exactly those it holds, `refused` those it names; `late` is the rest. How many ended in each way."""
    records = fleet.records(job_id)
    held = {_work(r) for r in records if isinstance(r, rec.UpdateAdmitted)}
    refused = {Work(r.job, r.round, r.attempt, r.device) for r in records if isinstance(r, rec.UpdateRefused)}
    told = {
        Work(done.job, done.round, done.attempt, name): done.verdict
        for name, node in fleet.daemons.items()
        for done in node.runtime.state.journal.finished
    }
    assert not [name for name, node in fleet.daemons.items() if node.runtime.state.journal.outbox], "not settled yet"
    lost = [work for work in fleet.history.trained if told.get(work) not in ("stored", "late", "refused")]
    assert lost == [], "an update was trained, and nobody decided about it"
    verdicts = {work: told[work] for work in fleet.history.trained}
    assert {work for work, verdict in verdicts.items() if verdict == "stored"} == held
    assert {work for work, verdict in verdicts.items() if verdict == "refused"} == refused
    return Counter(verdicts.values())


def _check_rounds(records: list[rec.AnyRecord]) -> None:
    """Every closed round folds what was admitted in its attempt; rounds commit in order, each planned as digested."""
    plans: dict[tuple[int, int], str] = {}
    attempt, admitted, closed, committed = 0, set[str](), set[tuple[int, int]](), list[int]()
    for record in records:
        match record:
            case rec.RoundPlanned():
                assert (record.round, record.attempt) not in plans, "a planned round was planned again"
                plans[record.round, record.attempt] = record.digest
                attempt, admitted = record.attempt, set()
            case rec.UpdateAdmitted():
                assert record.attempt == attempt
                admitted.add(record.device)
            case rec.RoundClosed():
                assert set(record.devices) == admitted, "the folded set is not the admitted one"
                assert (record.round, attempt) not in closed
                closed.add((record.round, attempt))
            case rec.RoundCommitted():
                committed.append(record.round)
            case _:
                pass
    assert committed == list(range(1, len(committed) + 1))


def planned(fleet: MemoryFleet, job_id: str) -> list[tuple[int, int, str]]:
    """(round, attempt, digest) of every plan."""
    return [(r.round, r.attempt, r.digest) for r in fleet.records(job_id) if isinstance(r, rec.RoundPlanned)]


def of_kind(fleet: MemoryFleet, job_id: str, kind: type[Any]) -> list[Any]:
    """The log's records of one kind."""
    return [record for record in fleet.records(job_id) if isinstance(record, kind)]


def _work(record: rec.UpdateAdmitted) -> Work:
    return Work(record.job, record.round, record.attempt, record.device)
