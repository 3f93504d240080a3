"""Rounds over a bad network: every round commits, and every update counts exactly once."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from coordinator.settings import WaitSettings
from muster.testbed.memory_fleet import MemoryFleet
from muster.testbed.memory_nodes import COORDINATOR
from shared.settings import BrokerSettings
from shared.transport.memory_network import Faults
from tests.fleet import fleet_rig as rig

BAD = Faults(
    loss=0.05, drop=0.02, duplicate=0.1, reorder=0.1, delay_s=(0.01, 0.2), reorder_s=2.0, redelivery_s=3.0
)  # fmt: skip


def _cuts(fleet: MemoryFleet, seed: int) -> None:
    """Some devices are away for seconds at a time, and once the coordinator."""
    rng = random.Random(seed)
    names = sorted(fleet.daemons)
    for _ in range(12):
        fleet.network.partition(rng.sample(names, 5), rng.uniform(1, 60), rng.uniform(1, 10))
    fleet.network.partition([COORDINATOR], rng.uniform(5, 40), 8.0)


@pytest.mark.parametrize("seed", [1, *(pytest.param(more, marks=pytest.mark.slow) for more in (2, 3))])
def test_fifty_devices_on_a_bad_network_commit_every_round(tmp_path: Path, seed: int) -> None:
    """Rounds close on half of the updates: of the others each one is settled too, with its reason."""
    spec = rig.spec(50, count=5, quorum=0.5, deadline_s=60.0, min_devices=25)
    with MemoryFleet(tmp_path, rig.members(50), seed=seed, faults=BAD) as fleet:
        _cuts(fleet, seed)
        job = fleet.finish(fleet.submit(spec), within_s=900.0)
        assert (job.phase, job.committed) == ("finished", 5)
        rig.check(fleet, job.id)
        _settle(fleet)
        ends = rig.check_none_lost(fleet, job.id)
        assert ends["refused"] == 0, "a bad network makes no update wrong"


@pytest.mark.parametrize("seed", [1, *(pytest.param(more, marks=pytest.mark.slow) for more in (2, 3))])
def test_fifty_devices_that_are_waited_for_lose_no_update(tmp_path: Path, seed: int) -> None:
    """With a quorum of all and ample time every update that was trained is in its round's fold, once."""
    spec = rig.spec(50, count=5, quorum=1.0, deadline_s=600.0)
    # Nobody is given up: who is cut off is waited for.
    waits = WaitSettings(silent_s=120.0, absent_s=120.0)
    broker = BrokerSettings(keepalive_s=10, reconnect_max_s=4.0, will_delay_s=120)
    with MemoryFleet(tmp_path, rig.members(50), seed=seed, faults=BAD, waits=waits, broker=broker) as fleet:
        _cuts(fleet, seed)
        job = fleet.finish(fleet.submit(spec), within_s=900.0)
        assert (job.phase, job.committed) == ("finished", 5)
        rig.check(fleet, job.id)
        _settle(fleet)
        assert rig.check_none_lost(fleet, job.id) == {"stored": 5 * 50}
        assert [r.devices for r in rig.of_kind(fleet, job.id, rig.rec.RoundClosed)] == [sorted(fleet.daemons)] * 5
        assert [(r.round, r.attempt) for r in rig.of_kind(fleet, job.id, rig.rec.RoundPlanned)] == [
            (number, 1) for number in range(1, 6)
        ]


def _settle(fleet: MemoryFleet) -> None:
    """Run until no device works or keeps an update any more."""

    def rests() -> bool:
        return all(node.phase == "idle" for node in fleet.daemons.values())

    fleet.run_until(rests, 300.0, "rest")


def test_with_all_updates_the_network_leaves_no_trace_in_the_bytes(tmp_path: Path) -> None:
    spec = rig.spec(12)
    with MemoryFleet(tmp_path / "bad", rig.members(12), seed=7, faults=BAD) as fleet:
        fleet.network.partition(["dev-003", "dev-007"], 3.0, 6.0)
        job = fleet.finish(fleet.submit(spec), within_s=900.0)
        assert job.phase == "finished"
        rig.check(fleet, job.id)
        assert fleet.adapter(job.id) == rig.undisturbed(tmp_path, 12, spec)


def test_two_hundred_devices_that_finish_at_once_lose_no_chunk(tmp_path: Path) -> None:
    spec = rig.spec(200, count=1, model="256x64")
    # Small packets and little credit: all of them wait for their turn.
    devices = rig.members(200, model="256x64", rows=8)
    with MemoryFleet(tmp_path, devices, max_packet=1600, credit_bytes=32 * 1024) as fleet:
        job = fleet.finish(fleet.submit(spec), within_s=900.0)
        assert (job.phase, job.committed) == ("finished", 1)
        rig.check(fleet, job.id)
        (closed,) = rig.of_kind(fleet, job.id, rig.rec.RoundClosed)
        assert len(closed.devices) == 200
        assert fleet.network.broker.dropped == 0
        assert fleet.coordinator.runtime.receiver.stats.rewanted == 0, "a chunk did not come"
        assert fleet.coordinator.runtime.receiver.stats.chunks >= 4 * 200
