"""A release on a device, step by step: what each stage asks for, what comes of each answer, after a restart too."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from edge_daemon import protocol
from edge_daemon.core import agents
from edge_daemon.core import commands as cmd
from edge_daemon.core import events as ev
from edge_daemon.core.release_transitions import allowed
from edge_daemon.core.state import Machine
from edge_daemon.settings import EdgeSettings, PolicySettings, ReleaseSettings
from shared.messages import CoordState
from shared.release_messages import Release, ReleaseSpec, ReleaseState, Score, Stage
from tests.unit.session_rig import ADAPTER, GIB, SETTINGS, Rig, assignment, load
from tests.unit.test_rollout import R1, R2, spec

GOOD = (Score(loss=2.0, rows=10), Score(loss=1.0, rows=10))


class Device(Rig):
    """The session rig with a release's events."""

    def want(self, release: ReleaseSpec | None, *, commit: bool = False, seq: int = 0, term: int = 1) -> list[Any]:
        """The desired release arrives."""
        self.seq = seq or getattr(self, "seq", 0) + 1
        message = Release(term=term, seq=self.seq, release=release, commit=commit, reason="asked")
        return self.feed(ev.ReleaseReceived, message=message)

    def fetched(self, number: int = 1) -> list[Any]:
        return self.feed(ev.AdapterStored, sha=spec(number).blob.sha)

    def checked(self, number: int = 1) -> list[Any]:
        return self.feed(ev.ReleaseChecked, release=spec(number).id)

    def staged(self, number: int = 1) -> list[Any]:
        return self.feed(ev.ReleaseStaged, release=spec(number).id)

    def evaluated(self, number: int = 1, scores: tuple[Score | None, Score | None] = GOOD) -> list[Any]:
        done = protocol.Evaluated(release=spec(number).id, before=scores[0], after=scores[1])
        return self.feed(ev.AgentEvaluated, evaluated=done)

    def unfit(self, kind: Any, number: int = 1) -> list[Any]:
        return self.feed(ev.AgentUnfit, unfit=protocol.Unfit(release=spec(number).id, kind=kind, reason="because"))

    def activated(self, release: str) -> list[Any]:
        return self.feed(ev.ReleaseActivated, release=release)

    def tried(self, number: int = 1, *, commit: bool = False) -> None:
        """Up to a trial under way."""
        self.want(spec(number), commit=commit)
        self.fetched(number)
        self.checked(number)
        self.staged(number)
        assert self.state.agent.status == "evaluating"

    def in_use(self, number: int = 1, *, commit: bool = True) -> None:
        """Up to a release in use."""
        self.tried(number, commit=commit)
        self.evaluated(number)
        self.activated(spec(number).id)

    def again(self, *, there: set[str], active: str) -> Device:
        """Another process on the same journal."""
        other = self.restart()
        device = Device.__new__(Device)
        device.__dict__.update(other.__dict__)
        device.state = msgspec_initial(other)
        device.feed(ev.Started, boot_id="boot-1", wall=device.wall, releases=frozenset(there), active=active)
        return device

    @property
    def rollout(self) -> Any:
        return self.state.journal.rollout


def msgspec_initial(rig: Rig) -> Any:
    from edge_daemon.core.session_machine import initial

    return initial(rig.settings, rig.state.journal, now=rig.now)


@pytest.fixture
def device() -> Device:
    made = Device()
    made.up()
    return made


def kinds(commands: list[Any]) -> list[str]:
    """The names of commands, those to the owner and about presence left out."""
    return [type(one).__name__ for one in commands if not isinstance(one, cmd.Note | cmd.Publish | cmd.Sample)]


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


def test_a_worse_release_is_left(device: Device) -> None:
    device.in_use(1)
    device.tried(2)
    assert device.did(cmd.Evaluate)[0].previous == R1
    device.evaluated(2, (GOOD[1], Score(loss=1.2, rows=10)))
    assert (device.rollout.stage, device.rollout.active) == ("failed", R1)
    assert kinds(device.last) == ["DropRelease"]
    (said,) = device.said(ReleaseState)
    assert said.reason.startswith("worse here: loss 1.2 on 10 rows, before 1, the limit is 1.1")
    # It stays so, however often it is said and whoever starts anew.
    assert kinds(device.want(spec(2))) == []
    other = device.again(there={R1}, active=R1)
    assert other.rollout.stage == "failed"


@pytest.mark.parametrize(
    ("kind", "stage"),
    [("load", "failed"), ("score", "failed"), ("base", "skipped"), ("data", "skipped"), ("stopped", "staged")],
)
def test_whose_fault_it_is(device: Device, kind: str, stage: Stage) -> None:
    device.tried()
    device.unfit(kind)
    assert device.rollout.stage == stage
    assert device.rollout.active == ""


def test_memory_that_runs_out_leads_to_fewer_bits(device: Device) -> None:
    device.tried()
    assert device.did(cmd.Evaluate)[0].bits == 32
    device.unfit("memory")
    assert [one.bits for one in device.did(cmd.Evaluate)] == [16]
    device.gone(out_of_memory=True)
    assert device.rollout.stage == "skipped"
    assert device.rollout.reason == "memory ran out, at 16 bits, and no fewer are proven here"


def test_an_agent_that_dies_over_it_is_tried_again_and_then_the_release_is_at_fault(device: Device) -> None:
    device.tried()
    for deaths in (1, 2):
        device.gone()
        assert (device.rollout.stage, device.rollout.deaths) == ("staged", deaths)
        for _ in range(40):
            device.tick(1.0)
        device.probe()
        assert device.state.agent.status == "evaluating"
    device.gone()
    assert device.rollout.stage == "failed"
    assert device.rollout.reason == "the agent died 3 times over it, last: exit status 1"


def test_an_agent_that_hangs_over_it_is_killed(device: Device) -> None:
    device.tried()
    assert not device.tick(170.0) or not device.did(cmd.KillAgent)
    device.tick(20.0)
    assert len(device.did(cmd.KillAgent)) == 1


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


def test_the_precision_of_a_trial_stays_with_the_release(device: Device) -> None:
    device.tried(1, commit=True)
    device.unfit("memory")
    device.evaluated()
    device.activated(R1)
    device.in_use(2)
    assert [(one.id, one.bits) for one in device.rollout.installed] == [(R1, 16), (R2, 32)]


def test_a_broken_gpu_is_waited_for(device: Device) -> None:
    device.want(spec(1))
    device.fetched()
    device.checked()
    device.feed(ev.LoadRead, reading=load(hung={"gpu": 99.0}))
    assert kinds(device.staged()) == ["DropBlob"]
    assert device.said(ReleaseState)[0].waits.startswith("GPU driver: no answer")
    device.feed(ev.LoadRead, reading=load())
    assert kinds(device.last) == ["Evaluate"]


def test_a_whole_model_needs_no_base() -> None:
    device = Device(settings=EdgeSettings(fleet="f1", device="dev-1"))
    device.up()
    task = msgspec.structs.replace(spec(1).task, kind="classification", labels=["a", "b"])
    device.want(spec(1, task=task, kind="model"))
    device.fetched()
    device.checked()
    device.staged()
    (order,) = device.did(cmd.Evaluate)
    assert (order.base_path, order.source, order.data_path) == ("", None, "")
    device.evaluated(1, (None, None))
    assert kinds(device.last) == ["ActivateRelease"], "there are no rows: that it loads is enough"


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


def test_a_file_of_held_out_rows_is_taken_whole() -> None:
    release = ReleaseSettings(data={"points": "held-out.jsonl"}, rows=99)
    device = Device(settings=msgspec.structs.replace(SETTINGS, release=release))
    device.up()
    device.tried()
    (order,) = device.did(cmd.Evaluate)
    assert (order.data_path, order.share, order.rows) == ("held-out.jsonl", 1.0, 99)
    assert (order.hold_out, order.trained_on) == (0.0, False)


def test_rows_left_out_of_training_are_told_to_the_agent() -> None:
    """When it is probed, and with a release."""
    settings = msgspec.structs.replace(SETTINGS, release=ReleaseSettings(hold_out=0.2))
    device = Device(settings=settings)
    device.up()
    assert agents.probe_of(device.state).hold_out == 0.2
    device.tried()
    (order,) = device.did(cmd.Evaluate)
    assert (order.data_path, order.hold_out, order.trained_on) == ("points.jsonl", 0.2, True)


def test_work_comes_first_and_waits_for_a_trial_under_way(device: Device) -> None:
    device.assign(assignment(1))
    device.feed(ev.AdapterStored, sha=ADAPTER)
    assert device.state.phase == "training"
    device.want(spec(1))
    device.fetched()
    device.checked()
    assert kinds(device.staged()) == ["DropBlob"]
    (said,) = device.said(ReleaseState)
    assert (said.stage, said.waits) == ("staged", "work of a round is under way")
    device.trained()
    assert kinds(device.last)[-1] == "Evaluate"
    assert (device.state.phase, device.state.agent.status) == ("offering", "evaluating")
    device.assign(assignment(2))
    device.feed(ev.AdapterStored, sha=ADAPTER)
    assert device.state.phase == "fetching", "the agent is taken"
    device.evaluated()
    assert device.state.phase == "training"
    assert "Train" in kinds(device.last)


def test_the_owners_hours_are_kept() -> None:
    policy = PolicySettings(hours=["22:00-06:00"])
    device = Device(settings=msgspec.structs.replace(SETTINGS, policy=policy))
    device.up()
    device.feed(ev.Tick, minute=600, wall=device.wall, disk_free=10 * GIB)
    device.want(spec(1))
    device.fetched()
    device.checked()
    device.staged()
    assert device.state.agent.status == "ready"
    assert device.said(ReleaseState)[0].waits.startswith("hours: it is 10:00, the owner allows 22:00-06:00")
    device.feed(ev.Tick, minute=22 * 60, wall=device.wall, disk_free=10 * GIB)
    assert device.state.agent.status == "evaluating"


def test_a_trial_rests_while_other_programs_need_the_device(device: Device) -> None:
    device.tried()
    device.feed(ev.LoadRead, reading=load(foreign_cores=4.0))
    assert [one.message.reason[:12] for one in device.did(cmd.Tell)] == ["foreign load"]
    assert device.said(ReleaseState)[0].waits.startswith("foreign load")
    device.feed(ev.LoadRead, reading=load(foreign_cores=3.5))
    assert device.did(cmd.Tell) == [], "not yet well below"
    device.feed(ev.LoadRead, reading=load())
    assert [one.message for one in device.did(cmd.Tell)] == [protocol.Resume()]


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


def test_a_device_without_an_agent_skips_it() -> None:
    device = Device()
    device.link()
    device.feed(ev.MachineRead, machine=Machine(cores=4.0, memory_bytes=2 * GIB))
    device.want(spec(1))
    device.fetched()
    device.checked()
    assert device.rollout.stage == "verified"
    for _ in range(3):
        device.feed(ev.AgentGone, reason="torch is not there")
        for _ in range(3):
            device.tick(0.5)
    assert device.rollout.stage == "skipped"
    assert "torch is not there" in device.rollout.reason


def test_moves_that_no_row_has_raise() -> None:
    assert not allowed("wanted", "AgentEvaluated", "active")
    assert not allowed("received", "ReleaseStaged", "staged")
    assert not allowed("failed", "Tick", "active")
    assert allowed("staged", "ReleaseActivated", "committed")
