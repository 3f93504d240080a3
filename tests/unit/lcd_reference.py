"""LCD by brute force: a second implementation to test `coordinator.core.planning.lcd` against."""

from __future__ import annotations

from typing import NamedTuple


class Found(NamedTuple):
    """One candidate T, as brute force sees it."""

    depths: list[int]
    round_s: float
    waiting: float
    coverage: float
    utility: float


def brute_force(
    times: list[list[float]], most: list[int], halved: list[bool], shares: list[float], ranks: tuple[int, ...]
) -> tuple[Found, float, int]:
    """(best, eps, number of candidates): every T for itself, word by word as the design says."""
    blocks = len(ranks)
    candidates = sorted({row[k - 1] for row, k_max in zip(times, most, strict=True) for k in range(1, k_max + 1)})
    found = []
    for candidate in candidates:
        depths = []
        for row, k_max, half in zip(times, most, halved, strict=True):
            k = max([k for k in range(1, k_max + 1) if row[k - 1] <= candidate], default=1)
            depths.append(max(1, k // 2) if half else k)
        taken = [row[k - 1] for row, k in zip(times, depths, strict=True)]
        longest = max(taken)
        utility = sum(p * sum(ranks[blocks - k :]) / sum(ranks) for p, k in zip(shares, depths, strict=True)) / longest
        waiting = sum(longest - t for t in taken) / len(taken)
        found.append(Found(depths, longest, waiting, depths.count(blocks) / len(depths), utility))
    eps, asked = 0.15, min(0.1, found[-1].coverage)
    while True:
        fits = [one for one in found if one.waiting <= eps * one.round_s and one.coverage >= asked]
        if fits:
            return max(fits, key=lambda one: one.utility), eps, len(candidates)
        eps *= 1.25
