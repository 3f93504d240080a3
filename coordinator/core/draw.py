"""Which of the ready devices take part in a round, where the job wants only some: a draw by hash."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from msgspec.structs import replace

from coordinator.core.planning.base import Plan

NOT_DRAWN = "not drawn for this round"


def drawn(devices: Sequence[str], sample: int, seed: int, round: int) -> list[str]:
    """`sample` of `devices` (0: all), by id: those whose hash of (seed, round, device) is smallest.

    Who is drawn depends on nothing but the round and who is ready; a device that comes or goes moves one place.
    """
    if not sample or len(devices) <= sample:
        return sorted(devices)
    return sorted(sorted(devices, key=lambda device: _rank(seed, round, device))[:sample])


def told(plan: Plan, ready: Sequence[str], taken: Sequence[str]) -> Plan:
    """`plan` made over the drawn devices `taken`, saying so."""
    if len(taken) == len(ready):
        return plan
    others = dict.fromkeys(sorted(set(ready) - set(taken)), NOT_DRAWN)
    reason = f"{plan.reason}; {len(taken)} of {len(ready)} ready devices were drawn (rounds.sample)"
    return replace(plan, reason=reason, left_out={**others, **plan.left_out})


def _rank(seed: int, round: int, device: str) -> bytes:
    return hashlib.sha256(f"{seed}/{round}/{device}".encode()).digest()
