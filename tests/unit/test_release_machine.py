"""The coordinator's decisions about a release: when it goes on, when it goes back, and that every walk ends."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest

from coordinator.core import commands as cmd
from coordinator.core import events as ev
from coordinator.core import release_records as rec
from coordinator.core import releases
from coordinator.core.release_records import Canaries
from coordinator.core.release_transitions import TABLE
from coordinator.core.turn import Waits
from coordinator.performing import line
from shared import machines
from shared.messages import DeviceState
from tests.unit.release_machine_rig import DEVICES, SCORES, ReleaseRig, begun, finished
from tests.unit.release_machine_rig import rig as rig  # a fixture


def test_the_way_of_a_good_release(rig: ReleaseRig) -> None:
    name = rig.release(canaries=Canaries(devices=["dev-b"]))
    (order,) = [c for c in rig.last if isinstance(c, cmd.PackRelease)]
    assert (order.release.id, order.job.id, rig.told) == (name, "job-1", {})
    rig.packed(name)
    assert rig.told == {"dev-b": (name, False)}
    rig.say("dev-b", name, "received")
    rig.say("dev-b", name, "staged")
    assert rig.found(name).parts["dev-b"].state == "told"
    rig.say("dev-b", name, "active", name, **SCORES)
    assert rig.found(name).phase == "rest"
    assert rig.told == dict.fromkeys(DEVICES, (name, True))
    for device in DEVICES:
        assert rig.found(name).phase == "rest"
        rig.takes(device)
    done = rig.found(name)
    assert (done.phase, done.reason) == ("finished", "4 committed")
    assert (done.parts["dev-b"].before, done.parts["dev-b"].after) == tuple(SCORES.values())


@pytest.mark.parametrize("stage", ["failed", "silent"])
def test_one_canary_that_fails_stops_it(rig: ReleaseRig, stage: str) -> None:
    first = finished(rig)
    name = begun(rig, canaries=Canaries(devices=["dev-a", "dev-c"]))
    rig.say("dev-a", name, "active", name)
    if stage == "failed":
        rig.say("dev-c", name, "failed", first, reason="worse here")
    else:
        rig.wait(60.0)
        assert rig.found(name).phase == "canary"
        rig.wait(60.0)
    found = rig.found(name)
    why = "worse here" if stage == "failed" else "said nothing about it within 100 s"
    assert (found.phase, found.reason) == ("rolling_back", f"stopped by a canary: dev-c: {why}")
    assert rig.told == dict.fromkeys(DEVICES, (first, True))
    assert [r.device for r in rig.log if isinstance(r, rec.DeviceReleased) and r.release == name][0] == "dev-a"
    rig.takes("dev-a")
    if stage == "silent":
        assert rig.found(name).phase == "rolling_back"
        rig.takes("dev-c")
    assert rig.found(name).phase == "rolled_back"
    assert rig.found(name).parts["dev-a"].state == "returned"
    assert set(rig.found(name).parts) == {"dev-a", "dev-c"}


def test_skipping_is_no_failure_but_one_has_to_take_it(rig: ReleaseRig) -> None:
    name = begun(rig, canaries=Canaries(devices=["dev-a", "dev-b"]))
    rig.say("dev-a", name, "skipped", reason="no base here")
    assert rig.found(name).phase == "canary"
    rig.say("dev-b", name, "active", name)
    assert rig.found(name).phase == "rest"
    assert "dev-a" not in rig.found(name).awaited
    for device in DEVICES[1:]:
        rig.takes(device)
    assert rig.found(name).reason == "3 committed, 1 skipped"
    again = begun(rig, canaries=Canaries(devices=["dev-a"]))
    rig.say("dev-a", again, "skipped", reason="no base here")
    assert rig.found(again).phase == "rolled_back", "nobody had it"
    assert rig.found(again).reason == "no canary could try it: dev-a: no base here"


def test_an_owner_who_keeps_a_canary_from_it_is_no_failure(rig: ReleaseRig) -> None:
    name = begun(rig, canaries=Canaries(devices=["dev-a", "dev-b"]))
    rig.say("dev-b", name, "active", name)
    rig.say("dev-a", name, "staged", waits="hours: it is 10:00")
    rig.wait(101.0)
    assert rig.found(name).phase == "rest"
    part = rig.found(name).parts["dev-a"]
    assert (part.state, part.reason) == ("skipped", "did not come to it within 100 s: hours: it is 10:00")
    rig.takes("dev-a")
    assert rig.found(name).parts["dev-a"].state == "committed", "later it came to it"


def test_a_failure_in_the_rest_takes_it_from_nobody(rig: ReleaseRig) -> None:
    name = begun(rig, canaries=Canaries(devices=["dev-a"]))
    rig.takes("dev-a")
    rig.say("dev-b", name, "failed", reason="worse here")
    for device in ("dev-a", "dev-c"):
        rig.takes(device)
    assert rig.found(name).phase == "rest"
    rig.wait(101.0)
    done = rig.found(name)
    assert (done.phase, done.reason) == ("finished", "2 committed, 1 failed, 1 silent")
    assert rig.told["dev-a"] == (name, True)


def test_what_can_not_be_packed_fails(rig: ReleaseRig) -> None:
    name = rig.release()
    rig.feed(ev.PackingFailed, release=name, reason="disk full")
    assert (rig.found(name).phase, rig.found(name).reason) == ("failed", "it can't be packed: disk full")
    assert rig.told == {}
    assert rig.release() == "job-1.r1-2"


def test_only_one_is_under_way(rig: ReleaseRig) -> None:
    begun(rig)
    rig.release()
    assert len(rig.state.releases) == 1
    assert rig.state.counters["releases while another is under way"] == 1


def test_an_operator_goes_back_from_every_phase(rig: ReleaseRig) -> None:
    first = finished(rig)
    name = rig.release()
    rig.feed(ev.RollbackRequested, release=name)
    assert rig.found(name).phase == "failed", "nobody had it"
    name = begun(rig, canaries=Canaries(devices=["dev-a"]))
    rig.feed(ev.RollbackRequested, release=name)
    assert (rig.found(name).phase, rig.told["dev-a"]) == ("rolling_back", (first, True))
    rig.takes("dev-a")
    assert rig.found(name).phase == "rolled_back"
    name = begun(rig, canaries=Canaries(devices=["dev-a"]))
    rig.takes("dev-a")
    rig.feed(ev.RollbackRequested, release=name)
    assert rig.found(name).phase == "rolling_back"
    for device in DEVICES:
        rig.takes(device)
    assert rig.found(name).phase == "rolled_back"
    rig.feed(ev.RollbackRequested, release=first)
    assert rig.told == dict.fromkeys(DEVICES, ("", False))
    for device in DEVICES:
        rig.takes(device)
    assert rig.found(first).phase == "rolled_back"
    # Not below one that stands, and not twice.
    second, third = finished(rig), finished(rig)
    rig.feed(ev.RollbackRequested, release=second)
    assert rig.found(second).phase == "finished"
    rig.feed(ev.RollbackRequested, release=first)
    assert rig.found(first).phase == "rolled_back"
    assert rig.told == dict.fromkeys(DEVICES, (third, True))


def test_a_rollback_waits_for_nobody_who_is_gone(rig: ReleaseRig) -> None:
    name = finished(rig)
    rig.wait(60.0)  # we have heard the fleet for long: its wills are believed after two seconds
    rig.feed(ev.FromDevice, device="dev-d", message=DeviceState(s="lost", epoch=1))
    rig.feed(ev.RollbackRequested, release=name)
    for device in DEVICES[:3]:
        assert rig.found(name).phase == "rolling_back"
        rig.takes(device)
    rig.wait(1.9)
    assert rig.found(name).phase == "rolling_back"
    rig.wait(1.0)
    assert rig.found(name).reason == "withdrawn by an operator; not yet confirmed by dev-d"
    assert rig.told["dev-d"] == ("", False), "retained: it finds it when it is back"


def test_a_roll_back_outlasts_a_broker_that_is_stopped(rig: ReleaseRig) -> None:
    """It sends the wills of all devices before it is gone."""
    name = finished(rig)
    rig.wait(60.0)
    rig.feed(ev.RollbackRequested, release=name)
    for device in DEVICES:
        rig.feed(ev.FromDevice, device=device, message=DeviceState(s="lost", epoch=1))
    rig.feed(ev.BrokerLost)
    rig.wait(300.0)
    assert rig.found(name).phase == "rolling_back"
    rig.feed(ev.BrokerFound, chunk=1000)
    rig.wait(1.0)
    assert rig.found(name).phase == "rolling_back"
    for device in DEVICES:
        rig.birth(device, epoch=2)
        rig.takes(device)
    assert (rig.found(name).phase, rig.found(name).reason) == ("rolled_back", "withdrawn by an operator")


def test_who_is_cut_off_calls_nobody_silent(rig: ReleaseRig) -> None:
    name = begun(rig, canaries=Canaries(devices=["dev-a"]))
    rig.feed(ev.BrokerLost)
    rig.now += 500.0
    rig.feed(ev.Tick)
    assert rig.found(name).phase == "canary"
    rig.feed(ev.BrokerFound, chunk=1000)
    rig.wait(5.0)
    assert rig.found(name).phase == "canary"
    rig.takes("dev-a")
    rig.wait(3.0)
    assert rig.found(name).phase == "rest"


def test_old_and_foreign_reports_change_nothing(rig: ReleaseRig) -> None:
    name = begun(rig, canaries=Canaries(devices=["dev-a"]))
    rig.say("dev-b", name, "active", name)
    assert rig.found(name).phase == "canary" and "dev-b" not in rig.found(name).parts
    rig.say("dev-a", "job-1.r9-9", "active", "job-1.r9-9")
    rig.words["dev-a"] = 0
    rig.say("dev-a", name, "active", name)
    assert rig.found(name).phase == "canary", "its number is an old one's"
    rig.words["dev-a"] = 5
    rig.say("dev-a", name, "active", name)
    assert rig.found(name).phase == "rest"


def test_every_record_is_a_line_for_people(rig: ReleaseRig) -> None:
    finished(rig)
    name = begun(rig, canaries=Canaries(devices=["dev-a"]))
    rig.say("dev-a", name, "failed", reason="worse here", **SCORES)
    lines = [line(record) for record in rig.log if isinstance(record, rec.ReleaseRecord)]
    assert all(one.startswith("release job-1.r1-") for one in lines)
    assert f"release {name}: dev-a failed loss 2.000 -> loss 1.000 worse here" in lines


def test_blobs_that_a_device_may_ask_for_are_kept(rig: ReleaseRig) -> None:
    names = [finished(rig) for _ in range(4)]
    blobs = [rig.found(name).blob.sha for name in names]
    assert releases.kept_blobs(rig.state.releases, 3) == set(blobs[1:])
    under_way = begun(rig)
    kept = releases.kept_blobs(rig.state.releases, 3)
    assert rig.found(under_way).blob.sha in kept
    assert {blobs[2], blobs[3]} <= kept


def test_a_number_that_a_device_knows_is_not_given_twice(rig: ReleaseRig) -> None:
    """A coordinator restored from an older copy has forgotten releases that devices have."""
    name = finished(rig)
    known = list(rig.state.release_reports.values())
    assert releases.next_number(rig.state.releases, known) == rig.found(name).number + 1
    assert releases.next_number({}, known) == rig.found(name).number + 1
    assert releases.next_number({}, []) == 1


# ---- in any order


def _turn(rig: ReleaseRig, draw: random.Random) -> None:
    device = draw.choice(DEVICES)
    name = draw.choice(list(rig.state.releases) or ["job-1.r1-1"])
    stage = draw.choice(["wanted", "received", "staged", "active", "committed", "failed", "skipped"])
    canaries = Canaries(count=draw.choice([1, 2, 4]), seed=draw.randrange(9))
    packing = [one for one in rig.state.releases.values() if one.phase == "packing"]
    acts: list[tuple[int, Any]] = [
        (2, lambda: rig.release(canaries=canaries)),
        (4, lambda: packing and rig.packed(packing[0].id)),
        (8, lambda: device in rig.told and rig.takes(device)),
        (3, lambda: rig.say(device, name, stage, draw.choice([name, ""]), waits=draw.choice(["", "hours"]))),
        (1, lambda: rig.feed(ev.RollbackRequested, release=name)),
        (4, lambda: rig.wait(draw.choice([0.1, 1.0, 20.0, 120.0]))),
        (1, lambda: rig.feed(ev.FromDevice, device=device, message=DeviceState(s="lost", epoch=1))),
        (2, lambda: rig.birth(device)),
        (1, rig.restart),
        (1, lambda: (rig.feed(ev.BrokerLost), rig.feed(ev.BrokerFound, chunk=1000))),
        (1, lambda: packing and rig.feed(ev.PackingFailed, release=packing[0].id, reason="why")),
    ]
    draw.choices([act for _, act in acts], [weight for weight, _ in acts])[0]()


def _converges(rig: ReleaseRig) -> None:
    """Undisturbed, everything ends, and every device has what holds for it."""
    rig.feed(ev.BrokerFound, chunk=1000)
    for device in DEVICES:
        rig.birth(device)
    for _ in range(12):
        for one in list(rig.state.releases.values()):
            if one.phase == "packing":
                rig.packed(one.id)
        for device in DEVICES:
            if device in rig.told:
                rig.takes(device)
        rig.wait(40.0)
    assert releases.under_way(rig.state.releases) is None
    if not rig.state.releases:
        return
    standing = releases.standing(rig.state.releases)
    wanted = (standing.id, True) if standing else ("", False)
    assert {rig.told.get(device, ("", False)) for device in DEVICES} == {wanted}


@pytest.mark.parametrize("seed", range(20))
def test_any_events_in_any_order(seed: int) -> None:
    draw, rig = random.Random(seed), ReleaseRig()
    rig.fleet()
    for _ in range(150):
        _turn(rig, draw)
    _converges(rig)


def test_the_walks_reach_every_phase() -> None:
    draw, rig, seen = random.Random(0), ReleaseRig(), set[str]()
    rig.fleet()
    for _ in range(1500):
        _turn(rig, draw)
        seen |= {one.phase for one in rig.state.releases.values()}
    assert seen == set(machines.phases(TABLE))


@pytest.mark.parametrize("waits", [Waits(gather_s=2.0), Waits(gather_s=0.2, grace_s=3.0, release_look_s=0.1)])
def test_the_grace_of_a_release_after_a_restart_is_a_setting(waits: Waits) -> None:
    """The second is a tenth of the first."""
    rig = ReleaseRig()
    rig.fleet()
    rig.state = replace(rig.state, waits=waits)
    name = begun(rig, canaries=Canaries(devices=["dev-a"]), deadline_s=0.1)
    rig.now += 1.0
    rig.restart()
    rig.wait(waits.grace_s - 0.1)
    assert rig.found(name).phase == "canary", "the devices may not have been heard yet"
    rig.wait(0.2)
    rig.wait(waits.release_look_s)
    assert rig.found(name).phase == "rolled_back", "nobody is known, so there is nobody to wait for"


@pytest.mark.parametrize("look_s", [1.0, 0.1])
def test_how_often_a_release_is_looked_at_is_a_setting(rig: ReleaseRig, look_s: float) -> None:
    rig.state = replace(rig.state, waits=Waits(gather_s=0.0, release_look_s=look_s))
    begun(rig, canaries=Canaries(devices=["dev-a"]))
    rig.feed(ev.Tick)
    seen = rig.state.release_looked_at
    rig.now += 0.5 * look_s
    rig.feed(ev.Tick)
    assert rig.state.release_looked_at == seen
    rig.now += 0.6 * look_s
    rig.feed(ev.Tick)
    assert rig.state.release_looked_at == rig.now
