"""A daemon's machine beside a model of its agent and disk, which refuses orders that the real ones could not obey.

For walks through events in any order: everything that must always hold is checked after every step.
"""

from __future__ import annotations

from typing import Any

import msgspec

from edge_daemon import protocol
from edge_daemon.core import commands as cmd
from edge_daemon.core import events as ev
from edge_daemon.core.session_machine import initial, step
from edge_daemon.core.state import Identity, Journal, Machine, State, finished, identity_of, offered
from edge_daemon.settings import EdgeSettings
from shared.ids import digest_of
from shared.messages import Assign, Assignment, CoordState, DatasetFacts, DeviceState, Done, Load
from tests.unit.session_rig import facts


def update_sha(identity: Identity) -> str:
    """The digest of the update that training `identity` gives: always the same."""
    return digest_of(repr(tuple(identity)).encode())


class Daemon:
    """The machine with its disk (`journal`, `blobs`, `work_files`) and its agent. `restart` keeps only the disk."""

    def __init__(self, settings: EdgeSettings, data: str) -> None:
        self.settings = settings
        self.data = data
        self.now = 100.0
        self.epoch = 0
        self.journal = Journal()
        self.blobs: set[str] = set()
        self.work_files: set[str] = set()
        self.trained: list[Identity] = []
        self.words: list[str] = []
        self.restart()

    def restart(self) -> None:
        """A new process finds what is on disk."""
        self.agent = "absent"
        self.order: Identity | None = None
        self.resting = False
        self.linked = False
        self.state: State = initial(self.settings, self.journal, now=self.now)
        self.feed(ev.Started(now=self.now, boot_id="boot", minute=720, wall=1e9))

    def feed(self, event: ev.AnyEvent) -> None:
        """One event; the journal is saved before the commands are done."""
        self.state, commands = step(self.state, event)
        self.journal = msgspec.msgpack.decode(msgspec.msgpack.encode(self.state.journal), type=Journal)
        assert self.journal == self.state.journal
        follow = [answer for command in commands if (answer := self._perform(command)) is not None]
        self._check()
        for answer in follow:
            self.feed(answer)

    def _perform(self, command: cmd.Command) -> ev.AnyEvent | None:
        match command:
            case cmd.Publish():
                assert self.linked, f"published while offline: {command.message}"
                if isinstance(command.message, DeviceState):
                    self.words.append(command.message.s)
            case cmd.StartAgent():
                assert self.agent == "absent"
                self._agent_is("starting")
            case cmd.KillAgent():
                assert self.agent != "absent"
            case cmd.Tell():
                self._told(command.message)
            case cmd.Train():
                self._ordered(command.assignment)
            case cmd.Fetch() if command.ref.sha in self.blobs:
                return ev.AdapterStored(now=self.now, sha=command.ref.sha)
            case cmd.Adopt():
                if command.sha not in self.work_files | self.blobs:
                    return ev.OfferLost(now=self.now, sha=command.sha, reason="no such file")
                self.blobs.add(command.sha)
            case cmd.DropBlob():
                self.blobs.discard(command.sha)
            case cmd.Tidy():
                self.blobs &= set(command.shas)
        return None

    def _agent_is(self, status: str) -> None:
        self.agent, self.order, self.resting = status, None, False

    def _told(self, message: protocol.PipeMessage) -> None:
        assert self.agent == "busy", f"an idle agent is told {message}"
        if isinstance(message, protocol.Stop) and message.after_step:
            return  # where it rests before a first step it goes on resting
        assert isinstance(message, protocol.Stop) or self.resting == isinstance(message, protocol.Resume)
        self.resting = isinstance(message, protocol.Pause)

    def _ordered(self, work: Assignment) -> None:
        identity = identity_of(work)
        assert self.agent == "ready", "only a ready agent takes work"
        assert work.adapter.sha in self.blobs, "the global adapter is not on disk"
        assert finished(self.journal, identity) is None, f"{identity} is over and is trained again"
        assert offered(self.journal, identity) is None, f"{identity} is in the outbox and is trained again"
        self.agent, self.order, self.resting = "busy", identity, False

    # ---- what may happen to it

    def tick(self, seconds: float) -> None:
        """Time passes."""
        self.now += seconds
        self.feed(ev.Tick(now=self.now, minute=720, wall=1e9 + self.now, disk_free=2**40))

    def relink(self, term: int) -> None:
        """The broker goes, or comes with the coordinator behind it."""
        self.linked = not self.linked
        if not self.linked:
            self.feed(ev.Unlinked(now=self.now, reason="cut"))
            return
        self.epoch += 1
        self.feed(ev.Linked(now=self.now, epoch=self.epoch, max_chunk=100_000))
        self.coordinator(online=True, term=term)

    def coordinator(self, *, online: bool, term: int) -> None:
        """The coordinator's presence."""
        state = CoordState(online=online, term=term)
        self.feed(ev.CoordinatorSeen(now=self.now, coordinator="coord-1", state=state))

    def examine(self) -> None:
        """Telemetry knows the machine."""
        self.feed(ev.MachineRead(now=self.now, machine=Machine(hardware="board", cores=4.0)))

    def assign(self, wanted: Assignment | None, term: int) -> None:
        """A desired state arrives, perhaps an old one."""
        self.feed(ev.AssignReceived(now=self.now, assign=Assign(term=term, assignment=wanted)))

    def store(self, wanted: Assignment) -> None:
        """The global adapter is complete, if the daemon pulls it."""
        if self.state.work == wanted and self.state.accepted:
            self.blobs.add(wanted.adapter.sha)
            self.feed(ev.AdapterStored(now=self.now, sha=wanted.adapter.sha))

    def read(self, load: Load) -> None:
        """A reading of the load."""
        self.feed(ev.LoadRead(now=self.now, reading=load))

    def settle(self, identity: Identity, verdict: Any) -> None:
        """The coordinator decides on an update, perhaps on one that is not there."""
        self.feed(ev.Settled(now=self.now, done=Done(sha=update_sha(identity), verdict=verdict, reason="why")))

    def probe(self) -> None:
        """The agent answers its probe."""
        self._agent_is("ready")
        probed = protocol.Probed(bits=[16, 32], datasets={self.data: DatasetFacts(rows=50)})
        self.feed(ev.AgentProbed(now=self.now, probed=probed))

    def train(self) -> None:
        """The agent's update is on disk."""
        assert self.order is not None
        identity = self.order
        self._agent_is("ready")
        self.work_files.add(update_sha(identity))
        self.trained.append(identity)
        done = protocol.Trained(**identity._asdict(), sha=update_sha(identity), size=500, facts=facts())
        self.feed(ev.AgentTrained(now=self.now, trained=done))

    def fail(self) -> None:
        """The agent can't do its work, or has forgotten it as told."""
        assert self.order is not None
        failure = protocol.Failed(**self.order._asdict(), kind="data", reason="because")
        self._agent_is("ready")
        self.feed(ev.AgentFailed(now=self.now, failed=failure))

    def die(self, *, out_of_memory: bool) -> None:
        """The agent's process ends."""
        self._agent_is("absent")
        self.feed(ev.AgentGone(now=self.now, reason="killed by signal 9", out_of_memory=out_of_memory))

    # ---- what must always hold

    def _check(self) -> None:
        state, journal = self.state, self.journal
        kept, over = [offer.identity for offer in journal.outbox], [done.identity for done in journal.finished]
        assert len({*kept, *over}) == len(kept) + len(over), "work is in the outbox or over, once"
        if state.phase in ("training", "paused"):
            assert state.work is not None
            assert state.accepted
            assert state.adapter_there
        if state.phase in ("idle", "offering"):
            assert state.work is None
            assert bool(journal.outbox) == (state.phase == "offering")
        assert bool(state.paused) == (state.phase == "paused") == self.resting
        if state.phase == "stopped":
            return
        assert (state.agent.status == "absent") == (self.agent == "absent")
        if self.linked and state.phase != "draining":
            assert self.words[-1] == ("training" if state.phase in ("fetching", "training", "paused") else "ready")
