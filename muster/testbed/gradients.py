"""Real gradients for virtual devices: the real agent on one base per bit width, in this or in other processes.

What a device's round gives is a function of its order (assignment, rows, global adapter) and of the number of steps,
and of nothing else; so it may be computed by anyone, before the virtual clock has come that far, and does not depend
on how many processes there are: each computes on one thread.
"""

from __future__ import annotations

import signal
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from msgspec.structs import replace

from edge_daemon import protocol
from edge_daemon.training.agent import Agent
from edge_daemon.training.control import Control, Stopped
from muster.testbed.runs import RunFailed
from shared.jobs import Bits
from shared.processes import die_with_parent

_NEVER = 10**9
_DATA_SETS = 1000
"""Shares of devices that stay tokenised."""


@dataclass(frozen=True)
class Order:
    """One device's work, and how many of its steps are done before its time is up."""

    train: protocol.Train
    steps: int


class WorkerDied(RunFailed):
    """A process that computes gradients ended by itself."""


class _Clockless(Control):
    """A control that nobody speaks to, without a thread: work ends after `left` steps."""

    def __init__(self) -> None:
        self.beat_s, self.deadline, self.paused_s = 5.0, None, 0.0
        self.left = 0

    def send(self, message: Any) -> None:
        """Nobody listens."""

    def beat(self, what: str) -> None:
        """Nobody listens."""

    def poll(self, what: str) -> None:  # noqa: ARG002 - an agent says what it does
        """Raises `Stopped` once the steps are done."""
        if self.left <= 0:
            raise Stopped("time")

    def progress(self, make: Callable[[], Any]) -> None:  # noqa: ARG002 - nobody listens
        """Count a step."""
        self.left -= 1


class Agents:
    """The agents of this process: one for each bit width, so that every base stays loaded."""

    def __init__(self) -> None:
        self._agents: dict[Bits, tuple[Agent, _Clockless]] = {}

    def train(self, order: Order) -> protocol.Trained | protocol.Failed:
        """Do the work; its update lies at the order's `update_path`."""
        train = order.train
        import torch

        agent, control = self._agent(train.assignment.work.bits)
        control.left = order.steps
        # An evaluation in this process takes more.
        torch.set_num_threads(1)
        # A checkpoint would be written for nobody.
        training = replace(train.assignment.training, checkpoint_every=_NEVER)
        return agent.train(replace(train, assignment=replace(train.assignment, training=training), train_for_s=0.0))

    def _agent(self, bits: Bits) -> tuple[Agent, _Clockless]:
        if bits not in self._agents:
            control = _Clockless()
            agent = Agent(control, data_sets=_DATA_SETS)
            agent.probe(protocol.Probe(datasets={}, threads=1))
            self._agents[bits] = agent, control
        return self._agents[bits]


_agents: Agents | None = None


def _open() -> None:
    """Begin a process; Ctrl-C is for the one that started it, and its end is this one's end, however it comes."""
    global _agents  # noqa: PLW0603 - a process of the pool has one
    die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _agents = Agents()


def _train(order: Order) -> protocol.Trained | protocol.Failed:
    assert _agents is not None
    return _agents.train(order)


class Workers:
    """Computes orders in `count` processes (0: in this one). A context manager: leaving it ends them."""

    def __init__(self, count: int) -> None:
        self._here = Agents() if count == 0 else None
        self._pool = ProcessPoolExecutor(count, get_context("spawn"), initializer=_open) if count else None
        self._ahead: dict[str, Future[protocol.Trained | protocol.Failed]] = {}

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def begin(self, order: Order) -> None:
        """Compute `order` ahead of its time, if there are processes for it."""
        key = _key(order)
        if self._pool is not None and key not in self._ahead:
            self._ahead[key] = self._pool.submit(_train, order)

    def result(self, order: Order) -> protocol.Trained | protocol.Failed:
        """What `order` gives; waits for it."""
        if self._here is not None:
            return self._here.train(order)
        self.begin(order)
        try:
            return self._ahead.pop(_key(order)).result()
        except BrokenProcessPool as error:
            raise WorkerDied(f"a process that computes gradients ended: {error}") from error

    def forget(self, device: str) -> None:
        """Nothing that was begun for `device` is needed any more."""
        for key in [key for key in self._ahead if key.startswith(f"{device}/")]:
            # One that runs already can't be stopped; should the same be asked for again, this is its answer.
            if self._ahead[key].cancel():
                del self._ahead[key]

    def forget_all(self) -> None:
        """Nothing that was begun is needed any more: waits for what runs, so that its files can be removed."""
        for future in self._ahead.values():
            if not future.cancel():
                future.exception()
        self._ahead.clear()


def _key(order: Order) -> str:
    work, train = order.train.assignment, order.train
    return f"{train.device}/{work.job}/{work.round}/{work.attempt}/{order.steps}/{train.batch_limit}"


def scratch(folder: Path, order: Order) -> Path:
    """Where an order's update is written until its virtual end."""
    return folder / _key(order).replace("/", ".")
