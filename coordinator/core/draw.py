"""Which of the ready devices take part in a round, where the job wants only some: a draw by hash."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from msgspec.structs import replace

from coordinator.core.planning.base import Plan
from shared.errors import UserError

NOT_DRAWN = "not drawn for this round"


TRIES = 8
"""How often others are drawn in the place of devices that turn out to be unable."""


class Draw(NamedTuple):
    """Which draw it is. A round that is repeated (another `attempt`) draws anew."""

    seed: int
    round: int
    attempt: int


def drawn(devices: Sequence[str], sample: int, draw: Draw) -> list[str]:
    """`sample` of `devices` (0: all), by id: those whose hash of (draw, device) is smallest.

    Who is drawn depends on nothing but the draw and who is ready; a device that comes or goes moves one place.
    """
    if not sample or len(devices) <= sample:
        return sorted(devices)
    return sorted(sorted(devices, key=lambda device: _rank(draw, device))[:sample])


def plan_over(ready: Sequence[str], sample: int, draw: Draw, make: Callable[[Sequence[str]], Plan]) -> Plan:
    """The plan that `make` gives for drawn devices. In the place of those that it leaves out the next ones are drawn.

    Raises the `UserError` of `make` where it finds nobody able among all that were drawn.
    """
    unable: dict[str, str] = {}
    for left in range(TRIES, 0, -1):
        pool = [device for device in ready if device not in unable]
        taken = drawn(pool, sample, draw)
        last = left == 1 or len(taken) == len(pool)
        try:
            plan = make(taken)
        except UserError as error:
            if last:
                raise
            unable.update(dict.fromkeys(taken, str(error)))
            continue
        if last or not plan.left_out:
            return _told(plan, ready, taken, unable)
        unable.update(plan.left_out)
    raise AssertionError("the last try returns or raises")


def _told(plan: Plan, ready: Sequence[str], taken: Sequence[str], unable: Mapping[str, str]) -> Plan:
    """`plan` made over the drawn devices `taken`, saying so."""
    if len(taken) == len(ready):
        return plan
    others = dict.fromkeys(sorted(set(ready) - set(taken)), NOT_DRAWN)
    reason = f"{plan.reason}; {len(taken)} of {len(ready)} ready devices were drawn (rounds.sample)"
    return replace(plan, reason=reason, left_out={**others, **unable, **plan.left_out})


def _rank(draw: Draw, device: str) -> bytes:
    return hashlib.sha256(f"{draw.seed}/{draw.round}/{draw.attempt}/{device}".encode()).digest()
