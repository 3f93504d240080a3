"""An agent on a virtual clock: the daemon's `Trainer` over least squares in this process.

It obeys and answers as a subprocess does (between two steps, through the daemon's queue), really trains, and can be
told to crash or to hang.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import msgspec

from edge_daemon import protocol
from edge_daemon.adapters.trainer import AgentEnded, AgentSpoke
from edge_daemon.training import merging
from muster.testbed import least_squares, least_squares_release
from muster.testbed.clocked_process import ClockedProcess, Later
from muster.testbed.least_squares import Ended, Rows, Training
from shared import adapter as adapters
from shared.errors import MusterError, UserError
from shared.files import write_whole
from shared.held_out import places
from shared.ids import digest_of
from shared.jobs import Bits
from shared.messages import DatasetFacts

_PROGRESS_S = 0.5


@dataclass
class Behaviour:
    """How an agent behaves; may be changed while it runs."""

    step_s: float = 0.05
    probe_s: float = 0.2
    bits: tuple[Bits, ...] = (16, 32)
    fits: int = 2**31
    """Largest batch that fits; a larger one ends the process as the kernel does when memory runs out."""
    crash_at: int | None = None
    """Die before this step (from 0), once."""
    hang_at: int | None = None
    """Say nothing any more before this step, once."""
    forge: Callable[[protocol.Train, bytes], bytes] | None = None
    """Puts other bytes in the place of an update; its digest is of those."""
    crash_at_merge: bool = False
    """Die when told to merge, once."""
    evaluate_s: float = 0.3
    """What measuring a release takes."""
    measured: Callable[[protocol.Evaluate, protocol.FromAgent], protocol.FromAgent | None] = lambda _order, said: said
    """What it answers to the measuring of a release; None: it dies over it."""
    every_time: bool = False
    """Crash or hang each time, not only once."""


@dataclass
class Watch:
    """What a fleet wants to know of its agents; called with (order) and (order, update's bytes)."""

    ordered: Callable[[protocol.Train], None] = lambda _order: None
    trained: Callable[[protocol.Train, bytes], None] = lambda _order, _data: None


@dataclass
class _Task:
    order: protocol.Train
    training: Training
    saved: Path
    begun: float
    last: float
    """When the step under way began."""
    said: float = -1e9
    paused_at: float | None = None
    paused_s: float = 0.0
    steps: list[float] = field(default_factory=list)
    stop: Literal["", "drain", "discard"] = ""


class MemoryTrainer(ClockedProcess):
    """`Trainer` whose agent lives on `later` and `clock`; what it says is handed to `post`."""

    def __init__(
        self,
        rows: Rows,
        behaviour: Behaviour,
        post: Callable[[AgentSpoke], None],
        later: Later,
        clock: Callable[[], float],
        watch: Watch | None = None,
    ) -> None:
        super().__init__(post, later)
        self._rows = rows
        self._behaviour = behaviour
        self._clock = clock
        self._watch = watch or Watch()
        self._beat_s = 5.0
        self._task: _Task | None = None
        self._ordered: protocol.Train | None = None

    # ---- what the daemon asks

    def start(self, probe: protocol.Probe) -> None:
        """Start the agent and probe it."""
        self._rise()
        self._task = None
        self._beat_s = probe.beat_s
        self._later(self._behaviour.probe_s, lambda: self._say(self._probed(probe)))

    def tell(self, message: protocol.ToAgent) -> None:
        """Send it a message."""
        if not self._alive:
            return
        match message:
            case protocol.Train():
                self._ordered = message
                self._watch.ordered(message)
                self._begin(message)
            case protocol.Merge():
                self._later(0.0, lambda: self._merge(message))
            case protocol.Evaluate():
                self._later(self._behaviour.evaluate_s, lambda: self._evaluate(message))
            case protocol.Pause() if self._task is not None:
                self._pause(self._task)
            case protocol.Resume() if self._task is not None:
                self._resume(self._task)
            case protocol.Stop(after_step=True) if self._task is not None:
                spent = max(self._clock() - self._task.begun, 2 * protocol.NO_TIME_S)
                self._task.order = msgspec.structs.replace(self._task.order, train_for_s=spent)
                if self._task.paused_at is not None:
                    self._later(0.0, self._step)
            case protocol.Stop() if self._task is not None:
                self._task.stop = "discard" if message.discard else "drain"
                if self._task.paused_at is not None:
                    self._later(0.0, self._step)
            case _:
                pass

    # ---- the agent

    def _gone(self) -> None:
        self._task = None

    def _probed(self, probe: protocol.Probe) -> protocol.Probed:
        facts = DatasetFacts(rows=len(self._rows) - len(places(len(self._rows), probe.hold_out)))
        return protocol.Probed(
            bits=list(self._behaviour.bits), datasets=dict.fromkeys(probe.datasets, facts), agent_bytes=2**26,
            hardware="virtual",
        )  # fmt: skip

    def _begin(self, order: protocol.Train) -> None:
        work = order.assignment
        batch = min(work.work.batch, order.batch_limit) if order.batch_limit else work.work.batch
        if batch > self._behaviour.fits:
            self._later(self._behaviour.step_s, lambda: self._die(AgentEnded("out of memory", out_of_memory=True)))
            return
        try:
            start = adapters.read_file(Path(order.adapter_path))
            rows = least_squares_release.learned(self._rows, order.hold_out)
            training = least_squares.begin(work, start, rows, batch=batch, part=order.part, parts=order.parts)
        except MusterError as error:
            self._fail(order, "data" if isinstance(error, UserError) else "adapter", str(error))
            return
        saved = Path(order.checkpoint_dir) / f"checkpoint-{order.part}-{order.parts}.npz"
        if saved.exists():
            training.restore(saved.read_bytes())
        self._task = _Task(order, training, saved, begun=self._clock(), last=self._clock())
        self._later(self._behaviour.step_s, self._step)
        self._later(self._beat_s, self._beat)

    def _merge(self, order: protocol.Merge) -> None:
        if self._behaviour.crash_at_merge:
            self._behaviour.crash_at_merge = False
            self._die(AgentEnded("exit status 70", out_of_memory=False))
            return
        merged = merging.merge(order)
        assert self._ordered is not None
        self._watch.trained(self._ordered, Path(order.update_path).read_bytes())
        self._say(merged)

    def _evaluate(self, order: protocol.Evaluate) -> None:
        known = order.data_path != ""
        said = self._behaviour.measured(order, least_squares_release.evaluate(order, self._rows if known else None))
        if said is None:
            self._die(AgentEnded("exit status 70", out_of_memory=False))
        else:
            self._say(said)

    def _beat(self) -> None:
        if self._task is not None:
            self._say(protocol.Beat(what="training"))
            self._later(self._beat_s, self._beat)

    def _pause(self, task: _Task) -> None:
        if task.paused_at is None:
            task.paused_at = self._clock()

    def _resume(self, task: _Task) -> None:
        if task.paused_at is not None:
            task.paused_s += self._clock() - task.paused_at
            task.paused_at, task.last = None, self._clock()
            self._later(self._behaviour.step_s, self._step)

    def _step(self) -> None:
        """The end of a step, where orders are obeyed."""
        task = self._task
        if task is None:
            return
        if task.stop == "discard":
            self._task = None
            self._fail(task.order, "stopped", "told to discard")
        elif task.stop == "drain":
            self._finish(task, "drain")
        elif 0 < task.order.train_for_s <= self._clock() - task.begun and task.training.step_done:
            self._finish(task, task.order.assignment.work.ended(task.training.step_done))
        elif task.paused_at is not None:
            return
        elif task.training.finished:
            self._finish(task, "complete")
        elif not self._faulty(task):
            self._advance(task)

    def _advance(self, task: _Task) -> None:
        loss = task.training.step()
        task.steps.append(self._clock() - task.last)
        task.last = self._clock()
        if task.training.step_done % task.order.assignment.training.checkpoint_every == 0:
            write_whole(task.saved, task.training.save(), fsync=False)
        if self._clock() - task.said >= _PROGRESS_S:
            task.said = self._clock()
            self._say(
                protocol.Progressed(
                    step=task.training.step_done,
                    steps=task.order.assignment.work.told_steps(task.training.step_done),
                    samples=task.training.drawn,
                    loss=loss,
                    samples_per_s=task.training.batch / max(task.steps[-1], 1e-9),
                )  # fmt: skip
            )
        self._later(0.0 if task.training.finished else self._behaviour.step_s, self._step)

    def _faulty(self, task: _Task) -> bool:
        behaviour, step = self._behaviour, task.training.step_done
        if behaviour.crash_at == step:
            behaviour.crash_at = step if behaviour.every_time else None
            self._die(AgentEnded("exit status 70", out_of_memory=False))
            return True
        if behaviour.hang_at == step:
            behaviour.hang_at = step if behaviour.every_time else None
            self._task = None  # nothing is scheduled any more: not even a beat
            return True
        return False

    def _finish(self, task: _Task, ended: Ended) -> None:
        self._task = None
        order, training = task.order, task.training
        data = training.update(order.device)
        if self._behaviour.forge is not None:
            data = self._behaviour.forge(order, data)
        Path(order.update_path).parent.mkdir(parents=True, exist_ok=True)
        Path(order.update_path).write_bytes(data)
        if order.parts == 1:
            self._watch.trained(order, data)
        times = sorted(task.steps)
        facts = least_squares.facts_of(
            training, ended=ended, step_s=times[len(times) // 2] if times else 0.0, train_s=sum(task.steps),
            paused_s=task.paused_s, batch_limit=order.batch_limit, cores_used=1.0,
        )  # fmt: skip
        work = order.assignment
        self._say(
            protocol.Trained(
                job=work.job, round=work.round, attempt=work.attempt, sha=digest_of(data), size=len(data), facts=facts
            )
        )

    def _fail(self, order: protocol.Train, kind: Literal["data", "adapter", "stopped"], reason: str) -> None:
        work = order.assignment
        self._say(protocol.Failed(job=work.job, round=work.round, attempt=work.attempt, kind=kind, reason=reason))
