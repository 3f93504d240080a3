"""Releases over the in-memory network: canaries first, then the rest; or back, with the rest untouched."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from coordinator.core import events as ev
from coordinator.core.release_records import Canaries
from coordinator.web.refusals import Conflict
from edge_daemon import protocol
from muster.testbed import least_squares, least_squares_release
from muster.testbed.least_squares import Rows
from muster.testbed.memory_fleet import MemoryFleet
from muster.testbed.memory_nodes import DATASET
from shared import topics
from tests.fleet import fleet_rig as rig
from tests.fleet import release_rig as rel

FOUR = ("dev-000", "dev-001", "dev-002", "dev-003")


def test_a_good_release_goes_to_the_canary_then_to_the_rest(tmp_path: Path) -> None:
    with MemoryFleet(tmp_path, rig.members(4)) as fleet:
        job = rel.trained(fleet, 4)
        release = rel.start(fleet, job, canaries=Canaries(share=0.25, seed=3))
        fleet.run_until(lambda: rel.found(fleet, release).phase == "rest", 60.0, "the rest")
        (canary,) = rel.found(fleet, release).chosen
        assert rel.in_use(fleet) == {name: release if name == canary else "" for name in FOUR}
        done = rel.ended(fleet, release)
        assert (done.phase, done.reason) == ("finished", "4 committed")
        assert rel.in_use(fleet) == dict.fromkeys(FOUR, release)
        assert rel.told(fleet, release)[canary] == ["active", "committed"]
        for name in FOUR:
            part = done.parts[name]
            assert part.before is not None and part.after is not None
            assert part.after.loss < part.before.loss, "trained for it, and no better than nothing"
            rows = fleet.daemons[name].member.rows
            assert rel.loss(fleet, name) < 0.95 * float(np.mean(np.square(rows.y)))
        rel.check(fleet, release)
        folder = fleet.daemons[canary].folder / "releases" / release
        assert rel.paths(folder) == ["README.md", "adapter_config.json", "adapter_model.safetensors", "muster.json"]


def test_the_same_seed_draws_the_same_canaries(tmp_path: Path) -> None:
    with MemoryFleet(tmp_path, rig.members(4)) as fleet:
        job = rel.trained(fleet, 4)
        drawn = []
        for seed in (1, 1, 2, 3, 4):
            release = rel.start(fleet, job, canaries=Canaries(count=2, seed=seed))
            rel.ended(fleet, release)
            drawn.append(rel.found(fleet, release).chosen)
    assert drawn[0] == drawn[1]
    assert len(set(drawn)) > 1


def test_a_worse_release_is_stopped_by_the_canaries_and_the_rest_is_untouched(tmp_path: Path) -> None:
    with MemoryFleet(tmp_path, rig.members(4)) as fleet:
        job = rel.trained(fleet, 4)
        first = rel.start(fleet, job)
        assert rel.ended(fleet, first).phase == "finished"
        bad = rel.start_of(fleet, job, rel.spoiled(fleet, job), canaries=Canaries(devices=["dev-000", "dev-002"]))
        done = rel.ended(fleet, bad)
        assert done.phase == "rolled_back"
        assert "stopped by a canary: dev-000: worse here: loss" in done.reason
        assert rel.in_use(fleet) == dict.fromkeys(FOUR, first)
        assert set(rel.told(fleet, bad)) <= {"dev-000", "dev-002"}, "a device beyond the canaries heard of it"
        for name in ("dev-001", "dev-003"):
            assert fleet.daemons[name].runtime.state.journal.rollout.wanted.id == first
            assert not (fleet.daemons[name].folder / "releases" / bad).exists()
        rel.check(fleet, bad)


def test_one_failing_canary_takes_it_from_the_others(tmp_path: Path) -> None:
    """On dev-000 it looks fine and is put in place; dev-001 can't load it."""
    members = rig.members(3)
    members[1].behaviour.evaluate_s = 5.0
    members[1].behaviour.measured = lambda order, said: (
        protocol.Unfit(release=order.release, kind="load", reason="no such tensor") if order.previous else said
    )
    with MemoryFleet(tmp_path, members) as fleet:
        job = rel.trained(fleet, 3)
        first = rel.start(fleet, job)
        assert rel.ended(fleet, first).phase == "finished"
        second = rel.start(fleet, job, canaries=Canaries(devices=["dev-000", "dev-001"]))
        fleet.run_until(lambda: rel.in_use(fleet)["dev-000"] == second, 60.0, "the first canary")
        done = rel.ended(fleet, second)
        assert (done.phase, done.reason) == ("rolled_back", "stopped by a canary: dev-001: no such tensor")
        assert rel.told(fleet, second) == {"dev-000": ["active", "returned"], "dev-001": ["failed"]}
        assert rel.in_use(fleet) == dict.fromkeys(FOUR[:3], first)
        rel.check(fleet, second)


def test_a_canary_that_falls_silent_stops_it(tmp_path: Path) -> None:
    with MemoryFleet(tmp_path, rig.members(3)) as fleet:
        job = rel.trained(fleet, 3)
        release = rel.start(fleet, job, canaries=Canaries(devices=["dev-001"]))
        fleet.daemons["dev-001"].kill()
        fleet.run(rel.DEADLINE_S - 20.0)
        assert rel.found(fleet, release).phase == "canary", "given up before its time"
        done = rel.ended(fleet, release)
        assert done.phase == "rolled_back"
        assert done.reason.startswith("stopped by a canary: dev-001: said nothing about it within 120 s")
        assert rel.in_use(fleet) == dict.fromkeys(FOUR[:3], "")
        # Once it is back it hears that it is to have nothing.
        fleet.daemons["dev-001"].start()
        fleet.run(10.0)
        assert rel.in_use(fleet)["dev-001"] == ""
        rel.check(fleet, release)


def test_a_canary_kept_from_it_by_its_owner_is_no_sign_of_a_fault(tmp_path: Path) -> None:
    members = rig.members(3)
    with MemoryFleet(tmp_path, members) as fleet:
        job = rel.trained(fleet, 3)
        members[0].foreign_cores = members[0].cores
        fleet.run(15.0)
        release = rel.start(fleet, job, canaries=Canaries(devices=["dev-000", "dev-001"]))
        done = rel.ended(fleet, release)
        assert (done.phase, done.reason) == ("finished", "2 committed, 1 skipped")
        assert "did not come to it within 120 s: foreign load" in done.parts["dev-000"].reason
        # Its turn comes once the device is its own again.
        members[0].foreign_cores = 0.0
        fleet.run(30.0)
        assert rel.in_use(fleet) == dict.fromkeys(FOUR[:3], release)
        assert rel.found(fleet, release).parts["dev-000"].state == "committed"


def test_where_no_canary_can_try_it_nobody_gets_it(tmp_path: Path) -> None:
    members = rig.members(3)
    members[0].settings = {"release": _release_settings(accept=False)}
    with MemoryFleet(tmp_path, members) as fleet:
        job = rel.trained(fleet, 3)
        release = rel.start(fleet, job, canaries=Canaries(devices=["dev-000"]))
        done = rel.ended(fleet, release)
        assert done.phase == "rolled_back"
        assert done.reason == "no canary could try it: dev-000: its owner takes no releases (release.accept)"
        assert rel.in_use(fleet) == dict.fromkeys(FOUR[:3], "")


def test_a_device_that_comes_late_gets_it(tmp_path: Path) -> None:
    with MemoryFleet(tmp_path, rig.members(4)) as fleet:
        fleet.run(3.0)
        fleet.daemons["dev-003"].kill()
        job = rel.trained(fleet, 3)
        release = rel.start(fleet, job)
        assert rel.ended(fleet, release).reason == "3 committed"
        assert rel.found(fleet, release).left_out == {"dev-003": "it is lost"}
        fleet.daemons["dev-003"].start()
        fleet.run(20.0)
        assert rel.in_use(fleet)["dev-003"] == release
        assert rel.told(fleet, release)["dev-003"] == ["committed"]


def test_a_device_that_is_off_during_a_rollback_goes_back_once_it_returns(tmp_path: Path) -> None:
    """Whatever was in use on it: its files of the release before are still there, and those withdrawn go."""
    with MemoryFleet(tmp_path, rig.members(3)) as fleet:
        job = rel.trained(fleet, 3)
        first = rel.start(fleet, job)
        assert rel.ended(fleet, first).phase == "finished"
        second = rel.start(fleet, job)
        assert rel.ended(fleet, second).phase == "finished"
        fleet.daemons["dev-002"].kill()
        rel.desk(fleet).releases.roll_back("last")
        done = rel.ended(fleet, second)
        assert done.reason == "withdrawn by an operator; not yet confirmed by dev-002"
        assert rel.in_use(fleet) == {"dev-000": first, "dev-001": first, "dev-002": second}
        # The coordinator is another process by then, and the broker need not have kept anything.
        fleet.coordinator.restart(2.0)
        fleet.run(10.0)
        fleet.daemons["dev-002"].start()
        fleet.run(10.0)
        assert rel.in_use(fleet) == dict.fromkeys(FOUR[:3], first)
        rel.check(fleet, second)


def test_a_device_that_was_off_for_two_releases_takes_the_one_that_stands(tmp_path: Path) -> None:
    with MemoryFleet(tmp_path, rig.members(3)) as fleet:
        job = rel.trained(fleet, 3)
        first = rel.start(fleet, job)
        assert rel.ended(fleet, first).phase == "finished"
        fleet.daemons["dev-002"].kill()
        fleet.run(5.0)
        second, third = rel.start(fleet, job), ""
        assert rel.ended(fleet, second).phase == "finished"
        third = rel.start(fleet, job)
        assert rel.ended(fleet, third).phase == "finished"
        rel.desk(fleet).releases.roll_back("last")
        assert rel.ended(fleet, third).phase == "rolled_back"
        assert rel.in_use(fleet) == {"dev-000": second, "dev-001": second, "dev-002": first}
        fleet.daemons["dev-002"].start()
        fleet.run(20.0)
        assert rel.in_use(fleet) == dict.fromkeys(FOUR[:3], second)
        assert rel.told(fleet, second)["dev-002"] == ["committed"]
        assert "dev-002" not in rel.told(fleet, third)


def test_a_device_that_leaves_the_fleet_keeps_what_it_has_and_the_broker_nothing(tmp_path: Path) -> None:
    with MemoryFleet(tmp_path, rig.members(2)) as fleet:
        job = rel.trained(fleet, 2)
        first = rel.start(fleet, job)
        assert rel.ended(fleet, first).phase == "finished"
        name = topics.RELEASE.name("memory", device="dev-001")
        assert fleet.network.broker.retained(name)
        runtime = fleet.coordinator.runtime
        runtime.step(ev.Decommissioned(device="dev-001", **runtime.now()))
        fleet.run(0.1)
        assert fleet.network.broker.retained(name) == b""
        # It was not stopped, and comes back by itself: it is told again what stands.
        fleet.run(20.0)
        assert fleet.network.broker.retained(name)
        assert rel.in_use(fleet) == dict.fromkeys(FOUR[:2], first)
        second = rel.start(fleet, job)
        assert rel.ended(fleet, second).reason == "2 committed"
        assert rel.in_use(fleet) == dict.fromkeys(FOUR[:2], second)


def test_a_device_that_lost_its_journal_keeps_what_it_has_in_use(tmp_path: Path) -> None:
    with MemoryFleet(tmp_path, rig.members(2)) as fleet:
        job = rel.trained(fleet, 2)
        release = rel.start(fleet, job)
        assert rel.ended(fleet, release).phase == "finished"
        node = fleet.daemons["dev-001"]
        node.kill()
        (node.folder / "journal").write_bytes(b"torn")
        sent = fleet.coordinator.runtime.sender.sent_chunks
        node.start()
        for _ in range(100):
            fleet.run(0.1)
            assert rel.in_use(fleet)["dev-001"] == release
        assert node.runtime.state.journal.rollout.stage == "committed"
        assert fleet.coordinator.runtime.sender.sent_chunks == sent, "its files were there"
        rel.check(fleet, release)


def test_a_release_is_judged_on_rows_that_training_left_out(tmp_path: Path) -> None:
    """One device keeps a fifth of its rows aside, the others none, and the operator sees which is which."""
    members = rig.members(2, rows=25)
    members[0].settings = {"release": _release_settings(hold_out=0.2)}
    with MemoryFleet(tmp_path, members) as fleet:
        job = rel.trained(fleet, 2)
        facts = {d: known.info.datasets[DATASET].rows for d, known in fleet.coordinator.runtime.state.fleet.items()}
        assert facts == {"dev-000": 20, "dev-001": 25}
        release = rel.start(fleet, job)
        parts = rel.ended(fleet, release).parts
        assert parts["dev-000"].after is not None and parts["dev-001"].after is not None
        assert (parts["dev-000"].after.rows, parts["dev-000"].after.trained_on) == (5, False)
        assert (parts["dev-001"].after.rows, parts["dev-001"].after.trained_on) == (3, True)
        rows = fleet.daemons["dev-000"].member.rows
        left_out = Rows(rows.x[4::5], rows.y[4::5])
        folder = fleet.daemons["dev-000"].folder / "releases" / "current"
        measured = least_squares.loss_of(least_squares_release.read(folder), left_out)
        assert parts["dev-000"].after.loss == pytest.approx(measured, rel=1e-5)
        trained = fleet.adapter(job)
    # What is left out was never seen: it is the adapter of a fleet that lacks those rows.
    lacking = rig.members(2, rows=25)
    lacking[0].rows = least_squares_release.learned(lacking[0].rows, 0.2)
    with MemoryFleet(tmp_path / "lacking", lacking) as fleet:
        assert fleet.adapter(rel.trained(fleet, 2)) == trained


def test_an_operator_rolls_back_a_finished_release(tmp_path: Path) -> None:
    with MemoryFleet(tmp_path, rig.members(3)) as fleet:
        job = rel.trained(fleet, 3)
        first, second = rel.start(fleet, job), ""
        rel.ended(fleet, first)
        second = rel.start(fleet, job)
        rel.ended(fleet, second)
        assert rel.in_use(fleet) == dict.fromkeys(FOUR[:3], second)
        sent = fleet.coordinator.runtime.sender.sent_chunks
        with pytest.raises(Conflict, match=f"{second} stands above {first}"):
            rel.desk(fleet).releases.roll_back(first)
        rel.desk(fleet).releases.roll_back("last")
        assert rel.ended(fleet, second).phase == "rolled_back"
        assert rel.in_use(fleet) == dict.fromkeys(FOUR[:3], first)
        assert fleet.coordinator.runtime.sender.sent_chunks == sent, "its files were still there"
        rel.check(fleet, second)
        # Whoever says it once more, or after a canary has stopped a release, must not lose the good one.
        refused = rf"last release {second} is rolled back already .*in force is {first}: name it"
        with pytest.raises(Conflict, match=refused):
            rel.desk(fleet).releases.roll_back("last")
        rel.desk(fleet).releases.roll_back(first)
        assert rel.ended(fleet, first).phase == "rolled_back"
        assert rel.in_use(fleet) == dict.fromkeys(FOUR[:3], "")
        rel.check(fleet, first)
        with pytest.raises(Conflict, match="nothing to roll back"):
            rel.desk(fleet).releases.roll_back("last")
        # What was withdrawn does not come back by itself.
        third = rel.start(fleet, job)
        fleet.run_until(lambda: rel.found(fleet, third).phase == "rest", 60.0, "the rest")
        assert set(rel.in_use(fleet).values()) == {third, ""}
        rel.ended(fleet, third)
        assert rel.in_use(fleet) == dict.fromkeys(FOUR[:3], third)


def test_devices_keep_so_many_releases_before(tmp_path: Path) -> None:
    with MemoryFleet(tmp_path, rig.members(2, release=_release_settings(keep=1))) as fleet:
        job = rel.trained(fleet, 2)
        names = []
        for _ in range(4):
            names.append(rel.start(fleet, job))
            assert rel.ended(fleet, names[-1]).phase == "finished"
        folder = fleet.daemons["dev-000"].folder / "releases"
        assert sorted(path.name for path in folder.iterdir()) == sorted(["current", *names[-2:]])


def test_a_device_tries_a_release_between_rounds(tmp_path: Path) -> None:
    """Work is under way on the canary: the release waits for it, and the rounds lose nothing to it."""
    with MemoryFleet(tmp_path, rig.members(2, step_s=1.0)) as fleet:
        job = rel.trained(fleet, 2)
        long = fleet.submit(rig.spec(2, count=2, local_steps=40), "job-2")
        fleet.run_until(lambda: fleet.daemons["dev-000"].phase == "training", 60.0, "training")
        release = rel.start(fleet, job, canaries=Canaries(devices=["dev-000"]))
        fleet.run(20.0)
        view = next(one for one in rel.desk(fleet).releases.one(release).devices if one.device == "dev-000")
        assert (view.stage, view.reason) == ("staged", "work of a round is under way")
        assert fleet.daemons["dev-000"].phase == "training"
        assert fleet.finish(long).phase == "finished"
        assert rel.ended(fleet, release).phase == "finished"
        rig.check(fleet, long)


def test_what_can_not_be_released_is_said(tmp_path: Path) -> None:
    with MemoryFleet(tmp_path, rig.members(2)) as fleet:
        with pytest.raises(Exception, match="no job 'other'"):
            rel.start(fleet, "other")
        queued = fleet.submit(rig.spec(2), "job-2")
        fleet.run(0.5)
        with pytest.raises(Conflict, match="no round of it is committed yet"):
            rel.start(fleet, queued)
        fleet.finish(queued)
        with pytest.raises(Exception, match="no accepted round 9; accepted rounds: 1, 2, 3"):
            rel.start(fleet, queued, round=9)
        with pytest.raises(Conflict, match="canary dev-9 can't take a release: no such device"):
            rel.start(fleet, queued, canaries=Canaries(devices=["dev-9"]))
        release = rel.start(fleet, queued, round=2)
        assert release == "job-2.r2-1"
        with pytest.raises(Conflict, match="job-2.r2-1 is under way"):
            rel.start(fleet, queued)
        assert rel.ended(fleet, release).phase == "finished"


def _release_settings(**changes: object) -> object:
    from edge_daemon.settings import ReleaseSettings

    return ReleaseSettings(**changes)  # type: ignore[arg-type]  # the caller names its fields
