"""The daemon's only loop: events in, `session_machine.step`, journal to disk, commands performed.

It has no clock and no thread of its own: the service feeds it from a queue, a simulation from a virtual clock.
"""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, cast

from typing_extensions import assert_never

from edge_daemon import orders, protocol
from edge_daemon.adapters.store import UPDATE_FILE, Store
from edge_daemon.adapters.team import TeamTrainer
from edge_daemon.adapters.trainer import AgentEnded, AgentSpoke
from edge_daemon.core import backlog
from edge_daemon.core import commands as cmd
from edge_daemon.core import events as ev
from edge_daemon.core.session_machine import initial, step
from edge_daemon.core.state import Machine, identity_of
from edge_daemon.placing import Placed, Placer
from edge_daemon.settings import EdgeSettings
from shared import fields, logs, messages, release_messages, topics
from shared.blob_folder import NoRoom
from shared.blob_sender import BlobSender
from shared.blobs import BlobReceiver
from shared.codec import pack, unpack
from shared.errors import DecodeError, RemoteError
from shared.messages import Done, Load, Manifest, Missing, Want
from shared.transport import base
from shared.transport.outlet import publish_waiting

log = logging.getLogger(__name__)
COORDINATOR = "coordinator"
"""The one peer of a device's transfers."""
CONTROL_ROOM = 16
"""Places in the transport's queue that chunks leave free for control messages."""
RETRY_S = 5.0
_LEVELS = {"info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}


@dataclass(frozen=True)
class Sampled:
    """The telemetry thread read the load."""

    load: Load


@dataclass(frozen=True)
class Examined:
    """The machine's static facts are known."""

    machine: Machine


@dataclass(frozen=True)
class Asked:
    """Someone wants the daemon to leave."""


@dataclass
class Ports:
    """The edges the runtime works through. `minute`: local minute of the day."""

    transport: base.Transport
    store: Store
    trainer: TeamTrainer
    clock: Callable[[], float]
    wall: Callable[[], float]
    minute: Callable[[], int]
    sample_every: Callable[[float], None]
    offload: Callable[[Callable[[], Placed]], None]
    """Run it elsewhere and post what it returns."""


class Runtime:
    """One daemon. `handle` and `tick` run on the owner's thread only; `left` is set once it has said goodbye."""

    def __init__(self, settings: EdgeSettings, ports: Ports, *, boot_id: str, version: str) -> None:
        self.settings = settings
        self.ports = ports
        self.left = False
        self.state = initial(settings, ports.store.load(), version=version, now=ports.clock())
        # What is under way here is known (`cmd.Tidy`, `cmd.DropBlob`), so that no part must go for its age.
        credit = settings.credit_bytes
        self.receiver = BlobReceiver(ports.store.blobs, credit_bytes=credit, retry_s=RETRY_S, part_s=math.inf)
        self.sender = BlobSender(ports.store.blobs, fields.MAX_CHUNK_BYTES)
        self._placer = Placer(self)
        self._boot_id = boot_id
        self._waiting: deque[base.Outgoing] = deque()
        self._unsaved: backlog.Backlog = ()
        self._failed: deque[ev.AgentFailed] = deque()
        self._performing = False
        self._begun = False
        self._ticked_at = -1e9

    # ---- in

    def handle(self, event: object) -> None:
        """Take one event of any edge, then let time pass and send what is due."""
        self._begin()
        now = self.ports.clock()
        match event:
            case base.Received():
                try:
                    self._on_received(event)
                finally:
                    # What we can't handle now we can't handle later; unacknowledged, it would block the session.
                    self.ports.transport.ack(event)
            case base.Connected():
                self.receiver.limit_packet(event.max_packet)
                self.sender.limit_packet(event.max_packet)
                self.step(ev.Linked(now=now, epoch=event.epoch, max_chunk=self.sender.max_chunk))
            case base.Disconnected():
                self.sender.cancel_peer(COORDINATOR)
                # Asked for again by the next session; until then questions would only pile up.
                self.receiver.cancel_peer(COORDINATOR)
                self.step(ev.Unlinked(now=now, reason=event.reason))
            case base.TransportFailed():
                log.error("the broker refuses us: %s", event.reason)
            case base.Published():
                if event.reason:
                    log.error("the broker refused a message (%s): %s", event.token, event.reason)
            case AgentSpoke():
                self._on_agent(event)
            case Sampled():
                self.step(ev.LoadRead(now=now, reading=event.load))
            case Examined():
                self.step(ev.MachineRead(now=now, machine=event.machine))
            case Asked():
                self.step(ev.Drain(now=now))
            case Placed():
                self.step(event.event)
            case _:
                log.error("unknown event %s", type(event).__name__)
        self.tick()

    def tick(self) -> None:
        """Let time pass: announcements, re-requests, queued messages."""
        now = self.ports.clock()
        self._begin()
        if now - self._ticked_at >= 0.25:
            self._ticked_at = now
            self._catch_up()
            free, behind = self.ports.store.disk_free(), bool(self._unsaved)
            minute, wall = self.ports.minute(), self.ports.wall()
            self.step(ev.Tick(now=now, minute=minute, wall=wall, disk_free=free, behind=behind))
        for _, want in self.receiver.due(now):
            self._send(topics.UP_BLOB, want)
        self._flush()

    def _begin(self) -> None:
        """The first step of all: what is under way is worked out from what the disk really holds."""
        if self._begun:
            return
        self._begun = True
        folder = self.ports.store.releases
        started = ev.Started(
            now=self.ports.clock(), boot_id=self._boot_id, minute=self.ports.minute(), wall=self.ports.wall(),
            releases=folder.there(), active=folder.active(),
        )  # fmt: skip
        self.step(started)

    def reconfigure(self, settings: EdgeSettings) -> None:
        """Take over new settings; what they change of identity, broker and folders is for a new process."""
        self.settings = settings
        self.step(ev.Reconfigured(now=self.ports.clock(), settings=settings))

    def step(self, event: ev.AnyEvent) -> None:
        """One decision, after those that wait for room on the disk."""
        if not backlog.passes(self._unsaved, event) or not self._decided(event):
            self._unsaved = backlog.behind(self._unsaved, event)

    def _catch_up(self) -> None:
        """Take up what waits, as far as the disk lets us. What follows from one event comes before the next."""
        waiting, self._unsaved = deque(self._unsaved), ()
        try:
            while waiting and not self._unsaved:
                self.step(waiting.popleft())
        finally:
            self._unsaved += tuple(waiting)

    def _decided(self, event: ev.AnyEvent) -> bool:
        """Decide, save, perform: a changed journal is on disk before anything that follows from it is done. False: it
        can't be written, and nothing has happened."""
        state, commands = step(self.state, event)
        if state.journal is not self.state.journal and state.journal != self.state.journal:
            try:
                self.ports.store.save(state.journal)
            except OSError as error:
                log.error("the journal can't be written, trying again: %s", error)
                return False
        if state.phase != self.state.phase:
            words = (self.state.phase, state.phase, type(event).__name__)
            log.info("%s -> %s on %s", *words, extra=logs.event("phase"))
        self.state = state
        outermost, self._performing = not self._performing, True
        try:
            for command in commands:
                self._perform(command)
        finally:
            self._performing = not outermost
        # Not before: what is still to be said of these steps would be said after what comes of a failure.
        while outermost and self._failed:
            self.step(self._failed.popleft())
        return True

    # ---- commands

    def _perform(self, command: cmd.Command) -> None:
        ports, store = self.ports, self.ports.store
        match command:
            case cmd.Publish():
                self._send(_TOPICS[type(command.message)], command.message)
            case cmd.StartAgent():
                ports.trainer.start(command.probe, command.gpus)
            case cmd.KillAgent():
                ports.trainer.kill(command.reason, hung=command.hung)
            case cmd.Tell():
                ports.trainer.tell(command.message)
            case cmd.Train():
                self._train(command)
            case cmd.Fetch():
                self._fetch(command)
            case cmd.Adopt():
                self._adopt(command)
            case cmd.DropBlob():
                self.receiver.cancel(COORDINATOR, command.sha)
                store.blobs.remove(command.sha)
            case cmd.DropWork():
                store.drop_work(command.identity)
            case cmd.Tidy():
                store.tidy(command.identities, command.shas)
            case cmd.Sample():
                ports.sample_every(command.seconds)
            case cmd.RaiseEpoch():
                store.raise_epoch(command.epoch)
            case cmd.Note():
                log.log(_LEVELS[command.level], "%s", command.text)
            case cmd.Leave():
                self._flush()
                ports.transport.stop(graceful=True)
                self.left = True
            case _:
                self._placer.perform(command)

    def _train(self, order: cmd.Train) -> None:
        store, work = self.ports.store, order.assignment
        folder, adapter = store.work_folder(identity_of(work)), store.blobs.path(work.adapter.sha)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            self._untold(work, "internal", f"{folder}: {error.strerror}")
            return
        if adapter is None:
            self._untold(work, "adapter", "the global adapter vanished from the disk")
            return
        self.ports.trainer.tell(orders.train(order, self.settings, store, adapter, self.sender.max_chunk))

    def _untold(self, work: messages.Assignment, kind: Literal["adapter", "internal"], reason: str) -> None:
        """The session takes its agent to be at work that nobody told it of: it ends as the agent would end it."""
        failed = protocol.Failed(job=work.job, round=work.round, attempt=work.attempt, kind=kind, reason=reason)
        self._failed.append(ev.AgentFailed(now=self.ports.clock(), failed=failed))

    def _fetch(self, command: cmd.Fetch) -> None:
        now, ref = self.ports.clock(), command.ref
        try:
            there = self.receiver.want(COORDINATOR, ref, command.chunk, now)
        except (NoRoom, RemoteError) as error:
            self.step(ev.AdapterLost(now=now, sha=ref.sha, reason=str(error), room=isinstance(error, NoRoom)))
            return
        if there:
            self.step(ev.AdapterStored(now=now, sha=ref.sha))
        elif not self.state.connected:
            self.receiver.cancel_peer(COORDINATOR)  # the next session asks for it

    def _adopt(self, command: cmd.Adopt) -> None:
        """Move a finished update among the blobs; after a crash it may have been moved already."""
        store = self.ports.store
        if store.blobs.path(command.sha) is not None:
            return
        reason = "its digest is another"
        try:
            if store.blobs.adopt(store.work_folder(command.identity) / UPDATE_FILE).sha == command.sha:
                return
        except (OSError, NoRoom) as error:
            reason = str(error)
        self.step(ev.OfferLost(now=self.ports.clock(), sha=command.sha, reason=reason))

    # ---- agent

    def _on_agent(self, spoke: AgentSpoke) -> None:
        now = self.ports.clock()
        match self.ports.trainer.digest(spoke):
            case None:
                return
            case AgentEnded() as end:
                self.step(ev.AgentGone(now=now, reason=end.reason, out_of_memory=end.out_of_memory))
            case protocol.Probed() as probed:
                self.step(ev.AgentProbed(now=now, probed=probed))
            case protocol.Beat():
                self.step(ev.AgentBeat(now=now))
            case protocol.StepOut() as out:
                name = topics.UP_STEP.name(self.settings.fleet, device=self.settings.device)
                self.ports.transport.publish(base.Outgoing(topics.UP_STEP, name, out.packet))
            case protocol.Progressed() as progressed:
                self.step(ev.AgentBeat(now=now, progressed=progressed))
            case protocol.Trained() as trained:
                self.step(ev.AgentTrained(now=now, trained=trained))
            case protocol.Failed() as failed:
                self.step(ev.AgentFailed(now=now, failed=failed))
            case protocol.Evaluated() as evaluated:
                self.step(ev.AgentEvaluated(now=now, evaluated=evaluated))
            case protocol.Unfit() as unfit:
                self.step(ev.AgentUnfit(now=now, unfit=unfit))

    # ---- messages

    def _on_received(self, received: base.Received) -> None:
        parsed = topics.parse(received.name)
        if parsed is None or parsed.fleet != self.settings.fleet or parsed.device not in ("", self.settings.device):
            log.warning("foreign message on %s", received.name)
            return
        try:
            self._dispatch(parsed, received)
        except DecodeError as error:
            log.warning("message on %s refused: %s", received.name, error)

    def _dispatch(self, parsed: topics.Parsed, received: base.Received) -> None:
        now, payload, topic = self.ports.clock(), received.payload, parsed.topic
        if topic is topics.DOWN_CHUNK:
            self._on_chunk(parsed, payload)
        elif topic is topics.DOWN_STEP:
            self.ports.trainer.tell(protocol.StepIn(packet=payload))
        elif topic is topics.DOWN_BLOB:
            self._on_blob(unpack(payload, cast(type[messages.BlobMessage], messages.BlobMessage)))
        elif topic is topics.ASSIGN:
            assign = unpack(payload, messages.Assign) if payload else messages.Assign(term=self.state.journal.term)
            self.step(ev.AssignReceived(now=now, assign=assign))
        elif topic is topics.RELEASE:
            # Empty: taken from the broker, which says nothing of what is to be in use.
            if payload:
                self.step(ev.ReleaseReceived(now=now, message=unpack(payload, release_messages.Release)))
        elif topic is topics.COMMAND:
            self.step(ev.CommandReceived(now=now, command=unpack(payload, messages.Command)))
        elif topic is topics.STATE and payload:
            self.step(ev.OwnStateSeen(now=now, state=unpack(payload, messages.DeviceState)))
        elif topic is topics.COORD_STATE and payload:
            seen = unpack(payload, messages.CoordState)
            self.step(ev.CoordinatorSeen(now=now, coordinator=parsed.coordinator, state=seen))

    def _on_chunk(self, parsed: topics.Parsed, payload: bytes) -> None:
        now = self.ports.clock()
        arrival = self.receiver.on_chunk(COORDINATOR, parsed.sha, parsed.index, payload, now)
        if arrival.kind == "complete":
            self.step(ev.AdapterStored(now=now, sha=parsed.sha))
        elif arrival.kind in ("corrupt", "no_room"):
            room = arrival.kind == "no_room"
            self.step(ev.AdapterLost(now=now, sha=parsed.sha, reason=arrival.reason, room=room))

    def _on_blob(self, message: messages.BlobMessage) -> None:
        now = self.ports.clock()
        match message:
            case Want():
                missing = self.sender.on_want(COORDINATOR, message)
                if missing is None:
                    self.step(ev.Wanted(now=now, sha=message.sha))
                elif self.ports.store.blobs.path(message.sha) is None:
                    self._send(topics.UP_BLOB, missing)
                    self.step(ev.OfferLost(now=now, sha=message.sha, reason="its file is gone"))
                else:
                    # `Missing` would make the coordinator refuse an update that is here.
                    self.step(ev.WantUnfit(now=now, sha=message.sha, reason=missing.reason))
            case Done():
                self.sender.cancel(message.sha)
                self.step(ev.Settled(now=now, done=message))
            case Missing():
                if self.receiver.on_missing(COORDINATOR, message.sha):
                    self.step(ev.AdapterLost(now=now, sha=message.sha, reason=message.reason))
            case Manifest():
                log.warning("a coordinator offers nothing: manifest ignored")
            case _:
                assert_never(message)

    # ---- out

    def _send(self, topic: topics.Topic, message: object) -> None:
        name = topic.name(self.settings.fleet, device=self.settings.device)
        self._waiting.append(base.Outgoing(topic, name, pack(message), token=name))

    def _flush(self) -> None:
        transport = self.ports.transport
        publish_waiting(transport, self._waiting)
        room = transport.room() - CONTROL_ROOM if self.state.connected else 0
        for chunk in self.sender.take(room) if room > 0 else []:
            name = topics.UP_CHUNK.name(
                self.settings.fleet, device=self.settings.device, sha=chunk.sha, index=chunk.index
            )
            transport.publish(base.Outgoing(topics.UP_CHUNK, name, chunk.data))
        transport.pump()


_TOPICS: dict[type[Any], topics.Topic] = {
    messages.DeviceState: topics.STATE,
    messages.DeviceInfo: topics.INFO,
    messages.Load: topics.LOAD,
    messages.Ack: topics.ACK,
    messages.Progress: topics.PROGRESS,
    messages.Manifest: topics.UP_BLOB,
    release_messages.ReleaseState: topics.RELEASE_STATE,
}
