"""Which rows of a data set a release is judged on: best those that training leaves out."""

from __future__ import annotations


def places(rows: int, share: float) -> range:
    """Places (from 0) of the rows left out of `rows`: evenly spread, always the same; about `share` of them.

    At `share` 0, and of fewer rows than it takes for one, none; never all.
    """
    every = max(2, round(1.0 / share)) if share > 0.0 else rows + 1
    return range(every - 1, rows, every)


def some(rows: int, share: float, most: int) -> list[int]:
    """Places of about `share` of `rows`, and at most `most` (0: all of these), evenly spread over all of them."""
    every = range(0, rows, max(1, round(1.0 / share)))
    if not 0 < most < len(every):
        return list(every)
    return [every[number * len(every) // most] for number in range(most)]
