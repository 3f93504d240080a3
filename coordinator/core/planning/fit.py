"""Step time of one device, fitted from what it measured: `seconds = overhead_s * x0 + per_flop_s * x1`.

Recursive weighted least squares of relative errors. The past weighs `KEEP` against one new round, and only
`KEEP_SURPRISED` where the round lies outside the band: a device that really changed is followed within a few rounds.
As long as only one batch size was seen the two parts can't be told apart; a weak prior then says that `OVERHEAD` of a
step does not grow with the batch, or as much as in the fleet (`Pool`).

**Held values.** Planners use `overhead_s` and `per_flop_s` as they were last adopted; a new solution is adopted only
once it differs by more than `BAND`. Noise of +-10 % in step times so never moves a batch between neighbours. Live load
is no part of this: it scales predictions at once.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

import msgspec

KEEP = 0.7
KEEP_SURPRISED = 0.5
KEEP_POOLED = 0.9
ODD = 4.0
BAND = 1.2
"""Ratio of predictions within which the held values stay."""
OUTLIER = 2.0
"""An observation further off than this ratio counts as one at this ratio."""
OVERHEAD, OVERHEAD_WEIGHT, POOL_WEIGHT = 0.05, 0.05, 0.001


class Fit(msgspec.Struct, frozen=True, kw_only=True):
    """Normal equations of the observations so far, and the values held."""

    rounds: int = 0
    s00: float = 0.0
    s01: float = 0.0
    s11: float = 0.0
    r0: float = 0.0
    r1: float = 0.0
    overhead_s: float = 0.0
    per_flop_s: float = 0.0

    def predict(self, x0: float, x1: float) -> float:
        """Seconds by the held values."""
        return self.overhead_s * x0 + self.per_flop_s * x1

    def learn(self, x0: float, x1: float, seconds: float, overhead: float | None = None) -> Fit:
        """The fit that also knows one more round. All arguments positive; `overhead`: its share as the fleet has it."""
        expected = self.predict(x0, x1) if self.rounds else seconds
        if self.rounds >= 2:
            seconds = min(max(seconds, expected / OUTLIER), expected * OUTLIER)
        keep = KEEP if _near(seconds / expected) else KEEP_SURPRISED
        u0, u1, told = x0 / expected, x1 / expected, seconds / expected
        sums = {
            "s00": keep * self.s00 + u0 * u0,
            "s01": keep * self.s01 + u0 * u1,
            "s11": keep * self.s11 + u1 * u1,
            "r0": keep * self.r0 + u0 * told,
            "r1": keep * self.r1 + u1 * told,
        }
        overhead, per_flop = _solve(**sums, share=OVERHEAD if overhead is None else overhead, weight=OVERHEAD_WEIGHT)
        if self.rounds and _near((overhead * x0 + per_flop * x1) / expected):
            overhead, per_flop = self.overhead_s, self.per_flop_s
        return Fit(rounds=self.rounds + 1, overhead_s=overhead, per_flop_s=per_flop, **sums)


class Pool(msgspec.Struct, frozen=True, kw_only=True):
    """What the devices of a fleet have in common: the same two parts, each device's times its probe's FLOP/s.

    Devices of unequal batches tell both apart at once, which takes one device many rounds. No values are held: nobody
    is planned by them once it was measured itself.
    """

    s00: float = 0.0
    s01: float = 0.0
    s11: float = 0.0
    r0: float = 0.0
    r1: float = 0.0
    overhead: float = 0.0
    per_flop: float = 0.0

    def learn(self, seen: Sequence[tuple[float, float, float]]) -> Pool:
        """The pool that also knows a round's (x0, x1, seconds), one of each device.

        Left out is who is further off than `ODD` from what the pool expects (before there is one, from the median of
        the round): a probe that says too little would weigh by the square of it.
        """
        usual = statistics.median(one[2] / one[1] for one in seen) if seen else 0.0
        seen = [one for one in seen if 1 / ODD <= one[2] / (self.seconds(*one[:2]) or usual * one[1]) <= ODD]
        if not seen:
            return self
        u0, u1 = ([one[place] / one[2] for one in seen] for place in (0, 1))
        sums = {
            "s00": KEEP_POOLED * self.s00 + math.fsum(one * one for one in u0),
            "s01": KEEP_POOLED * self.s01 + math.fsum(a * b for a, b in zip(u0, u1, strict=True)),
            "s11": KEEP_POOLED * self.s11 + math.fsum(one * one for one in u1),
            "r0": KEEP_POOLED * self.r0 + math.fsum(u0),
            "r1": KEEP_POOLED * self.r1 + math.fsum(u1),
        }
        overhead, per_flop = _solve(**sums, share=OVERHEAD, weight=POOL_WEIGHT)
        return Pool(**sums, overhead=overhead, per_flop=per_flop)

    def seconds(self, x0: float, x1: float) -> float:
        """Of such a step; 0: nothing was learned yet."""
        return self.overhead * x0 + self.per_flop * x1

    def share(self, x0: float, x1: float) -> float | None:
        """The overhead's share of such a step; None: nothing was learned yet."""
        whole = self.seconds(x0, x1)
        return self.overhead * x0 / whole if whole > 0 else None


def _near(ratio: float) -> bool:
    return 1 / BAND <= ratio <= BAND


def _solve(
    s00: float, s01: float, s11: float, r0: float, r1: float, share: float, weight: float
) -> tuple[float, float]:
    """Both parts, neither negative, minimising the squared relative errors under the prior on the overhead."""
    a00, b0 = s00 * (1 + weight), r0 * (1 + weight * share)
    determinant = a00 * s11 - s01 * s01
    overhead = (b0 * s11 - r1 * s01) / determinant
    per_flop = (a00 * r1 - s01 * b0) / determinant
    if overhead < 0:
        return 0.0, r1 / s11
    if per_flop < 0:
        return b0 / a00, 0.0
    return overhead, per_flop
