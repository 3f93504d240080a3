"""The session rig with a release's events, and what its machine then asks for."""

from __future__ import annotations

from typing import Any

import pytest

from edge_daemon import protocol
from edge_daemon.core import commands as cmd
from edge_daemon.core import events as ev
from edge_daemon.core.session_machine import initial
from shared.release_messages import Release, ReleaseSpec, Score
from tests.unit.session_rig import Rig
from tests.unit.test_rollout import spec

GOOD = (Score(loss=2.0, rows=10), Score(loss=1.0, rows=10))


class Device(Rig):
    """The session rig with a release's events."""

    def want(self, release: ReleaseSpec | None, *, commit: bool = False, seq: int = 0, term: int = 1) -> list[Any]:
        """The desired release arrives."""
        self.seq = seq or getattr(self, "seq", 0) + 1
        message = Release(term=term, seq=self.seq, release=release, commit=commit, reason="asked")
        return self.feed(ev.ReleaseReceived, message=message)

    def fetched(self, number: int = 1) -> list[Any]:
        """Its blob is complete."""
        return self.feed(ev.AdapterStored, sha=spec(number).blob.sha)

    def checked(self, number: int = 1) -> list[Any]:
        """Its digest is right."""
        return self.feed(ev.ReleaseChecked, release=spec(number).id)

    def staged(self, number: int = 1) -> list[Any]:
        """It is unpacked."""
        return self.feed(ev.ReleaseStaged, release=spec(number).id)

    def evaluated(self, number: int = 1, scores: tuple[Score | None, Score | None] = GOOD) -> list[Any]:
        """The agent tried it."""
        done = protocol.Evaluated(release=spec(number).id, before=scores[0], after=scores[1])
        return self.feed(ev.AgentEvaluated, evaluated=done)

    def unfit(self, kind: Any, number: int = 1) -> list[Any]:
        """The agent could not try it."""
        return self.feed(ev.AgentUnfit, unfit=protocol.Unfit(release=spec(number).id, kind=kind, reason="because"))

    def activated(self, release: str) -> list[Any]:
        """It is the one in use; none if empty."""
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
        """What the journal knows of releases."""
        return self.state.journal.rollout


def msgspec_initial(rig: Rig) -> Any:
    """The state that a new process makes of the rig's journal."""
    return initial(rig.settings, rig.state.journal, now=rig.now)


@pytest.fixture
def device() -> Device:
    """Connected, its agent probed."""
    made = Device()
    made.up()
    return made


def kinds(commands: list[Any]) -> list[str]:
    """The names of commands, those to the owner and about presence left out."""
    return [type(one).__name__ for one in commands if not isinstance(one, cmd.Note | cmd.Publish | cmd.Sample)]
