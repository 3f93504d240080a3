"""Whether what a long-running program holds grows with the rounds: memory by a straight line, descriptors by thirds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

RSS_PER_ROUND = 5_000.0
"""Bytes. A leaked update, plan or message is larger; the page cache of the event log, which ends at 2 MB, is not."""
SLACK = 1_500_000.0
"""Bytes that a line may rise in all: allocators take memory in steps, and a short run sees one of them as a slope."""


@dataclass
class Held:
    """What one program held, sample by sample."""

    name: str
    rounds: list[int] = field(default_factory=list)
    rss: list[int] = field(default_factory=list)
    descriptors: list[int] = field(default_factory=list)

    def add(self, round: int, rss: int, descriptors: int) -> None:
        """One sample, taken in `round`; bytes."""
        self.rounds.append(round)
        self.rss.append(rss)
        self.descriptors.append(descriptors)

    @property
    def slope(self) -> float:
        """Bytes of RSS per round, by least squares."""
        return float(np.polyfit(self.rounds, self.rss, 1)[0])

    @property
    def swollen(self) -> bool:
        """Whether its RSS rises beyond both bounds."""
        return self.slope > RSS_PER_ROUND and self.slope * (self.rounds[-1] - self.rounds[0]) > SLACK

    @property
    def more_descriptors(self) -> int:
        """By how much the fewest descriptors of the last third exceed the most of the first; not above 0: no growth."""
        third = len(self.descriptors) // 3
        return min(self.descriptors[-third:]) - max(self.descriptors[:third])


def grown(programs: Sequence[Held]) -> str:
    """What grew beyond its bound, in one line; "": nothing. Needs six samples of each program, warm-up left out."""
    found = []
    for held in programs:
        if held.swollen:
            rise = held.rss[-1] - held.rss[0]
            found.append(f"{held.name}: RSS by {held.slope / 1e3:.1f} kB a round, {rise / 1e6:.1f} MB in all")
        if held.more_descriptors > 0:
            found.append(f"{held.name}: file descriptors by {held.more_descriptors}, now {held.descriptors[-1]}")
    return "; ".join(found)
