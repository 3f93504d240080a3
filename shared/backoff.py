"""Full-jitter exponential backoff."""

from __future__ import annotations


def delay(attempt: int, draw: float, *, base_s: float = 1.0, cap_s: float = 120.0) -> float:
    """Seconds to wait before try `attempt` (0, 1, ...): uniform in [0, min(cap, base * 2**attempt)].

    `draw` is a uniform random number of [0, 1), an argument so that the decision stays pure.
    Source: "full jitter"; without it a fleet reconnects in step after a broker's restart.
    """
    return draw * min(cap_s, base_s * 2.0 ** min(attempt, 30))
