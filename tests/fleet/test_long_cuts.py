"""Downloads that are cut for longer than a receiver waits for chunks: they go on where they were."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from coordinator.core.release_records import Canaries
from coordinator.settings import WaitSettings
from muster.testbed.memory_fleet import MemoryFleet
from muster.testbed.memory_nodes import COORDINATOR
from shared.settings import BrokerSettings
from tests.fleet import fleet_rig as rig
from tests.fleet import release_rig as rel

MODEL = "256x64"
VICTIM = "dev-001"
CUT_S = 1200.0
"""Longer than `BlobReceiver` keeps a pull without a chunk."""
CHUNK = 1024
"""Bytes; a content has several."""


def _fleet(root: Path) -> MemoryFleet:
    """Two devices that are waited for however long they are away; contents travel in small chunks."""
    waits = WaitSettings(silent_s=4 * CUT_S, absent_s=4 * CUT_S)
    broker = BrokerSettings(keepalive_s=10, reconnect_max_s=4.0, will_delay_s=int(4 * CUT_S))
    return MemoryFleet(root, rig.members(2, model=MODEL), waits=waits, broker=broker, max_packet=4096 + CHUNK)


def _slow(fleet: MemoryFleet, bytes_per_s: float) -> None:
    """The victim's link down."""
    fleet.network.rate = lambda client, way: bytes_per_s if (client, way) == (VICTIM, "down") else math.inf


def _chunks(fleet: MemoryFleet) -> int:
    """How many the victim has taken."""
    return fleet.daemons[VICTIM].runtime.receiver.stats.chunks


def _in_the_middle_of_the_adapter(fleet: MemoryFleet) -> str:
    """Up to a victim that has part of the second round's adapter."""
    job = fleet.submit(rig.spec(2, count=2, model=MODEL, deadline_s=8 * CUT_S))
    fleet.run_until(lambda: fleet.committed(job) == 1, 60.0, "the first round")
    _slow(fleet, 1500.0)
    before = _chunks(fleet)
    fleet.run_until(lambda: _chunks(fleet) > before + 1, 60.0, "the first chunks")
    assert fleet.daemons[VICTIM].phase == "fetching"
    return job


def test_an_adapter_is_fetched_after_a_long_cut(tmp_path: Path) -> None:
    with _fleet(tmp_path / "cut") as fleet:
        job = _in_the_middle_of_the_adapter(fleet)
        before = _chunks(fleet)
        fleet.network.partition([VICTIM], fleet.network.now, CUT_S)
        fleet.run(CUT_S - 10.0)
        assert fleet.daemons[VICTIM].phase == "fetching"
        assert fleet.daemons[VICTIM].runtime.ports.store.blobs.parts(), "what had come is gone"
        fleet.run(60.0)
        _slow(fleet, math.inf)
        assert fleet.finish(job, within_s=120.0).phase == "finished"
        size = len(fleet.adapter(job))
        assert _chunks(fleet) - before < math.ceil(size / CHUNK), "all of it was fetched anew"
        rig.check(fleet, job)
        assert {attempt for _, attempt, _ in rig.planned(fleet, job)} == {1}


def test_an_adapter_is_fetched_where_the_coordinators_chunks_do_not_come_for_long(tmp_path: Path) -> None:
    """Both are connected all the while, and the coordinator hears what it is asked for."""
    with _fleet(tmp_path / "mute") as fleet:
        job = _in_the_middle_of_the_adapter(fleet)
        fleet.network.deny = lambda client, name: client == COORDINATOR and "/chunk/" in name
        fleet.run(CUT_S)
        assert fleet.daemons[VICTIM].phase == "fetching"
        fleet.network.deny = lambda _client, _name: False
        _slow(fleet, math.inf)
        assert fleet.finish(job, within_s=180.0).phase == "finished"
        rig.check(fleet, job)


def test_a_release_is_fetched_after_a_long_cut(tmp_path: Path) -> None:
    with _fleet(tmp_path / "cut") as fleet:
        job = rel.trained(fleet, 2, model=MODEL, count=1)
        _slow(fleet, 700.0)
        before = _chunks(fleet)
        release = rel.start(fleet, job, canaries=Canaries(devices=["dev-000"]))
        fleet.run_until(lambda: _chunks(fleet) > before + 1, 200.0, "the first chunks")
        assert fleet.daemons[VICTIM].runtime.state.journal.rollout.stage == "wanted"
        fleet.network.partition([VICTIM], fleet.network.now, CUT_S)
        fleet.run(CUT_S + 30.0)
        _slow(fleet, math.inf)
        fleet.run(120.0)
        assert rel.in_use(fleet)[VICTIM] == release


@pytest.mark.parametrize("restarted", [False, True])
def test_nothing_is_asked_for_while_there_is_no_broker(tmp_path: Path, restarted: bool) -> None:
    """It would all be sent at once when the broker is back."""
    with _fleet(tmp_path / "cut") as fleet:
        job = _in_the_middle_of_the_adapter(fleet)
        victim = fleet.daemons[VICTIM]
        fleet.network.partition([VICTIM], fleet.network.now, CUT_S)
        if restarted:
            victim.restart(1.0)
        fleet.run(60.0)
        assert victim.phase == "fetching"
        assert victim.runtime.receiver.outstanding == 0
        fleet.run(CUT_S)
        _slow(fleet, math.inf)
        assert fleet.finish(job, within_s=120.0).phase == "finished"
        rig.check(fleet, job)
