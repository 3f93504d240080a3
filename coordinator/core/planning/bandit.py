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
its pulls. Points that the device can't hold are never offered, nor those outside the span that is asked for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
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
"""Points a side of a region that are looked at: a region is offered if the device holds one of them."""
_NEAR = 1e-6


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

    def holds(self, at: Point) -> bool:
        """Whether the point lies in it. An upper edge belongs to the next region, the square's own to the last."""
        return self.x <= at[0] < _edge(self.x + self.wide) and self.y <= at[1] < _edge(self.y + self.high)

    def points(self, draw: Point, span: tuple[float, float] = (0.0, 1.0)) -> list[Point]:
        """`POINTS` x `POINTS` points in it, shifted by the draw and moved into the span of x; none where it is outside
        of that."""
        low, high = span
        if self.x > high or _edge(self.x + self.wide) <= low:
            return []
        shifted = [((i + draw[0]) / POINTS, (j + draw[1]) / POINTS) for i in range(POINTS) for j in range(POINTS)]
        return [(min(high, max(low, self.x + x * self.wide)), self.y + y * self.high) for x, y in shifted]

    def halves(self) -> tuple[Region, Region]:
        """Both halves across its longer side."""
        pulls = self.pulls / 2
        if self.wide >= self.high:
            half = self.wide / 2
            lower = Region(self.x, self.y, half, self.high, pulls, self.mean)
            return lower, Region(self.x + half, self.y, half, self.high, pulls, self.mean)
        half = self.high / 2
        lower = Region(self.x, self.y, self.wide, half, pulls, self.mean)
        return lower, Region(self.x, self.y + half, self.wide, half, pulls, self.mean)


class Choice(NamedTuple):
    """An arm, and why: what is expected of it, and what not knowing adds (infinite: nothing was met near)."""

    at: Point
    estimate: float
    bonus: float


def _edge(value: float) -> float:
    return math.inf if value > 1 - 1e-9 else value


def _start() -> tuple[Region, ...]:
    side = 1 / START
    return tuple(Region(i * side, j * side, side, side) for i in range(START) for j in range(START))


class Bandit(msgspec.Struct, frozen=True, kw_only=True):
    """See the module. Pure: draws come in, and a new one comes out."""

    regions: tuple[Region, ...] = _start()

    def choose(
        self, draw: tuple[float, float, float], holds: Callable[[Point], bool], span: tuple[float, float] = (0.0, 1.0)
    ) -> Choice | None:
        """The arm to pull first in a round (`Pulls.choose`)."""
        return Pulls(self).choose(draw, holds, span)

    def learn(self, seen: Sequence[tuple[Point, float]]) -> Bandit:
        """The bandit after a round in which these arms had these rewards, in [0, 1]."""
        regions = [msgspec.structs.replace(one, pulls=KEEP * one.pulls) for one in self.regions]
        for at, reward in seen:
            place = next(i for i, region in enumerate(regions) if region.holds(at))
            old = regions[place]
            pulls = old.pulls + 1
            new = msgspec.structs.replace(old, pulls=pulls, mean=(old.mean * old.pulls + reward) / pulls)
            refined = pulls >= ENOUGH and max(new.wide, new.high) > FINEST
            regions[place : place + 1] = new.halves() if refined else [new]
        return Bandit(regions=tuple(regions))


class Pulls:
    """The choices of one round, one after the other: what was given out and is not rewarded yet lowers the bonus there.

    Each takes time in proportion to the regions, however many came before."""

    def __init__(self, bandit: Bandit) -> None:
        self._regions = bandit.regions
        self._middles = np.array([region.middle for region in bandit.regions])
        pulls = np.array([region.pulls for region in bandit.regions])
        means = np.array([region.mean for region in bandit.regions])
        near = _kernel(self._middles, self._middles)
        self._known, self._count = near @ pulls, float(pulls.sum())
        told = self._known > 0
        self._estimates = np.divide(near @ (pulls * means), self._known, out=np.zeros_like(self._known), where=told)
        self._places = np.arange(len(bandit.regions))

    def choose(
        self, draw: tuple[float, float, float], holds: Callable[[Point], bool], span: tuple[float, float] = (0.0, 1.0)
    ) -> Choice | None:
        """The next arm; None where the device holds no point of any region.

        `draw`: three numbers in [0, 1); `span`: least and largest x to choose from, which may be the same.
        """
        bonuses = self._bonuses()
        # Of equal regions the draw decides.
        turned = np.modf(draw[2] + self._places * 0.6180339887498949)[0]
        for place in np.lexsort((turned, -(self._estimates + bonuses))):
            points = [point for point in self._regions[place].points(draw[:2], span) if holds(point)]
            if points:
                at = points[int(draw[2] * len(points))]
                self._known = self._known + _kernel(self._middles, np.array([at]))[:, 0]
                self._count += 1
                return Choice(at, float(self._estimates[place]), float(bonuses[place]))
        return None

    def _bonuses(self) -> npt.NDArray[np.float64]:
        curious, met = CURIOSITY * math.sqrt(math.log(1 + self._count)), self._known > _NEAR
        bonuses: npt.NDArray[np.float64] = np.divide(
            curious, np.sqrt(self._known), out=np.full_like(self._known, math.inf), where=met
        )
        return bonuses


def _kernel(ones: npt.NDArray[np.float64], others: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    squares = np.square(ones[:, None, :] - others[None, :, :]).sum(axis=2)
    found: npt.NDArray[np.float64] = np.exp(-squares / (2 * WIDTH**2))
    return found
