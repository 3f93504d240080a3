"""The thread that reads the load and hands it on.

GPUs are read by a second thread with a budget: while a hung driver holds it, the host's readings go on and the GPUs'
are absent.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Collection
from typing import Protocol

from edge_daemon.adapters.telemetry.host import HostReader, HostReading
from shared.messages import GpuLoad, Load

log = logging.getLogger(__name__)


class GpuSource(Protocol):
    """What the sampler needs of a GPU reader."""

    def read(self, own: Collection[int] = ()) -> list[GpuLoad]:
        """The load of each GPU now; may hang."""


class HostSource(Protocol):
    """What the sampler needs of a host reader."""

    def read(self) -> HostReading:
        """The load of the host now."""

    def tree(self) -> set[int]:
        """Process ids that are ours."""


class Sampler:
    """Reads every `period_s` seconds and calls `sink(load)` from its own thread; `sink` must only enqueue.

    `Load.epoch`, `seq`, `phase`, `job`, `round` and `attempt` are left at their zero for the session machine.
    """

    def __init__(
        self,
        sink: Callable[[Load], None],
        *,
        host: HostSource | None = None,
        gpus: GpuSource | None = None,
        period_s: float = 10.0,
        budget_s: float = 2.0,
    ) -> None:
        self._sink = sink
        self._host = host or HostReader()
        self._gpus = _Budgeted(gpus, budget_s) if gpus is not None else None
        self._period_s = period_s
        self._wake = threading.Event()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="telemetry", daemon=True)

    def start(self) -> None:
        """Begin; the first reading is handed on at once."""
        self._thread.start()

    def set_period(self, seconds: float) -> None:
        """Read every `seconds` from now on; a changed period begins with a reading at once."""
        if seconds != self._period_s:
            self._period_s = seconds
            self._wake.set()

    def stop(self) -> None:
        """End the thread; returns once it is done (a hung driver's thread is left behind)."""
        self._stopping = True
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join()
        if self._gpus is not None:
            self._gpus.stop()

    def read(self) -> Load:
        """One reading. Not for use beside the running thread: rates are differences to the reading before."""
        host = self._host.read()
        gpus = self._gpus.read(self._host.tree()) if self._gpus is not None else []
        return Load(
            epoch=0, seq=0, cores=host.cores, own_cores=host.own_cores, foreign_cores=host.foreign_cores,
            throttled=host.throttled, memory_available=host.memory_available, memory_limit=host.memory_limit,
            own_memory=host.own_memory,
            temperature_c=host.temperature_c, on_battery=host.on_battery, gpus=gpus,
        )  # fmt: skip

    def _run(self) -> None:
        while not self._stopping:
            self._wake.clear()
            try:
                self._sink(self.read())
            except Exception:  # noqa: BLE001 - the loop of a thread: one failed reading must not end telemetry
                log.exception("a reading failed")
            self._wake.wait(self._period_s)


class _Budgeted:
    """Asks a GPU source from a thread of its own, for at most `budget_s` seconds."""

    def __init__(self, source: GpuSource, budget_s: float) -> None:
        self._source = source
        self._budget_s = budget_s
        self._asked: queue.SimpleQueue[Collection[int] | None] = queue.SimpleQueue()
        self._answers: queue.SimpleQueue[list[GpuLoad]] = queue.SimpleQueue()
        self._hung = False
        self._thread: threading.Thread | None = None

    def read(self, own: Collection[int]) -> list[GpuLoad]:
        """The GPUs' load, or [] where they did not answer in time."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="telemetry-gpu", daemon=True)
            self._thread.start()
        if self._hung:
            try:
                self._answers.get_nowait()
            except queue.Empty:
                return []
            log.warning("the GPU driver answers again")
            self._hung = False
        self._asked.put(own)
        try:
            return self._answers.get(timeout=self._budget_s)
        except queue.Empty:
            log.warning("the GPU driver did not answer within %.1f s; going on without its readings", self._budget_s)
            self._hung = True
            return []

    def stop(self) -> None:
        """End the thread once it is free."""
        self._asked.put(None)

    def _run(self) -> None:
        while (own := self._asked.get()) is not None:
            try:
                answer = self._source.read(own)
            except Exception:  # noqa: BLE001 - the loop of a thread: it must answer, or GPUs count as hung for ever
                log.exception("reading the GPUs failed")
                answer = []
            self._answers.put(answer)
