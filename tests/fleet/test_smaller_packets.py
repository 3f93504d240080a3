"""A broker that comes back with a smaller limit of its packets, and questions that were asked by the former one."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from muster.testbed.memory_fleet import MemoryFleet
from muster.testbed.memory_nodes import DaemonNode
from shared import topics
from shared.codec import pack
from shared.messages import Want
from shared.transport.base import Outgoing
from tests.fleet import fleet_rig as rig

MODEL = "256x64"
VICTIM = "dev-001"
LARGE, SMALL = 4096 + 4096, 4096 + 1024
"""Packets: their chunks are 4 KiB and 1 KiB."""


def _offering(fleet: MemoryFleet, job: str) -> DaemonNode:
    """Up to a device whose update of the second round is on its way, slowly."""
    victim = fleet.daemons[VICTIM]
    fleet.run_until(lambda: fleet.committed(job) == 1 and victim.phase == "training", 60.0, "training")
    fleet.network.rate = lambda client, way: 400.0 if (client, way) == (VICTIM, "up") else math.inf
    fleet.run_until(lambda: victim.phase == "offering", 60.0, "the offer")
    return victim


def _ask(fleet: MemoryFleet, want: Want) -> None:
    """As the broker does with what it kept for the device."""
    name = topics.DOWN_BLOB.name("memory", device=VICTIM)
    transport = fleet.daemons["dev-000"].runtime.ports.transport
    fleet.network.flush(transport, [Outgoing(topics.DOWN_BLOB, name, pack(want))])


def _orders(fleet: MemoryFleet) -> int:
    """How often the victim began to train for the second round."""
    return len([work for work, _ in fleet.history.ordered if (work.device, work.round) == (VICTIM, 2)])


@pytest.mark.parametrize("ranges", [(0, 1), (0, 1000)], ids=["too large", "too large and beyond the end"])
def test_an_update_that_is_asked_for_by_the_former_limit_is_not_lost(tmp_path: Path, ranges: tuple[int, int]) -> None:
    spec = rig.spec(2, count=2, model=MODEL)
    with MemoryFleet(tmp_path, rig.members(2, model=MODEL), max_packet=LARGE) as fleet:
        job = fleet.submit(spec)
        victim = _offering(fleet, job)
        (offer,) = victim.runtime.state.journal.outbox
        fleet.network.max_packet = SMALL
        fleet.network.crash_broker(2.0)
        fleet.run(8.0)
        assert victim.runtime.sender.max_chunk < offer.size
        _ask(fleet, Want(sha=offer.sha, chunk=4096, ranges=[ranges]))
        fleet.run(1.0)
        assert _orders(fleet) == 1, "the update was taken as lost"
        fleet.network.rate = lambda _client, _way: math.inf
        assert fleet.finish(job).phase == "finished"
        rig.check(fleet, job)
        assert rig.check_none_lost(fleet, job) == {"stored": 4}
        assert {attempt for _, attempt, _ in rig.planned(fleet, job)} == {1}


def test_an_update_that_is_asked_for_beyond_its_end_is_not_lost(tmp_path: Path) -> None:
    with MemoryFleet(tmp_path, rig.members(2, model=MODEL), max_packet=LARGE) as fleet:
        job = fleet.submit(rig.spec(2, count=2, model=MODEL))
        victim = _offering(fleet, job)
        (offer,) = victim.runtime.state.journal.outbox
        _ask(fleet, Want(sha=offer.sha, chunk=1024, ranges=[(1000, 1)]))
        fleet.run(1.0)
        assert _orders(fleet) == 1
        assert fleet.finish(job).phase == "finished"
        rig.check(fleet, job)
        assert rig.check_none_lost(fleet, job) == {"stored": 4}


def test_an_update_whose_file_is_gone_is_trained_again(tmp_path: Path) -> None:
    with MemoryFleet(tmp_path, rig.members(2, model=MODEL), max_packet=LARGE) as fleet:
        job = fleet.submit(rig.spec(2, count=2, model=MODEL))
        victim = _offering(fleet, job)
        (offer,) = victim.runtime.state.journal.outbox
        victim.runtime.ports.store.blobs.remove(offer.sha)
        _ask(fleet, Want(sha=offer.sha, chunk=1024, ranges=[(0, 1)]))
        fleet.run(1.0)
        assert _orders(fleet) == 2
