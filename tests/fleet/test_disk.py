"""Full disks: nothing is lost, nothing counts twice, and work goes on as soon as there is room."""

from __future__ import annotations

from pathlib import Path

import pytest

from coordinator.core import records as rec
from muster.testbed.memory_fleet import MemoryFleet
from tests.fleet import fleet_rig as rig

FULL_S = 8.0


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
