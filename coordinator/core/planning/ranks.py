"""Which LoRA rank a device trains at: one for all, one that follows its capability, or none.

`capability` is our reading of what the papers of unequal ranks (`hetlora`, `flexlora`, `flora`) leave open, since they
draw the ranks or take them as given. The fastest device of the round gets the job's rank R; another the largest power
of two r below it, 2 at least, with

    step time <= step time of the fastest * R / r * sqrt(2),

both at the job's batch and with nothing else running, so that live load moves no rank. The root rounds a device to the
nearest power of two, so that neither noise nor a device exactly half as fast flaps between two. Where memory would hold
a larger rank only on a base of fewer bits, the rank gives way.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

from coordinator.core.facts import ModelFacts, ModuleSpec
from coordinator.core.planning.cost_model import ASSUMED_SPEED, MEDIAN_SPEED, PROBED_SPEED
from coordinator.core.planning.demand import Demand, dense_params
from coordinator.core.planning.reasons import plural, seconds, word
from shared.jobs import Bits

RankPolicy = Literal["equal", "capability", "none"]
"""`none`: the parameters are trained themselves, without factors."""
LEAST = 2


class Ranked(NamedTuple):
    """What one rank asks: of each module (none larger than its module), and in all."""

    rank: int
    ranks: dict[str, int]
    need: Demand
    note: str


class Timed(NamedTuple):
    """Step time of a device at the job's batch, undisturbed, and where it is from."""

    device: str
    step_s: float
    source: str


def rank_sizes(largest: int, policy: RankPolicy) -> tuple[int, ...]:
    """The ranks to choose from, rising: powers of two from `LEAST`, and the job's rank as the largest."""
    found = {largest}
    size = LEAST
    while policy == "capability" and size < largest:
        found.add(size)
        size *= 2
    return tuple(sorted(found))


def of_modules(modules: list[ModuleSpec], rank: int) -> tuple[dict[str, int], str]:
    """`rank` on every module, no larger than the module, and a note where some are smaller."""
    ranks = {module.name: min(rank, module.out, module.inp) for module in modules}
    clipped = sum(given < rank for given in ranks.values())
    return ranks, f"{plural(clipped, 'module')} smaller than that get their size" if clipped else ""


def equal_reason(modules: list[ModuleSpec], rank: int) -> str:
    """Why every device trains at `rank`."""
    _, note = of_modules(modules, rank)
    smallest = min(min(module.out, module.inp) for module in modules)
    reading = f"{rank} asked on {plural(len(modules), 'module')}"
    return word("rank", rank, reading, f"the smallest side {smallest}", note, verb="exceeds" if note else "meets")


def none_reason(facts: ModelFacts) -> str:
    """Why no module gets factors."""
    return word("rank", 0, f"{dense_params(facts)} parameters trained themselves", "0 factors asked")


def in_time(sizes: tuple[int, ...], own: Timed, fastest: Timed) -> int:
    """The largest rank that the device's speed allows, by the rule above."""
    allowed = [size for size in sizes if own.step_s <= _allowed_s(size, sizes, fastest)]
    return allowed[-1] if allowed else sizes[0]


def capability_reason(
    rank: int, sizes: tuple[int, ...], own: Timed, fastest: Timed, batch: int, notes: tuple[str, ...]
) -> str:
    """Why the device trains at `rank`."""
    bound_s = _allowed_s(rank, sizes, fastest)
    met = own.step_s <= bound_s
    reading = f"step {seconds(own.step_s)} ({own.source}) undisturbed at batch {batch}"
    told = f"{fastest.device}, the fastest, takes {seconds(fastest.step_s)}"
    bound = f"{seconds(bound_s)} for {rank} of {sizes[-1]} ({told})"
    least = "" if met else "the least rank all the same"
    return word("rank", rank, reading, bound, least, *notes, verb="meets" if met else "exceeds")


def memory_note(rank: int, bits: Bits, larger: int, refused: str | Bits) -> str:
    """Why memory allows `rank` and not the next `larger` one, which `refused`: the bits it would take, or why none."""
    if isinstance(refused, str):
        return f"{larger} would not fit ({refused})"
    return f"{larger} would leave memory for {refused} bits only, {rank} leaves it for {bits}"


def unmeasured_note(source: str) -> str:
    """What the rank rests on where the device's own speed was never measured; `source` as in `Pace`."""
    if source == ASSUMED_SPEED:
        return "nothing was measured yet: devices are taken to be as fast as their probes, or alike"
    return "not measured itself yet" if source in (MEDIAN_SPEED, PROBED_SPEED) else ""


def _allowed_s(rank: int, sizes: tuple[int, ...], fastest: Timed) -> float:
    return fastest.step_s * sizes[-1] / rank * math.sqrt(2.0)
