"""Full disks: nothing is lost, nothing counts twice, and work goes on as soon as there is room."""

from __future__ import annotations

from pathlib import Path

import pytest

from coordinator.core import records as rec
from edge_daemon.adapters.trainer import AgentSpoke
from edge_daemon.core import events as ev
from edge_daemon.settings import AgentSettings
from muster.testbed.memory_fleet import MemoryFleet
from muster.testbed.memory_nodes import DaemonNode
from shared.messages import Assign, Assignment
from tests.fleet import fleet_rig as rig
from tests.unit.session_rig import assignment

FULL_S = 8.0
SILENCE_S = 10.0


def test_updates_of_the_last_rounds_stay_and_older_ones_go(tmp_path: Path) -> None:
    with MemoryFleet(tmp_path, rig.members(2)) as fleet:
        job = fleet.submit(rig.spec(2, count=6))
        fleet.run_until(lambda: fleet.committed(job) == 4, 60.0, "four rounds")
        fleet.coordinator.restart(1.0)  # what is recent is known again from the log
        fleet.run(1.5)
        assert fleet.finish(job).phase == "finished"
        kept = fleet.coordinator.blobs.digests()
        there = {r.round for r in rig.of_kind(fleet, job, rec.UpdateAdmitted) if r.blob.sha in kept}
        assert there == {4, 5, 6}


@pytest.mark.parametrize("phase", ["preparing", "waiting", "open", "folding", "evaluating", "exporting"])
def test_the_coordinators_log_is_full_for_a_while(tmp_path: Path, phase: str) -> None:
    spec = rig.spec(3, tmp_path / "held-out.jsonl")
    with MemoryFleet(tmp_path / "full", rig.members(3)) as fleet:
        job = fleet.submit(spec)
        fleet.run_until(lambda: (found := fleet.job(job)) is not None and found.phase == phase, 60.0, phase)
        before = fleet.records(job)
        fleet.coordinator.log_full = True
        fleet.run(FULL_S)
        assert fleet.records(job) == before
        assert fleet.job(job).phase == phase
        assert "full" in fleet.coordinator.runtime.problem
        fleet.coordinator.log_full = False
        assert fleet.finish(job).phase == "finished"
        assert fleet.coordinator.runtime.problem == ""
        rig.check(fleet, job)
        assert {attempt for _, attempt, _ in rig.planned(fleet, job)} == {1}
        assert fleet.adapter(job) == rig.undisturbed(tmp_path, 3, spec)


def test_a_job_submitted_to_a_full_disk_is_not_taken_behind_the_operators_back(tmp_path: Path) -> None:
    """The API says that it was not written; submitted again, it runs once."""
    with MemoryFleet(tmp_path, rig.members(2)) as fleet:
        fleet.coordinator.log_full = True
        job = fleet.submit(rig.spec(2, count=1))
        fleet.run(FULL_S)
        assert fleet.job(job) is None
        fleet.coordinator.log_full = False
        fleet.run(10.0)
        assert fleet.job(job) is None
        assert fleet.finish(fleet.submit(rig.spec(2, count=1))).phase == "finished"


def test_a_full_log_and_a_kill_lose_nothing(tmp_path: Path) -> None:
    """What came while the disk was full was acknowledged to the broker only: the devices offer it again."""
    spec = rig.spec(3, count=2)
    with MemoryFleet(tmp_path / "full", rig.members(3)) as fleet:
        job = fleet.submit(spec)
        fleet.run_until(lambda: (found := fleet.job(job)) is not None and found.phase == "open", 60.0, "open")
        fleet.coordinator.log_full = True
        fleet.run(FULL_S)
        assert fleet.history.trained
        assert fleet.history.admitted == []
        fleet.coordinator.restart(1.0)
        fleet.coordinator.log_full = False
        fleet.run(1.5)
        assert fleet.finish(job).phase == "finished"
        rig.check(fleet, job)
        assert fleet.adapter(job) == rig.undisturbed(tmp_path, 3, spec)


@pytest.mark.parametrize("phase", ["idle", "fetching", "training", "offering"])
def test_a_devices_disk_is_full_for_a_while(tmp_path: Path, phase: str) -> None:
    spec = rig.spec(3)
    with MemoryFleet(tmp_path / "full", rig.members(3)) as fleet:
        job = fleet.submit(spec)
        victim = fleet.daemons["dev-001"]
        fleet.run_until(lambda: fleet.committed(job) == 1 and victim.phase == phase, 60.0, phase)
        victim.disk_full = True
        fleet.run(FULL_S)
        victim.disk_full = False
        assert fleet.finish(job).phase == "finished"
        rig.check(fleet, job)
        assert {attempt for _, attempt, _ in rig.planned(fleet, job)} == {1}
        assert fleet.adapter(job) == rig.undisturbed(tmp_path, 3, spec)


# ---- a device whose journal can't be written


def _impatient(count: int) -> list[rig.Member]:
    """Devices that soon take a silent agent for dead."""
    return rig.members(count, agent=AgentSettings(silence_s=SILENCE_S))


def _at_work(fleet: MemoryFleet, job: str) -> DaemonNode:
    """Up to a device that trains in the second round."""
    victim = fleet.daemons["dev-001"]
    fleet.run_until(lambda: fleet.committed(job) == 1 and victim.phase == "training", 60.0, "training")
    return victim


def _starts(victim: DaemonNode) -> int:
    """How often its agent was started."""
    return victim.runtime.ports.trainer.trainers[0]._run


@pytest.mark.parametrize("full_s", [10 * SILENCE_S, 10 * SILENCE_S + 0.5])
def test_an_agent_is_not_killed_for_the_silence_of_a_full_disk(tmp_path: Path, full_s: float) -> None:
    """It is done, and that can't be written down: to the machine it seems to train and to say nothing."""
    spec = rig.spec(3)
    with MemoryFleet(tmp_path / "full", _impatient(3)) as fleet:
        job = fleet.submit(spec)
        victim = _at_work(fleet, job)
        starts = _starts(victim)
        victim.disk_full = True
        fleet.run(full_s)
        victim.disk_full = False
        assert fleet.finish(job, within_s=60.0).phase == "finished"
        rig.check(fleet, job)
        assert _starts(victim) == starts, "its agent was killed"
        assert {attempt for _, attempt, _ in rig.planned(fleet, job)} == {1}
        assert fleet.adapter(job) == rig.undisturbed(tmp_path, 3, spec)


def test_an_agent_at_long_work_lives_through_a_full_disk(tmp_path: Path) -> None:
    """What it says waits behind what can't be written; the daemon neither kills it nor looks as if it hung."""
    with MemoryFleet(tmp_path, _impatient(2)) as fleet:
        fleet.daemons["dev-001"].member.behaviour.step_s = 5.0
        job = fleet.submit(rig.spec(2, count=2))
        victim = _at_work(fleet, job)
        starts = _starts(victim)
        victim.disk_full = True
        fleet.run(3 * SILENCE_S)
        assert fleet.network.now - victim.runtime.state.agent.heard_at < SILENCE_S
        assert len(victim.runtime._unsaved) < 10, "what waits grows with every word of the agent"
        victim.disk_full = False
        assert fleet.finish(job).phase == "finished"
        rig.check(fleet, job)
        assert _starts(victim) == starts


@pytest.mark.parametrize("full_s", [FULL_S, FULL_S + 0.5])
@pytest.mark.parametrize(
    "came",
    [[assignment(1), None], [assignment(1), assignment(2), None, assignment(3), None], [None, assignment(1), None]],
    ids=["withdrawn", "three works", "none before"],
)
def test_what_comes_while_the_disk_is_full_is_taken_in_its_order(
    tmp_path: Path, came: list[Assignment | None], full_s: float
) -> None:
    with MemoryFleet(tmp_path, rig.members(1)) as fleet:
        fleet.run(3.0)
        (victim,) = fleet.daemons.values()
        victim.disk_full = True
        for wanted in came:
            victim.runtime.step(ev.AssignReceived(now=fleet.network.now, assign=Assign(term=9, assignment=wanted)))
            fleet.run(0.2)
        fleet.run(full_s)
        victim.disk_full = False
        fleet.run(1.0)
        assert victim.runtime.state.journal.assignment is None, "work that was withdrawn is done"
        assert victim.phase == "idle"


def test_a_device_leaves_with_a_full_disk(tmp_path: Path) -> None:
    with MemoryFleet(tmp_path, rig.members(2)) as fleet:
        victim = _at_work(fleet, fleet.submit(rig.spec(2, count=2)))
        victim.disk_full = True
        fleet.run(FULL_S)
        assert victim.runtime._unsaved
        victim.leave()
        fleet.run_until(lambda: not victim.alive, 60.0, "the end of the daemon")


def test_a_device_whose_agent_is_gone_unheard_works_again(tmp_path: Path) -> None:
    """Whatever lost its end: to the session it is at work, and there is no process that could be killed."""
    with MemoryFleet(tmp_path, _impatient(2)) as fleet:
        job = fleet.submit(rig.spec(2, count=2))
        victim = _at_work(fleet, job)
        trainer = victim.runtime.ports.trainer
        trainer.kill("an accident")
        assert trainer.digest(AgentSpoke(_starts(victim), None)) is not None
        fleet.run(SILENCE_S / 2)
        assert victim.runtime.state.agent.status == "busy"
        assert fleet.finish(job, within_s=60.0).phase == "finished"
        rig.check(fleet, job)


def test_an_adapter_that_vanishes_before_the_training_is_told_at_once(tmp_path: Path) -> None:
    with MemoryFleet(tmp_path, rig.members(3)) as fleet:
        job = fleet.submit(rig.spec(3, count=2, quorum=0.5))
        victim = _at_work(fleet, job)
        victim.runtime.ports.trainer.kill("an accident")
        fleet.run_until(lambda: victim.runtime.state.agent.status == "absent", 30.0, "the end of its agent")
        state = victim.runtime.state
        assert state.adapter_there and state.work is not None
        victim.runtime.ports.store.blobs.remove(state.work.adapter.sha)
        fleet.run_until(lambda: victim.runtime.state.work is None, 30.0, "the end of its work")
        fleet.run(1.0)
        told = fleet.coordinator.runtime.state.fleet["dev-001"].state
        assert told is not None and told.s == victim.runtime.state.word, "not what was said before it ended"
        assert fleet.finish(job, within_s=60.0).phase == "finished"
        (failed,) = [one for one in rig.of_kind(fleet, job, rec.DeviceAnswered) if one.verdict == "failed"]
        assert (failed.device, failed.reason) == ("dev-001", "adapter: the global adapter vanished from the disk")


def test_a_device_with_a_full_disk_is_in_the_fleet_again_after_each_cut(tmp_path: Path) -> None:
    """What waits for room is not what says that it is there."""
    with MemoryFleet(tmp_path, rig.members(3)) as fleet:
        job = fleet.submit(rig.spec(3))
        victim = fleet.daemons["dev-001"]
        fleet.run_until(lambda: fleet.committed(job) == 1 and victim.phase == "training", 60.0, "training")
        victim.disk_full = True
        fleet.run(FULL_S)
        for _ in range(2):
            fleet.network.partition(["dev-001"], fleet.network.now, 60.0)
            fleet.run(150.0)
            known = fleet.coordinator.runtime.state.fleet["dev-001"]
            assert known.present and known.epoch == victim.runtime.state.epoch
            assert len(victim.runtime._unsaved) < 10
        victim.disk_full = False
        assert fleet.finish(job).phase == "finished"
        rig.check(fleet, job)
