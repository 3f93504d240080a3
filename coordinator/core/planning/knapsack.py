"""Which level of each item, where one level of every item is taken and their weights share a capacity.

    max sum_m value[m][k_m]   subject to   sum_m weight[m][k_m] <= capacity

The multiple-choice knapsack of FedPipe's second stage: an item is a matrix, its levels are ranks. Level 0 is "not
taken" (weight and value 0); weights are whole and rise with the level. `exact` solves it as a MILP by HiGHS. `greedy`
takes the steps of all items in the order of their gain per weight, skipping those that no longer fit, for many
capacities at once; where a single level alone is worth more, it takes that, so it never gets less than half the best.
Only steps on the upper hull of an item count: a level that lies below the line between its neighbours is never part of
a best mix. `bound` is the optimum of the same problem with parts of steps allowed.

The problem is our reading of the paper, which names it a MILP; so is the greedy for large fleets.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Numbers = npt.NDArray[np.float64]
Levels = npt.NDArray[np.int64]
_ROUNDED = 1e-6
"""Of a value: what a solver may be off by."""


class Item(NamedTuple):
    """Weight and value of each level, the first of them 0 and 0."""

    weights: tuple[int, ...]
    values: tuple[float, ...]


class _Step(NamedTuple):
    """From one level of an item on its hull up to the next."""

    item: int
    start: int
    end: int
    weight: int
    gain: float


def value(items: Sequence[Item], levels: Sequence[int] | Levels) -> float:
    """Sum of the values at `levels`."""
    return math.fsum(item.values[level] for item, level in zip(items, levels, strict=True))


def values(items: Sequence[Item], levels: Levels) -> Numbers:
    """The value of each row of `levels` (choices x items)."""
    worth = np.zeros(len(levels))
    for index, item in enumerate(items):
        worth += np.asarray(item.values)[levels[:, index]]
    return worth


def weight(items: Sequence[Item], levels: Sequence[int] | Levels) -> int:
    """Sum of the weights at `levels`."""
    return sum(item.weights[level] for item, level in zip(items, levels, strict=True))


def unit(items: Sequence[Item]) -> int:
    """The largest number that divides every weight: capacities with equal whole multiples have equal solutions."""
    return math.gcd(*(amount for item in items for amount in item.weights)) or 1


def greedy(items: Sequence[Item], capacities: Sequence[int] | Levels) -> Levels:
    """(capacities x items) a good level of each item for each capacity, none of which may be negative."""
    left = np.asarray(capacities, dtype=np.int64).copy()
    levels = np.zeros((len(left), len(items)), dtype=np.int64)
    for step in _steps(items):
        taken = (left >= step.weight) & (levels[:, step.item] == step.start)
        levels[taken, step.item] = step.end
        left[taken] -= step.weight
    return _or_single(items, np.asarray(capacities, dtype=np.int64), levels)


def bound(items: Sequence[Item], capacities: Sequence[int] | Levels) -> Numbers:
    """No choice within a capacity is worth more than this."""
    steps = _steps(items)
    weights = np.cumsum([0.0, *(step.weight for step in steps)])
    gains = np.cumsum([0.0, *(step.gain for step in steps)])
    most: Numbers = np.interp(np.asarray(capacities, dtype=np.float64), weights, gains)
    return most


def exact(items: Sequence[Item], capacity: int) -> tuple[int, ...] | None:
    """The best level of each item; that of `greedy` where the solver's is worth less by rounding. None: the solver
    found no optimum."""
    found, start = _solve(items, capacity), tuple(greedy(items, [capacity])[0].tolist())
    least = value(items, start)
    if found is None or weight(items, found) > capacity or value(items, found) < least - _ROUNDED * abs(least):
        return None
    return found if value(items, found) >= least else start


def _or_single(items: Sequence[Item], capacities: Levels, levels: Levels) -> Levels:
    """`levels`, or the most valuable single level that fits, where that is worth more."""
    worth = values(items, levels)
    singles = ((index, level) for index, item in enumerate(items) for level in range(1, len(item.weights)))
    for index, level in singles:
        better = (capacities >= items[index].weights[level]) & (items[index].values[level] > worth)
        levels[better] = 0
        levels[better, index] = level
        worth[better] = items[index].values[level]
    return levels


def _steps(items: Sequence[Item]) -> list[_Step]:
    """The hull steps of all items by falling gain per weight; of equal ones the lighter first, then by item."""
    steps = [step for index, item in enumerate(items) for step in _hull(index, item)]
    return sorted(steps, key=lambda step: (-step.gain / step.weight, step.weight, step.item, step.start))


def _hull(index: int, item: Item) -> list[_Step]:
    """Steps from level to level on the upper hull of (weight, value), their slopes falling and positive."""
    kept = [0]
    for level in range(1, len(item.weights)):
        if item.values[level] <= item.values[kept[-1]]:
            continue
        while len(kept) > 1 and _slope(item, kept[-1], level) >= _slope(item, kept[-2], kept[-1]):
            kept.pop()
        kept.append(level)
    return [
        _Step(index, low, high, item.weights[high] - item.weights[low], item.values[high] - item.values[low])
        for low, high in zip(kept, kept[1:], strict=False)
    ]


def _slope(item: Item, low: int, high: int) -> float:
    return (item.values[high] - item.values[low]) / (item.weights[high] - item.weights[low])


def _solve(items: Sequence[Item], capacity: int) -> tuple[int, ...] | None:
    """By HiGHS: one binary for each level of each item. None where it finds no optimum."""
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array

    places = [(index, level) for index, item in enumerate(items) for level in range(len(item.weights))]
    one = unit(items)
    heavy = np.array([items[index].weights[level] / one for index, level in places])
    worth = np.array([items[index].values[level] for index, level in places])
    owners = csr_array((np.ones(len(places)), ([index for index, _ in places], np.arange(len(places)))))
    found = milp(
        -worth / max(float(worth.max()), 1e-300),
        integrality=np.ones(len(places)),
        bounds=Bounds(0, 1),
        constraints=[LinearConstraint(owners, 1, 1), LinearConstraint(heavy[None, :], 0, capacity // one)],
        options={"mip_rel_gap": 0.0},
    )
    if found.status != 0:
        return None
    levels = [0] * len(items)
    for (index, level), taken in zip(places, found.x, strict=True):
        if taken > 0.5:
            levels[index] = level
    return tuple(levels)
