"""A daemon's session machine on a table: feeds it events, keeps its journal, checks its invariants after every step."""

from __future__ import annotations

from typing import Any

from edge_daemon import protocol
from edge_daemon.core import commands as cmd
from edge_daemon.core import events as ev
from edge_daemon.core.session_machine import initial, step
from edge_daemon.core.state import WORKING, Finished, Identity, Journal, Machine, Offer, State, identity_of
from edge_daemon.settings import EdgeSettings
from shared.jobs import BaseSpec, TaskSpec, TrainingSpec
from shared.messages import (
    Assign,
    Assignment,
    BlobRef,
    CoordState,
    DatasetFacts,
    Done,
    Load,
    UpdateFacts,
    Work,
)

SETTINGS = EdgeSettings(fleet="fleet-1", device="dev-1", data={"points": "points.jsonl"}, models={"16x8": "16x8"})
GIB = 1024**3
ADAPTER = "a" * 64
UPDATE = "d" * 64
FIRST = Identity("job-1", 1, 1)


def load(**changes: Any) -> Load:
    """A calm reading."""
    values = {"epoch": 0, "seq": 0, "cores": 4.0, "memory_available": GIB, "memory_limit": 2 * GIB, **changes}
    return Load(**values)


def assignment(round: int = 1, attempt: int = 1, job: str = "job-1", **changes: Any) -> Assignment:
    """A piece of work."""
    values: dict[str, Any] = {
        "work": Work(ranks={"linear": 2}, batch=4, bits=32, steps=8, train_for_s=100.0),
        "base": BaseSpec(model="16x8"), "base_digest": "b" * 64,
        "task": TaskSpec(kind="least_squares", dataset="points"), "training": TrainingSpec(), "rounds": 3, "seed": 0,
        "adapter": BlobRef(sha=ADAPTER, size=100), **changes,
    }  # fmt: skip
    return Assignment(job=job, round=round, attempt=attempt, **values)


def facts(**changes: Any) -> UpdateFacts:
    """Facts of a complete update."""
    values = {
        "samples": 32, "steps": 8, "batch": 4, "bits": 32, "loss_first": 2.0, "loss_last": 1.0, "step_s": 0.1,
        "train_s": 0.8, **changes,
    }  # fmt: skip
    return UpdateFacts(**values)


class Rig:
    """The machine with its journal. `restart` throws away all but that, as a kill does."""

    def __init__(self, journal: Journal | None = None, settings: EdgeSettings = SETTINGS, boot: str = "boot-1") -> None:
        self.settings = settings
        self.now = 1000.0
        self.wall = 50_000.0
        self.epoch = 0
        self.boot = boot
        self.state: State = initial(settings, journal or Journal(), now=self.now)
        self.all: list[cmd.Command] = []
        self.last: list[cmd.Command] = []
        self.feed(ev.Started, boot_id=boot, wall=self.wall)

    def feed(self, kind: type[ev.Event], **values: Any) -> list[cmd.Command]:
        """One event; returns the commands."""
        before = self.state
        self.state, self.last = step(before, kind(now=self.now, **values))  # type: ignore[arg-type]  # a member
        self.all += self.last
        check(before, self.state, self.last)
        again, more = step(self.state, ev.AgentBeat(now=self.now))  # what a state needs was already worked out
        assert (again.phase, again.journal) == (self.state.phase, self.state.journal)
        assert not [c for c in more if isinstance(c, cmd.Train | cmd.StartAgent | cmd.Fetch)]
        return self.last

    def tick(self, seconds: float = 1.0) -> list[cmd.Command]:
        """Time passes."""
        self.now += seconds
        self.wall += seconds
        return self.feed(ev.Tick, wall=self.wall, disk_free=10 * GIB)

    def restart(self, boot: str = "boot-1") -> Rig:
        """Another process on the same journal; clocks go on."""
        other = Rig.__new__(Rig)
        other.settings, other.now, other.wall, other.epoch, other.boot = (
            self.settings, self.now + 2.0, self.wall + 2.0, self.epoch, boot,
        )  # fmt: skip
        other.state = initial(self.settings, self.state.journal, now=other.now)
        other.all, other.last = [], []
        other.feed(ev.Started, boot_id=boot, wall=other.wall)
        return other

    # ---- what others say

    def up(self, machine: Machine | None = None) -> Rig:
        """Connected, a coordinator there, the agent probed."""
        self.link()
        self.feed(ev.CoordinatorSeen, coordinator="coord-1", state=CoordState(online=True, term=1))
        self.feed(ev.MachineRead, machine=machine or Machine(cores=4.0, memory_bytes=2 * GIB))
        return self.probe()

    def link(self) -> None:
        """The session with the broker stands."""
        self.epoch += 1
        self.feed(ev.Linked, epoch=self.epoch, max_chunk=100_000)

    def probe(self) -> Rig:
        """The agent answers its probe."""
        self.feed(ev.AgentProbed, probed=protocol.Probed(bits=[16, 32], datasets={"points": DatasetFacts(rows=100)}))
        return self

    def assign(self, work: Assignment | None, term: int = 1) -> list[cmd.Command]:
        """The desired state arrives."""
        return self.feed(ev.AssignReceived, assign=Assign(term=term, assignment=work))

    def training(self, **changes: Any) -> Rig:
        """At work on round 1."""
        self.up()
        self.assign(assignment(**changes))
        self.feed(ev.AdapterStored, sha=ADAPTER)
        assert self.state.phase == "training"
        return self

    def trained(self, round: int = 1, attempt: int = 1, sha: str = UPDATE) -> list[cmd.Command]:
        """The agent wrote an update."""
        done = protocol.Trained(job="job-1", round=round, attempt=attempt, sha=sha, size=200, facts=facts())
        return self.feed(ev.AgentTrained, trained=done)

    def failed(self, kind: Any = "data", round: int = 1, attempt: int = 1, batch_limit: int = 0) -> list[cmd.Command]:
        """The agent could not do its work."""
        failure = protocol.Failed(
            job="job-1", round=round, attempt=attempt, kind=kind, reason="because", batch_limit=batch_limit
        )
        return self.feed(ev.AgentFailed, failed=failure)

    def settle(self, verdict: Any = "stored", sha: str = UPDATE, reason: str = "") -> list[cmd.Command]:
        """The coordinator decides on an update."""
        return self.feed(ev.Settled, done=Done(sha=sha, verdict=verdict, reason=reason))

    def gone(self, out_of_memory: bool = False) -> list[cmd.Command]:
        """The agent's process ends."""
        return self.feed(ev.AgentGone, reason="exit status 1", out_of_memory=out_of_memory)

    # ---- looking

    def did(self, kind: type[Any]) -> list[Any]:
        """The last commands of one kind."""
        return [command for command in self.last if isinstance(command, kind)]

    def said(self, kind: type[Any]) -> list[Any]:
        """The last messages of one kind."""
        return [c.message for c in self.last if isinstance(c, cmd.Publish) and isinstance(c.message, kind)]

    def done(self) -> list[tuple[Identity, str]]:
        """How work ended."""
        return [(end.identity, end.verdict) for end in self.state.journal.finished]


def check(before: State, state: State, commands: list[cmd.Command]) -> None:
    """What must hold after every step."""
    journal = state.journal
    offers: list[Offer] = list(journal.outbox)
    ends: list[Finished] = list(journal.finished)
    assert len({offer.identity for offer in offers}) == len(offers), "one piece of work, two offers"
    assert len({end.identity for end in ends}) == len(ends), "one piece of work ended twice"
    assert not {offer.identity for offer in offers} & {end.identity for end in ends}, "finished and still offered"
    assert journal.term >= before.journal.term
    lost = {offer.sha for offer in before.journal.outbox} - {offer.sha for offer in offers}
    settled = {end.identity for end in ends}
    gone = {offer.identity for offer in before.journal.outbox if offer.sha in lost}
    noted = [command for command in commands if isinstance(command, cmd.Note) and "is lost" in command.text]
    assert gone <= settled or noted, "an update left the outbox without a word"
    if state.phase in WORKING:
        assert state.work is not None
        assert state.accepted
    if state.phase in ("training", "paused") and state.agent.status == "busy":
        assert state.work is not None
        assert state.agent.identity == identity_of(state.work)
    trains = [command for command in commands if isinstance(command, cmd.Train)]
    assert len(trains) <= 1
    for order in trains:
        identity = identity_of(order.assignment)
        assert identity not in settled and identity not in {offer.identity for offer in offers}, "trained again"
    dropped = {command.sha for command in commands if isinstance(command, cmd.DropBlob)}
    assert not dropped & {offer.sha for offer in offers}, "a blob still offered was dropped"
    if state.phase == "stopped" and before.phase != "stopped":
        assert isinstance(commands[-1], cmd.Leave)
