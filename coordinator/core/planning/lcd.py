"""LCD: the depth of every device and the rank of every block, as numbers (LEGEND, arXiv 2412.20004).

The paper's (abstract, public digest): depth counted from the output, ranks that rise toward it, a greedy configuration
algorithm "LCD" against waiting. Our reading: everything below, since LCD's steps are not public.

    ranks      r_l = r_1 + lambda (l - 1), l = 1 (input) .. L (output), sum r_l <= R_tot
    candidates T = every t_i(k), k <= k_i^max;  k_i(T) = the largest k with t_i(k) <= T, else 1
    of each    T' = max t_i(k_i);  waiting W = mean (T' - t_i);  coverage C = share of devices that tune block 1
               utility U = sum_i p_i sum_{l > L - k_i} omega_l / T',  omega_l = r_l / sum r
    choice     the largest U with W <= eps T' and C >= 0.1; where there is none, eps is relaxed by 1.25

Two additions: no more coverage is asked than the devices can give, and a device whose readings are old tunes half its
depth. All candidates are judged in one sweep over the sorted t_i(k): a step of one device from k - 1 to k blocks moves
each of the sums by a difference. n devices cost n L log(n L).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]

WAITING = 0.15
"""eps: the share of the round that devices may wait on average."""
RELAXED = 1.25
COVERAGE = 0.1


class Choice(NamedTuple):
    """What LCD found. `depths` per device; `reached`: before halving for old readings.

    `round_s`: T', the time of the slowest; `waiting`: W as a share of it, within `bound`; `candidates`: how many T.
    """

    depths: Ints
    reached: Ints
    round_s: float
    waiting: float
    bound: float
    coverage: float
    asked: float
    utility: float
    candidates: int


def progression(blocks: int, total: int, first: int) -> tuple[int, ...]:
    """Ranks of blocks 1 .. `blocks`: arithmetic from `first`, rounded, summing to `total` or just below.

    Lambda = 2 (total - blocks first) / (blocks (blocks - 1)). Halves are rounded down: values mirrored about the mean
    have fractions that add up to a whole, so that rounding never adds to the sum where total / blocks is whole.
    """
    if blocks == 1:
        return (total,)
    rise, parts = 2 * (total - blocks * first), blocks * (blocks - 1)
    return tuple(first - (parts - 2 * rise * place) // (2 * parts) for place in range(blocks))


def first_rank(rank: int) -> int:
    """r_1 for a mean of `rank`: the largest of 1, 2 and 4 that is at most a quarter of it, else 1."""
    return max((first for first in (2, 4) if 4 * first <= rank), default=1)


class _Sweep(NamedTuple):
    """Each candidate T, rising and once, with what it gives."""

    times: Floats
    longest: Floats
    waiting: Floats
    coverage: Floats
    utility: Floats


def choose(times: Floats, most: Ints, halved: Flags, shares: Floats, ranks: tuple[int, ...]) -> Choice:
    """Depths for devices whose round with k blocks takes `times[i, k - 1]`, rising in k.

    `most`: k_i^max >= 1; `halved`: devices that get half of what they reach; `shares`: p_i.
    """
    devices, blocks = times.shape
    depths = np.arange(1, blocks + 1)
    allowed = depths[None, :] <= most[:, None]
    given = np.where(halved[:, None], np.maximum(1, depths // 2), depths)
    worth = np.cumsum(np.array(ranks[::-1], dtype=np.float64)) / sum(ranks)
    sweep = _sweep(times, allowed, given, shares, worth)
    asked = min(COVERAGE, float(sweep.coverage[-1]))
    bound, covers = WAITING, sweep.coverage >= asked
    while not np.any(fits := covers & (sweep.waiting <= bound * sweep.longest)):
        bound *= RELAXED
    best = int(np.argmax(np.where(fits, sweep.utility, -1.0)))
    reached = np.maximum(1, np.count_nonzero(allowed & (times <= sweep.times[best]), axis=1))
    longest = float(sweep.longest[best])
    return Choice(
        depths=given[np.arange(devices), reached - 1], reached=reached, round_s=longest,
        waiting=float(sweep.waiting[best]) / longest if longest > 0 else 0.0, bound=bound,
        coverage=float(sweep.coverage[best]), asked=asked, utility=float(sweep.utility[best]),
        candidates=len(sweep.times),
    )  # fmt: skip


def _sweep(times: Floats, allowed: Flags, given: Ints, shares: Floats, worth: Floats) -> _Sweep:
    """All candidates. A device stands at k = 1 until T reaches its t_i(2): its first step changes nothing."""
    devices, blocks = times.shape
    taken = np.take_along_axis(times, given - 1, axis=1)
    order = np.argsort(times[allowed], kind="stable")
    events = times[allowed][order]
    last = np.append(events[1:] != events[:-1], True)

    def total(values: npt.NDArray[Any]) -> Floats:
        """Sum over the devices of `values[i, k_i - 1]` at each candidate."""
        steps = np.diff(values, axis=1, prepend=values[:, :1])[allowed][order]
        summed: Floats = (values[:, 0].sum() + np.cumsum(steps))[last]
        return summed

    longest = np.maximum(np.maximum.accumulate(taken[allowed][order]), taken[:, 0].max())[last]
    utility = total(shares[:, None] * worth[given - 1])
    return _Sweep(
        times=events[last],
        longest=longest,
        waiting=np.maximum(longest - total(taken) / devices, 0.0),
        coverage=total((given == blocks).astype(np.int64)) / devices,
        utility=np.divide(utility, longest, out=utility, where=longest > 0),
    )
