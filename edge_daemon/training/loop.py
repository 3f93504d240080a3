"""The training loop: one piece of work on a loaded base, step by step, resumable, stoppable between micro-batches.

A step is a function of (job seed, round, place in the order of samples) and the tensors: batches, dropout and learning
rate follow from them, so a resumed run does what the undisturbed one would have done.
"""

from __future__ import annotations

import hashlib
import logging
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from edge_daemon.protocol import Progressed
from edge_daemon.training.control import Control, PipeClosed, Stopped
from edge_daemon.training.pruner import Pruner
from shared.messages import Assignment
from shared.modeling import half
from shared.modeling.base_model import Base
from shared.modeling.checkpoint import Position, identity, load_checkpoint, save_checkpoint
from shared.modeling.data import SampleOrder, TokenData
from shared.modeling.faults import OutOfMemory, is_out_of_memory
from shared.modeling.importance import Scorer, sensitivities
from shared.modeling.lora import Carried
from shared.modeling.objective import loss_sum
from shared.modeling.optimizing import advance, begin_moments, optimizer_of, rate_of, restore, state_of
from shared.modeling.remembered import remembering

log = logging.getLogger(__name__)
_SCORE = "score/"
"""Before a module's name in a checkpoint: the state of its score."""


class Diverged(Exception):
    """The loss is no number any more."""


@dataclass
class Loop:
    """Trains `carried` on `data` as `assignment` says. `batch_limit`: largest batch known to fit, 0 if not known.

    `part` of `parts`: which of the samples are this agent's, as in `protocol.Train`. `pruner`: made `carried`, where
    the work prunes.
    """

    base: Base
    carried: Carried
    data: TokenData
    assignment: Assignment
    control: Control
    checkpoint_dir: Path
    batch_limit: int = 0
    part: int = 0
    parts: int = 1
    pruner: Pruner | None = None

    def __post_init__(self) -> None:
        self.position = Position(batch=self.assignment.work.batch)
        self._order = SampleOrder(self.data.rows, self.assignment.seed, self.assignment.round, self.part, self.parts)
        self._work = identity(self.assignment, self.part, self.parts)
        self._optimizer = self._make_optimizer()
        self._scorer = Scorer() if self.assignment.work.score else None
        self._loss_of_step: Callable[[int], float] = self._step

    @property
    def importance(self) -> dict[str, float]:
        """As in `UpdateFacts`; empty where it was not asked for."""
        return self._scorer.shares() if self._scorer is not None else {}

    def run(self) -> str:
        """Train to the end, the time limit or a stop; how it ended, as in `UpdateFacts.ended`.

        Raises `Stopped` where the work is to be forgotten, `PipeClosed`, `OutOfMemory` and `Diverged`.
        """
        self._resume()
        if self.position.step:
            self.control.heeds_time = True
        if self.batch_limit and self.position.batch > self.batch_limit:
            self.position.batch = self.position.batch_limit = self.batch_limit
        self.base.model.train()
        paused_before, cpu_before, waited_before = self.position.paused_s, self.position.cpu_s, self.control.paused_s
        cpu_start = time.process_time()
        try:
            with half.fast_products(self.base.device):
                while self.position.step < self.assignment.work.most_steps:
                    self._advance()
                    self.position.paused_s = paused_before + self.control.paused_s - waited_before
                    self.position.cpu_s = cpu_before + time.process_time() - cpu_start
                    if self.position.step % self.assignment.training.checkpoint_every == 0:
                        self.save()
                    self.control.progress(self._progress)
        except Stopped as stop:
            if stop.discard:
                raise
            return self.assignment.work.ended(self.position.step) if stop.ended == "time" else stop.ended
        except PipeClosed:
            self.save()
            raise
        finally:
            self._optimizer.zero_grad(set_to_none=True)
            self.base.model.eval()
        return "complete"

    def save(self) -> None:
        """Write a checkpoint of the last complete step."""
        tensors = state_of(self._optimizer, self.carried)
        if self._scorer is not None:
            tensors |= {f"{_SCORE}{name}": state for name, state in self._scorer.save().items()}
        if self.pruner is not None:
            tensors |= self.pruner.save()
        save_checkpoint(self.checkpoint_dir, self._work, self.position, tensors)

    def forget_moments(self) -> None:
        """Free the optimizer's state, which may be twice a whole model; there is nothing left to train."""
        self._optimizer.state.clear()

    def _advance(self) -> None:
        """One optimizer step; a batch that does not fit is halved until it does."""
        while True:
            self.control.poll("training")
            started, waited = time.monotonic(), self.control.paused_s
            try:
                loss = self._loss_of_step(self.position.batch)
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                self._halve(error)
                continue
            seconds = time.monotonic() - started - (self.control.paused_s - waited)
            self.position.step += 1
            self.position.samples += self.position.batch
            self.position.losses.append(loss)
            self.position.step_seconds.append(seconds)
            self.position.train_s += seconds
            self._prune()
            return

    def _prune(self) -> None:
        """Make the model smaller, where it is time to; the optimizer goes on with what is left of its moments.

        Nothing is polled here: the step is done, and a stop must not come between it and its pruning.
        """
        if self.pruner is None or not self.pruner.due(self.position.step):
            return
        self.control.beat("pruning")
        moments = {name: self._optimizer.state[tensor] for name, tensor in self.carried.named().items()}
        self.carried, left = self.pruner.prune(self.carried, moments)
        self._optimizer = self._make_optimizer()
        for name, tensor in self.carried.named().items():
            if left[name]:
                self._optimizer.state[tensor] = left[name]
        self.base.model.train()

    def _halve(self, error: BaseException) -> None:
        batch = self.position.batch
        self._optimizer.zero_grad(set_to_none=True)
        if self.base.device != "cpu":
            torch.cuda.empty_cache()
        if batch == 1:
            raise OutOfMemory("a batch of one sample does not fit the memory")
        self.position.batch = self.position.batch_limit = batch // 2
        log.warning("out of memory at batch %d, going on with %d: %s", batch, batch // 2, error)

    def _step(self, batch: int) -> float:
        """The mean loss of one step over `batch` samples.

        Leaves the tensors untouched if it raises anything but `OutOfMemory`.
        """
        with remembering(self.carried.dense):
            return self._stepped(batch)

    def _stepped(self, batch: int) -> float:
        training = self.assignment.training
        indices = self._order.take(self.position.samples, batch)
        # Dropout of a step must not depend on what ran before it, for a resumed run.
        torch.manual_seed(mixed(self.assignment.seed, self.assignment.round, self.position.samples, self.part))
        micro = -(-batch // training.accumulation)
        weight = self.data.weight(indices)
        total = torch.zeros((), device=self.base.device)
        for start in range(0, batch, micro):
            if start:
                self.control.poll("training")
            part = self.data.batch(indices[start : start + micro], self.base.device)
            loss = loss_sum(self.base.model, part, self.data.kind)[0] / weight
            loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
            total += loss.detach()
        mean = float(total)
        if not math.isfinite(mean):
            raise Diverged(f"the loss became {mean} at step {self.position.step + 1}")
        # Before the pruner learns, which a step that is done again for lack of memory must not do twice.
        begin_moments(self._optimizer)
        seen = sensitivities(self.carried.factors, self.carried.scaling) if self._scorer is not None else {}
        if self.pruner is not None:
            self.pruner.learn(self.carried, self._rate())
        advance(self._optimizer, self.carried, training, self._rate())
        if self._scorer is not None:
            # Now, since a step that did not fit the memory is done again.
            self._scorer.learn(seen)
        return mean

    def _rate(self) -> float:
        work, steps = self.assignment, self.assignment.work.steps
        # Extra steps have the rate of the last: after it the next round's begin, or nothing.
        return rate_of(work.training, work.round, work.rounds, steps, min(self._place(), steps - 1))

    def _place(self) -> int:
        """Steps of the round that are done."""
        return self.position.step

    def _make_optimizer(self) -> torch.optim.Optimizer:
        return optimizer_of(self.carried, self.assignment.training)

    def _resume(self) -> None:
        found = load_checkpoint(self.checkpoint_dir, self._work)
        if found is None:
            return
        position, tensors = found
        lacks = any(f"value/{name}" not in tensors for name in self.carried.named())
        # Before anything is restored: work that starts again has its first model.
        if lacks or (self.pruner is not None and not self.pruner.can_restore(tensors)):
            log.warning("checkpoint lacks tensors, the work starts again")
            return
        if self.pruner is not None:
            self.carried = self.pruner.restore(tensors, self.carried)
            self._optimizer = self._make_optimizer()
        restore(self._optimizer, self.carried, tensors)
        if self._scorer is not None:
            scores = {name: tensor for name, tensor in tensors.items() if name.startswith(_SCORE)}
            self._scorer.restore({name.removeprefix(_SCORE): state for name, state in scores.items()})
        self.position = position
        log.info("resumed at step %d of %d", position.step, self.assignment.work.steps)
        # The daemon may have gone between the last step and its pruning.
        self._prune()

    def _progress(self) -> Progressed:
        position = self.position
        return Progressed(
            step=position.step,
            steps=self.assignment.work.told_steps(position.step),
            samples=position.samples,
            loss=position.losses[-1] if position.losses else 0.0,
            samples_per_s=position.samples / position.train_s if position.train_s > 0 else 0.0,
        )


def mean_ends(losses: list[float]) -> tuple[float, float]:
    """Mean loss over the first and over the last fifth of the steps (one step at least)."""
    count = max(1, len(losses) // 5)
    return statistics.fmean(losses[:count]), statistics.fmean(losses[-count:])


def mixed(*parts: int) -> int:
    """A seed that depends on all of `parts`."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:7], "little")
