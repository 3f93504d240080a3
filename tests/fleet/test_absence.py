"""Devices that die or leave, wills that come late, a broker that restarts with or without its memory."""

from __future__ import annotations

from pathlib import Path

import pytest

from coordinator.core import records as rec
from muster.testbed.memory_fleet import MemoryFleet
from shared import topics
from shared.codec import pack
from shared.messages import DeviceState
from shared.transport.base import Outgoing
from tests.fleet import fleet_rig as rig

WAIT_S = 15.0
"""How long a fleet waits for a device that is gone."""


def _training(fleet: MemoryFleet, device: str = "dev-000", round: int = 1) -> None:
    def there() -> bool:
        journal = fleet.daemons[device].runtime.state.journal
        work = journal.assignment
        return fleet.daemons[device].phase == "training" and work is not None and work.round >= round

    fleet.run_until(there, 60.0, f"{device} at work")
    fleet.run(0.1)


def _closes(fleet: MemoryFleet, job: str) -> int:
    return len(rig.of_kind(fleet, job, rec.RoundClosed))


@pytest.mark.parametrize("end", ["kill", "leave"])
def test_a_device_that_is_gone_ends_its_wait(tmp_path: Path, end: str) -> None:
    with MemoryFleet(tmp_path, rig.members(3, step_s=0.5)) as fleet:
        job = fleet.submit(rig.spec(2, quorum=0.5, count=2))
        _training(fleet)
        fleet.run(3.0)
        victim, at = fleet.daemons["dev-000"], fleet.network.now
        # The others are done within 4 s: after that only the dead device is waited for.
        victim.kill() if end == "kill" else victim.leave()
        if end == "leave":
            fleet.run_until(lambda: not victim.alive, WAIT_S, "the end of the daemon")
            victim.member.behaviour.step_s = 0.01
        fleet.run_until(lambda: fleet.committed(job) == 1, WAIT_S, "the commit without the dead device")
        assert fleet.network.now - at <= WAIT_S
        found = fleet.finish(job)
        assert found.phase == "finished"
        rig.check(fleet, job)
        first = rig.of_kind(fleet, job, rec.RoundClosed)[0]
        assert {"dev-001", "dev-002"} <= set(first.devices)


def test_partial_work_of_a_device_that_leaves_counts(tmp_path: Path) -> None:
    with MemoryFleet(tmp_path, rig.members(3, step_s=0.5)) as fleet:
        job = fleet.submit(rig.spec(3, quorum=0.5, count=1, min_devices=2))
        fleet.daemons["dev-001"].member.behaviour.step_s = 3.0
        _training(fleet)
        fleet.run(2.0)
        fleet.daemons["dev-000"].leave()
        fleet.run_until(lambda: not fleet.daemons["dev-000"].alive, 10.0, "the end of the daemon")
        fleet.daemons["dev-000"].start()  # as after an update of the package
        assert fleet.finish(job).phase == "finished"
        facts = {r.device: r.facts for r in rig.of_kind(fleet, job, rec.UpdateAdmitted)}
        assert facts["dev-000"].ended == "drain"
        assert 0 < facts["dev-000"].samples < facts["dev-002"].samples
        rig.check(fleet, job)


def test_an_update_that_comes_late_counts_until_the_close(tmp_path: Path) -> None:
    """A device is cut off for longer than the fleet waits for it, while another is still at work."""
    with MemoryFleet(tmp_path, rig.members(2)) as fleet:
        job = fleet.submit(rig.spec(2, quorum=0.5, count=1))
        fleet.daemons["dev-001"].member.behaviour.step_s = 5.0  # 40 s of work keep the round open
        fleet.daemons["dev-000"].member.behaviour.step_s = 0.5
        _training(fleet)
        fleet.network.partition(["dev-000"], fleet.network.now, 20.0)
        fleet.run(16.0)
        state = fleet.coordinator.runtime.state
        known = state.fleet["dev-000"]
        assert fleet.network.now - known.heard_at > state.waits.silent_s, "it does not count as silent"
        assert fleet.history.admitted == []
        assert fleet.finish(job).phase == "finished"
        (closed,) = rig.of_kind(fleet, job, rec.RoundClosed)
        assert closed.devices == ["dev-000", "dev-001"]
        rig.check(fleet, job)


def test_an_update_after_the_close_is_late_and_forgotten(tmp_path: Path) -> None:
    with MemoryFleet(tmp_path, rig.members(3)) as fleet:
        job = fleet.submit(rig.spec(2, quorum=0.5, count=1, deadline_s=20.0))
        slow = fleet.daemons["dev-000"]
        slow.member.behaviour.step_s = 4.0
        assert fleet.finish(job).phase == "finished"
        (closed,) = rig.of_kind(fleet, job, rec.RoundClosed)
        assert closed.devices == ["dev-001", "dev-002"]
        fleet.run(40.0)
        assert slow.phase == "idle"
        assert slow.runtime.state.journal.outbox == ()
        rig.check(fleet, job)


def test_a_forgotten_device_leaves_nothing_at_the_broker(tmp_path: Path) -> None:
    """In the middle of a round, which closes with the others; one that was not stopped comes back."""
    with MemoryFleet(tmp_path, rig.members(3, step_s=0.5)) as fleet:
        job = fleet.submit(rig.spec(2, quorum=0.5, count=2, min_devices=2))
        _training(fleet)
        gone, alive = fleet.daemons["dev-000"], fleet.daemons["dev-001"]
        gone.leave()
        fleet.run_until(lambda: not gone.alive, 10.0, "the end of the daemon")
        fleet.coordinator.runtime.forget("dev-000")
        fleet.run(1.0)
        names = [topic.name("memory", device="dev-000") for topic in (topics.STATE, topics.INFO, topics.ASSIGN)]
        assert [fleet.network.broker.retained(name) for name in names] == [b"", b"", b""]
        assert "dev-000" not in fleet.coordinator.runtime.state.fleet
        fleet.coordinator.runtime.forget("dev-001")
        fleet.run(15.0)
        assert fleet.coordinator.runtime.state.fleet["dev-001"].present, "it runs, and protests"
        assert alive.alive
        assert fleet.finish(job).phase == "finished"
        rig.check(fleet, job)


def test_the_will_of_a_former_connection_does_not_bury_a_living_device(tmp_path: Path) -> None:
    with MemoryFleet(tmp_path, rig.members(2, step_s=0.5)) as fleet:
        job = fleet.submit(rig.spec(2, count=1))
        _training(fleet)
        epoch = fleet.daemons["dev-000"].runtime.state.epoch
        name = topics.STATE.name("memory", device="dev-000")
        _publish(fleet, name, DeviceState(s="lost", epoch=epoch - 1))
        fleet.run(1.0)
        assert fleet.coordinator.runtime.state.fleet["dev-000"].present
        _publish(fleet, name, DeviceState(s="lost", epoch=epoch))  # of this very connection: it must protest
        fleet.run(1.0)
        known = fleet.coordinator.runtime.state.fleet["dev-000"]
        assert known.present
        assert fleet.finish(job).phase == "finished"
        rig.check(fleet, job)


def _publish(fleet: MemoryFleet, name: str, state: DeviceState) -> None:
    """As the broker does with a will."""
    fleet.network.flush(_any_transport(fleet), [Outgoing(topics.STATE, name, pack(state))])


def _any_transport(fleet: MemoryFleet) -> object:
    return fleet.daemons["dev-001"].runtime.ports.transport


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("phase", ["fetching", "training", "offering"])
def test_the_round_goes_on_after_a_crash_of_the_broker(tmp_path: Path, phase: str, keep: bool) -> None:
    spec = rig.spec(4)
    with MemoryFleet(tmp_path / "broker", rig.members(4), seed=5) as fleet:
        job = fleet.submit(spec)
        victim = fleet.daemons["dev-002"]
        fleet.run_until(lambda: fleet.committed(job) == 1 and victim.phase == phase, 60.0, phase)
        fleet.network.crash_broker(3.0, keep=keep)
        found = fleet.finish(job, within_s=300.0)
        assert found.phase == "finished"
        rig.check(fleet, job)
        assert {attempt for _, attempt, _ in rig.planned(fleet, job)} == {1}
        known = fleet.coordinator.runtime.state.fleet
        assert all(presence.able for presence in known.values())
        assert {name: node.runtime.state.epoch for name, node in fleet.daemons.items()} == {
            name: presence.epoch for name, presence in known.items()
        }
        assert fleet.adapter(job) == rig.undisturbed(tmp_path, 4, spec)
