"""How a planner words the reason of a number: `name value: reading meets bound; notes`. Stable, for tools to read.

batch 4: step 0.82 s (fitted on 3 rounds) at 0.31 free cores (foreign 0.52 of 0.83) meets 8.4 s round target; ...
"""

from __future__ import annotations

import re
from typing import Literal

Verb = Literal["meets", "exceeds"]

PATTERN = re.compile(
    r"(?P<name>rank|depth|batch|bits|steps|agents|weights|prune|split) (?P<value>\d+): "
    r"(?P<reading>.+?) (?P<verb>meets|exceeds) (?P<bound>[^;]+)(?:; (?P<notes>.+))?"
)
"""Matches (`fullmatch`) every reason in `Work.reasons`; reading and bound hold at least one number each."""


def word(name: str, value: int, reading: str, bound: str, *notes: str, verb: Verb = "meets") -> str:
    """The reason why `name` is `value`: what was read, the bound it met, and what else the reader should know."""
    told = f"{name} {value}: {reading} {verb} {bound}"
    for note in notes:  # a few for each of tens of thousands of works
        if note:
            told += f"; {note}"
    return told


def seconds(value: float) -> str:
    """A duration with three significant digits, never in powers of ten where people would not write them."""
    return f"{value:.0f} s" if value >= 100 else f"{value:.3g} s"


def mebibytes(value: float) -> str:
    """A size in MiB, to one of them."""
    return f"{value / 2**20:.0f} MiB"


def plural(count: int, noun: str) -> str:
    """`1 round`, `2 rounds`."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
