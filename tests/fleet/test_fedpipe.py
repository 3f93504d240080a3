"""The strategy `fedpipe` in a whole fleet in memory: scores come home, and the next round rests on them."""

from __future__ import annotations

from pathlib import Path

import msgspec

from coordinator.core import records as rec
from coordinator.web import history
from muster.testbed.least_squares import MODULE
from muster.testbed.memory_fleet import MemoryFleet
from shared import jobs
from tests.fleet import fleet_rig as rig


def _spec(devices: int, held_out: Path | None = None, **rounds: int) -> jobs.JobSpec:
    spec = rig.spec(devices, held_out, **rounds)
    strategy = msgspec.structs.replace(spec.strategy, name="fedpipe", warm_up_steps=8, rescore_every=3)
    return msgspec.structs.replace(spec, strategy=strategy)


def test_scores_come_home_and_the_next_rounds_rest_on_them(tmp_path: Path) -> None:
    spec = _spec(3, tmp_path / "held-out.jsonl", count=5)
    with MemoryFleet(tmp_path, rig.members(3)) as fleet:
        job = fleet.finish(fleet.submit(spec))
        assert job.phase == "finished"
        rig.check(fleet, job.id)
        plans = [record.plan for record in rig.of_kind(fleet, job.id, rec.RoundPlanned)]
        assert [all(work.score for work in plan.participants.values()) for plan in plans] == [
            True, False, False, True, False
        ]  # fmt: skip
        admitted = rig.of_kind(fleet, job.id, rec.UpdateAdmitted)
        assert [record.facts.importance for record in admitted if record.round == 1] == [{MODULE: 1.0}] * 3
        assert [record.facts.importance for record in admitted if record.round == 2] == [{}] * 3
        view = history.job_view(fleet.records(job.id), job)
        assert [round.weights.scored for round in view.rounds if round.weights] == [0, 1, 1, 1, 4]
        assert view.rounds[1].weights is not None and view.rounds[1].weights.scores == {MODULE: 1.0}
        losses = [round.metrics.loss for round in view.rounds if round.metrics]
        assert len(losses) == 5 and losses[-1] < losses[0] < view.baseline.loss  # type: ignore[union-attr]  # it has one


def test_a_killed_coordinator_plans_as_it_would_have(tmp_path: Path) -> None:
    """Its scores are learned again from the log."""
    whole = rig.undisturbed(tmp_path, 2, _spec(2, count=4))
    with MemoryFleet(tmp_path / "killed", rig.members(2)) as fleet:
        job = fleet.submit(_spec(2, count=4))
        for done in (1, 3):
            fleet.run_until(lambda done=done: fleet.committed(job) == done, 600.0)  # type: ignore[misc]  # binds it
            fleet.coordinator.kill()
            fleet.run(5.0)
            fleet.coordinator.start()
        assert fleet.finish(job).phase == "finished"
        rig.check(fleet, job)
        assert fleet.adapter(job) == whole
