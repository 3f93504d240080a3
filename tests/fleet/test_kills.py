"""Coordinator and daemon killed in every phase, and at every single write: the fleet resumes, to the same bytes.

The phases come from the transition tables: a new phase without a scenario here fails.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from coordinator import runtime as coordinator_runtime
from coordinator.core import events as ev
from coordinator.core import records as rec
from coordinator.core.transitions import TABLE as COORDINATOR_TABLE
from coordinator.workers.protocol import Evaluate, Prepare, WorkerFailed
from edge_daemon.core.transitions import TABLE as DAEMON_TABLE
from muster.testbed.memory_fleet import MemoryFleet
from muster.testbed.memory_process import Crash
from shared import jobs
from shared.machines import phases
from tests.fleet import fleet_rig as rig

DEVICES = 3
DOWN_S = 3.0
VICTIM = "dev-000"
SEEN_S = 120.0

Scenario = Callable[[MemoryFleet, str], None]
"""Brings the fleet where the kill strikes."""


@pytest.fixture(scope="module")
def held_out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("held-out") / "rows.jsonl"


@pytest.fixture(scope="module")
def spec(held_out: Path) -> jobs.JobSpec:
    return rig.spec(DEVICES, held_out)


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory, spec: jobs.JobSpec) -> bytes:
    """The final adapter of the undisturbed run."""
    return rig.undisturbed(tmp_path_factory.mktemp("expected"), DEVICES, spec)


# ---- coordinator


def _phase(fleet: MemoryFleet, job: str, phase: str, committed: int) -> bool:
    found = fleet.job(job)
    return found is not None and found.phase == phase and found.committed >= committed


def _until(phase: str, committed: int = 0) -> Scenario:
    def reach(fleet: MemoryFleet, job: str) -> None:
        fleet.run_until(lambda: _phase(fleet, job, phase, committed), SEEN_S, phase)

    return reach


def _open_with_one_update(fleet: MemoryFleet, job: str) -> None:
    _until("open", 1)(fleet, job)
    before = len(fleet.history.admitted)
    fleet.run_until(lambda: len(fleet.history.admitted) > before, SEEN_S, "an admitted update")
    assert _phase(fleet, job, "open", 1)


def _queued(fleet: MemoryFleet, job: str) -> None:
    """Queued lasts no longer than a step: the kill strikes right after the job is on disk."""
    fleet.coordinator.on_append = _crash_after(rec.JobSubmitted)
    fleet.run_until(lambda: not fleet.coordinator.alive, SEEN_S, "the crash")
    fleet.coordinator.on_append = lambda _when, _records: None


def _crash_after(kind: type[Any]) -> Callable[[str, Any], None]:
    def on_append(when: str, records: Any) -> None:
        if when == "after" and any(isinstance(record, kind) for record in records):
            raise Crash

    return on_append


def _broken_worker(kind: type[Any], phase: str) -> Scenario:
    def reach(fleet: MemoryFleet, job: str) -> None:
        fleet.coordinator.fault = lambda question: (
            WorkerFailed(reason="no memory") if isinstance(question, kind) and not _judging_base(fleet, job) else None
        )
        _until(phase)(fleet, job)
        fleet.coordinator.fault = lambda _question: None

    return reach


def _judging_base(fleet: MemoryFleet, job: str) -> bool:
    return _phase(fleet, job, "baseline", 0)


def _cancelled(fleet: MemoryFleet, job: str) -> None:
    _until("open", 1)(fleet, job)
    _ask(fleet, ev.CancelRequested, job)
    _until("cancelled")(fleet, job)


def _ask(fleet: MemoryFleet, kind: type[Any], job: str) -> None:
    runtime = fleet.coordinator.runtime
    fleet.coordinator.post(coordinator_runtime.Call(lambda: _step(runtime, kind, job)))


def _step(runtime: coordinator_runtime.Runtime, kind: type[Any], job: str) -> None:
    runtime.step(kind(job=job, **runtime.now()))


COORDINATOR_SCENARIOS: dict[str, Scenario] = {
    "queued": _queued,
    "preparing": _until("preparing"),
    "baseline": _until("baseline"),
    "waiting": _until("waiting"),
    "open": _open_with_one_update,
    "folding": _until("folding", 1),
    "evaluating": _until("evaluating", 1),
    "exporting": _until("exporting"),
    "paused": _broken_worker(Evaluate, "paused"),
    "finished": _until("finished"),
    "cancelled": _cancelled,
    "failed": _broken_worker(Prepare, "failed"),
}


def test_every_phase_of_the_coordinator_has_a_scenario() -> None:
    assert set(COORDINATOR_SCENARIOS) == set(phases(COORDINATOR_TABLE))


@pytest.mark.parametrize("phase", phases(COORDINATOR_TABLE))
def test_coordinator_killed(tmp_path: Path, spec: jobs.JobSpec, expected: bytes, phase: str) -> None:
    with MemoryFleet(tmp_path, rig.members(DEVICES)) as fleet:
        job = fleet.submit(spec)
        COORDINATOR_SCENARIOS[phase](fleet, job)
        fleet.coordinator.kill()
        before = fleet.records(job)
        fleet.run(DOWN_S)
        fleet.coordinator.start()
        fleet.run(1.0)
        assert fleet.records(job)[: len(before)] == before
        if phase in ("cancelled", "failed"):
            fleet.run(20.0)
            assert _phase(fleet, job, phase, 0)
            assert {node.phase for node in fleet.daemons.values()} == {"idle"}
            return
        if phase == "paused":
            assert _phase(fleet, job, "paused", 0)
            _ask(fleet, ev.ResumeRequested, job)
            fleet.run(1.0)
        _finishes_alike(fleet, job, expected)


def _finishes_alike(fleet: MemoryFleet, job: str, expected: bytes) -> None:
    found = fleet.finish(job, within_s=300.0)
    assert (found.phase, found.committed) == ("finished", 3), fleet.describe(job)
    rig.check(fleet, job)
    plans = rig.planned(fleet, job)
    assert [number for number, _, _ in plans[-3:]] == [1, 2, 3]
    assert max(attempt for _, attempt, _ in plans) == 1, "a round was given up"
    assert fleet.adapter(job) == expected


def test_coordinator_killed_around_every_write(tmp_path: Path, spec: jobs.JobSpec, expected: bytes) -> None:
    """Before and after each transaction of the log, so between every record and the commands that follow from it."""
    writes = _appends(tmp_path / "count", spec)
    assert writes > 20
    for number in range(writes):
        for when in ("before", "after"):
            _killed_at(tmp_path / f"{number}-{when}", spec, expected, number, when)


def _appends(root: Path, spec: jobs.JobSpec) -> int:
    count = 0

    def on_append(when: str, _records: Any) -> None:
        nonlocal count
        count += when == "after"

    with MemoryFleet(root, rig.members(DEVICES)) as fleet:
        fleet.coordinator.on_append = on_append
        fleet.finish(fleet.submit(spec))
    return count


def _killed_at(root: Path, spec: jobs.JobSpec, expected: bytes, number: int, when: str) -> None:
    seen = {"before": 0, "after": 0}
    struck = False

    def on_append(here: str, _records: Any) -> None:
        nonlocal struck
        seen[here] += 1
        if not struck and here == when and seen[here] == number + 1:
            struck = True
            raise Crash

    with MemoryFleet(root, rig.members(DEVICES)) as fleet:
        fleet.coordinator.on_append = on_append
        job = fleet.submit(spec)
        fleet.run_until(lambda: not fleet.coordinator.alive, SEEN_S, f"write {number}")
        fleet.run(1.0)
        fleet.coordinator.start()
        if fleet.job(job) is None:
            fleet.submit(spec)  # it was not on disk yet: its operator was told so
        fleet.run(0.5)
        _finishes_alike(fleet, job, expected)


# ---- daemon


def _daemon_in(phase: str, committed: int = 1) -> Scenario:
    def reach(fleet: MemoryFleet, job: str) -> None:
        def there() -> bool:
            return fleet.committed(job) >= committed and fleet.daemons[VICTIM].phase == phase

        fleet.run_until(there, SEEN_S, phase)

    return reach


def _training(fleet: MemoryFleet, job: str) -> None:
    _daemon_in("training")(fleet, job)
    fleet.run(0.22)  # some steps and a checkpoint, not all steps
    assert fleet.daemons[VICTIM].phase == "training"


def _paused(fleet: MemoryFleet, job: str) -> None:
    member = fleet.daemons[VICTIM].member
    member.behaviour.step_s = 0.5
    _daemon_in("training")(fleet, job)
    member.foreign_cores = member.cores
    _daemon_in("paused")(fleet, job)
    member.foreign_cores = 0.0


def _draining(fleet: MemoryFleet, job: str) -> None:
    _slow_others(fleet)
    _training(fleet, job)
    fleet.daemons[VICTIM].leave()
    _daemon_in("draining")(fleet, job)


def _stopped(fleet: MemoryFleet, job: str) -> None:
    _daemon_in("idle", 0)(fleet, job)
    fleet.daemons[VICTIM].leave()
    _daemon_in("stopped", 0)(fleet, job)
    assert not fleet.daemons[VICTIM].alive


def _slow_others(fleet: MemoryFleet) -> None:
    """A device that leaves is not waited for: the others' work keeps the round open until it is back."""
    for name, node in fleet.daemons.items():
        if name != VICTIM:
            node.member.behaviour.step_s = 1.0


DAEMON_SCENARIOS: dict[str, Scenario] = {
    "probing": _daemon_in("probing", 0),
    "idle": _daemon_in("idle"),
    "fetching": _daemon_in("fetching"),
    "training": _training,
    "paused": _paused,
    "offering": _daemon_in("offering"),
    "draining": _draining,
    "stopped": _stopped,
}


def test_every_phase_of_the_daemon_has_a_scenario() -> None:
    assert set(DAEMON_SCENARIOS) == set(phases(DAEMON_TABLE))


@pytest.mark.parametrize("phase", phases(DAEMON_TABLE))
def test_daemon_killed(tmp_path: Path, spec: jobs.JobSpec, expected: bytes, phase: str) -> None:
    with MemoryFleet(tmp_path, rig.members(DEVICES)) as fleet:
        victim = fleet.daemons[VICTIM]
        if phase == "probing":
            fleet.network.schedule(1.0, lambda: fleet.submit(spec))
            job = "job-1"
            assert victim.phase == "probing"
        else:
            job = fleet.submit(spec)
            DAEMON_SCENARIOS[phase](fleet, job)
        assert victim.phase == phase
        victim.kill()
        fleet.run(DOWN_S)
        victim.start()
        fleet.run(1.0)
        _finishes_alike(fleet, job, expected)


def test_daemon_killed_after_every_save(tmp_path: Path, spec: jobs.JobSpec, expected: bytes) -> None:
    """Right after each write of the journal, so between every decision and the commands that follow from it."""
    number, struck = 0, True
    while struck:
        struck = _daemon_killed_at(tmp_path / str(number), spec, expected, number)
        number += 1
    assert number > 10


def _daemon_killed_at(root: Path, spec: jobs.JobSpec, expected: bytes, number: int) -> bool:
    """Whether there is a save of this number."""
    saves = 0

    def on_save(_journal: object) -> None:
        nonlocal saves
        saves += 1
        if saves == number + 1:
            raise Crash

    with MemoryFleet(root, rig.members(DEVICES)) as fleet:
        victim = fleet.daemons[VICTIM]
        victim.on_save = on_save
        job = fleet.submit(spec)
        fleet.run_until(lambda: not victim.alive or _phase(fleet, job, "finished", 3), SEEN_S, f"save {number}")
        struck = not victim.alive
        if struck:
            fleet.run(1.0)
            victim.start()
        _finishes_alike(fleet, job, expected)
    return struck
