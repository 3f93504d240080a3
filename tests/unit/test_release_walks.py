"""Releases on a device under events in any order, restarts and kills among them: what must always hold does, and in the
end the device has what it is to have."""

from __future__ import annotations

import random
from typing import Any

import pytest

from edge_daemon import protocol
from edge_daemon.core import commands as cmd
from edge_daemon.core import events as ev
from edge_daemon.core.session_machine import initial
from shared.release_messages import Release, ReleaseSpec, ReleaseState, Score
from tests.unit.daemon_model import Daemon
from tests.unit.session_rig import SETTINGS, assignment, load
from tests.unit.test_rollout import spec

RELEASES = [spec(number) for number in range(1, 6)]
NUMBERS = {release.id: release.number for release in [*RELEASES, spec(9)]}
BAD = {RELEASES[2].id}
"""Worse than anything."""


class PowerCut(Exception):
    """Nothing of this process is left."""


class Device(Daemon):
    """The daemon's model with a disk for releases. `proven`: what passed a trial here; `late`: tasks off the loop."""

    def __init__(self) -> None:
        self.folders: set[str] = set()
        self.current = ""
        self.proven: set[str] = set()
        self.late: list[cmd.Command] = []
        self.trial: cmd.Evaluate | None = None
        self.said: list[ReleaseState] = []
        self.seq = 0
        self.cut = False
        super().__init__(SETTINGS, "points")

    def restart(self) -> None:
        """What was under way in the process is lost; the disk stays."""
        self.late, self.trial, self.agent = [], None, "absent"
        self.order, self.resting, self.linked = None, False, False
        self.state = initial(self.settings, self.journal, now=self.now)
        there = frozenset(self.folders)
        started = ev.Started(
            now=self.now, boot_id="boot", minute=720, wall=1e9, releases=there, active=self.current
        )  # fmt: skip
        self.feed(started)

    def _perform(self, command: cmd.Command) -> ev.AnyEvent | None:
        match command:
            case cmd.CheckRelease() | cmd.StageRelease():
                self.late.append(command)
            case cmd.Evaluate():
                assert self.agent == "ready", "only a ready agent tries a release"
                assert self.state.phase not in ("fetching", "training", "paused"), "work comes first"
                assert command.release.id in self.folders
                assert command.previous == self.current
                self.agent, self.trial = "evaluating", command
            case cmd.ActivateRelease():
                assert not command.release or command.release in self.folders, "put in place without files"
                assert not command.release or command.release in self.proven, "put in place without a trial"
                self.current = command.release
                if self.cut:
                    raise PowerCut
                return ev.ReleaseActivated(now=self.now, release=command.release)
            case cmd.DropRelease():
                assert command.release != self.current, "what is in use was dropped"
                self.folders.discard(command.release)
            case cmd.TidyReleases():
                assert self.current in ("", *command.releases)
                self.folders &= set(command.releases)
            case cmd.Publish() if isinstance(command.message, ReleaseState):
                self.said.append(command.message)
                return super()._perform(command)
            case _:
                return super()._perform(command)
        return None

    def _told(self, message: protocol.PipeMessage) -> None:
        if self.agent == "evaluating":
            assert isinstance(message, protocol.Pause | protocol.Resume)
            assert self.resting == isinstance(message, protocol.Resume)
            self.resting = isinstance(message, protocol.Pause)
            return
        super()._told(message)

    def _check(self) -> None:
        state, rollout = self.state, self.journal.rollout
        assert self.current == rollout.active or state.release_task.startswith("activate")
        assert rollout.wanted is not None or rollout.stage == "none"
        if not state.release_task.startswith("activate") and state.phase != "draining":
            newest = rollout.wanted.number if rollout.wanted else -1
            assert not self.current or NUMBERS[self.current] <= newest, "what was withdrawn is in use"
        assert self.current in ("", *self.folders)
        assert {one.id for one in rollout.installed} <= self.folders
        if rollout.stage in ("active", "committed"):
            assert rollout.wanted is not None and rollout.active == rollout.wanted.id
        if self.agent == "evaluating":
            assert bool(state.release_paused) == self.resting
            self.resting, resting = False, self.resting
            super()._check()
            self.resting = resting
        else:
            super()._check()

    # ---- what may happen to it

    def want(self, release: ReleaseSpec | None, *, commit: bool) -> None:
        """The desired release arrives."""
        self.seq += 1
        message = Release(term=1, seq=self.seq, release=release, commit=commit)
        self.feed(ev.ReleaseReceived(now=self.now, message=message))

    def fetch(self) -> None:
        """The content is complete, if it is pulled."""
        if self.state.release_task == "fetch" and (wanted := self.journal.rollout.wanted):
            self.blobs.add(wanted.blob.sha)
            self.feed(ev.AdapterStored(now=self.now, sha=wanted.blob.sha))

    def place(self, fault: Any = "") -> None:
        """A task off the loop ends."""
        if not self.late:
            return
        task = self.late.pop(0)
        assert isinstance(task, cmd.CheckRelease | cmd.StageRelease)
        if fault or task.sha not in self.blobs:
            self.feed(ev.ReleaseProblem(now=self.now, release=task.release, reason="why", fault=fault or "gone"))
        elif isinstance(task, cmd.CheckRelease):
            self.feed(ev.ReleaseChecked(now=self.now, release=task.release))
        else:
            self.folders.add(task.release)
            self.feed(ev.ReleaseStaged(now=self.now, release=task.release))

    def judge(self, unfit: Any = "") -> None:
        """The agent answers."""
        if self.trial is None or self.agent != "evaluating":
            return
        release, self.trial = self.trial.release.id, None
        self.agent, self.resting = "ready", False
        if unfit:
            said = protocol.Unfit(release=release, kind=unfit, reason="because")
            self.feed(ev.AgentUnfit(now=self.now, unfit=said))
            return
        if release not in BAD:
            self.proven.add(release)
        after = Score(loss=9.0 if release in BAD else 1.0, rows=5)
        done = protocol.Evaluated(release=release, before=Score(loss=1.0, rows=5), after=after)
        self.feed(ev.AgentEvaluated(now=self.now, evaluated=done))

    def fall(self) -> None:
        """The agent's process ends."""
        if self.agent != "absent":
            self.trial = None
            self.die(out_of_memory=False)

    def power_cut(self) -> None:
        """The power goes in the middle of an activation: after the rename, before anyone wrote it down."""
        self.cut = True
        try:
            self.judge()
        except PowerCut:
            self.cut = False
            self.restart()
        self.cut = False


def _turn(device: Device, draw: random.Random) -> None:
    one = assignment(draw.choice([1, 2, 3]))
    acts = [
        (6, lambda: device.tick(draw.choice([0.2, 1.0, 30.0, 100.0]))),
        (1, lambda: device.relink(1)),
        (1, device.examine),
        (2, lambda: device.assign(draw.choice([one, None]), 1)),
        (2, lambda: device.store(device.state.work or one)),
        (3, lambda: device.want(draw.choice([*RELEASES, None]), commit=draw.random() < 0.5)),
        (3, lambda: device.want(device.journal.rollout.wanted, commit=True)),
        (6, device.fetch),
        (6, device.place),
        (1, lambda: device.place(draw.choice(["broken", "gone", "disk"]))),
        (6, device.judge),
        (1, lambda: device.judge(draw.choice(["load", "base", "memory", "stopped"]))),
        (1, lambda: device.feed(ev.LoadRead(now=device.now, reading=load(foreign_cores=draw.choice([0.0, 4.0]))))),
        (1, lambda: device.feed(ev.AdapterLost(now=device.now, sha=draw.choice(RELEASES).blob.sha, reason="gone"))),
        (1, device.fall),
        (1, device.restart),
        (1, device.power_cut),
    ]
    if device.agent == "starting":
        acts.append((8, device.probe))
    if device.agent == "busy":
        acts.append((6, device.train))
    draw.choices([act for _, act in acts], [weight for weight, _ in acts])[0]()


def _settles(device: Device, wanted: ReleaseSpec | None) -> str:
    """What is in use once nothing disturbs the device any more."""
    device.want(wanted, commit=True)
    device.assign(None, 1)
    device.feed(ev.LoadRead(now=device.now, reading=load()))
    for _ in range(60):
        match device.agent:
            case "starting":
                device.probe()
            case "busy":
                device.train()
            case _:
                device.tick(61.0)
        device.fetch()
        device.place()
        device.judge()
    return device.current


@pytest.mark.parametrize("seed", range(25))
def test_any_events_in_any_order(seed: int) -> None:
    draw = random.Random(seed)
    device = Device()
    for _ in range(400):
        _turn(device, draw)
    last = spec(9)
    assert _settles(device, last) == last.id
    assert device.journal.rollout.stage == "committed"
    keep = device.settings.release.keep
    assert len(device.folders) <= keep + 1, "folders that nobody needs"
    assert _settles(device, None) == ""
    assert device.folders == set()


def test_the_walks_reach_every_stage() -> None:
    draw, seen = random.Random(1), set[str]()
    device = Device()
    for _ in range(3000):
        _turn(device, draw)
        seen.add(device.journal.rollout.stage)
    assert seen == {"none", "wanted", "received", "verified", "staged", "active", "committed", "failed", "skipped"}
    assert {said.stage for said in device.said} >= seen - {"none"}
