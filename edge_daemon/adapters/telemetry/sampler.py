"""The thread that reads the load and hands it on.

Host and GPUs are each read by a thread of their own with a budget (`budgeted`): a load goes out on time whatever hangs,
and says what does. While the GPUs' driver hangs their readings are absent; while the host's hang the last ones stand.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Collection
from typing import Protocol

from edge_daemon.adapters.telemetry.budgeted import Budgeted, Unanswered
from edge_daemon.adapters.telemetry.host import HostReader, HostReading
from shared.messages import GpuLoad, Load

log = logging.getLogger(__name__)
GPU, HOST = "gpu", "host"


class GpuSource(Protocol):
    """What the sampler needs of a GPU reader."""

    def read(self, own: Collection[int] = ()) -> list[GpuLoad]:
        """The load of each GPU now; may hang."""


class HostSource(Protocol):
    """What the sampler needs of a host reader."""

    def read(self) -> HostReading:
        """The load of the host now; may hang."""


class Sampler:
    """Reads every `period_s` seconds and calls `sink(load)` from its own thread; `sink` must only enqueue.

    `budget_s`: how long either reader may take. `Load.epoch`, `seq`, `phase`, `job`, `round` and `attempt` are left at
    their zero for the session machine.
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
        source = host or HostReader()
        self._host: Budgeted[None, HostReading] = Budgeted(HOST, lambda _: source.read(), budget_s)
        self._last: HostReading | None = None
        self._gpus = Budgeted(GPU, gpus.read, budget_s) if gpus is not None else None
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
        """End the thread; returns once it is done (a hung reader's thread is left behind)."""
        self._stopping = True
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join()
        self._host.stop()
        if self._gpus is not None:
            self._gpus.stop()

    def read(self) -> Load:
        """One reading. Not for use beside the running thread: rates are differences to the reading before."""
        hung: dict[str, float] = {}
        try:
            self._last = self._host.read(None)
        except Unanswered:
            hung[HOST] = self._host.silent_s
        host = self._last
        gpus = self._read_gpus(host.own_pids if host is not None else frozenset(), hung)
        if host is None:
            return Load(epoch=0, seq=0, gpus=gpus, hung=hung)
        return Load(
            epoch=0, seq=0, cores=host.cores, own_cores=host.own_cores, foreign_cores=host.foreign_cores,
            throttled=host.throttled, memory_available=host.memory_available, memory_limit=host.memory_limit,
            own_memory=host.own_memory, temperature_c=host.temperature_c, on_battery=host.on_battery, gpus=gpus,
            host=host.host, hung=hung,
        )  # fmt: skip

    def _read_gpus(self, own: Collection[int], hung: dict[str, float]) -> list[GpuLoad]:
        if self._gpus is None:
            return []
        try:
            return self._gpus.read(own)
        except Unanswered:
            hung[GPU] = self._gpus.silent_s
        except Exception:  # noqa: BLE001 - a reader's fault must not cost the host's readings, too
            log.exception("reading the GPUs failed")
        return []

    def _run(self) -> None:
        while not self._stopping:
            self._wake.clear()
            try:
                self._sink(self.read())
            except Exception:  # noqa: BLE001 - the loop of a thread: one failed reading must not end telemetry
                log.exception("a reading failed")
            self._wake.wait(self._period_s)
