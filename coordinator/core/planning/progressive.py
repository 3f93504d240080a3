"""When and how bottleneck adapters grow: the rule of `fedadapter`, without devices.

The paper's (FedAdapter, Cai et al., MobiCom 2023, arXiv 2205.10162, by its abstract): begin with few, small adapters in
the top layers, go deeper and wider as training goes on; profile future configurations on devices in trial groups.
Our reading, since the abstract gives no rule:

* A configuration is (depth in blocks from the output, width). It begins at depth 2 and the job's `rank` as width. The
  next deeper one has a sixth of the blocks more, one at least; the next wider one twice the width.
* Progress stalls when the fleet's loss fell by less than `STALL` of itself over the last `WINDOW` rounds. Then one
  round is a trial: a third of the participants each train the present, the deeper and the wider configuration.
* The group whose loss fell fastest per second wins, a smaller configuration where two are equal; the seconds are those
  of one common device, since groups hold different ones. Whoever wins, `WINDOW` rounds pass before the next trial.
* With fewer participants than groups there is no trial: the configuration grows on a stall, deeper and wider in turn.

The paper runs its trials beside the training all the time and keeps a winner's model; here a trial is a round of its
own, and what its groups share is averaged.
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec
from msgspec.structs import replace

WINDOW = 3
STALL = 0.03
FIRST_DEPTH = 2


class Shape(msgspec.Struct, frozen=True, kw_only=True, order=True):
    """A configuration: blocks with an adapter, counted from the output, and the width of each."""

    depth: int
    width: int

    def __str__(self) -> str:
        return f"depth {self.depth}, width {self.width}"


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """The largest configuration."""

    depth: int
    width: int


class Progress(msgspec.Struct, frozen=True, kw_only=True):
    """Where the growth is. `shape` None: nothing was planned yet."""

    shape: Shape | None = None
    losses: list[float] = []
    """The fleet's loss at the start of each round since the last decision, oldest first."""
    grew_deeper: bool = False
    """Whether the last growth without a trial was in depth."""

    def at(self, limits: Limits, width: int) -> Shape:
        """The present configuration; `width`: of the first one."""
        return self.shape or Shape(depth=min(FIRST_DEPTH, limits.depth), width=min(width, limits.width))

    @property
    def stalled(self) -> bool:
        """Whether progress stalls."""
        if len(self.losses) <= WINDOW:
            return False
        before, now = self.losses[-1 - WINDOW], self.losses[-1]
        return before - now < STALL * abs(before)

    def seen(self, loss: float) -> Progress:
        """After a round that began with the fleet's loss at `loss`."""
        return replace(self, losses=[*self.losses, loss][-1 - WINDOW :])

    def decided(self, shape: Shape) -> Progress:
        """After a decision for `shape`: losses count anew."""
        return replace(self, shape=shape, losses=[])

    def grown(self, shape: Shape, limits: Limits) -> Progress:
        """After a stall without a trial: `shape` grows, deeper and wider in turn as far as it can."""
        further = candidates(shape, limits)[1:]
        if not further:
            return self.decided(shape)
        deeper = [one for one in further if one.depth > shape.depth]
        wider = [one for one in further if one.width > shape.width]
        chosen = (wider or deeper if self.grew_deeper else deeper or wider)[0]
        return replace(self.decided(chosen), grew_deeper=chosen.depth > shape.depth)


def candidates(shape: Shape, limits: Limits) -> list[Shape]:
    """The present configuration, then the deeper and the wider one, where the limits leave any."""
    depth = min(limits.depth, shape.depth + max(1, limits.depth // 6))
    width = min(limits.width, 2 * shape.width)
    found = [shape, replace(shape, depth=depth), replace(shape, width=width)]
    return [one for index, one in enumerate(found) if index == 0 or one != shape]


def fastest(rates: Mapping[Shape, float]) -> Shape:
    """The configuration whose loss fell most per second; a smaller one where two are equal."""
    return min(rates, key=lambda shape: (-rates[shape], shape))
