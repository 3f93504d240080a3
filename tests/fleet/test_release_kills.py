"""Devices and coordinator killed at every stage of a release, and at every write: it ends as if nothing had been.

The stages and phases come from the tables: a new one without a scenario here fails.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from coordinator.core.release_records import Canaries
from coordinator.core.release_transitions import TABLE
from edge_daemon import protocol
from edge_daemon.core.release_transitions import STAGES
from edge_daemon.settings import ReleaseSettings
from muster.testbed.memory_fleet import MemoryFleet
from muster.testbed.memory_nodes import Member
from muster.testbed.memory_process import Crash
from shared.machines import phases
from shared.transport.memory_network import Faults
from tests.fleet import fleet_rig as rig
from tests.fleet import release_rig as rel

DEVICES = 3
NAMES = tuple(f"dev-00{number}" for number in range(DEVICES))
VICTIM = "dev-000"
CANARIES = Canaries(devices=[VICTIM])
DOWN_S = 3.0
SEEN_S = 60.0


@pytest.fixture(scope="module")
def before(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fleet's folder with a finished job and its first release in use everywhere."""
    root = tmp_path_factory.mktemp("before") / "fleet"
    with MemoryFleet(root, rig.members(DEVICES)) as fleet:
        job = rel.trained(fleet, DEVICES)
        assert rel.ended(fleet, rel.start(fleet, job)).phase == "finished"
    return root


FIRST, SECOND = "job-1.r3-1", "job-1.r3-2"


def fleet_of(before: Path, root: Path, members: list[Member] | None = None) -> MemoryFleet:
    """A fleet that goes on from a copy of `before`."""
    shutil.copytree(before, root, symlinks=True)
    return MemoryFleet(root, members or rig.members(DEVICES))


def settled(fleet: MemoryFleet) -> None:
    """Up to devices that are heard."""
    fleet.run(4.0)
    assert rel.in_use(fleet) == dict.fromkeys(NAMES, FIRST)


# ---- a device, a good release


def _stage(fleet: MemoryFleet, name: str = VICTIM) -> str:
    node = fleet.daemons[name]
    rollout = node.runtime.state.journal.rollout if node.alive else None
    return rollout.stage if rollout is not None and rollout.wanted and rollout.wanted.id == SECOND else ""


def _members(stage: str) -> list[Member]:
    members = rig.members(DEVICES)
    if stage == "failed":
        members[0].behaviour.measured = lambda order, said: protocol.Unfit(
            release=order.release, kind="load", reason="no such tensor"
        )
    if stage == "skipped":
        members[0].settings = {"release": ReleaseSettings(accept=False)}
    return members


GOOD = ("wanted", "received", "verified", "staged", "active", "committed")
BAD = ("failed", "skipped")


def test_every_stage_has_a_scenario() -> None:
    assert {*GOOD, *BAD, "none"} == set(STAGES), "none is the stage of a device that was never told"


@pytest.mark.parametrize("stage", GOOD)
def test_a_device_killed_at_each_stage_goes_on(before: Path, tmp_path: Path, stage: str) -> None:
    with fleet_of(before, tmp_path / "fleet") as fleet:
        settled(fleet)
        assert rel.start(fleet, "job-1", canaries=CANARIES) == SECOND
        fleet.run_until(lambda: _stage(fleet) == stage, SEEN_S, stage)
        fleet.daemons[VICTIM].kill()
        fleet.run(DOWN_S)
        fleet.daemons[VICTIM].start()
        _ends_well(fleet)


def _ends_well(fleet: MemoryFleet) -> None:
    done = rel.ended(fleet, SECOND)
    assert (done.phase, done.reason) == ("finished", f"{DEVICES} committed"), done
    fleet.run(5.0)
    assert rel.in_use(fleet) == dict.fromkeys(NAMES, SECOND)
    for states in rel.told(fleet, SECOND).values():
        assert len(states) == len(set(states)), "one device told the same twice, and both count"
    rel.check(fleet, SECOND)


@pytest.mark.parametrize("stage", BAD)
def test_a_device_killed_where_it_failed_keeps_what_it_had(before: Path, tmp_path: Path, stage: str) -> None:
    members = _members(stage)
    with fleet_of(before, tmp_path / "fleet", members) as fleet:
        settled(fleet)
        rel.start(fleet, "job-1", canaries=Canaries(devices=["dev-001"]))
        fleet.run_until(lambda: _stage(fleet) == stage, SEEN_S, stage)
        fleet.daemons[VICTIM].kill()
        fleet.run(DOWN_S)
        fleet.daemons[VICTIM].start()
        done = rel.ended(fleet, SECOND)
        assert (done.phase, done.reason) == ("finished", f"2 committed, 1 {stage}")
        assert rel.in_use(fleet) == {VICTIM: FIRST, "dev-001": SECOND, "dev-002": SECOND}
        rel.check(fleet, SECOND)


def test_a_device_killed_after_every_save_goes_on(before: Path, tmp_path: Path) -> None:
    saves = _each_save(before, tmp_path, _good)
    assert saves >= len(GOOD) + 1, "fewer writes than stages"


def test_a_device_killed_after_every_save_of_a_rollback_goes_back(before: Path, tmp_path: Path) -> None:
    """The victim has the release in use when another canary fails."""
    saves = _each_save(before, tmp_path, _rolled_back, _one_fails)
    assert saves >= len(GOOD) + 1


Scenario = Callable[[MemoryFleet], None]


def _each_save(before: Path, root: Path, scenario: Scenario, members: Callable[[], list[Member]] | None = None) -> int:
    """Run `scenario` once for each write of the victim's journal in it, with a kill after that write; how many."""
    number, struck = 0, True
    while struck:
        with fleet_of(before, root / str(number), members() if members else None) as fleet:
            settled(fleet)
            struck = _struck(fleet, number, scenario)
        number += 1
    return number - 1


def _struck(fleet: MemoryFleet, number: int, scenario: Scenario) -> bool:
    victim, saves, struck = fleet.daemons[VICTIM], 0, False

    def on_save(_journal: object) -> None:
        nonlocal saves, struck
        saves += 1
        if saves == number + 1:
            struck = True
            fleet.network.schedule(fleet.network.now + 1.0, victim.start)
            raise Crash

    victim.on_save = on_save
    scenario(fleet)
    return struck


def _good(fleet: MemoryFleet) -> None:
    rel.start(fleet, "job-1", canaries=CANARIES)
    _ends_well(fleet)


def _one_fails() -> list[Member]:
    members = rig.members(DEVICES)
    members[1].behaviour.evaluate_s = 8.0
    members[1].behaviour.measured = lambda order, said: (
        protocol.Unfit(release=order.release, kind="load", reason="no such tensor") if order.release == SECOND else said
    )
    return members


def _rolled_back(fleet: MemoryFleet) -> None:
    rel.start(fleet, "job-1", canaries=Canaries(devices=[VICTIM, "dev-001"]))
    done = rel.ended(fleet, SECOND)
    assert (done.phase, done.reason) == ("rolled_back", "stopped by a canary: dev-001: no such tensor")
    fleet.run(5.0)
    assert rel.in_use(fleet) == dict.fromkeys(NAMES, FIRST)
    assert rel.told(fleet, SECOND)[VICTIM][-1] == "returned"
    rel.check(fleet, SECOND)


@pytest.mark.parametrize("scenario", [_good, _rolled_back], ids=["forward", "back"])
def test_a_device_killed_between_the_rename_and_the_journal(before: Path, tmp_path: Path, scenario: Scenario) -> None:
    """`current` points to the release already, and nothing says so: at each of its changes."""
    number, struck = 0, True
    while struck:
        struck = False
        members = _one_fails() if scenario is _rolled_back else None
        with fleet_of(before, tmp_path / str(number), members) as fleet:
            settled(fleet)
            victim = fleet.daemons[VICTIM]
            folder = victim.runtime.ports.store.releases
            real, calls = folder.activate, 0

            def activate(release: str, number: int = number, victim: Any = victim, real: Any = real) -> None:
                nonlocal calls, struck
                real(release)
                calls += 1
                if calls == number + 1:
                    struck = True
                    victim.world.network.schedule(victim.now + 1.0, victim.start)
                    raise Crash

            folder.activate = activate  # type: ignore[method-assign]  # the same, and then the power is cut
            scenario(fleet)
        number += 1
    assert number - 1 >= (2 if scenario is _rolled_back else 1)


# ---- the coordinator


COORDINATOR_PHASES: dict[str, Scenario] = {
    phase: (_rolled_back if phase in ("rolling_back", "rolled_back") else _good)
    for phase in ("packing", "canary", "rest", "finished", "rolling_back", "rolled_back")
}


def test_every_phase_of_the_coordinator_has_a_scenario() -> None:
    assert {*COORDINATOR_PHASES, "failed"} == set(phases(TABLE)), "failed: nothing was begun"


@pytest.mark.parametrize("phase", COORDINATOR_PHASES)
def test_the_coordinator_killed_in_each_phase_goes_on(before: Path, tmp_path: Path, phase: str) -> None:
    scenario = COORDINATOR_PHASES[phase]
    with fleet_of(before, tmp_path / "fleet", _one_fails() if scenario is _rolled_back else None) as fleet:
        settled(fleet)

        def look() -> None:
            node = fleet.coordinator
            known = node.runtime.state.releases.get(SECOND) if node.alive else None
            if known is not None and known.phase == phase:
                node.restart(DOWN_S)
                return
            fleet.network.schedule(fleet.network.now + 0.02, look)

        look()
        scenario(fleet)
        if phase in ("finished", "rolled_back"):
            fleet.run(DOWN_S + 5.0)
            rel.check(fleet, SECOND)


@pytest.mark.parametrize("scenario", [_good, _rolled_back], ids=["forward", "back"])
def test_the_coordinator_killed_around_every_write_goes_on(before: Path, tmp_path: Path, scenario: Scenario) -> None:
    number, struck = 0, True
    while struck:
        for when in ("before", "after"):
            members = _one_fails() if scenario is _rolled_back else None
            with fleet_of(before, tmp_path / f"{number}-{when}", members) as fleet:
                settled(fleet)
                struck = _coordinator_struck(fleet, number, when, scenario)
        number += 1
    assert number > 5


def _coordinator_struck(fleet: MemoryFleet, number: int, when: str, scenario: Scenario) -> bool:
    node, seen, struck = fleet.coordinator, {"before": 0, "after": 0}, False

    def on_append(here: str, _records: Any) -> None:
        nonlocal struck
        seen[here] += 1
        if not struck and here == when and seen[here] == number + 2:  # the first write is its beginning
            struck = True
            fleet.network.schedule(fleet.network.now + 1.0, node.start)
            raise Crash

    node.on_append = on_append
    scenario(fleet)
    return struck


# ---- the network


@pytest.mark.parametrize("seed", [1, 2])
def test_over_a_bad_network_a_release_reaches_every_device(tmp_path: Path, seed: int) -> None:
    faults = Faults(
        loss=0.05, drop=0.02, duplicate=0.1, reorder=0.1, delay_s=(0.01, 0.2), reorder_s=2.0, redelivery_s=3.0
    )
    with MemoryFleet(tmp_path, rig.members(12), seed=seed, faults=faults) as fleet:
        job = rel.trained(fleet, 12)
        names = sorted(fleet.daemons)
        for round in range(2):
            release = rel.start(fleet, job, canaries=Canaries(count=3, seed=seed))
            fleet.network.partition(names[round * 3 : round * 3 + 3], 5.0, 8.0)
            done = rel.ended(fleet, release)
            assert (done.phase, done.reason) == ("finished", "12 committed")
            assert rel.in_use(fleet) == dict.fromkeys(names, release)
        rel.desk(fleet).releases.roll_back("last")
        rel.ended(fleet, release)
        fleet.run(60.0)
        assert set(rel.in_use(fleet).values()) == {f"{job}.r3-1"}
        rel.check(fleet, release)
