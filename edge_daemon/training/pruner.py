"""Iterative prune and tune within one piece of work (FedSpine, arXiv 2501.02438): a little goes, the rest is tuned on.

**The paper's** (a public note): whole heads and FFN channels go, by an importance from LoRA gradients that is smoothed
over the steps; pruning is spread over the round, 20 steps apart. **LoRAPrune's formulas** (arXiv 2305.18403), the
evident ancestor:

    G = g_B A + B g_A - lr g_B g_A          the one-step change of BA, up to the rate
    I(unit) = sum of |G * (W0 + s BA)| over its rows and columns, of L2 norm one within each matrix

**Our reading**: J = max(1, steps // every) prunings at equal distances with tuning after each; after the j-th the share
p0 + (p1 - p0)(1 - (1 - j/J)^3) is gone; what the fleet found of a unit counts as much as what the device finds.

Matrices become physically smaller, rows of B and columns of A with their Adam moments, too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from shared import units
from shared.adapter import Adapter
from shared.messages import Assignment
from shared.modeling import lora, pruning
from shared.modeling.base_model import Base
from shared.modeling.lora import Carried
from shared.pruning_order import Pruning
from shared.units import Group

SMOOTHING = 0.9
Moments = dict[str, dict[str, Any]]
_SCORES, _KEPT, _DONE = "unit_score/", "unit_kept/", "prunings_done"


def points(steps: int, every: int) -> tuple[int, ...]:
    """After which steps of a round something is pruned."""
    count = max(1, steps // every)
    return tuple(sorted({max(1, round(steps * j / (count + 1))) for j in range(1, count + 1)}))


def ratio_after(before: float, target: float, done: int, count: int) -> float:
    """The share of each group that is gone after so many of `count` prunings."""
    return before + (target - before) * (1.0 - (1.0 - done / count) ** 3)


@dataclass
class Pruner:
    """Prunes `base`, on which nothing is yet, as `order` says: at once what is gone already, then step by step."""

    base: Base
    known: Sequence[Group]
    order: Pruning
    given: Adapter
    assignment: Assignment
    kept: dict[str, list[int]] = field(init=False)
    scores: dict[str, npt.NDArray[np.float64]] = field(init=False)
    requantized: float = 0.0
    done: int = 0
    """How many prunings of the round are done."""

    def __post_init__(self) -> None:
        """Raises `DecodeError` and `ModelFault` where the order is not for this base."""
        begun = units.unpack(self.known, self.order.kept)
        self.kept = {group.name: begun.get(group.name, list(range(group.count))) for group in self.known}
        self.scores = {group.name: np.zeros(group.count) for group in self.known}
        self._fleet = units.scores_of(self.known, self.given.scores)
        if self.order.begin > 0:
            self.kept = units.best(self.known, self._fleet, self.order.begin, self.kept)
        self._before = units.ratio_of(self.known, self.kept)
        self._points = points(self.assignment.work.steps, self.order.every)
        pruning.prune(self.base, self.kept)

    def carry(self) -> Carried:
        """The global adapter on what is left of the base, with the work's LoRA."""
        work, training = self.assignment.work, self.assignment.training
        return lora.carry(
            self.base, self.given, work.ranks, alpha_ratio=training.alpha_ratio, seed=self.assignment.seed,
            round=self.assignment.round,
        )  # fmt: skip

    def learn(self, carried: Carried, lr: float) -> None:
        """Take in the gradients of a step, before the optimizer moves anything."""
        seen = gradient_scores(self.base, self.known, self.kept, carried, lr)
        for group in self.known:
            there = self.kept[group.name]
            old = self.scores[group.name][there]
            fresh = seen[group.name]
            self.scores[group.name][there] = np.where(old > 0, SMOOTHING * old + (1 - SMOOTHING) * fresh, fresh)

    def due(self, step: int) -> bool:
        """Whether something goes that should be gone after so many steps."""
        pending = self._points[self.done : self.done + 1]
        return bool(pending) and step >= pending[0] and self.order.ratio > self._before

    def prune(self, carried: Carried, moments: Mapping[str, Mapping[str, Any]]) -> tuple[Carried, Moments]:
        """The next pruning: (what is carried on the smaller base, its moments). `moments`: by name of the tensor."""
        ratio = ratio_after(self._before, self.order.ratio, self.done + 1, len(self._points))
        found = self._shrink(units.best(self.known, self._judged(), ratio, self.kept), carried, moments)
        self.done += 1
        return found

    def save(self) -> dict[str, torch.Tensor]:
        """For a checkpoint."""
        kept = {f"{_KEPT}{name}": torch.tensor(there) for name, there in self.kept.items()}
        kept[_DONE] = torch.tensor(self.done)
        return kept | {f"{_SCORES}{name}": torch.from_numpy(found.copy()) for name, found in self.scores.items()}

    def can_restore(self, tensors: Mapping[str, torch.Tensor]) -> bool:
        """Whether the checkpoint holds all that `restore` needs."""
        return _DONE in tensors and all(
            f"{prefix}{group.name}" in tensors for group in self.known for prefix in (_KEPT, _SCORES)
        )

    def restore(self, tensors: Mapping[str, torch.Tensor], carried: Carried) -> Carried:
        """What is carried where the checkpoint was written; the values come after. It `can_restore`."""
        self.done = int(tensors[_DONE])
        kept = {group.name: tensors[f"{_KEPT}{group.name}"].tolist() for group in self.known}
        self.scores = {group.name: tensors[f"{_SCORES}{group.name}"].numpy().copy() for group in self.known}
        return self._shrink(kept, carried, {})[0]

    def _judged(self) -> dict[str, npt.NDArray[np.float64]]:
        """What decides: by weights, or by what was found here and, with the same weight, in the fleet."""
        if self.order.criterion == "magnitude":
            return magnitude_scores(self.base, self.known, self.kept)
        return {name: _of_sum_one(found) + _of_sum_one(self._fleet[name]) for name, found in self.scores.items()}

    def _shrink(
        self, kept: dict[str, list[int]], carried: Carried, moments: Mapping[str, Mapping[str, Any]]
    ) -> tuple[Carried, Moments]:
        # Copies, since carrying anew gives the head, which is the same tensors, the global adapter's values.
        before, old = dict(carried.cuts), {name: tensor.detach().clone() for name, tensor in carried.named().items()}
        lora.detach(self.base)
        self.kept = kept
        pruning.prune(self.base, kept)
        fresh = self.carry()
        sliced: Moments = {}
        with torch.no_grad():
            for name, tensor in fresh.named().items():
                tensor.copy_(_cut_of(old[name], name, before, fresh.cuts))
                state = moments.get(name, {})
                sliced[name] = {
                    key: _cut_of(value, name, before, fresh.cuts) if torch.as_tensor(value).ndim > 1 else value
                    for key, value in state.items()
                }
        self.requantized = max(self.requantized, pruning.requantized(self.base))
        return fresh, sliced


def gradient_scores(
    base: Base, known: Sequence[Group], kept: units.Kept, carried: Carried, lr: float
) -> dict[str, npt.NDArray[np.float64]]:
    """Group -> importance of the units that are there, by the LoRA gradients of one step."""

    def matrix(name: str) -> torch.Tensor | None:
        b, a = carried.factors.get(name, (None, None))
        if b is None or a is None or b.grad is None or a.grad is None:
            return None
        change = b.grad @ a + b @ a.grad - lr * (b.grad @ a.grad)
        return change.mul_(pruning.frozen(base, name) + carried.scaling * (b @ a)).abs_()

    return _by_unit(known, kept, matrix)


def magnitude_scores(base: Base, known: Sequence[Group], kept: units.Kept) -> dict[str, npt.NDArray[np.float64]]:
    """Group -> sum of the absolute weights of each unit of the whole model, 0 for those that are gone."""
    there = _by_unit(known, kept, lambda name: pruning.frozen(base, name).abs())
    found = {}
    for group in known:
        found[group.name] = np.zeros(group.count)
        found[group.name][list(kept[group.name])] = there[group.name]
    return found


@torch.no_grad()
def _by_unit(
    known: Sequence[Group], kept: units.Kept, matrix: Callable[[str], torch.Tensor | None]
) -> dict[str, npt.NDArray[np.float64]]:
    """Sums over the rows and columns of each unit that is there, of L2 norm one in each matrix, over its matrices.

    `matrix`: of a module, None: it has none. One at a time is held: together they are as large as the whole model.
    """
    found = {}
    for group in known:
        total = np.zeros(len(kept[group.name]))
        for one in group.slices:
            values = matrix(one.module)
            if values is None:
                continue
            sums = values.sum(1 if one.side == "out" else 0)
            of_units = sums.view(len(one.starts), len(total), one.width).sum((0, 2)).double().cpu().numpy()
            total += of_units / max(float(np.linalg.norm(of_units)), 1e-30)
        found[group.name] = total
    return found


def _cut_of(value: torch.Tensor, name: str, before: lora.Cuts, after: lora.Cuts) -> torch.Tensor:
    """What is left of a factor, or of a moment of it, once its module is cut further."""
    module, _, leaf = name.rpartition(".")
    if leaf not in ("lora_a", "lora_b"):
        return value
    side = 0 if leaf == "lora_b" else 1
    had, has = before.get(module, (None, None))[side], after.get(module, (None, None))[side]
    if has is None:
        return value
    where = torch.from_numpy(has if had is None else np.searchsorted(had, has)).to(value.device)
    return value.index_select(side, where)


def _of_sum_one(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    total = float(values.sum())
    return values / total if total > 0 else values
