"""The coordinator's only loop: events in, `round_machine.step`, records to disk, commands performed.

It has no clock and no thread of its own: the service feeds it from a queue, a simulation from a virtual clock.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, cast

from typing_extensions import assert_never

from coordinator import performing
from coordinator.adapters.event_log import EventLog, LogUnavailable
from coordinator.adapters.worker import Supervised, Top, Worker, WorkerSpoke
from coordinator.core import events as ev
from coordinator.core import releases
from coordinator.core.job import Job, apply
from coordinator.core.records import RoundCommitted
from coordinator.core.release_records import ReleaseEnded, ReleaseRecord
from coordinator.core.releases import Release
from coordinator.core.round_machine import step
from coordinator.core.turn import State, Waits
from coordinator.settings import CoordinatorSettings
from shared import fields, messages, topics
from shared.blob_folder import BlobFolder
from shared.blob_sender import BlobSender
from shared.blobs import BlobReceiver
from shared.codec import pack, unpack
from shared.errors import DecodeError
from shared.ids import is_name
from shared.messages import CoordState, Done, Missing, Want
from shared.transport import base
from shared.transport.outlet import publish_waiting

log = logging.getLogger(__name__)
LOG_RETRY_S = 1.0
PRESENCE_S = 30.0
"""The coordinator's presence is said again so often: a broker may drop what it acknowledged, and devices hold their
updates back until they hear of a coordinator."""
CONTROL_ROOM = 64
"""Places in the transport's queue that chunks leave free for control messages."""


@dataclass(frozen=True)
class Finished:
    """Work done off the loop is through; `event` goes into the machine."""

    event: ev.AnyEvent


@dataclass(frozen=True)
class Call:
    """Something another thread wants done on the loop (the HTTP API)."""

    run: Callable[[], None]


@dataclass
class Ports:
    """The edges the runtime works through."""

    transport: base.Transport
    log: EventLog
    blobs: BlobFolder
    worker: Worker
    clock: Callable[[], float]
    wall: Callable[[], float]
    post: Callable[[Any], None]
    offload: Callable[[Callable[[], ev.AnyEvent], Callable[[Finished], None]], None]
    top: Top | None = None
    """Of split learning; None: there is none here."""


class Runtime:
    """One coordinator. `handle` and `tick` run on the owner's thread only."""

    def __init__(self, settings: CoordinatorSettings, ports: Ports) -> None:
        self.settings = settings
        self.ports = ports
        self.term = ports.log.next_term()
        self._recent: deque[set[str]] = deque(maxlen=settings.keep_rounds)
        """Blobs of the latest committed rounds."""
        jobs, released = _replay(ports.log, self._recent)
        self.state = State(
            waits=waits_of(settings),
            term=self.term,
            jobs=jobs,
            releases=released,
        )
        self.receiver = BlobReceiver(ports.blobs, credit_bytes=settings.credit_bytes, retry_s=settings.waits.retry_s)
        self.sender = BlobSender(ports.blobs, fields.MAX_CHUNK_BYTES)
        self.connected = False
        self.problem = ""
        self._waiting: deque[base.Outgoing] = deque()
        self._performer = performing.Performer(self)
        self._started = False
        self._unwritten: deque[ev.AnyEvent] = deque()
        self._retry_at = 0.0
        self._present_at = 0.0

    # ---- in

    def handle(self, event: object) -> None:
        """Take one event of any edge, then let time pass and send what is due."""
        match event:
            case base.Received():
                try:
                    self._on_received(event)
                finally:
                    # What we can't handle now we can't handle later; unacknowledged, it would block the session.
                    self.ports.transport.ack(event)
            case base.Connected():
                self._on_connected(event)
            case base.Disconnected():
                self.connected = False
                self.problem = event.reason
                self.step(ev.BrokerLost(**self.now()))
                log.warning("disconnected from the broker: %s", event.reason)
            case base.TransportFailed():
                self.problem = event.reason
                log.error("the broker refuses us: %s", event.reason)
            case base.Published():
                if event.reason:
                    log.error("the broker refused a message (%s): %s", event.token, event.reason)
            case Finished():
                self.step(event.event)
            case WorkerSpoke():
                self._workers()[-1 if event.top else 0].on_spoke(event)
            case Call():
                event.run()
            case _:
                log.error("unknown event %s", type(event).__name__)
        self.tick()

    def tick(self) -> None:
        """Let time pass: deadlines, re-requests, queued messages."""
        now = self.ports.clock()
        if not self._started:
            self._started = True
            self.step(ev.Started(now=now, ts=self.ports.wall()))
        if self._unwritten and now >= self._retry_at:
            self.step(self._unwritten.popleft())
        try:
            while self.step(ev.Tick(now=now, ts=self.ports.wall())):
                pass  # a decision may make the next one due: committed, so plan
        finally:
            self._send_due(now)

    def _workers(self) -> list[Supervised]:
        top = self.ports.top
        return [self.ports.worker] if top is None else [self.ports.worker, top]

    def _send_due(self, now: float) -> None:
        """Even where a decision failed: nobody else should wait for it."""
        for worker in self._workers():
            worker.tick(now)
        if self.connected and now - self._present_at >= PRESENCE_S:
            self._say_presence(online=True)
        for device, want in self.receiver.due(now):
            self.send(topics.DOWN_BLOB, want, device=device)
        self._flush()

    def reconfigure(self, settings: CoordinatorSettings) -> None:
        """Take over new settings; what they change of identity, broker and folders is for a new process."""
        self.settings = settings
        for worker in self._workers():
            worker.limit_silence(settings.waits.worker_silence_s)
        self.step(ev.Reconfigured(waits=waits_of(settings), **self.now()))

    def step(self, event: ev.AnyEvent) -> bool:
        """One decision: durable records first, then commands. Whether anything was written down."""
        result = step(self.state, event)
        if result.records:
            try:
                self.ports.log.append(result.records)
            except LogUnavailable as error:
                self._on_unwritten(event, error)
                return False
            self.problem = ""
            for record in result.records:
                log.info("%s", performing.line(record), extra=performing.fields(record))
        before, self.state = self.state, result.state
        for command in result.commands:
            self._performer.perform(command)
        for record in result.records:
            if isinstance(record, RoundCommitted):
                self._recent.append(performing.referenced(before.jobs[record.job]))
            if isinstance(record, RoundCommitted | ReleaseEnded):
                self._collect_garbage()
        return bool(result.records)

    def _on_unwritten(self, event: ev.AnyEvent, error: LogUnavailable) -> None:
        """The state did not move: what would have been decided is decided again once the disk takes it."""
        log.error("the event log can't be written, trying again: %s", error)
        self.problem = str(error)
        self._retry_at = self.ports.clock() + LOG_RETRY_S
        # Who asked for something is told that nothing was begun, so nothing may be.
        if not isinstance(event, ev.Tick | ev.Request):
            self._unwritten.append(event)

    # ---- out

    def send(self, topic: topics.Topic, message: object, **parts: str) -> None:
        """Publish a control message; waits in memory while the transport's queue is full."""
        name = topic.name(self.settings.fleet, **parts)
        self._waiting.append(base.Outgoing(topic, name, pack(message), token=name))

    def clear(self, topic: topics.Topic, **parts: str) -> None:
        """Take what the broker retains there."""
        name = topic.name(self.settings.fleet, **parts)
        self._waiting.append(base.Outgoing(topic, name, b"", token=name))

    def forget(self, device: str) -> None:
        """Take `device` out of the fleet: what the broker retains of it goes, an assignment too."""
        for topic in (topics.ASSIGN, topics.INFO, topics.STATE):
            self.clear(topic, device=device)
        self._forget_session(device)
        self.step(ev.Decommissioned(device=device, **self.now()))

    def stop(self) -> None:
        """Say goodbye and end the worker."""
        self._say_presence(online=False)
        self._flush()
        for worker in self._workers():
            worker.stop()
        self.ports.transport.stop(graceful=True)

    def now(self) -> dict[str, float]:
        """The two clocks, for building events."""
        return {"now": self.ports.clock(), "ts": self.ports.wall()}

    def _flush(self) -> None:
        transport = self.ports.transport
        publish_waiting(transport, self._waiting)
        room = transport.room() - CONTROL_ROOM if self.connected else 0
        for chunk in self.sender.take(room) if room > 0 else []:
            name = topics.DOWN_CHUNK.name(self.settings.fleet, device=chunk.peer, sha=chunk.sha, index=chunk.index)
            transport.publish(base.Outgoing(topics.DOWN_CHUNK, name, chunk.data))
        transport.pump()

    def _say_presence(self, *, online: bool) -> None:
        self._present_at = self.ports.clock()
        state = CoordState(online=online, term=self.term, ts=self.ports.wall())
        self.send(topics.COORD_STATE, state, coordinator=self.settings.name)

    # ---- messages

    def _on_connected(self, event: base.Connected) -> None:
        self.connected, self.problem = True, ""
        self.receiver.limit_packet(event.max_packet)
        self.sender.limit_packet(event.max_packet)
        chunk = min(fields.MAX_CHUNK_BYTES, self.receiver.max_chunk)
        self.step(ev.BrokerFound(chunk=chunk, **self.now()))
        self._say_presence(online=True)

    def _on_received(self, received: base.Received) -> None:
        parsed = topics.parse(received.name)
        if parsed is None or parsed.fleet != self.settings.fleet or not is_name(parsed.device):
            self._count("foreign messages", received.name, "no such topic")
            return
        try:
            self._dispatch(parsed, received)
        except DecodeError as error:
            self._count("undecodable messages", received.name, str(error))

    def _dispatch(self, parsed: topics.Parsed, received: base.Received) -> None:
        device = parsed.device
        if parsed.topic is topics.UP_CHUNK:
            self._on_chunk(parsed, received.payload)
        elif parsed.topic is topics.UP_BLOB:
            self._on_blob(device, unpack(received.payload, cast(type[messages.BlobMessage], messages.BlobMessage)))
        elif parsed.topic.retain and not received.payload:
            self._forget_session(device)
            self.step(ev.Decommissioned(device=device, **self.now()))
        else:
            message: Any = unpack(received.payload, cast(type[Any], parsed.topic.message))
            known = self.state.fleet.get(device)
            if known is not None and message.epoch > known.epoch:
                self._forget_session(device)
            self.step(ev.FromDevice(device=device, message=message, **self.now()))

    def _on_blob(self, device: str, message: messages.BlobMessage) -> None:
        match message:
            case messages.Manifest():
                self.step(ev.FromDevice(device=device, message=message, **self.now()))
                return
            case Want():
                missing = self.sender.on_want(device, message)
                if missing is not None:
                    self.send(topics.DOWN_BLOB, missing, device=device)
            case Missing():
                if self.receiver.on_missing(device, message.sha):
                    reason = f"the device lost the update: {message.reason}"
                    self.step(ev.UpdateLost(device=device, sha=message.sha, reason=reason, **self.now()))
            case Done():
                pass
            case _:
                assert_never(message)
        self.step(ev.Heard(device=device, **self.now()))

    def _forget_session(self, device: str) -> None:
        """A device in a new session has forgotten what it was asked for and what it asked for."""
        self.receiver.cancel_peer(device)
        self.sender.cancel_peer(device)

    def _on_chunk(self, parsed: topics.Parsed, payload: bytes) -> None:
        now = self.now()
        arrival = self.receiver.on_chunk(parsed.device, parsed.sha, parsed.index, payload, now["now"])
        self.step(ev.Heard(device=parsed.device, **now))
        match arrival.kind:
            case "complete":
                for device in arrival.peers:
                    self.step(ev.UpdateStored(device=device, sha=parsed.sha, **now))
            case "corrupt":
                for device in arrival.peers:
                    self.step(ev.UpdateLost(device=device, sha=parsed.sha, reason=arrival.reason, **now))
            case "unexpected":
                self._count("unexpected chunks", parsed.device, arrival.reason)
            case "no_room":
                log.error("no room for an update, it will be announced again: %s", arrival.reason)
            case "more":
                pass
            case _:
                assert_never(arrival.kind)

    def _count(self, what: str, where: str, why: str) -> None:
        counters = self.state.counters
        self.state = replace(self.state, counters={**counters, what: counters.get(what, 0) + 1})
        log.warning("%s: %s: %s", what, where, why)

    # ---- blobs

    def _collect_garbage(self) -> None:
        """Drop blobs that neither a live job, nor one of the last rounds, nor a release refers to."""
        making = releases.under_way(self.state.releases)
        packing = making is not None and making.phase == "packing" and making.blob is None
        if packing or any(job.phase in ("preparing", "folding") for job in self.state.jobs.values()):
            return  # what is being made may be in the store already, and nothing refers to it yet
        keep = {manifest.sha for manifest in self.state.announced.values()}.union(*self._recent)
        keep |= releases.kept_blobs(self.state.releases, self.settings.keep_releases)
        for job in self.state.jobs.values():
            keep |= performing.referenced(job)
        for sha in self.ports.blobs.digests() - keep:
            self.ports.blobs.remove(sha)


def waits_of(settings: CoordinatorSettings) -> Waits:
    """The waits of the machine."""
    waits = settings.waits
    return Waits(
        silent_s=waits.silent_s, absent_s=waits.absent_s, fresh_s=waits.cautious_periods * waits.period_s,
        gather_s=waits.gather_s, repeat_s=waits.repeat_s, grace_s=waits.grace_s, remind_s=waits.remind_s,
        release_look_s=waits.release_look_s, release_remind_s=waits.release_remind_s, patience=waits.patience,
    )  # fmt: skip


def _replay(event_log: EventLog, recent: deque[set[str]]) -> tuple[dict[str, Job], dict[str, Release]]:
    """All jobs and releases; the blobs of each committed round go to `recent`."""
    jobs: dict[str, Job] = {}
    released: dict[str, Release] = {}
    for record in event_log.replay():
        if isinstance(record, ReleaseRecord):
            released[record.release] = releases.apply(released.get(record.release), record)
            continue
        if isinstance(record, RoundCommitted):
            recent.append(performing.referenced(jobs[record.job]))
        jobs[record.job] = apply(jobs.get(record.job), record)
    return jobs, released
