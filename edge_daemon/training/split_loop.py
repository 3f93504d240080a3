"""Split learning on the device: its blocks forward, features out, their gradient in, its blocks backward (MergeSFL,
arXiv 2311.13348).

The device follows the top worker's count of steps (`shared.steps`) and keeps a checkpoint every so many of them, under
their number, so that all can go back to the last number that all hold. With `overlap` the features of the next batch
are computed while the gradient of the last is awaited: with the weights that there are, one step old. The gradient is
then that at those weights, exactly, applied to the newer ones.
"""

from __future__ import annotations

import hashlib
import logging
import os
import statistics
import time
from collections import deque
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
import torch

from edge_daemon.protocol import Progressed
from edge_daemon.training.control import Stopped
from edge_daemon.training.loop import Diverged, Loop, mixed
from edge_daemon.training.step_line import StepLine
from shared import steps, tensors
from shared.errors import DecodeError
from shared.fields import MAX_CHUNK_BYTES
from shared.files import write_whole
from shared.jobs import SplitSpec
from shared.modeling import half, split
from shared.modeling.checkpoint import Numbered
from shared.modeling.data import Batch
from shared.modeling.faults import is_out_of_memory
from shared.modeling.lower import Lower
from shared.modeling.optimizing import advance, restore, state_of
from shared.modeling.remembered import REMEMBERED

log = logging.getLogger(__name__)
HELLO_S = 1.0
_SECRET = "noise.key"


@dataclass
class Sent:
    """A batch whose features are under way. `values`: of what is trained, as they were; `paused_s`: pauses before."""

    step: int
    message: steps.Features
    hidden: torch.Tensor
    values: dict[str, torch.Tensor]
    samples: int
    forward_s: float
    cpu_s: float
    paused_s: float
    sent_at: float = 0.0
    first_at: float = 0.0


@dataclass
class SplitLoop(Loop):
    """A `Loop` whose base is the lower part of the model. `packet`: bytes of the largest packet; `fetch_s`: seconds
    that this round's download took."""

    packet: int = MAX_CHUNK_BYTES
    fetch_s: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        work = self.assignment
        self._line = StepLine(self.control, steps.identity(work.job, work.round, work.attempt), self.packet)
        self._lower = Lower(self.base, self.carried)
        self._checkpoints = Numbered(self.checkpoint_dir, self._work)
        self.again_s = max(2.0, self._split.step_s / 2)
        """Seconds without a gradient after which features are sent again."""
        self.done = 0
        """Steps that the top worker counts as done."""
        self._paused_s = 0.0
        """The agent's pauses as far as `position` holds them."""
        self._secret = self._kept_secret()

    @property
    def _split(self) -> SplitSpec:
        assert self.assignment.work.split is not None
        return self.assignment.work.split

    def run(self) -> str:
        """As `Loop.run`; complete once the top worker's steps are done."""
        self._prepare()
        # How long the first step takes is the other devices' matter, too.
        self.control.heeds_time = True
        self._paused_s = self.control.paused_s
        self.base.model.train()
        try:
            with half.fast_products(self.base.device):
                while (begin := self._begin()) is not None:
                    self._go_to(begin)
                    if self._steps():
                        break
        except Stopped as stop:
            if stop.discard:
                raise
            self._take_latest()
            return stop.ended
        finally:
            self._optimizer.zero_grad(set_to_none=True)
            self.base.model.eval()
        self._take_latest()
        return "complete"

    def save(self) -> None:
        """Write a checkpoint under the number of steps done."""
        self._checkpoints.save(self.done, self.position, state_of(self._optimizer, self.carried))

    # ---- where to go on

    def _kept_secret(self) -> bytes:
        """What the noise on features depends on: the device's own, so that nobody else can draw it again."""
        path = self.checkpoint_dir / _SECRET
        if not path.is_file():
            self.checkpoint_dir.mkdir(parents=True, exist_ok=True)
            write_whole(path, os.urandom(32))
        return path.read_bytes()

    def _take_latest(self) -> None:
        """Work that ends before it was let go on again ends with its last checkpoint."""
        if self.position.step or not (held := [step for step in self._checkpoints.held() if step]):
            return
        self._load(held[-1])
        log.info("ends with its checkpoint of step %d", held[-1])

    def _prepare(self) -> None:
        """See to it that every checkpoint there is one of this work, and that of the start is there."""
        self._checkpoints.check()
        if 0 not in self._checkpoints.held():
            self.save()

    def _begin(self) -> steps.Begin | None:
        """Say hello until the top worker says where to go on; None: the steps are over."""
        line, due = self._line, 0.0
        while True:
            if self.control.now() >= due:
                line.send(
                    steps.Hello(work=line.work, run=line.run, held=self._checkpoints.held(), fetch_s=self.fetch_s)
                )
                due = self.control.now() + HELLO_S
            match line.receive("waiting for the other devices", due):
                case steps.Query(run=run) if run > line.run:
                    line.run, due = run, 0.0
                case steps.Begin() as begin if begin.load in self._checkpoints.held():
                    line.run = begin.run
                    return begin
                case steps.End():
                    return None
                case _:
                    pass

    def _progress(self) -> Progressed:
        return msgspec.structs.replace(super()._progress(), batch=self.position.batch)

    def _go_to(self, begin: steps.Begin) -> None:
        self._load(begin.load)
        if begin.batch:
            self.position.batch = min(begin.batch, self.position.batch_limit or begin.batch)
        self._checkpoints.drop_after(begin.load)
        # An agent that is killed for memory can't tell any more what it tried.
        self.control.send(self._progress())
        self.done = begin.step
        log.info("run %d goes on at step %d, from checkpoint %d", begin.run, begin.step, begin.load)

    def _load(self, step: int) -> None:
        found, before = self._checkpoints.load(step), self.position
        if found is not None:
            position, state = found
            self._optimizer.zero_grad(set_to_none=True)
            if restore(self._optimizer, self.carried, state):
                self.position = position
        # What this process learned after the checkpoint stays true: what fits, and how long it paused.
        self.position.paused_s = max(self.position.paused_s, before.paused_s)
        limits = [one for one in (self.batch_limit, before.batch_limit, self.position.batch_limit) if one]
        if limits:
            self.position.batch_limit = min(limits)
            self.position.batch = min(self.position.batch, self.position.batch_limit)

    # ---- steps

    def _steps(self) -> bool:
        """Step by step; False: all go back to a checkpoint."""
        total, depth = self.assignment.work.steps, steps.UNDER_WAY if self._split.overlap else 1
        under_way: deque[Sent] = deque()
        came: dict[int, steps.Gradient] = {}
        asked = False
        while True:
            while len(under_way) < depth and self.done + len(under_way) < total:
                under_way.append(self._send(self.done + len(under_way) + 1, sum(sent.samples for sent in under_way)))
            if not under_way:
                return True
            first = under_way[0]
            # In order, each before the next features are computed: as if none had been lost.
            came = {step: gradient for step, gradient in came.items() if step >= first.step}
            if first.step in came:
                self._take(first, came.pop(first.step), under_way)
                continue
            usual = statistics.median(self.position.waits[-9:]) if self.position.waits else 0.0
            again_at = first.sent_at + max(self.again_s, 3.0 * usual)
            match self._line.receive("waiting for the gradient", again_at):
                case None:
                    if self.control.now() >= again_at:
                        self._again(first)
                case steps.Gradient(run=self._line.run) as gradient if gradient.step >= first.step:
                    came[gradient.step] = gradient
                    if first.step not in came:  # lost, for they come in order
                        self._again(first)
                case steps.Skip(run=self._line.run) as skip if skip.step >= first.step:
                    self._leave(skip.step, under_way, came)
                case steps.Query(run=run) if run > self._line.run:
                    self._line.run = run
                    return False
                case steps.End() if asked or under_way[-1].step < total:
                    self._leave(first.step, under_way, came)
                    return True
                case steps.End():
                    # Gradients may be what was lost: who has them answers with them, and else with the end again.
                    asked = True
                    for sent in under_way:
                        self._again(sent)
                case _:
                    pass

    def _leave(self, step: int, under_way: deque[Sent], came: dict[int, steps.Gradient]) -> None:
        """Wait no longer for gradients up to that of `step`; learn from those that came, and what came behind them."""
        while under_way and (under_way[0].step <= step or under_way[0].step in came):
            if (gradient := came.pop(under_way[0].step, None)) is not None:
                self._take(under_way[0], gradient, under_way)
            else:
                under_way.popleft()
        self.done = max(self.done, step)

    def _again(self, sent: Sent) -> None:
        self._line.send(sent.message)
        sent.sent_at = self.control.now()

    def _take(self, first: Sent, gradient: steps.Gradient, under_way: deque[Sent]) -> None:
        """Learn from a gradient; where there is no room for that, go on with smaller batches, one step poorer."""
        try:
            if self._learn(first, gradient):
                under_way.popleft()
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            # What is under way has the old size: its gradient would not fit what is computed anew.
            self.done = under_way[-1].step
            under_way.clear()
            self._halve(error)

    def _send(self, step: int, ahead: int) -> Sent:
        """Compute the features of the next batch and send them; a batch that does not fit is halved until it does."""
        while True:
            self.control.poll("training")
            try:
                sent = self._forward(step, ahead)
                break
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                self._halve(error)
        self._line.send(sent.message)
        sent.sent_at = sent.first_at = self.control.now()
        return sent

    def _forward(self, step: int, ahead: int) -> Sent:
        started, place, asked = self.control.now(), self.position.samples + ahead, self._split
        cpu_s = time.process_time()
        indices = self._order.take(place, self.position.batch)
        batch = self.data.batch(indices, self.base.device)
        seed = mixed(self.assignment.seed, self.assignment.round, place, self.part)
        torch.manual_seed(seed)
        named = self.carried.named()
        # What batch normalisation remembers is no gradient's to move: the forward pass itself writes it.
        copied = [own for own in named if asked.overlap and not own.endswith(REMEMBERED)]
        values = {own: tensor.detach() for own, tensor in named.items()}
        values |= {own: values[own].clone() for own in copied}
        for own, value in values.items():
            value.requires_grad_(named[own].requires_grad)
        hidden = self._features(values, batch)
        noise = hashlib.sha256(self._secret + f"{self.assignment.round}/{place}".encode()).digest()
        generator = torch.Generator(device=hidden.device).manual_seed(int.from_bytes(noise[:7], "little"))
        hidden = split.clipped(hidden, asked.clip, asked.noise, generator)
        message = steps.Features(
            work=self._line.work, run=self._line.run, step=step, hidden=tensors.encode(_plain(hidden), asked.codec),
            targets=memoryview(batch.targets.cpu().numpy().astype("<i4").tobytes()),
            mask=memoryview(b"" if self.base.kind == "image" else batch.mask.cpu().numpy().astype("u1").tobytes()),
        )  # fmt: skip
        took = self.control.now() - started, time.process_time() - cpu_s
        return Sent(step, message, hidden, values, len(indices), *took, self.control.paused_s)

    def _learn(self, sent: Sent, gradient: steps.Gradient) -> bool:
        """Go back through the blocks and take the step; False for a gradient that does not fit."""
        started, cpu_s, paused_s = self.control.now(), time.process_time(), self.control.paused_s
        waited = started - sent.first_at - (paused_s - sent.paused_s)
        try:
            given = tensors.decode(gradient.hidden)
        except DecodeError as error:
            log.warning("a gradient is no good: %s", error)
            return False
        if given.shape != tuple(sent.hidden.shape) or not np.isfinite(given).all():
            raise Diverged(f"the gradient of step {sent.step} is not finite, or of shape {given.shape}")
        trained = {own: value for own, value in sent.values.items() if value.requires_grad}
        outer = torch.from_numpy(np.array(given)).to(sent.hidden.device, sent.hidden.dtype)
        named = self.carried.named()
        for own, grad in zip(trained, self._gradients(sent, list(trained.values()), outer), strict=True):
            named[own].grad = grad
        advance(self._optimizer, self.carried, self.assignment.training, self._rate())
        self.done = sent.step
        position, seconds = self.position, sent.forward_s + self.control.now() - started
        position.step += 1
        position.samples += sent.samples
        position.losses.append(gradient.loss)
        position.step_seconds.append(seconds)
        position.train_s += seconds
        position.cpu_s += sent.cpu_s + time.process_time() - cpu_s
        position.paused_s += paused_s - self._paused_s
        self._paused_s = paused_s
        position.waits.append(waited)
        if self.done % self.assignment.training.checkpoint_every == 0:
            self.save()
        self.control.progress(self._progress)
        return True

    def _features(self, values: dict[str, torch.Tensor], batch: Batch) -> torch.Tensor:
        return self._lower.features(values, batch)

    def _gradients(
        self, sent: Sent, trained: list[torch.Tensor], outer: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:  # fmt: skip
        return torch.autograd.grad(sent.hidden, trained, outer, allow_unused=True)

    def _place(self) -> int:
        return self.done


def _plain(hidden: torch.Tensor) -> Any:
    return hidden.detach().to("cpu", torch.float32).numpy()
