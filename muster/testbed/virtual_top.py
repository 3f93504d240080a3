"""The top worker of a simulated fleet: the real one, in this process, on the virtual clock and the simulated network.

What it computes takes no time: the server is not what a simulation measures.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from coordinator.adapters.worker import Reply, WorkerSpoke
from coordinator.workers import protocol as wire
from coordinator.workers.top_link import Link
from coordinator.workers.top_worker import TICK_S, TopWorker
from muster.testbed.clocked_process import Later
from shared.settings import BrokerSettings
from shared.transport.base import Transport
from shared.transport.memory import MemoryTransport
from shared.transport.memory_network import MemoryNetwork

THREADS = 1
"""What devices compute on: results must not depend on what ran before."""


class VirtualTop:
    """`Top` in the coordinator's process. `later`: of its node, so that nothing comes after the node's death;
    `answered`: has a reply made on the coordinator's loop."""

    def __init__(self, network: MemoryNetwork, later: Later, answered: Callable[[Callable[[], None]], None]) -> None:
        self._network = network
        self._later = later
        self._answered = answered
        self._run = 0
        self._worker: TopWorker | None = None
        self._reply: Reply | None = None

    # ---- what the coordinator asks

    def ask(self, question: wire.TopRound, reply: Reply) -> None:
        """Conduct a round."""
        self._reply = reply
        if self._worker is None:
            self._start()
        self._turn(question)

    def tell(self, message: wire.TopWithout | wire.TopFinish) -> None:
        """Say something about the round under way."""
        if self._reply is not None:
            self._turn(message)

    def drop(self) -> None:
        """Forget the question."""
        if self._reply is not None:
            self.stop()

    def stop(self) -> None:
        """End it."""
        self._run += 1
        if self._worker is not None:
            self._worker.close()
        self._worker = self._reply = None

    def on_spoke(self, event: WorkerSpoke) -> None:
        """There is no subprocess that could speak."""

    def tick(self, now: float) -> None:
        """It never hangs."""

    def limit_silence(self, silence_s: float) -> None:
        """It is never silent."""

    # ---- the worker's side

    def write(self, message: object) -> None:
        """The worker answers."""
        reply = self._reply
        if isinstance(message, wire.TopTrained | wire.WorkerFailed) and reply is not None:
            self._reply = None
            answer = message
            self._answered(lambda: reply(answer))

    def put(self, event: object) -> None:
        """Its connection brings an event."""
        run = self._run

        def due() -> None:
            if run == self._run:
                self._turn(event)

        self._later(0.0, due)

    def qsize(self) -> int:
        """Nothing waits: it computes in no time."""
        return 0

    def _start(self) -> None:
        self._worker = TopWorker(
            self, Link(self, self._connect, int(1000 * self._network.now) + 1), lambda: self._network.now
        )
        run = self._run

        def tick() -> None:
            if run == self._run:
                self._turn(None)
                self._later(TICK_S, tick)

        tick()

    def _connect(self, broker: BrokerSettings, name: str) -> Transport:
        epochs = iter(range(1, 2**31))
        return MemoryTransport(self._network, name, lambda: next(epochs), clean_start=True, settings=broker)

    def _turn(self, event: object) -> None:
        if self._worker is not None:
            before = torch.get_num_threads()
            torch.set_num_threads(THREADS)
            try:
                self._worker.turn(event)
            finally:
                torch.set_num_threads(before)
