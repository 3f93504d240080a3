"""An agent whose time is charged by the device model while its gradients are computed for real (`gradients`).

It obeys and answers on the virtual clock as the subprocess does, between two steps and through the daemon's queue. The
clock alone decides how many steps are done; the update is made of exactly those once the last one has ended. So what a
device delivers does not depend on when, or in which process, the gradients were computed.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import msgspec

from edge_daemon import protocol
from edge_daemon.adapters.trainer import AgentEnded, AgentSpoke
from muster.testbed.clocked_process import ClockedProcess, Later
from muster.testbed.gradients import Order, Workers, scratch
from muster.testbed.virtual_device import VirtualDevice
from muster.testbed.virtual_split import Bench, VirtualSplit
from shared.messages import DatasetFacts, UpdateFacts

_PROGRESS_S = 1.0


@dataclass
class _Task:
    order: protocol.Train
    batch: int
    halved: int
    """Largest batch that fits, where that was found while it ran; 0: not met."""
    begun: float
    load_s: float
    steps: list[float] = field(default_factory=list)
    said: float = -1e9
    paused_at: float | None = None
    paused_s: float = 0.0
    resting: bool = False
    """A pause has begun: the step that was under way has ended."""
    under_way: tuple[float, float] | None = None
    """When the step under way began, and its seconds; None: there is none, or it was told to end before them."""
    stop: Literal["", "drain", "discard"] = ""


@dataclass
class Splitting:
    """What a device of a job with split learning has beside: agents to take, and the labels that it tells."""

    bench: Bench
    labels: dict[str, int]


class VirtualTrainer(ClockedProcess):
    """`Trainer` of a virtual device. `rows`: of its data set."""

    def __init__(
        self, device: VirtualDevice, rows: int, workers: Workers, folder: Path, post: Callable[[AgentSpoke], None],
        later: Later, clock: Callable[[], float], splitting: Splitting | None = None,
    ) -> None:  # fmt: skip
        super().__init__(post, later)
        self._splitting = splitting
        self._device = device
        self._rows = rows
        self._workers = workers
        self._folder = folder
        self._clock = clock
        self._beat_s = 5.0
        self._task: _Task | None = None
        self._split: VirtualSplit | None = None

    # ---- what the daemon asks

    def start(self, probe: protocol.Probe) -> None:
        """Start the agent and probe it."""
        self._rise()
        self._task, self._beat_s = None, probe.beat_s
        self._device.begin_process()
        self._later(self._device.probe_s, lambda: self._say(self._probed(probe)))

    def tell(self, message: protocol.ToAgent) -> None:
        """Send it a message."""
        if not self._alive:
            return
        task = self._task
        match message:
            case protocol.Train() if message.assignment.work.split is not None:
                self._begin_split(message)
            case protocol.Train():
                self._begin(message)
            case protocol.Pause() | protocol.Resume() | protocol.Stop() | protocol.StepIn() if self._split is not None:
                self._split.hear(message)
            case protocol.Pause() if task is not None and task.paused_at is None:
                # The step under way is finished first.
                task.paused_at = self._clock()
            case protocol.Resume() if task is not None and task.paused_at is not None:
                self._resume(task)
            case protocol.Stop(after_step=True) if task is not None:
                self._end_now(task)
            case protocol.Stop() if task is not None:
                task.stop = "discard" if message.discard else "drain"
                if task.resting:
                    self._later(0.0, lambda: self._between(task))
            case _:
                pass

    def _end_now(self, task: _Task) -> None:
        """Have its time be over: at once, or with what is charged of the step under way (`_within`)."""
        spent = max(self._clock() - task.begun, 2 * protocol.NO_TIME_S)
        if 0 < task.order.train_for_s <= spent:
            return
        task.order = msgspec.structs.replace(task.order, train_for_s=spent)
        if task.resting and task.steps:
            self._later(0.0, lambda: self._between(task))
        elif task.under_way is not None and task.steps:
            begun, took = task.under_way
            task.under_way = None
            goes_on, counts = self._charged(took, self._clock() - begun)
            left = begun + goes_on - self._clock()
            self._later(max(0.0, left), lambda: self._ended(task, took) if counts else self._between(task))

    # ---- the agent

    def _gone(self) -> None:
        self._task = None
        if self._split is not None:
            self._split.end()
            self._split = None
        self._device.end_process(self._clock())

    def _probed(self, probe: protocol.Probe) -> protocol.Probed:
        facts = DatasetFacts(rows=self._rows, labels=self._splitting.labels if self._splitting else {})
        return protocol.Probed(
            bits=list(self._device.bits), datasets=dict.fromkeys(probe.datasets, facts),
            agent_bytes=self._device.idle_bytes, hardware=f"virtual {self._device.model.kind.name}",
            flops=self._device.flops,
        )  # fmt: skip

    # ---- work

    def _begin(self, order: protocol.Train) -> None:
        placed = self._placed(order)
        if placed is None:
            return
        batch, halved, load_s = placed
        steps = self._device.resumed(order.assignment)
        task = _Task(order, batch, halved, begun=self._clock(), load_s=load_s, steps=steps)
        self._task = task
        self._later(load_s, lambda: self._between(task))
        self._later(self._beat_s, self._beat)
        expected = self._expected(task)
        if expected:
            self._workers.begin(self._order(order, task.halved, expected))

    def _placed(self, order: protocol.Train) -> tuple[int, int, float] | None:
        """(batch, largest one that fits or 0, seconds to load the base); None: it does not fit, and that was said."""
        work, now = order.assignment.work, self._clock()
        batch = _batch(order)
        halved = order.batch_limit if batch < work.batch else 0
        load_s = self._device.load_base(work.bits)
        while not self._device.fits(work, batch, now):
            if self._device.kernel_kills:
                self._later(load_s, lambda: self._die(AgentEnded("out of memory", out_of_memory=True)))
                return None
            if batch == 1:
                self._later(load_s, lambda: self._fail(order, "memory", "a batch of one sample does not fit"))
                return None
            batch = halved = batch // 2
        return batch, halved, load_s

    # ---- split learning

    def _begin_split(self, order: protocol.Train) -> None:
        placed = self._placed(order)
        if placed is None:
            return
        assert self._splitting is not None  # or no split work would be planned
        _, halved, load_s = placed
        given = msgspec.structs.replace(
            order, batch_limit=halved or order.batch_limit, digests_path=str(self._folder / "digests.json")
        )

        def done(answer: protocol.Trained | protocol.Failed) -> None:
            if self._split is not work:
                return
            self._split = None
            self._device.rest(self._clock())
            if isinstance(answer, protocol.Trained):
                answer = msgspec.structs.replace(answer, facts=self._split_facts(given, answer.facts, load_s))
            self._say(answer)

        def beat() -> None:
            if self._split is work:
                self._say(protocol.Beat(what="training"))
                self._later(self._beat_s, beat)

        work = self._split = VirtualSplit(
            given, self._device, self._splitting.bench, self._later, self._clock, self._say, done
        )
        self._later(load_s, work.strand.start)
        self._later(self._beat_s, beat)

    def _split_facts(self, order: protocol.Train, real: UpdateFacts, load_s: float) -> UpdateFacts:
        work = order.assignment.work
        return msgspec.structs.replace(
            real, load_s=load_s, peak_bytes=self._device.peak_bytes(work, real.batch),
            base_bytes=self._device.base_bytes(work.bits), cores_used=self._device.cores_used(self._clock()),
        )  # fmt: skip

    def ahead(self, order: protocol.Train) -> None:
        """Let the gradients of work that is about to come be computed already, where nothing can change them."""
        work = order.assignment.work
        if not order.train_for_s and self._device.would_fit(work, _batch(order), self._clock()):
            self._workers.begin(self._order(order, order.batch_limit, work.most_steps))

    def _order(self, train: protocol.Train, limit: int, steps: int) -> Order:
        # Most is named by the device's own folders, which a process that computes ahead of the clock must not touch.
        order = Order(msgspec.structs.replace(train, batch_limit=limit, train_for_s=0.0), steps)
        path = str(scratch(self._folder, order))
        return Order(
            msgspec.structs.replace(
                order.train, update_path=path, checkpoint_dir=f"{path}.none",
                digests_path=str(self._folder / "digests.json"),
            ),
            steps,
        )  # fmt: skip

    def _expected(self, task: _Task) -> int:
        """Steps that will be done if nobody interferes."""
        wanted, limit = task.order.assignment.work.most_steps, task.order.train_for_s
        if not limit:
            return wanted
        now, heat = task.begun + task.load_s, self._device.heat_at(task.begun)
        done, counts = len(task.steps), True
        while counts and done < wanted and (now - task.begun < limit or not done):
            took = self._device.step_s(task.order.assignment, task.batch, done, now, heat)
            goes_on, counts = self._within(task, done, now, took)
            now, heat = now + goes_on, self._device.heat_after(heat, goes_on)
            done += counts
        return done

    def _within(self, task: _Task, done: int, now: float, took: float) -> tuple[float, bool]:
        """(seconds that the next step goes on for, whether it counts) of `took`. One that is charged as several
        (`Kind.charge`) ends, as they would, where the time is over, and counts where half of them were done; the first
        in any case."""
        limit = task.order.train_for_s
        left = limit - (now - task.begun)
        return (took, True) if not limit or not done or took <= left else self._charged(took, left)

    def _charged(self, took: float, left: float) -> tuple[float, bool]:
        charge = int(self._device.model.kind.charge)
        charged = min(charge, max(1, math.ceil(left / took * charge)))
        return took * charged / charge, 2 * charged >= charge

    def _beat(self) -> None:
        if self._task is not None:
            self._say(protocol.Beat(what="training"))
            self._later(self._beat_s, self._beat)

    def _resume(self, task: _Task) -> None:
        assert task.paused_at is not None
        rested, since = task.resting, task.paused_at
        task.resting, task.paused_at = False, None
        if rested:
            task.paused_s += self._clock() - since
            self._between(task)

    def _between(self, task: _Task) -> None:
        """Before a step, where orders are obeyed."""
        if task is not self._task:
            return
        order, done = task.order, len(task.steps)
        spent = self._clock() - task.begun
        if task.stop == "discard":
            self._drop(task, "told to discard")
        elif task.stop == "drain":
            self._finish(task, "drain") if done else self._drop(task, "stopped before the first step")
        elif 0 < order.train_for_s <= spent and done:
            self._finish(task, order.assignment.work.ended(done))
        elif done >= order.assignment.work.most_steps:
            self._finish(task, "complete")
        elif task.paused_at is not None:
            task.paused_at, task.resting = self._clock(), True
            self._device.rest(self._clock())
        else:
            self._device.work(self._clock())
            heat = self._device.heat_at(self._clock())
            took = self._device.step_s(order.assignment, task.batch, done, self._clock(), heat)
            goes_on, counts = self._within(task, done, self._clock(), took)
            step = task.under_way = (self._clock(), took)
            self._later(goes_on, lambda: self._over(task, step, counts=counts))

    def _over(self, task: _Task, step: tuple[float, float], *, counts: bool) -> None:
        """A step has gone on for as long as it was to, unless it was told to end before; it tells the seconds of a
        whole one."""
        if task.under_way is not step:
            return
        task.under_way = None
        if counts:
            self._ended(task, step[1])
        else:
            self._between(task)

    def _ended(self, task: _Task, took: float) -> None:
        """A step has ended."""
        if task is not self._task:
            return
        task.steps.append(took)
        done, assignment = len(task.steps), task.order.assignment
        if done % assignment.training.checkpoint_every == 0:
            self._device.save(assignment, task.steps)
        if self._clock() - task.said >= _PROGRESS_S:
            task.said = self._clock()
            self._say(
                protocol.Progressed(
                    # The gradients may not be there yet: the loss is told with the update.
                    step=done, steps=assignment.work.told_steps(done), samples=done * task.batch, loss=0.0,
                    samples_per_s=task.batch / took,
                )
            )  # fmt: skip
        self._between(task)

    def _finish(self, task: _Task, ended: Literal["complete", "time", "drain"]) -> None:
        self._task = None
        self._device.rest(self._clock())
        self._device.drop_checkpoint()
        order = task.order
        computed = self._order(order, task.halved, len(task.steps))
        made = self._workers.result(computed)
        self._workers.forget(order.device)
        if isinstance(made, protocol.Failed):
            self._say(made)
            return
        Path(order.update_path).parent.mkdir(parents=True, exist_ok=True)
        Path(computed.train.update_path).replace(order.update_path)
        self._say(msgspec.structs.replace(made, facts=self._facts(task, made.facts, ended)))

    def _facts(self, task: _Task, real: UpdateFacts, ended: Literal["complete", "time", "drain"]) -> UpdateFacts:
        work = task.order.assignment.work
        return msgspec.structs.replace(
            real, step_s=statistics.median(task.steps), train_s=sum(task.steps), load_s=task.load_s,
            paused_s=task.paused_s, peak_bytes=self._device.peak_bytes(work, task.batch),
            base_bytes=self._device.base_bytes(work.bits), cores_used=self._device.cores_used(self._clock()),
            batch_limit=task.halved, ended=ended,
        )  # fmt: skip

    def _drop(self, task: _Task, reason: str) -> None:
        self._workers.forget(task.order.device)
        self._device.rest(self._clock())
        self._device.drop_checkpoint()
        self._task = None
        self._fail(task.order, "stopped", reason)

    def _fail(self, order: protocol.Train, kind: Literal["memory", "stopped"], reason: str) -> None:
        work = order.assignment
        self._say(protocol.Failed(job=work.job, round=work.round, attempt=work.attempt, kind=kind, reason=reason))


def _batch(order: protocol.Train) -> int:
    batch = order.assignment.work.batch
    return min(batch, order.batch_limit) if order.batch_limit else batch
