"""S-UCB: a bandit over the unit square whose regions are refined where they pay (FedSpine, arXiv 2501.02438).

**The paper's** (a public note): an online bandit, "Smooth UCB", takes pruning ratio and rank as one arm, partitions and
refines their continuous space, and knows nothing of the devices beforehand. **Our reading**: everything below.

The square begins as `START` x `START` regions. Pulls are discounted by `KEEP` a round, so that a device whose speed
changes is followed. With K_ij = exp(-(d_ij / WIDTH)^2 / 2), d the distance between the middles of two regions, N a
region's discounted pulls and Rbar their mean reward:

    estimate_i = sum_j K_ij N_j Rbar_j / sum_j K_ij N_j          what was met nearby counts
    bonus_i    = CURIOSITY sqrt(ln(1 + sum_j N_j) / sum_j K_ij N_j)

In the bonus N also counts the arms that were given out in this round and are not rewarded yet (at their own places).
The region with the largest sum of both is taken, and in it a point by the given draw; one that nothing was met near
goes first. A region with `ENOUGH` pulls whose longer side exceeds `FINEST` is halved there; both halves inherit half of
its pulls. Heights that the device can't hold are never offered, nor points outside the span that is asked for.
"""

from __future__ import annotations

import math
from bisect import bisect
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

Point = tuple[float, float]
START = 3
KEEP = 0.98
CURIOSITY = 0.1
WIDTH = 0.1
ENOUGH, FINEST = 2.5, 0.08
POINTS = 4
"""Points a side of a region that are looked at: a region is offered if the device holds the height of one of them."""
_NEAR = 1e-6
_EDGES = tuple(i * (1 / START) for i in range(1, START))


class Region(msgspec.Struct, frozen=True, array_like=True):
    """A rectangle of the unit square: its lower corner and sides, its discounted pulls and their mean reward."""

    x: float
    y: float
    wide: float
    high: float
    pulls: float = 0.0
    mean: float = 0.0

    @property
    def middle(self) -> Point:
        """Of the rectangle."""
        return self.x + self.wide / 2, self.y + self.high / 2

    @property
    def edges(self) -> tuple[float, float, float, float]:
        """Least and largest x, least and largest y. An upper edge belongs to the next region, the square's own to the
        last."""
        return self.x, _edge(self.x + self.wide), self.y, _edge(self.y + self.high)

    def meets(self, span: tuple[float, float]) -> bool:
        """Whether the span of x, from the least to the largest, lies in it in part."""
        return self.x <= span[1] and _edge(self.x + self.wide) > span[0]

    def point(
        self, draw: tuple[float, float, float], holds: Callable[[float], bool], span: tuple[float, float]
    ) -> Point | None:
        """One of `POINTS` x `POINTS` points in it, shifted by the draw and moved into the span of x; none where it is
        outside of that, or holds no height. The draw's third number chooses."""
        if not self.meets(span):
            return None
        low, high = span
        heights = [y for j in range(POINTS) if holds(y := self.y + (j + draw[1]) / POINTS * self.high)]
        if not heights:
            return None
        i, j = divmod(int(draw[2] * POINTS * len(heights)), len(heights))
        return min(high, max(low, self.x + (i + draw[0]) / POINTS * self.wide)), heights[j]

    def halves(self) -> tuple[Region, Region]:
        """Both halves across its longer side. The upper one ends where this does, to the last bit: no point may lie
        in none of the regions."""
        pulls = self.pulls / 2
        if self.wide > self.high - 1e-9:
            half, middle = self.wide / 2, self.x + self.wide / 2
            lower = Region(self.x, self.y, half, self.high, pulls, self.mean)
            return lower, Region(middle, self.y, self.x + self.wide - middle, self.high, pulls, self.mean)
        half, middle = self.high / 2, self.y + self.high / 2
        lower = Region(self.x, self.y, self.wide, half, pulls, self.mean)
        return lower, Region(self.x, middle, self.wide, self.y + self.high - middle, pulls, self.mean)


class Choice(NamedTuple):
    """An arm, and why: what is expected of it, and what not knowing adds (infinite: nothing was met near)."""

    at: Point
    estimate: float
    bonus: float


def _edge(value: float) -> float:
    return math.inf if value > 1 - 1e-9 else value


def _cell(at: Point) -> int:
    """Which of the first regions a point lies in."""
    return START * bisect(_EDGES, at[0]) + bisect(_EDGES, at[1])


def _start() -> tuple[Region, ...]:
    side = 1 / START
    return tuple(Region(i * side, j * side, side, side) for i in range(START) for j in range(START))


class Bandit(msgspec.Struct, frozen=True, kw_only=True):
    """See the module. Pure: rewards come in, and a new one comes out. `Pulls` chooses."""

    regions: tuple[Region, ...] = _start()

    def learn(self, seen: Sequence[tuple[Point, float]]) -> Bandit:
        """The bandit after a round in which these arms had these rewards, in [0, 1]."""
        cells: list[list[Region]] = [[] for _ in range(START * START)]
        for one in self.regions:
            cells[_cell(one.middle)].append(msgspec.structs.replace(one, pulls=KEEP * one.pulls))
        edges = [[region.edges for region in regions] for regions in cells]
        for at, reward in seen:
            (x, y), cell = at, _cell(at)
            regions, bounds = cells[cell], edges[cell]
            # Regions that were stored before their halves ended exactly may leave gaps of a bit between them.
            place = len(regions) - 1
            for i, (left, right, low, high) in enumerate(bounds):
                if left <= x < right and low <= y < high:
                    place = i
                    break
            old = regions[place]
            pulls = old.pulls + 1
            new = msgspec.structs.replace(old, pulls=pulls, mean=(old.mean * old.pulls + reward) / pulls)
            refined = pulls >= ENOUGH and max(new.wide, new.high) > FINEST
            if refined:
                regions[place : place + 1] = halves = new.halves()
                bounds[place : place + 1] = [half.edges for half in halves]
            else:
                regions[place] = new
        return Bandit(regions=tuple(one for regions in cells for one in regions))


class Pulls:
    """The choices of one round, one after the other: what was given out and is not rewarded yet lowers the bonus there.

    Each takes time in proportion to the regions, however many came before."""

    def __init__(self, bandit: Bandit) -> None:
        self._regions = bandit.regions
        middles = [region.middle for region in bandit.regions]
        self._x, self._y = np.array([x for x, _ in middles]), np.array([y for _, y in middles])
        pulls = np.array([region.pulls for region in bandit.regions])
        means = np.array([region.mean for region in bandit.regions])
        near = np.array([self._near(middle) for middle in middles])
        self._known, self._count = near @ pulls, float(pulls.sum())
        told = self._known > 0
        self._estimates = np.divide(near @ (pulls * means), self._known, out=np.zeros_like(self._known), where=told)
        self._places = np.arange(len(bandit.regions))
        edges = [region.edges for region in bandit.regions]
        self._left, self._right = np.array([left for left, *_ in edges]), np.array([right for _, right, *_ in edges])
        self._within: dict[tuple[float, float], npt.NDArray[np.bool_] | None] = {}
        """By span, the regions that meet it; None: all."""

    def choose(
        self, draw: tuple[float, float, float], holds: Callable[[float], bool], span: tuple[float, float] = (0.0, 1.0)
    ) -> Choice | None:
        """The next arm; None where the device holds nothing of any region.

        `draw`: three numbers in [0, 1); `holds`: whether the device holds a height; `span`: least and largest x to
        choose from, which may be the same.
        """
        bonuses = self._bonuses()
        if span not in self._within:  # most devices share one
            meet = (self._left <= span[1]) & (self._right > span[0])  # `Region.meets`, of all
            self._within[span] = None if meet.all() else meet
        within, sums = self._within[span], self._estimates + bonuses
        if within is not None:
            sums = np.where(within, sums, -math.inf)
        for place in self._order(sums, draw[2]):
            at = self._regions[place].point(draw, holds, span)
            if at is not None:
                self._known = self._known + self._near(at)
                self._count += 1
                return Choice(at, float(self._estimates[place]), float(bonuses[place]))
        return None

    def _order(self, sums: npt.NDArray[np.float64], draw: float) -> Iterator[int]:
        """The regions, the largest sum first; of equal ones the draw decides. Nearly always the first will do."""
        first = int(sums.argmax())
        alone = np.count_nonzero(sums == sums[first]) == 1
        if alone:
            yield first
        turned = np.modf(draw + self._places * 0.6180339887498949)[0]
        yield from np.lexsort((turned, -sums))[int(alone) :].tolist()

    def _bonuses(self) -> npt.NDArray[np.float64]:
        curious = CURIOSITY * math.sqrt(math.log(1 + self._count))
        bonuses: npt.NDArray[np.float64] = curious / np.sqrt(np.maximum(self._known, _NEAR))
        if self._known.min() <= _NEAR:
            bonuses[self._known <= _NEAR] = math.inf
        return bonuses

    def _near(self, at: Point) -> npt.NDArray[np.float64]:
        """K of every region to a point."""
        aside, above = self._x - at[0], self._y - at[1]
        found: npt.NDArray[np.float64] = np.exp((aside * aside + above * above) / (-2 * WIDTH**2))
        return found
