"""A release on a device, step by step: what each stage asks for, what comes of each answer, after a restart too."""

from __future__ import annotations

import msgspec
import pytest

from edge_daemon.core import commands as cmd
from edge_daemon.core import events as ev
from edge_daemon.core.release_transitions import allowed
from edge_daemon.settings import EdgeSettings, ReleaseSettings
from shared.messages import CoordState
from shared.release_messages import ReleaseState
from tests.unit.releasing_rig import GOOD, Device, kinds, msgspec_initial
from tests.unit.releasing_rig import device as device  # a fixture
from tests.unit.session_rig import SETTINGS
from tests.unit.test_rollout import R1, R2, spec


def test_the_way_of_a_release(device: Device) -> None:
    assert device.want(spec(1)) and kinds(device.last) == ["Fetch"]
    assert device.did(cmd.Fetch)[0].ref == spec(1).blob
    assert kinds(device.fetched()) == ["CheckRelease"]
    assert kinds(device.checked()) == ["StageRelease"]
    assert kinds(device.staged()) == ["DropBlob", "Evaluate"]
    (order,) = device.did(cmd.Evaluate)
    assert (order.bits, order.data_path, order.share, order.previous) == (32, "points.jsonl", 0.1, "")
    assert kinds(device.evaluated()) == ["ActivateRelease"]
    assert device.rollout.stage == "staged"
    assert kinds(device.activated(R1)) == []
    assert (device.rollout.stage, device.rollout.active) == ("active", R1)
    (said,) = device.said(ReleaseState)
    assert (said.release, said.stage, said.active, said.before, said.after) == (R1, "active", R1, *GOOD)
    device.want(spec(1), commit=True)
    assert device.rollout.stage == "committed"
    assert [one.committed for one in device.rollout.installed] == [True]


def test_every_stage_is_said_once(device: Device) -> None:
    stages = []
    for turn in (
        lambda: device.want(spec(1), commit=True), device.fetched, device.checked, device.staged, device.evaluated,
        lambda: device.activated(R1), lambda: device.tick(1.0),
    ):  # fmt: skip
        turn()
        stages += [(said.stage, said.seq) for said in device.said(ReleaseState)]
    assert stages == [
        ("wanted", 1), ("received", 2), ("verified", 3), ("staged", 4), ("staged", 5), ("committed", 6)
    ]  # fmt: skip
    # A coordinator that begins anew hears it again, and so does one that asks.
    device.feed(ev.CoordinatorSeen, coordinator="coord-1", state=CoordState(online=True, term=2))
    assert [said.stage for said in device.said(ReleaseState)] == ["committed"]
    device.want(spec(1), commit=True)
    assert [said.stage for said in device.said(ReleaseState)] == ["committed"]


@pytest.mark.parametrize("stage", ["wanted", "received", "verified", "staged", "active", "committed"])
def test_a_restart_goes_on_where_it_was(device: Device, stage: str) -> None:
    steps = {
        "wanted": lambda: device.want(spec(1)), "received": device.fetched, "verified": device.checked,
        "staged": device.staged, "active": lambda: (device.evaluated(), device.activated(R1)),
        "committed": lambda: device.want(spec(1), commit=True),
    }  # fmt: skip
    for name, turn in steps.items():
        turn()
        if name == stage:
            break
    assert device.rollout.stage == stage
    unpacked = stage in ("staged", "active", "committed")
    active = R1 if stage in ("active", "committed") else ""
    other = device.again(there={R1} if unpacked or stage == "verified" else set(), active=active)
    first = kinds(other.last)
    tidied = other.did(cmd.TidyReleases)[0]
    kept_blobs = other.did(cmd.Tidy)[0].shas
    other.up()
    asked = {"wanted": "Fetch", "received": "CheckRelease", "verified": "StageRelease", "staged": "Evaluate"}
    done = first + kinds(other.all)
    assert asked.get(stage, "Tidy") in done
    assert (spec(1).blob.sha in kept_blobs) == (stage in ("wanted", "received", "verified"))
    assert tidied.releases == ((R1,) if unpacked else ())
    assert other.rollout.stage == stage


def test_a_kill_between_the_rename_and_the_journal(device: Device) -> None:
    device.tried()
    device.evaluated()
    other = device.again(there={R1}, active=R1)
    assert kinds(other.last).count("ActivateRelease") == 1, "done again: it changes nothing"
    other.activated(R1)
    assert other.rollout.stage == "active"


def test_files_that_are_gone_are_fetched_again(device: Device) -> None:
    device.in_use()
    other = device.again(there=set(), active="")
    assert (other.rollout.stage, other.rollout.active, other.rollout.installed) == ("wanted", "", ())
    assert "Fetch" in kinds(other.last)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        (EdgeSettings(fleet="f1", device="dev-1", release=ReleaseSettings(accept=False)), "release.accept"),
        (EdgeSettings(fleet="f1", device="dev-1"), "is not in this device's [models] table, and policy.hub is off"),
    ],
)
def test_what_a_device_can_not_have_is_skipped_before_a_byte_is_fetched(settings: EdgeSettings, reason: str) -> None:
    device = Device(settings=settings)
    device.up()
    task = msgspec.structs.replace(spec(1).task, kind="classification", labels=["a", "b"])
    device.want(spec(1, task=task))
    assert kinds(device.last) == ["DropBlob"]
    (said,) = device.said(ReleaseState)
    assert said.stage == "skipped" and reason in said.reason
    # Its owner may have changed that when the daemon starts anew.
    again = device.again(there=set(), active="")
    again.settings = SETTINGS
    assert again.rollout.stage == "skipped", "looked at once more, with the same end"


def test_what_was_skipped_is_tried_once_its_owner_allows_it() -> None:
    device = Device(settings=msgspec.structs.replace(SETTINGS, release=ReleaseSettings(accept=False)))
    device.up()
    device.want(spec(1))
    assert device.rollout.stage == "skipped"
    assert kinds(device.feed(ev.Reconfigured, settings=SETTINGS)) == ["Fetch"]
    assert device.rollout.stage == "wanted"


def test_a_folder_that_other_hands_removed_does_not_keep_what_was_withdrawn_in_use(device: Device) -> None:
    device.in_use(1)
    device.in_use(2)
    assert kinds(device.want(spec(1), commit=True)) == ["ActivateRelease"]
    device.feed(ev.ReleaseProblem, release=R1, reason="the folder is gone", fault="gone")
    assert [one.release for one in device.did(cmd.ActivateRelease)] == [""], "nothing older is here"
    assert kinds(device.activated("")) == ["DropRelease", "Fetch"]
    assert (device.rollout.stage, device.rollout.active, device.rollout.installed) == ("wanted", "", ())
    device.fetched()
    device.checked()
    device.staged()
    assert device.state.agent.status == "evaluating", "what comes anew is tried anew"


def test_a_disk_that_fails_for_a_release_of_before_holds_nothing_up(device: Device) -> None:
    device.want(spec(1))
    device.fetched()
    device.want(spec(2))
    device.feed(ev.ReleaseProblem, release=R1, reason="No space left on device", fault="disk")
    assert device.state.release_retry_at == 0.0


def test_a_lost_journal_takes_nothing_out_of_use(device: Device) -> None:
    """The retained word comes again: what is in place is neither fetched nor tried once more, and a newer one is."""
    device.in_use()
    other = Device()
    other.state = msgspec_initial(other)
    other.feed(ev.Started, boot_id="boot-1", wall=other.wall, releases=frozenset({R1}), active=R1)
    other.up()
    assert [one for one in other.all if isinstance(one, cmd.ActivateRelease)] == []
    assert [one.releases for one in other.all if isinstance(one, cmd.TidyReleases)] == [(R1,)]
    other.want(spec(1), commit=True)
    assert kinds(other.last) == ["ActivateRelease"], "it may not be there in truth: said once more, and no trial"
    other.activated(R1)
    assert (other.rollout.stage, other.rollout.active) == ("committed", R1)
    other.tried(2)
    (order,) = other.did(cmd.Evaluate)
    assert order.previous == R1


def test_a_full_disk_is_waited_for(device: Device) -> None:
    device.feed(ev.Tick, wall=device.wall, disk_free=1000)
    assert kinds(device.want(spec(1))) == []
    assert device.said(ReleaseState)[0].waits.startswith("disk: 0 MiB free, 512 needed")
    assert kinds(device.tick()) == ["Fetch"]
    device.fetched()
    device.checked()
    device.feed(ev.ReleaseProblem, release=R1, reason="No space left on device", fault="disk")
    assert (device.rollout.stage, kinds(device.last)) == ("verified", [])
    assert kinds(device.tick(30.0)) == []
    assert kinds(device.tick(31.0)) == ["StageRelease"]


def test_what_is_broken_or_gone(device: Device) -> None:
    device.want(spec(1))
    device.feed(ev.AdapterLost, sha=spec(1).blob.sha, reason="no space", room=True)
    assert device.rollout.stage == "wanted"
    assert kinds(device.tick(61.0)) == ["Fetch"]
    device.fetched()
    device.feed(ev.ReleaseProblem, release=R1, reason="it vanished", fault="gone")
    assert (device.rollout.stage, kinds(device.last)) == ("wanted", ["Fetch"])
    device.fetched()
    device.feed(ev.ReleaseProblem, release=R1, reason="not what its digest says", fault="broken")
    assert (device.rollout.stage, kinds(device.last)) == ("failed", ["DropBlob"])
    device.want(spec(2))
    device.feed(ev.AdapterLost, sha=spec(2).blob.sha, reason="not here")
    assert (device.rollout.stage, device.rollout.reason) == ("failed", "it can't be fetched: not here")


def test_a_rollback_needs_no_trial_and_no_transfer(device: Device) -> None:
    device.in_use(1)
    device.in_use(2, commit=False)
    assert (device.rollout.active, device.rollout.stage) == (R2, "active")
    assert kinds(device.want(spec(1), commit=True)) == ["ActivateRelease"]
    assert device.did(cmd.ActivateRelease)[0].release == R1
    assert kinds(device.activated(R1)) == ["DropRelease"]
    assert (device.rollout.stage, device.rollout.active) == ("committed", R1)
    assert [one.id for one in device.rollout.installed] == [R1]
    assert kinds(device.want(None)) == ["ActivateRelease"]
    device.activated("")
    assert (device.rollout.stage, device.rollout.active, device.rollout.installed) == ("none", "", ())
    (said,) = device.said(ReleaseState)
    assert (said.release, said.active, said.stage) == ("", "", "none")


def test_a_rollback_in_the_middle_of_a_trial(device: Device) -> None:
    device.in_use(1)
    device.tried(2)
    assert kinds(device.want(spec(1), commit=True)) == ["DropRelease", "ActivateRelease"]
    device.activated(R1)
    assert (device.rollout.stage, device.rollout.active) == ("committed", R1)
    device.evaluated(2)
    assert (device.rollout.stage, device.rollout.active) == ("committed", R1), "an answer about what is wanted no more"
    assert device.state.agent.status == "ready"


def test_old_words_are_ignored(device: Device) -> None:
    device.want(spec(2), seq=5)
    device.want(spec(1), seq=4)
    assert device.rollout.wanted.id == R2
    device.want(None, seq=9, term=0)
    assert device.rollout.wanted.id == R2
    device.want(spec(1), seq=1, term=2)
    assert device.rollout.wanted.id == R1, "another coordinator's first word"


def test_another_release_takes_the_place_of_one_under_way(device: Device) -> None:
    device.want(spec(1))
    device.fetched()
    assert kinds(device.want(spec(2))) == ["DropBlob", "Fetch"]
    device.checked(1)
    assert device.rollout.stage == "wanted"
    device.fetched(2)
    device.checked(2)
    assert kinds(device.want(spec(3))) == ["DropBlob", "DropRelease", "Fetch"]
    device.staged(2)
    assert kinds(device.last) == ["DropRelease"], "its folder was made meanwhile"


def test_a_device_that_was_never_told_says_nothing() -> None:
    device = Device()
    device.up()
    device.tick(100.0)
    assert not [one for one in device.all if isinstance(one, cmd.Publish) and isinstance(one.message, ReleaseState)]


def test_moves_that_no_row_has_raise() -> None:
    assert not allowed("wanted", "AgentEvaluated", "active")
    assert not allowed("received", "ReleaseStaged", "staged")
    assert not allowed("failed", "Tick", "active")
    assert allowed("staged", "ReleaseActivated", "committed")
