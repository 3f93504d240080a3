"""S-UCB on synthetic rewards: how near it comes to the best arm, and how soon again after the rewards change.

    python -m bench.bandit

A reward is a bump over the unit square, or a ridge, with noise of 0.05; the best arm's is 0.95. "Before": the mean
reward at pulls 40-60 over that of the best arm. "After": the same, 40 pulls after the bump has moved to another
place. Random: pulls at random, for comparison.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from statistics import fmean, stdev

from coordinator.core.planning.bandit import Bandit, Point, Pulls

Reward = Callable[[Point], float]
SEEDS = 40
BEST, NOISE = 0.95, 0.05


def bump(middle: Point, width: float = 0.2) -> Reward:
    """Falls off around a point."""
    return lambda at: BEST * math.exp(-((at[0] - middle[0]) ** 2 + (at[1] - middle[1]) ** 2) / (2 * width**2))


def ridge(height: float, width: float = 0.15) -> Reward:
    """Depends on one side alone."""
    return lambda at: BEST * math.exp(-((at[1] - height) ** 2) / (2 * width**2))


SURFACES: dict[str, Callable[[random.Random], tuple[Reward, Reward]]] = {
    "a bump": lambda rng: (bump((rng.random(), rng.random())), bump((rng.random(), rng.random()))),
    "a wide bump": lambda rng: (bump((rng.random(), rng.random()), 0.35), bump((rng.random(), rng.random()), 0.35)),
    "a ridge": lambda rng: (ridge(rng.random()), ridge(rng.random())),
}


def shares(surface: str, seed: int, *, chooses: bool = True) -> tuple[float, float]:
    """(before, after) as above, of one seed. `chooses`: else at random."""
    rng = random.Random(f"{surface}/{seed}")
    first, second = SURFACES[surface](rng)
    bandit, seen = Bandit(), []
    for pull in range(120):
        reward = first if pull < 60 else second
        draw = (rng.random(), rng.random(), rng.random())
        choice = Pulls(bandit).choose(draw, lambda _: True) if chooses else None
        at = choice.at if choice is not None else draw[:2]
        seen.append(reward(at) / BEST)
        bandit = bandit.learn([(at, min(1.0, max(0.0, reward(at) + rng.gauss(0.0, NOISE))))])
    return fmean(seen[40:60]), fmean(seen[100:120])


def table() -> list[str]:
    """Rows of Markdown."""
    lines = ["| reward | before | after | random, before |", "|---|---|---|---|"]
    for surface in SURFACES:
        found = [shares(surface, seed) for seed in range(SEEDS)]
        by_chance = fmean(shares(surface, seed, chooses=False)[0] for seed in range(SEEDS))
        cells = [
            f"{fmean(part):.2f} ± {1.96 * stdev(part) / math.sqrt(SEEDS):.2f}" for part in zip(*found, strict=True)
        ]
        lines.append(f"| {surface} | {cells[0]} | {cells[1]} | {by_chance:.2f} |")
    return lines


if __name__ == "__main__":
    print(*table(), sep="\n")
