"""Devices with several agents in a fleet: one exact update each, whichever agent dies or hangs on the way."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import pytest

from coordinator.core import records as rec
from coordinator.core.aggregation import registry
from edge_daemon.settings import AgentSettings
from muster.testbed import least_squares
from muster.testbed.least_squares import MODULE
from muster.testbed.memory_fleet import MemoryFleet
from muster.testbed.memory_nodes import Member
from shared import adapter as adapters
from tests.fleet import fleet_rig as rig

AGENTS = AgentSettings(gpus=["GPU-1", "GPU-2"])


def _members() -> list[Member]:
    """Two devices of which the second has two GPUs."""
    return [rig.members(1)[0], rig.members(2, agent=AGENTS)[1]]


def _product(adapter: bytes) -> np.ndarray:
    part = adapters.read(adapter).factors[MODULE]
    sigma = np.ones(part.rank) if part.sigma is None else part.sigma.astype(np.float64)
    return part.scaling * (part.b.astype(np.float64) * sigma) @ part.a.astype(np.float64)


def test_two_gpus_count_as_the_mean_of_what_each_trained(tmp_path: Path) -> None:
    spec = rig.spec(2, count=1)
    # All energy kept: the aggregate is the exact weighted sum.
    spec = msgspec.structs.replace(spec, strategy=msgspec.structs.replace(spec.strategy, energy=1.0))
    with MemoryFleet(tmp_path, _members()) as fleet:
        job = fleet.submit(spec)
        assert fleet.finish(job).phase == "finished"
        rig.check(fleet, job)
        admitted = {r.device: r for r in rig.of_kind(fleet, job, rec.UpdateAdmitted)}
        assert [admitted[d].facts.agents for d in sorted(admitted)] == [1, 2]
        assert [admitted[d].facts.samples for d in sorted(admitted)] == [32, 64]
        blobs = {d: fleet.coordinator.blobs.path(one.blob.sha) for d, one in admitted.items()}
        single, double = (_product(path.read_bytes()) for _, path in sorted(blobs.items()) if path is not None)
        np.testing.assert_allclose(_product(fleet.adapter(job)), single / 3 + double * 2 / 3, atol=1e-6)
        assert np.abs(double - single).max() > 1e-3


def test_what_travels_is_coded_once(tmp_path: Path) -> None:
    """The parts are merged at full precision: the update is the code of the exact one."""
    spec = rig.spec(2, count=1)
    coded: dict[str, bytes] = {}
    for codec in ("fp32", "int8"):
        given = msgspec.structs.replace(spec, training=msgspec.structs.replace(spec.training, codec=codec))
        with MemoryFleet(tmp_path / codec, _members()) as fleet:
            job = fleet.submit(given)
            assert fleet.finish(job).phase == "finished"
            (update,) = [r.blob.sha for r in rig.of_kind(fleet, job, rec.UpdateAdmitted) if r.device == "dev-001"]
            path = fleet.coordinator.blobs.path(update)
            assert path is not None
            coded[codec] = path.read_bytes()
    assert adapters.write(adapters.read(coded["fp32"]), "int8") == coded["int8"]


def test_three_rounds_teach_the_fleet(tmp_path: Path) -> None:
    """The directions that both agents of a device took over from the global adapter are folded once."""
    with MemoryFleet(tmp_path, _members()) as fleet:
        job = fleet.submit(rig.spec(2, tmp_path / "held-out.jsonl", count=5))
        assert fleet.finish(job).phase == "finished"
        rig.check(fleet, job)
        losses = [r.metrics.loss for r in rig.of_kind(fleet, job, rec.RoundCommitted)]
    rows = least_squares.read_rows(tmp_path / "held-out.jsonl", rig.MODEL)
    untrained = float(np.mean(np.square(rows.y)))
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0] < untrained


@pytest.mark.parametrize("aggregator", sorted({*registry.names()} - {"bottleneck"}))
@pytest.mark.parametrize("step", [0, 3, 7, "merge"])
def test_an_agent_that_dies_changes_no_byte(tmp_path: Path, aggregator: str, step: int | str) -> None:
    """Before a step, or when all have trained and it is to merge."""
    spec = rig.spec(2, count=2)
    own = "full" if aggregator == "dense" else spec.strategy.name
    strategy = msgspec.structs.replace(spec.strategy, name=own, aggregator=aggregator)
    spec = msgspec.structs.replace(spec, strategy=strategy)

    def run(folder: Path, crash_at: int | str | None) -> bytes:
        with MemoryFleet(folder, _members()) as fleet:
            behaviour = fleet.daemons["dev-001"].member.behaviour
            behaviour.crash_at = crash_at if isinstance(crash_at, int) else None
            behaviour.crash_at_merge = crash_at == "merge"
            job = fleet.submit(spec)
            assert fleet.finish(job).phase == "finished"
            rig.check(fleet, job)
            assert (behaviour.crash_at, behaviour.crash_at_merge) == (None, False)
            return fleet.adapter(job)

    assert run(tmp_path / "crash", step) == run(tmp_path / "calm", None)


def test_a_hang_of_one_agent_ends_in_the_same_bytes(tmp_path: Path) -> None:
    with MemoryFleet(tmp_path / "calm", _members()) as fleet:
        job = fleet.submit(rig.spec(2, count=2))
        fleet.finish(job)
        calm = fleet.adapter(job)
    with MemoryFleet(tmp_path / "hang", _members()) as fleet:
        fleet.daemons["dev-001"].member.behaviour.hang_at = 3
        job = fleet.submit(rig.spec(2, count=2))
        assert fleet.finish(job).phase == "finished"
        rig.check(fleet, job)
        assert fleet.adapter(job) == calm


def test_a_pause_rests_all_agents_and_changes_no_byte(tmp_path: Path) -> None:
    finals = []
    for busy in (0.0, 4.0):
        with MemoryFleet(tmp_path / f"busy-{busy:.0f}", _members()) as fleet:
            node = fleet.daemons["dev-001"]
            node.member.behaviour.step_s = 1.0
            job = fleet.submit(rig.spec(2, count=1))
            fleet.run_until(lambda node=node: node.phase == "training", 60.0)  # type: ignore[misc]  # bound now
            node.member.foreign_cores = busy
            if busy:
                fleet.run_until(lambda node=node: node.phase == "paused", 20.0)  # type: ignore[misc]  # bound now
                fleet.run(30.0)
                assert node.phase == "paused", "an agent went on, or gave up"
                node.member.foreign_cores = 0.0
            assert fleet.finish(job).phase == "finished"
            rig.check(fleet, job)
            (update,) = [r for r in rig.of_kind(fleet, job, rec.UpdateAdmitted) if r.device == "dev-001"]
            assert (update.facts.paused_s >= 29.0) == bool(busy)
            finals.append(fleet.adapter(job))
    assert finals[0] == finals[1]
