"""What real runtimes write down suffices to make each plan again: by the second implementation, from the file alone."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from msgspec.structs import replace

from muster.testbed import least_squares
from muster.testbed.memory_fleet import MemoryFleet
from muster.testbed.memory_nodes import Member
from muster.testbed.memory_trainer import Behaviour
from shared.jobs import JobSpec
from tests.fleet import fleet_rig as rig
from tests.unit.second.history import read
from tests.unit.test_plans_recomputed import again, agree

MODEL = "64x48"


def _members(rng: random.Random) -> list[Member]:
    return [
        Member(
            f"dev-{number:03d}", least_squares.make_rows(MODEL, rng.choice([5, 40, 90]), number, shift=0.3),
            Behaviour(step_s=rng.choice([0.02, 0.05, 0.2]), bits=rng.choice([(4, 8), (16, 32), (32,)])),
            cores=rng.choice([0.5, 1.0, 4.0]),
        )
        for number in range(6)
    ]  # fmt: skip


def _spec(name: str) -> JobSpec:
    spec = rig.spec(6, model=MODEL, count=6, quorum=0.5, deadline_s=60.0)
    return replace(
        spec,
        strategy=replace(
            spec.strategy, name=name, rank=16, batch=8, batch_min=1, batch_max=32, warm_up_steps=9, rescore_every=3
        ),
    )


@pytest.mark.parametrize("name", ["fedpipe", "legend"])
@pytest.mark.parametrize("seed", range(2))
def test_each_plan_of_a_fleet_in_memory_is_made_again_from_its_log(tmp_path: Path, name: str, seed: int) -> None:
    rng = random.Random(seed)
    members = _members(rng)
    with MemoryFleet(tmp_path, members, seed=seed) as fleet:
        job = fleet.submit(_spec(name))
        for committed in range(1, 6):
            fleet.run_until(lambda wanted=committed: fleet.committed(job) == wanted, 300.0)  # type: ignore[misc]  # binds it
            for member in members:
                member.foreign_cores = rng.choice([0.0, 0.0, 0.5]) * member.cores
            if committed == 3:
                fleet.coordinator.kill()
                fleet.coordinator.start()
        assert fleet.finish(job).phase == "finished"
        rig.check(fleet, job)
        path = fleet.coordinator.folder / "events.sqlite"
    story = read(path)
    agree(story, again(story, name))
    plans = [one.record.plan for one in story.plans]
    assert len({tuple(work.batch for work in plan.participants.values()) for plan in plans}) > 1 or name == "legend"
