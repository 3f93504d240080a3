"""Everything at once, drawn from a seed: a bad network, cuts, and kills of any node at any time."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from muster.testbed.memory_fleet import MemoryFleet
from shared.transport.memory_network import Faults
from tests.fleet import fleet_rig as rig

BAD = Faults(loss=0.05, drop=0.01, duplicate=0.05, reorder=0.1, delay_s=(0.01, 0.1), reorder_s=1.0, redelivery_s=2.0)


@pytest.mark.parametrize("seed", range(6))
def test_whatever_happens_the_bytes_are_the_same(tmp_path: Path, seed: int) -> None:
    spec = rig.spec(5, count=4, deadline_s=120.0)
    rng = random.Random(seed)
    with MemoryFleet(tmp_path / "chaos", rig.members(5, step_s=0.2), seed=seed, faults=BAD) as fleet:
        job = fleet.submit(spec)
        fleet.run(1.0)
        for _ in range(12):
            node = rng.choice([fleet.coordinator, *fleet.daemons.values()])
            match rng.randrange(4):
                case 0:
                    fleet.network.partition([node.client_id], fleet.network.now, rng.uniform(0.5, 20.0))
                case 1:
                    fleet.network.crash_broker(rng.uniform(0.1, 3.0), keep=rng.random() < 0.5)
                case _:
                    node.restart(rng.uniform(0.1, 10.0))
            fleet.run(rng.uniform(0.1, 6.0))
        fleet.run(12.0)
        found = fleet.finish(job, within_s=1500.0)
        assert (found.phase, found.committed) == ("finished", 4), fleet.describe(job)
        rig.check(fleet, job)
        assert fleet.adapter(job) == rig.undisturbed(tmp_path, 5, spec)
