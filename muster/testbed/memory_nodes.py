"""The nodes of a fleet in memory: the real runtimes of coordinator and daemon on a virtual clock, each of which can be
killed (all it had in memory is gone) and started again on its folder."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import msgspec

from coordinator import runtime as coordinator_runtime
from coordinator.adapters.event_log import LogUnavailable, SqliteEventLog
from coordinator.adapters.worker import Answer, Reply, Top, WorkerSpoke
from coordinator.core import events as ev
from coordinator.core.records import AnyRecord, UpdateAdmitted
from coordinator.settings import CoordinatorSettings
from coordinator.workers import protocol as worker_wire
from edge_daemon import protocol
from edge_daemon import runtime as edge_runtime
from edge_daemon.adapters.store import Store
from edge_daemon.adapters.team import TeamTrainer
from edge_daemon.adapters.trainer import AgentSpoke, Trainer
from edge_daemon.core.state import Journal, Machine
from edge_daemon.placing import Placed
from edge_daemon.settings import EdgeSettings
from muster.testbed import numpy_worker
from muster.testbed.least_squares import Rows
from muster.testbed.memory_process import EPOCH_WALL, Node, World, work_of
from muster.testbed.memory_trainer import Behaviour, MemoryTrainer, Watch
from shared import topics
from shared.blob_folder import BlobFolder
from shared.codec import pack
from shared.ids import digest_of
from shared.messages import CoordState, DeviceState, Load
from shared.transport.base import Outgoing
from shared.transport.memory import MemoryTransport

FLEET = "memory"
COORDINATOR = "coord-1"
DATASET = "points"
_GIB = 1024**3
_NOON = 12 * 60


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


class Answers(Protocol):
    """What a worker of the coordinator does, without its pipe."""

    def answer(self, request: worker_wire.Prepare | worker_wire.Evaluate) -> worker_wire.FromWorker:
        """Serve one request."""


class _Worker:
    """`Worker` in this process: answers after `work_s`."""

    def __init__(self, node: CoordinatorNode, worker: Answers) -> None:
        self._node = node
        self._worker = worker

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

    def limit_silence(self, silence_s: float) -> None:
        """It is never silent."""

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
            transport=self._transport, log=WatchedLog(self._sqlite, self), blobs=self.blobs,
            worker=_Worker(self, self.worker()), top=self.top(),
            clock=lambda: self.now, wall=lambda: EPOCH_WALL + self.now, post=self.post, offload=self._offload,
        )  # fmt: skip
        self.runtime = coordinator_runtime.Runtime(self.settings, ports)
        self._transport.start(self.post)

    def worker(self) -> Answers:
        """What answers for the model worker; asked at each start."""
        return numpy_worker.Worker()

    def top(self) -> Top | None:
        """The top worker; asked at each start."""
        return None

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

    node: DeviceNode

    def save(self, journal: Journal) -> None:
        """Write the journal durably."""
        if self.node.disk_full:
            raise OSError(28, "No space left on device")
        super().save(journal)
        self.node.on_save(journal)


class DeviceNode(Node):
    """A device's daemon; what it trains with, and what it reads of its machine, is for subclasses to say."""

    def __init__(self, world: World, folder: Path, settings: EdgeSettings) -> None:
        super().__init__(world, settings.device, folder)
        self.disk_full = False
        self.place_s = 0.05
        """What reading or writing the files of a release takes."""
        self.on_save: Callable[[Journal], None] = lambda _journal: None
        """Called after each save; may raise `Crash`."""
        self.settings = settings
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

    def agent(self, post: Callable[[AgentSpoke], None]) -> Trainer:
        """An agent that posts what it says."""
        raise NotImplementedError

    def machine(self) -> Machine:
        """The static facts of the machine."""
        raise NotImplementedError

    def load(self) -> Load:
        """A reading of its telemetry."""
        raise NotImplementedError

    def _boot(self) -> None:
        self._store = FaultyStore(self.folder, fsync=False)
        self._store.node = self
        self._transport = MemoryTransport(
            self.world.network, self.client_id, self._store.next_epoch, will=self._will, settings=self.settings.broker
        )
        self._transport.subscribe(topics.device_filters(FLEET, self.client_id))
        ports = edge_runtime.Ports(
            transport=self._transport, store=self._store, trainer=TeamTrainer(self.agent, self.post),
            clock=lambda: self.now, wall=lambda: EPOCH_WALL + self.now, minute=lambda: _NOON,
            sample_every=self._sample_every, offload=self._offload,
        )  # fmt: skip
        self.runtime = edge_runtime.Runtime(self.settings, ports, boot_id="boot-1", version="test")
        self._transport.start(self.post)
        self.post(edge_runtime.Examined(self.machine()))

    def _offload(self, work: Callable[[], Placed]) -> None:
        self.later(self.place_s, lambda: self.runtime.handle(work()))

    def _sample_every(self, seconds: float) -> None:
        self._reads += 1
        number = self._reads

        def read() -> None:
            if number == self._reads:
                self.later(seconds, read)
                self.runtime.handle(edge_runtime.Sampled(self.load()))

        self.later(0.0, read)

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


class DaemonNode(DeviceNode):
    """One device whose agent does least squares."""

    def __init__(self, world: World, folder: Path, member: Member) -> None:
        super().__init__(
            world,
            folder,
            EdgeSettings(
                **{
                    "fleet": FLEET, "device": member.device, "state_dir": str(folder), "data": {DATASET: "in memory"},
                    "broker": world.broker, **member.settings,
                }
            ),
        )  # fmt: skip
        self.member = member

    def agent(self, post: Callable[[AgentSpoke], None]) -> Trainer:
        """An agent that does least squares."""
        return MemoryTrainer(self.member.rows, self.member.behaviour, post, self.later, lambda: self.now, self._watch())

    def machine(self) -> Machine:
        """So many cores, 4 GiB."""
        return Machine(hardware="virtual", cores=self.member.cores, memory_bytes=4 * _GIB)

    def load(self) -> Load:
        """What other programs use is the member's to say."""
        return Load(
            epoch=0, seq=0, cores=self.member.cores, foreign_cores=self.member.foreign_cores,
            memory_available=3 * _GIB, memory_limit=4 * _GIB,
        )  # fmt: skip

    def _watch(self) -> Watch:
        def ordered(order: protocol.Train) -> None:
            self.world.history.note_ordered(work_of(order))

        def trained(order: protocol.Train, data: bytes) -> None:
            self.world.history.trained.setdefault(work_of(order), set()).add(digest_of(data))

        return Watch(ordered, trained)
