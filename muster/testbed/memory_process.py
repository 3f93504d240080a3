"""A process of a fleet in memory: a life on a folder and a virtual clock, ended at any moment by a kill."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from coordinator.core.records import UpdateAdmitted
from edge_daemon import protocol
from shared.blob_folder import BlobFolder
from shared.ids import digest_of
from shared.settings import BrokerSettings
from shared.transport.memory import MemoryTransport
from shared.transport.memory_network import MemoryNetwork

TICK_S = 0.5
EPOCH_WALL = 1_800_000_000.0
"""Wall clock at virtual second 0."""


class Crash(Exception):
    """The process dies here (an injected fault): never caught by a program under test."""


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
    tick_s = TICK_S

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
            self._again(self.tick_s)
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


def work_of(order: protocol.Train) -> Work:
    """The identity of an order."""
    work = order.assignment
    return Work(work.job, work.round, work.attempt, order.device)
