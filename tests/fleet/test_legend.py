"""The strategy `legend` in a fleet of real runtimes, over the test agent's one block."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np

from coordinator.core import records as rec
from coordinator.core.planning.legend import LegendPlanner
from coordinator.core.planning.reasons import PATTERN
from muster.testbed import least_squares
from muster.testbed.memory_fleet import MemoryFleet
from shared.jobs import JobSpec
from tests.fleet import fleet_rig as rig


def _spec(folder: Path) -> JobSpec:
    spec = rig.spec(4, folder / "held-out.jsonl", count=4)
    return msgspec.structs.replace(spec, strategy=msgspec.structs.replace(spec.strategy, name="legend"))


def test_a_fleet_learns_by_legend(tmp_path: Path) -> None:
    with MemoryFleet(tmp_path / "fleet", rig.members(4)) as fleet:
        job = fleet.submit(_spec(tmp_path))
        found = fleet.finish(job)
        assert found.phase == "finished"
        rig.check(fleet, job)
        assert isinstance(found.planner, LegendPlanner)
        # The data are a few rows and the model is tiny: times are learned, its link is not.
        assert {name: seen.rounds for name, seen in found.planner.times.devices.items()} == {
            f"dev-{number:03d}": 4 for number in range(4)
        }
        for record in rig.of_kind(fleet, job, rec.RoundPlanned):
            assert "coverage" not in record.plan.reason and "waiting" in record.plan.reason
            for work in record.plan.participants.values():
                assert work.ranks == {least_squares.MODULE: 4}
                assert {"rank", "depth", "batch", "bits", "steps"} <= work.reasons.keys()
                assert all(PATTERN.fullmatch(text) for text in work.reasons.values())
        losses = [record.metrics.loss for record in rig.of_kind(fleet, job, rec.RoundCommitted)]
    rows = least_squares.read_rows(tmp_path / "held-out.jsonl", rig.MODEL)
    assert losses[-1] < losses[0] < float(np.mean(np.square(rows.y)))


def test_a_killed_coordinator_goes_on_with_what_legend_had_learned(tmp_path: Path) -> None:
    spec = _spec(tmp_path)
    with MemoryFleet(tmp_path / "calm", rig.members(4)) as fleet:
        job = fleet.submit(spec)
        calm = fleet.finish(job)
        wanted = fleet.adapter(job)
    with MemoryFleet(tmp_path / "killed", rig.members(4)) as fleet:
        job = fleet.submit(spec)
        fleet.run_until(lambda: fleet.committed(job) == 2, 300.0, "the second round")
        before = fleet.job(job)
        assert before is not None
        fleet.coordinator.kill()
        fleet.coordinator.start()
        fleet.run_until(lambda: fleet.job(job) is not None, 30.0, "the replay")
        after = fleet.job(job)
        assert after is not None and after.planner == before.planner
        assert fleet.finish(job).phase == calm.phase == "finished"
        rig.check(fleet, job)
        assert fleet.adapter(job) == wanted
