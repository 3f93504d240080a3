"""Work that ends before its last step counts by the samples that were really trained."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np

from coordinator.core import records as rec
from muster.testbed.least_squares import MODULE
from muster.testbed.memory_fleet import MemoryFleet
from shared import adapter as adapters
from shared.adapter import Factors
from tests.fleet import fleet_rig as rig


def _product(part: Factors) -> np.ndarray:
    sigma = np.ones(part.rank) if part.sigma is None else part.sigma.astype(np.float64)
    return part.scaling * (part.b.astype(np.float64) * sigma) @ part.a.astype(np.float64)


def test_a_slow_device_counts_by_its_samples(tmp_path: Path) -> None:
    spec = rig.spec(2, count=1, train_for_s=2.0, local_steps=20)
    # All energy kept: the aggregate is the exact weighted sum.
    spec = msgspec.structs.replace(spec, strategy=msgspec.structs.replace(spec.strategy, energy=1.0))
    with MemoryFleet(tmp_path, rig.members(2)) as fleet:
        fleet.daemons["dev-001"].member.behaviour.step_s = 0.5
        job = fleet.submit(spec)
        assert fleet.finish(job).phase == "finished"
        rig.check(fleet, job)
        admitted = {r.device: r for r in rig.of_kind(fleet, job, rec.UpdateAdmitted)}
        fast, slow = admitted["dev-000"], admitted["dev-001"]
        assert (fast.facts.ended, fast.facts.samples) == ("complete", 80)
        assert slow.facts.ended == "time"
        assert 0 < slow.facts.samples <= 16
        total = fast.facts.samples + slow.facts.samples
        expected = sum(one.facts.samples / total * _product(_factors(fleet, one.blob.sha)) for one in (fast, slow))
        made = _product(adapters.read(fleet.adapter(job)).factors[MODULE])
        np.testing.assert_allclose(made, expected, atol=1e-6)
        assert np.abs(expected).max() > 1e-3


def test_a_first_round_ends_with_its_half(tmp_path: Path) -> None:
    """No speed is known yet, and one device is a hundred times slower than it looks."""
    spec = rig.spec(4, count=2, local_steps=20)
    spec = msgspec.structs.replace(spec, strategy=msgspec.structs.replace(spec.strategy, name="legend"))
    with MemoryFleet(tmp_path, rig.members(4)) as fleet:
        fast = fleet.daemons["dev-000"].member.behaviour.step_s
        fleet.daemons["dev-003"].member.behaviour.step_s = 100 * fast
        job = fleet.submit(spec)
        assert fleet.finish(job).phase == "finished"
        rig.check(fleet, job)
        admitted = {(r.round, r.device): r.facts for r in rig.of_kind(fleet, job, rec.UpdateAdmitted)}
        for number in (1, 2):
            slow, others = admitted[number, "dev-003"], [admitted[number, f"dev-00{n}"] for n in range(3)]
            assert slow.ended == "time" and 1 <= slow.steps <= 2
            assert all(one.steps >= (20 if number == 1 else 19) for one in others), "the second has a time for each"


def _factors(fleet: MemoryFleet, sha: str) -> Factors:
    path = fleet.coordinator.blobs.path(sha)
    assert path is not None
    return adapters.read(path.read_bytes()).factors[MODULE]


def test_memory_that_does_not_suffice_halves_the_batch(tmp_path: Path) -> None:
    with MemoryFleet(tmp_path, rig.members(2)) as fleet:
        fleet.daemons["dev-001"].member.behaviour.fits = 1
        job = fleet.submit(rig.spec(2, count=1))
        assert fleet.finish(job).phase == "finished"
        facts = {r.device: r.facts for r in rig.of_kind(fleet, job, rec.UpdateAdmitted)}
        assert (facts["dev-001"].batch, facts["dev-001"].batch_limit, facts["dev-001"].samples) == (1, 1, 8)
        rig.check(fleet, job)


def test_a_device_where_not_even_one_sample_fits_says_so(tmp_path: Path) -> None:
    with MemoryFleet(tmp_path, rig.members(3)) as fleet:
        fleet.daemons["dev-001"].member.behaviour.fits = 0
        job = fleet.submit(rig.spec(2, count=1, quorum=0.6))
        assert fleet.finish(job).phase == "finished"
        (answer,) = rig.of_kind(fleet, job, rec.DeviceAnswered)
        assert (answer.device, answer.verdict, answer.out_of_memory, answer.batch_limit) == (
            "dev-001",
            "failed",
            True,
            0,
        )
        assert "memory" in answer.reason


def test_an_agent_that_crashes_or_hangs_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    spec = rig.spec(3, count=2)
    with MemoryFleet(tmp_path / "agents", rig.members(3, agent=_impatient())) as fleet:
        fleet.daemons["dev-000"].member.behaviour.crash_at = 5
        fleet.daemons["dev-001"].member.behaviour.hang_at = 3
        job = fleet.submit(spec)
        assert fleet.finish(job).phase == "finished"
        rig.check(fleet, job)
        assert {attempt for _, attempt, _ in rig.planned(fleet, job)} == {1}
        assert fleet.adapter(job) == rig.undisturbed(tmp_path, 3, spec)


def test_an_agent_that_always_dies_ends_the_work_as_failed(tmp_path: Path) -> None:
    with MemoryFleet(tmp_path, rig.members(3)) as fleet:
        behaviour = fleet.daemons["dev-000"].member.behaviour
        behaviour.crash_at, behaviour.every_time = 1, True
        job = fleet.submit(rig.spec(3, count=1, quorum=0.6))
        assert fleet.finish(job).phase == "finished"
        (answer,) = rig.of_kind(fleet, job, rec.DeviceAnswered)
        assert (answer.device, answer.verdict) == ("dev-000", "failed")
        assert "died 3 times" in answer.reason
        rig.check(fleet, job)


def _impatient() -> object:
    from edge_daemon.settings import AgentSettings

    return AgentSettings(silence_s=5.0)


def test_foreign_load_pauses_and_does_not_refuse(tmp_path: Path) -> None:
    with MemoryFleet(tmp_path, rig.members(2)) as fleet:
        member = fleet.daemons["dev-000"].member
        member.foreign_cores = member.cores
        job = fleet.submit(rig.spec(2, count=1))
        fleet.run_until(lambda: fleet.daemons["dev-000"].phase == "paused", 60.0, "the pause")
        fleet.run(10.0)
        assert fleet.coordinator.runtime.state.fleet["dev-000"].load.paused.startswith("foreign load")
        member.foreign_cores = 0.0
        assert fleet.finish(job).phase == "finished"
        assert rig.of_kind(fleet, job, rec.DeviceAnswered) == []
        facts = {r.device: r.facts for r in rig.of_kind(fleet, job, rec.UpdateAdmitted)}
        assert facts["dev-000"].paused_s > 9.0
        rig.check(fleet, job)
