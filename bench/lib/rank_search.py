"""Other searches for batch, under-training and ranks than `fedpipe`'s, within the same bounds, to compare it with."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from coordinator.core.planning.knapsack import Item, Levels, Numbers
from coordinator.core.planning.rank_choice import UNDER_TRAINING, Options

CHUNK = 256
"""Random candidates that share an order of the modules."""


def random_search(rng: np.random.Generator, options: Options, items: Sequence[Item], times: int) -> Numbers:
    """J of each device's best candidate, of `times` for each batch and under-training that it can take; 0: it has none.

    A candidate is one of these pairs and, module by module in random order, any level that still fits, so that none
    breaks a bound.
    """
    flat = options.places.reshape(len(options.places), -1)
    able = [np.flatnonzero(row >= 0) for row in flat]
    owners = np.repeat(np.arange(len(flat)), [times * len(found) for found in able])
    taken = np.concatenate([rng.choice(found, times * len(found)) for found in able if len(found)])
    share = 1 - np.array(UNDER_TRAINING)[taken % len(UNDER_TRAINING)]
    best = np.zeros(len(flat))
    np.maximum.at(best, owners, share * _random_values(rng, items, options.capacities[flat[owners, taken]]))
    return best


def equal_ranks(options: Options, items: Sequence[Item]) -> Numbers:
    """J of each device at the best batch and under-training with the highest level that all modules can have."""
    levels = range(max(len(item.weights) for item in items))
    # A module too small for a level keeps its highest.
    whole = [sum(item.weights[min(level, len(item.weights) - 1)] for item in items) for level in levels]
    worth = [sum(item.values[min(level, len(item.values) - 1)] for item in items) for level in levels]
    highest = np.searchsorted(whole, options.capacities[options.places], side="right") - 1
    reached = np.where(options.places >= 0, (1 - np.array(UNDER_TRAINING)) * np.array(worth)[highest], 0.0)
    best: Numbers = reached.reshape(len(reached), -1).max(axis=1)
    return best


def _random_values(rng: np.random.Generator, items: Sequence[Item], rooms: Levels) -> Numbers:
    """The value of random levels within each of `rooms`."""
    weights, values = _table(items)
    worth = np.zeros(len(rooms))
    rows = rng.permutation(len(rooms))
    for chunk in np.array_split(rows, -(-len(rows) // CHUNK)):
        left = rooms[chunk].copy()
        for index in rng.permutation(len(items)):
            fitting = np.count_nonzero(weights[index] <= left[:, None], axis=1)
            level = (rng.random(len(chunk)) * fitting).astype(np.int64)
            left -= weights[index, level]
            worth[chunk] += values[index, level]
    return worth


def _table(items: Sequence[Item]) -> tuple[Levels, Numbers]:
    """(items x levels) weights and values; a level that an item lacks weighs more than any room."""
    levels = max(len(item.weights) for item in items)
    weights = np.full((len(items), levels), np.iinfo(np.int64).max)
    values = np.zeros((len(items), levels))
    for index, item in enumerate(items):
        weights[index, : len(item.weights)], values[index, : len(item.values)] = item.weights, item.values
    return weights, values
