"""Who tries a release and who hears of it: the choice of canaries, and words that are said again."""

from __future__ import annotations

from dataclasses import replace

import pytest

from coordinator.core import commands as cmd
from coordinator.core import events as ev
from coordinator.core import releases
from coordinator.core.release_records import Canaries
from coordinator.core.turn import Waits
from shared.messages import BlobRef, DeviceState
from tests.unit.release_machine_rig import DEVICES, ReleaseRig, begun, finished
from tests.unit.release_machine_rig import rig as rig  # a fixture


def test_who_is_asked(rig: ReleaseRig) -> None:
    rig.birth("dev-e", old=True)
    rig.birth("dev-f", data=False)
    rig.feed(ev.FromDevice, device="dev-d", message=DeviceState(s="lost", epoch=1))
    name = begun(rig, canaries=Canaries(share=1.0))
    found = rig.found(name)
    assert found.chosen == ("dev-a", "dev-b", "dev-c", "dev-f")
    assert found.left_out == {"dev-d": "it is lost", "dev-e": "its daemon is too old to take releases"}
    for device in found.chosen:
        rig.takes(device)
    for device in found.chosen:
        rig.takes(device)
    assert rig.found(name).phase == "finished"
    assert "dev-e" not in rig.told
    rig.birth("dev-d", epoch=2)
    assert rig.told["dev-d"] == (name, True), "it hears of it when it is back"
    rig.words["dev-d"] = 0
    rig.say("dev-d", name, "committed", name)
    assert rig.found(name).parts["dev-d"].state == "committed"


@pytest.mark.parametrize(
    ("ask", "count"),
    [
        (Canaries(share=0.1), 1), (Canaries(share=0.5), 5), (Canaries(share=0.51), 6), (Canaries(share=1.0), 10),
        (Canaries(count=3), 3), (Canaries(count=99), 10), (Canaries(devices=["d3", "d1", "other"]), 2),
    ],
)  # fmt: skip
def test_how_many_canaries_there_are(ask: Canaries, count: int) -> None:
    able = [f"d{number}" for number in range(10)]
    chosen = releases.choose(able, able, ask)
    assert len(chosen) == count
    assert chosen == sorted(chosen) and set(chosen) <= set(able)
    assert releases.choose(list(reversed(able)), able, ask) == chosen, "the order of the devices is no matter"


def test_devices_with_data_of_the_task_come_first() -> None:
    able = [f"d{number}" for number in range(20)]
    for seed in range(10):
        chosen = releases.choose(able, able[10:12], Canaries(count=3, seed=seed))
        assert {"d10", "d11"} < set(chosen)


def test_the_draw_is_spread_over_the_devices() -> None:
    able = [f"d{number}" for number in range(10)]
    drawn = [releases.choose(able, able, Canaries(count=1, seed=seed))[0] for seed in range(200)]
    assert set(drawn) == set(able)
    # A device that joins takes a canary's place at most; the others stay.
    more = [*able, "d10"]
    for seed in range(50):
        before = set(releases.choose(able, able, Canaries(count=3, seed=seed)))
        assert len(before & set(releases.choose(more, more, Canaries(count=3, seed=seed)))) >= 2


def test_without_a_device_that_can_take_it_it_fails() -> None:
    rig = ReleaseRig()
    rig.fleet("dev-a")
    rig.feed(ev.FromDevice, device="dev-a", message=DeviceState(s="disconnected", epoch=1))
    name = rig.release()
    rig.packed(name)
    assert rig.found(name).phase == "packing", "devices may be about to come"
    rig.wait(40.0)
    assert (rig.found(name).phase, rig.found(name).reason) == (
        "failed", "no device can take it now (dev-a: it is disconnected)",
    )  # fmt: skip


def test_a_lost_word_is_said_again(rig: ReleaseRig) -> None:
    begun(rig, canaries=Canaries(devices=["dev-a"]))
    rig.told.clear()
    rig.wait(31.0)
    assert set(rig.told) == {"dev-a"}
    rig.say("dev-a", rig.told["dev-a"][0], "received")
    rig.told.clear()
    rig.wait(31.0)
    assert rig.told == {}


def test_a_device_that_goes_by_another_word_later_is_told_again(rig: ReleaseRig) -> None:
    """Nothing is under way any more: it says now and then what it goes by."""
    name = finished(rig)
    rig.told.clear()
    rig.say("dev-a", "job-1.r1-9", "committed", "job-1.r1-9")
    assert rig.told == {}, "it may be on its way"
    rig.wait(31.0)
    rig.say("dev-b", name, "committed", name)
    rig.say("dev-a", "job-1.r1-9", "committed", "job-1.r1-9")
    assert rig.told == {"dev-a": (name, True)}


def test_a_device_that_left_the_fleet_leaves_no_word_and_is_told_anew_once_it_is_back(rig: ReleaseRig) -> None:
    name = finished(rig)
    rig.feed(ev.Decommissioned, device="dev-b")
    assert cmd.PublishRelease("dev-b", None) in rig.last
    rig.feed(ev.Decommissioned, device="dev-b")
    assert rig.last == [], "the broker's echo of what was taken"
    assert set(rig.told) == set(DEVICES) - {"dev-b"}
    rig.birth("dev-b")
    assert rig.told["dev-b"] == (name, True)


def test_a_broker_that_lost_all_is_told_again(rig: ReleaseRig) -> None:
    name = finished(rig)
    rig.told.clear()
    rig.feed(ev.BrokerLost)
    rig.feed(ev.BrokerFound, chunk=1000)
    assert rig.told == {}
    for device in DEVICES:
        rig.birth(device, epoch=2)
    assert rig.told == dict.fromkeys(DEVICES, (name, True))


def test_how_often_devices_are_reminded_of_a_release_is_a_setting(rig: ReleaseRig) -> None:
    rig.state = replace(rig.state, waits=Waits(gather_s=0.0, release_remind_s=3.0))
    begun(rig, canaries=Canaries(devices=["dev-a"]))
    rig.told.clear()
    rig.wait(2.0)
    assert rig.told == {}
    rig.wait(1.1)
    assert set(rig.told) == {"dev-a"}


@pytest.mark.parametrize("patience", [5.0, 2.0])
def test_a_restless_fleet_counts_as_heard_after_a_while_that_is_a_setting(rig: ReleaseRig, patience: float) -> None:
    rig.state = replace(rig.state, waits=Waits(gather_s=2.0, patience=patience))
    rig.restart()
    name = rig.release(canaries=Canaries(devices=["dev-a"]))
    rig.feed(ev.Packed, release=name, blob=BlobRef(sha=f"{1:064x}", size=50), kind="lora")
    began = rig.now
    epoch = 2
    while rig.found(name).phase == "packing":
        assert rig.now - began < 20.0
        for device in DEVICES:  # again and again one comes
            rig.feed(ev.FromDevice, device=device, message=DeviceState(s="lost", epoch=epoch))
            rig.birth(device, epoch=epoch + 1)
        epoch += 2
        rig.wait(1.0)
    assert rig.now - began == pytest.approx(2.0 * patience, abs=1.0)
