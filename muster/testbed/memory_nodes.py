"""The nodes of a fleet in memory: the real runtimes of coordinator and daemon on a virtual clock, each of which can be
killed (all it had in memory is gone) and started again on its folder."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from coordinator import runtime as coordinator_runtime
from coordinator.adapters.event_log import LogUnavailable, SqliteEventLog
from coordinator.adapters.worker import Answer, Reply, WorkerSpoke
from coordinator.core import events as ev
from coordinator.core.records import AnyRecord, UpdateAdmitted
from coordinator.settings import CoordinatorSettings
from coordinator.workers import protocol as worker_wire
from edge_daemon import protocol
from edge_daemon import runtime as edge_runtime
from edge_daemon.adapters.store import Store
from edge_daemon.adapters.team import TeamTrainer
from edge_daemon.core.state import Journal, Machine
from edge_daemon.settings import EdgeSettings
from muster.testbed import numpy_worker
from muster.testbed.least_squares import Rows
from muster.testbed.memory_trainer import Behaviour, MemoryTrainer, Watch
from shared import topics
from shared.blob_folder import BlobFolder
from shared.codec import pack
from shared.ids import digest_of
from shared.messages import CoordState, DeviceState, Load
from shared.settings import BrokerSettings
from shared.transport.base import Outgoing
from shared.transport.memory import MemoryTransport
from shared.transport.memory_network import MemoryNetwork

FLEET = "memory"
COORDINATOR = "coord-1"
DATASET = "points"
TICK_S = 0.5
EPOCH_WALL = 1_800_000_000.0
_GIB = 1024**3
_NOON = 12 * 60


class Crash(Exception):
    """The process dies here (an injected fault): never caught by a program under test."""


@dataclass
class Member:
    """One device: its data and its nature."""

    device: str
    rows: Rows
    behaviour: Behaviour = field(default_factory=Behaviour)
    cores: float = 4.0
    foreign_cores: float = 0.0
    """Used by other programs; may be changed while the fleet runs."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Fields of `EdgeSettings` other than the defaults."""


class Work(NamedTuple):
    """The identity of one device's work."""

    job: str
    round: int
    attempt: int
    device: str


@dataclass
class History:
    """What really happened, for checkers; nothing of it reaches the programs."""

    ordered: list[tuple[Work, bool]] = field(default_factory=list)
    """Every training begun, and whether the log held that device's update for it already."""
    trained: dict[Work, set[str]] = field(default_factory=dict)
    """Digests of the updates a device wrote for a piece of work."""
    admitted: list[Work] = field(default_factory=list)
    strange: list[str] = field(default_factory=list)
    """Admitted updates whose bytes on disk are not what their device trained."""

    def note_ordered(self, work: Work) -> None:
        """A training begins."""
        self.ordered.append((work, work in self.admitted))

    def note_admitted(self, record: UpdateAdmitted, blobs: BlobFolder) -> None:
        """An update is in the log."""
        work = Work(record.job, record.round, record.attempt, record.device)
        self.admitted.append(work)
        path = blobs.path(record.blob.sha)
        sha = digest_of(path.read_bytes()) if path is not None else "nothing"
        if sha != record.blob.sha or sha not in self.trained.get(work, set()):
            self.strange.append(f"{work}: {sha} is on disk, {record.blob.sha} was announced")


@dataclass(frozen=True)
class World:
    """What all nodes share."""

    network: MemoryNetwork
    broker: BrokerSettings
    history: History = field(default_factory=History)


class Node:
    """A process: what was meant for a life before a kill never reaches the next one."""

    _transport: MemoryTransport

    def __init__(self, world: World, client_id: str, folder: Path) -> None:
        self.world = world
        self.client_id = client_id
        self.folder = folder
        self.alive = False
        self._life = 0

    @property
    def now(self) -> float:
        """Virtual seconds."""
        return self.world.network.now

    def start(self) -> None:
        """Begin a life on the folder as it is."""
        self._life += 1
        self.alive = True
        with self._mortal():
            self._boot()
        self._again(0.0)

    def kill(self) -> None:
        """End at once, as by a power cut."""
        if self.alive:
            self.alive = False
            self._transport.stop(graceful=False)
            self._close()

    def restart(self, after_s: float = 0.0) -> None:
        """Kill, and start again `after_s` later."""
        self.kill()
        self.world.network.schedule(self.now + after_s, self._revive)

    def post(self, event: object, delay_s: float = 0.0) -> None:
        """Put `event` into the node's queue."""
        self.later(delay_s, lambda: self._handle(event))

    def later(self, seconds: float, call: Callable[[], None]) -> None:
        """Call back after `seconds`, if this life lasts."""
        life = self._life

        def due() -> None:
            if self.alive and life == self._life:
                with self._mortal():
                    call()

        self.world.network.schedule(self.now + seconds, due)

    def _revive(self) -> None:
        if not self.alive:
            self.start()

    def _again(self, seconds: float) -> None:
        def turn() -> None:
            self._again(TICK_S)
            self._tick()

        self.later(seconds, turn)

    @contextlib.contextmanager
    def _mortal(self) -> Iterator[None]:
        try:
            yield
        except Crash:
            self.kill()

    def _boot(self) -> None:
        raise NotImplementedError

    def _close(self) -> None:
        raise NotImplementedError

    def _handle(self, event: object) -> None:
        raise NotImplementedError

    def _tick(self) -> None:
        raise NotImplementedError


class WatchedLog:
    """`EventLog` that tells the history what it holds, and fails on demand."""

    def __init__(self, inner: SqliteEventLog, node: CoordinatorNode) -> None:
        self._inner = inner
        self._node = node

    def append(self, records: Sequence[AnyRecord]) -> None:
        """Write all of `records` durably, or none."""
        node = self._node
        if node.log_full:
            raise LogUnavailable("database or disk is full")
        node.on_append("before", records)
        self._inner.append(records)
        for record in records:
            if isinstance(record, UpdateAdmitted):
                node.world.history.note_admitted(record, node.blobs)
        node.on_append("after", records)

    def replay(self) -> Iterator[AnyRecord]:
        """Every record, in the order written."""
        return self._inner.replay()

    def of_job(self, job: str) -> list[AnyRecord]:
        """The records of one job, in order."""
        return self._inner.of_job(job)

    def next_term(self) -> int:
        """A number larger than any it gave before, durably."""
        return self._inner.next_term()


class _Worker:
    """`Worker` in this process: answers after `work_s`."""

    def __init__(self, node: CoordinatorNode) -> None:
        self._node = node
        self._worker = numpy_worker.Worker()

    def ask(self, question: worker_wire.Prepare | worker_wire.Evaluate, reply: Reply) -> None:
        """Answer `question` on the owner's thread."""

        def answer() -> None:
            given = self._node.fault(question) or self._worker.answer(question)
            if isinstance(given, worker_wire.Evaluated):
                # The only reading of a real clock: without it a run repeats bit for bit.
                metrics = msgspec.structs.replace(given.metrics, seconds=self._node.work_s)
                given = worker_wire.Evaluated(metrics=metrics)
            assert not isinstance(given, worker_wire.WorkerBeat)
            reply(given)

        self._node.post(coordinator_runtime.Call(answer), self._node.work_s)

    def on_spoke(self, event: WorkerSpoke) -> None:
        """There is no subprocess that could speak."""

    def tick(self, now: float) -> None:
        """It never hangs."""

    def stop(self) -> None:
        """Nothing to end."""


class CoordinatorNode(Node):
    """The coordinator. `work_s`: what a fold, a check, an evaluation takes."""

    def __init__(self, world: World, folder: Path, settings: CoordinatorSettings) -> None:
        super().__init__(world, settings.name, folder)
        self.settings = settings
        self.work_s = 0.05
        self.log_full = False
        self.on_append: Callable[[str, Sequence[AnyRecord]], None] = lambda _when, _records: None
        """Called before and after each append; may raise `Crash`."""
        self.fault: Callable[[object], Answer | None] = lambda _question: None
        """What the worker answers to a question, where it is not to be asked itself."""
        self.runtime: coordinator_runtime.Runtime
        self.blobs: BlobFolder

    def _boot(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._sqlite = SqliteEventLog(self.folder / "events.sqlite", fsync=False)
        self.blobs = BlobFolder(self.folder / "blobs", fsync=False)
        self._transport = MemoryTransport(
            self.world.network, self.client_id, lambda: self.runtime.term, will=self._will,
            settings=self.settings.broker,
        )  # fmt: skip
        self._transport.subscribe(topics.coordinator_filters(FLEET))
        ports = coordinator_runtime.Ports(
            transport=self._transport, log=WatchedLog(self._sqlite, self), blobs=self.blobs, worker=_Worker(self),
            clock=lambda: self.now, wall=lambda: EPOCH_WALL + self.now, post=self.post, offload=self._offload,
        )  # fmt: skip
        self.runtime = coordinator_runtime.Runtime(self.settings, ports)
        self._transport.start(self.post)

    def _offload(self, work: Callable[[], ev.AnyEvent], post: Callable[[coordinator_runtime.Finished], None]) -> None:
        self.later(self.work_s, lambda: post(coordinator_runtime.Finished(work())))

    def _will(self, epoch: int) -> Outgoing:
        name = topics.COORD_STATE.name(FLEET, coordinator=self.client_id)
        return Outgoing(topics.COORD_STATE, name, pack(CoordState(online=False, term=epoch)))

    def _close(self) -> None:
        self._sqlite.close()
        self.blobs.close()

    def _handle(self, event: object) -> None:
        self.runtime.handle(event)

    def _tick(self) -> None:
        self.runtime.tick()


class FaultyStore(Store):
    """`Store` whose disk can be full, and where a process can die right after a save."""

    node: DaemonNode

    def save(self, journal: Journal) -> None:
        """Write the journal durably."""
        if self.node.disk_full:
            raise OSError(28, "No space left on device")
        super().save(journal)
        self.node.on_save(journal)


class DaemonNode(Node):
    """One device's daemon with its agent."""

    def __init__(self, world: World, folder: Path, member: Member) -> None:
        super().__init__(world, member.device, folder)
        self.member = member
        self.disk_full = False
        self.on_save: Callable[[Journal], None] = lambda _journal: None
        """Called after each save; may raise `Crash`."""
        self.settings = EdgeSettings(
            **{
                "fleet": FLEET, "device": member.device, "state_dir": str(folder), "data": {DATASET: "in memory"},
                "broker": world.broker, **member.settings,
            }
        )  # fmt: skip
        self.runtime: edge_runtime.Runtime
        self._store: FaultyStore
        self._reads = 0

    @property
    def phase(self) -> str:
        """Of its session machine."""
        return self.runtime.state.phase

    def leave(self) -> None:
        """Ask it to leave, as SIGTERM does."""
        self.post(edge_runtime.Asked())

    def _boot(self) -> None:
        self._store = FaultyStore(self.folder, fsync=False)
        self._store.node = self
        self._transport = MemoryTransport(
            self.world.network, self.client_id, self._store.next_epoch, will=self._will, settings=self.settings.broker
        )
        self._transport.subscribe(topics.device_filters(FLEET, self.client_id))
        watch = self._watch()
        trainer = TeamTrainer(
            lambda post: MemoryTrainer(
                self.member.rows, self.member.behaviour, post, self.later, lambda: self.now, watch
            ),
            self.post,
        )
        ports = edge_runtime.Ports(
            transport=self._transport, store=self._store, trainer=trainer, clock=lambda: self.now,
            wall=lambda: EPOCH_WALL + self.now, minute=lambda: _NOON, sample_every=self._sample_every,
        )  # fmt: skip
        self.runtime = edge_runtime.Runtime(self.settings, ports, boot_id="boot-1", version="test")
        self._transport.start(self.post)
        machine = Machine(hardware="virtual", cores=self.member.cores, memory_bytes=4 * _GIB)
        self.post(edge_runtime.Examined(machine))

    def _watch(self) -> Watch:
        def ordered(order: protocol.Train) -> None:
            self.world.history.note_ordered(work_of(order))

        def trained(order: protocol.Train, data: bytes) -> None:
            self.world.history.trained.setdefault(work_of(order), set()).add(digest_of(data))

        return Watch(ordered, trained)

    def _sample_every(self, seconds: float) -> None:
        self._reads += 1
        number = self._reads

        def read() -> None:
            if number == self._reads:
                self.later(seconds, read)
                self.runtime.handle(edge_runtime.Sampled(self._load()))

        self.later(0.0, read)

    def _load(self) -> Load:
        return Load(
            epoch=0, seq=0, cores=self.member.cores, foreign_cores=self.member.foreign_cores,
            memory_available=3 * _GIB, memory_limit=4 * _GIB,
        )  # fmt: skip

    def _will(self, epoch: int) -> Outgoing:
        name = topics.STATE.name(FLEET, device=self.client_id)
        return Outgoing(topics.STATE, name, pack(DeviceState(s="lost", epoch=epoch, version="test")))

    def _close(self) -> None:
        self._store.close()

    def _handle(self, event: object) -> None:
        self.runtime.handle(event)
        self._end_if_left()

    def _tick(self) -> None:
        self.runtime.tick()
        self._end_if_left()

    def _end_if_left(self) -> None:
        if self.runtime.left and self.alive:
            self.alive = False
            self._close()


def work_of(order: protocol.Train) -> Work:
    """The identity of an order."""
    work = order.assignment
    return Work(work.job, work.round, work.attempt, order.device)
