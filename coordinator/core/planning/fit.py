"""Step time of one device, fitted from what it measured: `seconds = overhead_s * x0 + per_flop_s * x1`.

Weighted least squares of relative errors, older rounds forgotten by `KEEP`. As long as only one batch size was seen the
two parts can't be told apart; a weak prior then says that `OVERHEAD` of a step does not grow with the batch.

**Held values.** Planners use `overhead_s` and `per_flop_s` as they were last adopted; a new solution is adopted only
once it differs by more than `BAND`. Noise of +-10 % in step times so never moves a batch between neighbours, while a
device that really changed is followed within a few rounds. Live load is no part of this: it scales predictions at once.
"""

from __future__ import annotations

import msgspec

KEEP = 0.7
"""Weight of the past against one new round."""
BAND = 1.2
"""Ratio of predictions within which the held values stay."""
OUTLIER = 3.0
"""An observation further off than this ratio counts as one at this ratio."""
OVERHEAD, OVERHEAD_WEIGHT = 0.1, 0.05


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

    def learn(self, x0: float, x1: float, seconds: float) -> Fit:
        """The fit that also knows one more round. All arguments positive."""
        if self.rounds >= 2:
            expected = self.predict(x0, x1)
            seconds = min(max(seconds, expected / OUTLIER), expected * OUTLIER)
        u0, u1 = x0 / seconds, x1 / seconds
        sums = {
            "s00": KEEP * self.s00 + u0 * u0,
            "s01": KEEP * self.s01 + u0 * u1,
            "s11": KEEP * self.s11 + u1 * u1,
            "r0": KEEP * self.r0 + u0,
            "r1": KEEP * self.r1 + u1,
        }
        overhead, per_flop = _solve(**sums)
        if self.rounds and 1 / BAND <= (overhead * x0 + per_flop * x1) / self.predict(x0, x1) <= BAND:
            overhead, per_flop = self.overhead_s, self.per_flop_s
        return Fit(rounds=self.rounds + 1, overhead_s=overhead, per_flop_s=per_flop, **sums)


def _solve(s00: float, s01: float, s11: float, r0: float, r1: float) -> tuple[float, float]:
    """Both parts, neither negative, minimising the squared relative errors under the prior on the overhead."""
    a00, b0 = s00 * (1 + OVERHEAD_WEIGHT), r0 * (1 + OVERHEAD_WEIGHT * OVERHEAD)
    determinant = a00 * s11 - s01 * s01
    overhead = (b0 * s11 - r1 * s01) / determinant
    per_flop = (a00 * r1 - s01 * b0) / determinant
    if overhead < 0:
        return 0.0, r1 / s11
    if per_flop < 0:
        return b0 / a00, 0.0
    return overhead, per_flop
