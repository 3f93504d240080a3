"""Split learning on virtual devices: the real agent in a strand for each, on the virtual clock, its steps over the
simulated network.

Time is charged by the device model where the agent computes: a third of a step for the way forward through its blocks,
the rest for the way back. What it sends takes its link's time, as all that a device sends.
"""

from __future__ import annotations

import queue
import time
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from edge_daemon import protocol
from edge_daemon.training.agent import Agent
from edge_daemon.training.control import KEPT_PACKETS, Control
from edge_daemon.training.split_loop import Sent, SplitLoop
from muster.testbed.clocked_process import Later
from muster.testbed.strand import Strand
from muster.testbed.virtual_device import VirtualDevice
from shared.jobs import Bits
from shared.modeling.data import Batch, DataStore

FORWARD = 1 / 3
"""Of a step's compute."""
_DATA_SETS = 1000
"""Shares of devices that stay tokenised."""


class VirtualControl(Control):
    """A control on the virtual clock: it waits in its strand, and is told by calls of `hear`."""

    def __init__(self) -> None:
        self.beat_s, self.deadline, self.paused_s = 5.0, None, 0.0
        self._inbox: queue.Queue[protocol.ToAgent | None] = queue.Queue()
        self._waiting: list[protocol.ToAgent | None] = []
        self._steps: deque[bytes] = deque(maxlen=KEPT_PACKETS)
        self._said = self._progressed = 0.0
        self._work: VirtualSplit | None = None

    def attach(self, work: VirtualSplit | None) -> None:
        """From now on it belongs to `work`; None: to nobody."""
        self._work, self.paused_s, self.deadline = work, 0.0, None
        self._said = self._progressed = 0.0
        self._inbox = queue.Queue()
        self._waiting.clear()
        self._steps.clear()

    def now(self) -> float:
        """Virtual seconds."""
        return self._work.now() if self._work is not None else time.monotonic()

    def stamp(self) -> int:
        """By the virtual clock: equal seeds, equal bytes."""
        return int(1000 * self.now()) % 2**31

    def send(self, message: Any) -> None:
        """Say it to the daemon."""
        if self._work is not None:
            if not isinstance(message, protocol.StepOut):
                self._said = self.now()
            self._work.say(message)

    def hear(self, message: protocol.ToAgent) -> None:
        """Of the owner: the daemon says something."""
        self._inbox.put(message)

    def _heard(self, seconds: float) -> protocol.ToAgent | None:
        assert self._work is not None
        if self._inbox.empty():
            self._work.strand.rest(seconds)
        return self._inbox.get_nowait()

    def spend(self, share: float, samples: int) -> None:
        """Let the time of this share of a step over so many samples pass."""
        assert self._work is not None
        self._work.compute(share, samples)


class ChargedLoop(SplitLoop):
    """A `SplitLoop` whose compute takes the device model's time."""

    control: VirtualControl

    def _kept_secret(self) -> bytes:
        # No secret here, so that equal seeds give equal bytes.
        return f"{self.assignment.seed}/{self.data.rows}".encode()

    def _features(self, values: dict[str, torch.Tensor], batch: Batch) -> torch.Tensor:
        hidden = super()._features(values, batch)
        self.control.spend(FORWARD, len(batch.targets))
        return hidden

    def _gradients(
        self, sent: Sent, trained: list[torch.Tensor], outer: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:  # fmt: skip
        found = super()._gradients(sent, trained, outer)
        self.control.spend(1.0 - FORWARD, sent.samples)
        return found


class Known(NamedTuple):
    """What the first agent proved, and the shares that they read."""

    bits: list[Bits]
    notes: dict[str, str]
    store: DataStore | None


class VirtualAgent(Agent):
    """The real agent, with a loop whose time is charged."""

    control: VirtualControl

    def __init__(self, known: Known | None) -> None:
        self.control = VirtualControl()
        super().__init__(self.control, data_sets=_DATA_SETS)
        if known is None:
            self.probe(protocol.Probe(datasets={}, threads=1))
        else:
            self._bits, self._notes, self._store = known

    @property
    def known(self) -> Known:
        """What goes for all agents."""
        return Known(self._bits, self._notes, self._store)

    def forget(self) -> None:
        """Let its base go: it is as work that was cut left it."""
        self._loaded = None

    def _split_loop(self) -> type[SplitLoop]:
        return ChargedLoop


class Bench:
    """Agents to be had: each holds the lower part of a base, so there are as many as train at once."""

    def __init__(self) -> None:
        self._known: Known | None = None
        self._free: list[VirtualAgent] = []

    def take(self) -> VirtualAgent:
        """An agent that is free, or a new one."""
        if self._free:
            return self._free.pop()
        agent = VirtualAgent(self._known)
        self._known = agent.known
        return agent

    def give(self, agent: VirtualAgent) -> None:
        """It is free again."""
        agent.control.attach(None)
        self._free.append(agent)


class VirtualSplit:
    """One piece of split work on a virtual device. `say`: to the daemon; `done`: with the agent's answer."""

    def __init__(
        self, order: protocol.Train, device: VirtualDevice, bench: Bench, later: Later, clock: Callable[[], float],
        say: Callable[[protocol.FromAgent], None], done: Callable[[protocol.Trained | protocol.Failed], None],
    ) -> None:  # fmt: skip
        self.order = order
        self.now = clock
        self.say = say
        self._device = device
        self._done = done
        self._bench = bench
        self._agent = bench.take()
        self._agent.control.attach(self)
        self._steps = 0
        self.strand = Strand(self._program, later)

    def hear(self, message: protocol.ToAgent) -> None:
        """The daemon says something to the agent."""
        self._agent.control.hear(message)
        self.strand.wake()

    def end(self) -> None:
        """The agent's process dies."""
        if self.strand.ended:
            return
        if self.strand.started:
            self.strand.cut()
            self._agent.forget()
        self._bench.give(self._agent)

    def compute(self, share: float, samples: int) -> None:
        """Of the strand: so much of a step passes; what the daemon says meanwhile waits for its end."""
        self._device.work(self.now())
        heat = self._device.heat_at(self.now())
        until = self.now() + share * self._device.step_s(self.order.assignment, samples, self._steps, self.now(), heat)
        while (left := until - self.now()) > 0:
            self.strand.rest(left)
        self._device.rest(self.now())
        self._steps += share > FORWARD

    def _program(self) -> None:
        torch.set_num_threads(1)
        answer = self._agent.train(self.order)
        self._bench.give(self._agent)
        self._done(answer)
