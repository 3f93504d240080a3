"""How far two orders of strategies agree: Kendall's tau over times to a target, where close times are ties. Pure."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from itertools import combinations
from typing import NamedTuple


class Timed(NamedTuple):
    """Seconds that a strategy took to the target (`math.inf`: it never got there), and how far chance moves them."""

    seconds: float
    spread: float


def timed(seconds: Sequence[float], round_s: float) -> Timed:
    """The mean of one time for each seed, `math.inf` where one of them is.

    The spread is the standard deviation over the seeds; with one seed it is `round_s`, the seconds of the round that
    reached the target: quality is known at the end of a round only.
    """
    if math.inf in seconds:
        return Timed(math.inf, 0.0)
    return Timed(statistics.fmean(seconds), statistics.stdev(seconds) if len(seconds) > 1 else round_s)


def compared(one: Timed, other: Timed) -> int:
    """-1: `one` is faster; 1: slower; 0: a tie: no further apart than the larger spread, or neither got there."""
    if one.seconds == other.seconds:
        return 0
    if abs(one.seconds - other.seconds) <= max(one.spread, other.spread):
        return 0
    return -1 if one.seconds < other.seconds else 1


def tau(first: Sequence[Timed], second: Sequence[Timed]) -> float:
    """Kendall's tau-b of two orders of the same strategies: pairs ordered alike less pairs ordered the other way, over
    the geometric mean of the pairs that each order tells apart. 0 where one of them has ties alone."""
    pairs = [
        (compared(first[a], first[b]), compared(second[a], second[b])) for a, b in combinations(range(len(first)), 2)
    ]
    apart = math.prod(sum(pair[side] != 0 for pair in pairs) for side in (0, 1))
    return sum(a * b for a, b in pairs) / math.sqrt(apart) if apart else 0.0
