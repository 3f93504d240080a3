"""MergeSFL's control (arXiv 2311.13348, ICDE 2024): batch sizes, who takes part, and how even the merged labels are.

**The paper's** (abstract; formulas as recalled): batches in inverse proportion to a sample's time, so that all finish
together, d_i = floor(D (mu_l + beta_l) / (mu_i + beta_i)) with l the fastest; a genetic algorithm that chooses who
takes part by the Kullback-Leibler divergence of the merged label mix Phi = sum d_i V_i / sum d_i to that of the
fleet, Phi0 = mean of V_i, under the bandwidth that the server takes in. **Our reading**: operators and
constants of the search, its fitness, waiting in it, moves of +-1 in place of a dual step, batches aligned to finish
together, exchanges of one device for another after the search as long as they raise the fitness, and that a number to
select is met exactly as far as the budget allows. The fitness is

    -KL + 0.02 min(1, used / budget) + 0.01 mean q_i - 0.05 waiting,      q_i = 1 / (1 + times selected),

Arrays have an entry per device: `batches` (samples), `mixes` (devices x classes) with rows of sum 1. A sample has the
same size everywhere, so the budget is a number of samples. Pure; a seed decides every draw.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

POPULATION, GENERATIONS, ELITE, TOURNAMENT = 30, 40, 2, 3
USED, RARE, WAITING = 0.02, 0.01, 0.05
LEAST_SHARE, LATEST = 0.9, 1.03
"""What a move may leave of a batch by the formula, and make of the longest time."""
STRETCH = 2.0
"""What alignment may make of the longest time."""
MOST_ENDS = 2000
"""Ends of a step that alignment tries."""
LEAST_GAIN = 0.01
"""Of waiting, below which batches stay as they are."""
SPARE = 0.05
"""Share of the budget below which nothing is scaled up."""


class Fleet(NamedTuple):
    """Who can be selected."""

    batches: Ints
    mixes: Floats
    goal: Floats
    """Phi0 (classes)."""
    rarity: Floats
    """q_i."""
    budget: float = 0.0
    """Samples of a step that the server takes in; 0: not bounded."""
    least: int = 1
    most: int = 0
    """How many may be selected; 0: all."""
    took: Floats | None = None
    """Seconds of a step; None: nobody waits."""

    @property
    def largest(self) -> int:
        """The largest selection."""
        return min(self.most or len(self.batches), len(self.batches))

    @property
    def smallest(self) -> int:
        """The smallest selection, where the budget allows it."""
        return max(1, min(self.least, self.largest))

    def holds(self, samples: float) -> bool:
        """Whether the budget takes so many samples."""
        return not self.budget or samples <= self.budget


def regulated(times: Floats, default: int, least: int, most: Ints) -> Ints:
    """d_i by the formula, clipped to `least` and to the `most` of each device, which is stronger."""
    wanted = np.floor(default * (float(times.min()) / times) + 1e-9).astype(np.int64)
    return np.minimum(np.maximum(wanted, least), most)


def mixes_of(labels: list[dict[str, int]]) -> tuple[Floats, Floats, Bools]:
    """(V_i, Phi0, who told its labels). Who told none counts as having the mean mix; classes are those of all."""
    classes = sorted({label for told in labels for label, rows in told.items() if rows > 0})
    if not classes:
        return np.ones((len(labels), 1)), np.ones(1), np.zeros(len(labels), dtype=np.bool_)
    counts = np.array([[float(told.get(label, 0)) for label in classes] for told in labels])
    sums = counts.sum(axis=1)
    told = sums > 0
    mixes = counts / np.where(told, sums, 1.0)[:, None]
    goal = mixes[told].mean(axis=0)
    mixes[~told] = goal
    return mixes, goal, told


def divergence(sums: Floats, goal: Floats) -> Floats:
    """KL(Phi || Phi0) in nats of merged labels `sums` (... x classes), not yet divided by their total."""
    total = sums.sum(axis=-1, keepdims=True)
    share = sums / np.where(total > 0, total, 1.0)
    # A class with no share adds nothing; one outside the goal is in nobody's mix.
    safe = np.where(share > 0, share / np.where(goal > 0, goal, 1.0), 1.0)
    found: Floats = (share * np.log(safe)).sum(axis=-1)
    return np.maximum(found, 0.0)


def kl_of(fleet: Fleet, chosen: Bools, batches: Ints | None = None) -> float:
    """KL of the mix of those `chosen`."""
    weights = np.where(chosen, fleet.batches if batches is None else batches, 0)
    return float(divergence(weights.astype(np.float64) @ fleet.mixes, fleet.goal))


def fitness(fleet: Fleet, chosen: Bools) -> float:
    """What the search maximises; see the module."""
    used = float(fleet.batches[chosen].sum()) / fleet.budget if fleet.budget else 0.0
    rare = float(fleet.rarity[chosen].mean()) if chosen.any() else 0.0
    waits = float(_idle(fleet.took[chosen])) if fleet.took is not None and chosen.any() else 0.0
    return -kl_of(fleet, chosen) + USED * min(1.0, used) + RARE * rare - WAITING * waits


def repaired(fleet: Fleet, chosen: Bools, rng: np.random.Generator) -> Bools:
    """`chosen` made feasible: whoever's leaving makes the lowest KL goes; where too few are left others are drawn, so
    that a flipped bit becomes an exchange and not the same set again."""
    chosen = chosen.copy()
    weighted = fleet.batches[:, None] * fleet.mixes
    if not chosen.any():
        chosen[int(np.argmin(divergence(weighted, fleet.goal)))] = True
    sums, samples, count = weighted[chosen].sum(axis=0), int(fleet.batches[chosen].sum()), int(chosen.sum())
    while count > 1 and (count > fleet.largest or not fleet.holds(samples)):
        index = np.flatnonzero(chosen)
        out = int(index[np.argmin(divergence(sums - weighted[index], fleet.goal))])
        chosen[out] = False
        sums, samples, count = sums - weighted[out], samples - int(fleet.batches[out]), count - 1
    wanted = fleet.largest if fleet.most else fleet.smallest
    while count < wanted:
        index = np.flatnonzero(~chosen)
        if fleet.budget:
            index = index[samples + fleet.batches[index] <= fleet.budget]
        if not len(index):
            break
        new = int(rng.choice(index))
        chosen[new] = True
        samples, count = samples + int(fleet.batches[new]), count + 1
    return chosen


def select(fleet: Fleet, seed: int) -> Bools:
    """Who takes part, by the genetic algorithm."""
    rng, size = np.random.default_rng(seed), len(fleet.batches)
    # Begin near the size that fits: else repair, not the search, would choose.
    share = fleet.largest / size if fleet.most else 0.5
    if fleet.budget:
        share = min(share, fleet.budget / max(1.0, float(fleet.batches.sum())))
    people = [repaired(fleet, row, rng) for row in rng.random((POPULATION, size)) < share]
    scores = [fitness(fleet, one) for one in people]
    for _ in range(GENERATIONS):
        best = sorted(range(POPULATION), key=lambda one: (-scores[one], one))[:ELITE]
        following, marks = [people[one] for one in best], [scores[one] for one in best]
        while len(following) < POPULATION:
            one, two = (_winner(rng, scores) for _ in range(2))
            child = np.where(rng.random(size) < 0.5, people[one], people[two]) ^ (rng.random(size) < 1.0 / size)
            child = repaired(fleet, child, rng)
            following.append(child)
            marks.append(fitness(fleet, child))
        people, scores = following, marks
    return _exchanged(fleet, people[max(range(POPULATION), key=lambda one: (scores[one], -one))])


def _exchanged(fleet: Fleet, chosen: Bools) -> Bools:
    """`chosen` with one in the place of another as long as that raises the fitness."""
    weighted = fleet.batches[:, None] * fleet.mixes
    now, found = fitness(fleet, chosen), chosen.copy()
    while not found.all():
        inside, outside = np.flatnonzero(found), np.flatnonzero(~found)
        sums = weighted[found].sum(axis=0) - weighted[inside][:, None] + weighted[outside][None]
        samples = fleet.batches[found].sum() - fleet.batches[inside][:, None] + fleet.batches[outside][None]
        rare = (fleet.rarity[found].sum() - fleet.rarity[inside][:, None] + fleet.rarity[outside][None]) / len(inside)
        after = RARE * rare - divergence(sums, fleet.goal)
        if fleet.took is not None:
            inner = fleet.took[inside]
            slowest = int(inner.argmax())
            rest = np.full(len(inner), inner[slowest])
            rest[slowest] = np.delete(inner, slowest).max(initial=0.0)
            mean = (fleet.took[found].sum() - fleet.took[inside][:, None] + fleet.took[outside][None]) / len(inside)
            after -= WAITING * (1.0 - mean / np.maximum(rest[:, None], fleet.took[outside][None]))
        if fleet.budget:
            after += np.where(samples <= fleet.budget, USED * samples / fleet.budget, -np.inf)
        best = int(np.argmax(after))
        if float(after.flat[best]) <= now + 1e-12:
            break
        now = float(after.flat[best])
        out, new = divmod(best, len(outside))
        found[inside[out]], found[outside[new]] = False, True
    return found


def tuned(
    fleet: Fleet, chosen: Bools, times: Floats, most: Ints, least: int | Ints = 1, enough: float = 0.0,
    share: float = LEAST_SHARE,
) -> Ints:  # fmt: skip
    """Batches of all devices, those `chosen` moved by +-1 while that lowers KL and it is above `enough`.

    No batch falls below `share` of the formula's or rises above `most`; nobody takes longer than 1.03 times the
    longest.
    """
    batches, index = fleet.batches.copy(), np.flatnonzero(chosen)
    floor = np.maximum(np.ceil(share * fleet.batches - 1e-9).astype(np.int64), np.minimum(least, fleet.batches))
    latest = LATEST * float((batches[index] * times[index]).max())
    ceiling = np.minimum(most, np.floor(latest / times + 1e-9).astype(np.int64))
    sums = batches[index].astype(np.float64) @ fleet.mixes[index]
    samples = int(batches[index].sum())
    now = float(divergence(sums, fleet.goal))
    while now > enough:
        up = (batches[index] < ceiling[index]) & fleet.holds(samples + 1)
        down = batches[index] > floor[index]
        after = np.concatenate(
            [
                np.where(up, divergence(sums + fleet.mixes[index], fleet.goal), np.inf),
                np.where(down, divergence(sums - fleet.mixes[index], fleet.goal), np.inf),
            ]
        )
        move = int(np.argmin(after))
        if after[move] >= now - 1e-12:
            break
        step, place = (1, index[move]) if move < len(index) else (-1, index[move - len(index)])
        batches[place] += step
        samples += step
        sums, now = sums + step * fleet.mixes[place], float(after[move])
    return batches


def aligned(fleet: Fleet, chosen: Bools, batches: Ints, times: Floats, most: Ints, enough: float = 0.0) -> Ints:
    """Batches of all devices, those `chosen` such that they wait least for each other, in a step up to twice as
    long: whole samples of a slow device leave up to one of them unused, whatever the formula says.

    KL stays as low as it is, or below `enough`; the budget holds.
    """
    index = np.flatnonzero(chosen)
    pace, mixes, ceiling = times[index], fleet.mixes[index], most[index]
    now = batches[index]
    longest = float((now * pace).max())
    bound = max(enough, float(divergence(now @ mixes, fleet.goal)))
    # Beyond a device's largest batch nothing changes; a device that lies about its speed must not make more of them.
    multiples = np.arange(1, int(min(STRETCH * longest / pace.min(), float(ceiling.max()))) + 1)
    ends = np.unique(np.multiply.outer(pace, multiples))
    ends = ends[(ends >= longest * (1 - 1e-9)) & (ends <= STRETCH * longest)]
    ends = ends[:: -(-len(ends) // MOST_ENDS) or 1]
    tried = np.clip(np.floor(ends[:, None] / pace + 1e-9), 1, ceiling).astype(np.int64)
    tried = np.concatenate([now[None], tried])
    waits = _idle(tried * pace)
    fine = divergence(tried @ mixes, fleet.goal) <= bound + 1e-12
    if fleet.budget:
        fine &= tried.sum(axis=1) <= fleet.budget
    fine[0] = True
    found = batches.copy()
    waits[0] -= LEAST_GAIN
    found[index] = tried[int(np.argmin(np.where(fine, waits, np.inf)))]
    return found


def scaled(batches: Ints, chosen: Bools, most: Ints, budget: float) -> tuple[Ints, float]:
    """(batches, factor): those `chosen` times one factor that fills the spare budget, where more than 5 % is spare.

    No batch passes its `most`, so the factor is that of the tightest: times stay equal, and so does the mix but for
    rounding down.
    """
    used = int(batches[chosen].sum())
    if not budget or used > (1.0 - SPARE) * budget:
        return batches, 1.0
    factor = min(budget / used, float((most[chosen] / batches[chosen]).min()))
    if factor <= 1.0:
        return batches, 1.0
    grown = np.floor(batches * factor + 1e-9).astype(np.int64)
    return np.where(chosen, np.minimum(grown, most), batches), factor


def waiting(batches: Ints, chosen: Bools, times: Floats) -> float:
    """Mean share of a step that those `chosen` wait for the slowest."""
    return float(_idle(batches[chosen] * times[chosen]))


def _idle(took: Floats) -> Floats:
    """Mean share of a step that devices which take so long (... x devices) wait for the slowest."""
    share: Floats = 1.0 - took.mean(axis=-1) / took.max(axis=-1)
    return share


def _winner(rng: np.random.Generator, scores: list[float]) -> int:
    """The best of three drawn."""
    drawn = rng.integers(0, len(scores), TOURNAMENT)
    return int(max(drawn, key=lambda one: (scores[one], -one)))
