"""What planners know of pruned models: what is left of the base at a ratio, and what the fleet found of its units."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from msgspec.structs import replace

from coordinator.core.facts import ModelFacts
from coordinator.core.planning.unit_table import Rows, UnitTable
from shared import units
from shared.adapter import Adapter
from shared.errors import DecodeError
from shared.messages import DeviceInfo, UpdateFacts, Work
from shared.pruning_order import Pruning
from shared.units import Group

SMOOTHING = 0.7
"""Of the fleet's scores, by round."""


def class_of(info: DeviceInfo) -> str:
    """The kind of machine that devices are alike by: their GPU, else what their hardware is called."""
    return next((gpu.name for gpu in info.gpus if gpu.name), info.hardware) or "unknown"


def facts_at(facts: ModelFacts, ratio: float) -> ModelFacts:
    """The base with `ratio` of the units of each group gone. Activations stay those of the whole, an upper bound."""
    if ratio <= 0.0 or not facts.groups:
        return facts
    sizes = {module.name: (module.out, module.inp) for module in facts.modules}
    left = units.sizes_at(facts.groups, ratio, sizes)
    modules = [replace(module, out=left[module.name][0], inp=left[module.name][1]) for module in facts.modules]
    gone = sum(out * inp for out, inp in sizes.values()) - sum(module.out * module.inp for module in modules)
    return replace(facts, modules=modules, linear_params=facts.linear_params - gone)


def begun(groups: Sequence[Group], order: Pruning) -> float:
    """The ratio of a model when its device begins such work: an order that tells one goes beyond what is gone."""
    return order.begin or ratio_of(groups, order.kept)


def middle(groups: Sequence[Group], order: Pruning) -> float:
    """The ratio that stands for such work: that in the middle of it, to the nearest of a hundred."""
    return round((begun(groups, order) + order.ratio) / 2, 2)


def ratio_of(groups: Sequence[Group], packed: Mapping[str, bytes]) -> float:
    """The ratio that a model of `packed` units was pruned to: as `units.ratio_of`."""
    if not packed:
        return 0.0
    gone = [
        1.0 - int.from_bytes(bits, "little").bit_count() / group.count
        for group in groups
        if (bits := packed.get(group.name)) is not None
    ]
    return max(gone, default=0.0)


class Sound(NamedTuple):
    """What a device told of a round in which it pruned."""

    facts: UpdateFacts
    begun: float
    """The ratio at which it began, and that at which it ended."""
    ratio: float


def fault(groups: Sequence[Group], order: Pruning, facts: UpdateFacts) -> str:
    """Why what a device tells of its units is not what its order can leave, or "": it is its own claim."""
    (found,) = held_against(groups, [(order, facts)])
    return found if isinstance(found, str) else ""


def sound(groups: Sequence[Group], works: Mapping[str, Work], results: Mapping[str, UpdateFacts]) -> dict[str, Sound]:
    """Those that trained, and tell of their units what their orders can leave, by their names."""
    told = {
        device: (order, facts)
        for device, facts in sorted(results.items())
        if facts.samples and device in works and (order := works[device].prune) is not None
    }
    found = zip(told, held_against(groups, list(told.values())), strict=True)
    return {device: one for device, one in found if not isinstance(one, str)}


def held_against(groups: Sequence[Group], told: Sequence[tuple[Pruning, UpdateFacts]]) -> list[Sound | str]:
    """What each of these orders and facts comes to, or why the facts are not what the order can leave.

    All at once: lists of units took 1.8 ms for a device, and a round may have ten thousand.
    """
    if not groups:
        return ["it has no units to prune" if facts.kept else Sound(facts, order.begin, 0.0) for order, facts in told]
    table = UnitTable(groups)
    found: list[Sound | str] = ["" for _ in told]
    fit: list[int] = []
    rows: list[tuple[bytes, bytes]] = []
    for place, (order, facts) in enumerate(told):
        try:
            rows.append((table.row(facts.kept), table.row(order.kept) if order.kept else table.every))
            fit.append(place)
        except DecodeError as error:
            found[place] = str(error)
    if fit:
        left, there = (table.rows(side) for side in zip(*rows, strict=True))
        for place, one in zip(fit, _compared(groups, table, [told[place] for place in fit], left, there), strict=True):
            found[place] = one
    return found


def _compared(
    groups: Sequence[Group], table: UnitTable, told: Sequence[tuple[Pruning, UpdateFacts]], left: Rows, there: Rows
) -> list[Sound | str]:
    """`held_against` where all fit: what is `left`, of what was `there`."""
    after, before = table.count(left), table.count(there)
    back = left & ~there
    least = table.left_at([order.ratio for order, _ in told], before)
    most = table.left_at([order.begin for order, _ in told], before)
    astray = (after < least) | (after > most)
    if back.any():
        astray |= table.count(back) > 0
    ends = zip(told, table.ratios(before), table.ratios(after), strict=True)
    found: list[Sound | str] = [Sound(facts, max(begun, order.begin), ratio) for (order, facts), begun, ratio in ends]
    for row in np.flatnonzero(astray.any(axis=1)).tolist():
        at = int(astray[row].argmax())
        why = f"{after[row, at]} units are left, {least[row, at]} to {most[row, at]} were asked for"
        if not after[row, at]:
            why = "at least one unit has to stay"
        if table.count(back[row : row + 1])[0, at]:
            why = "it kept units that were gone before"
        found[row] = f"{groups[at].name}: {why}"
    return found


class Told(NamedTuple):
    """What a device's update says of its units; `weight`: its share of the round."""

    weight: float
    kept: Mapping[str, bytes]
    scores: Mapping[str, bytes]


def model_left(
    groups: Sequence[Group], before: Adapter, parts: Sequence[Told], most: float
) -> tuple[dict[str, bytes], dict[str, bytes]]:
    """(units, fleet's scores) of the global model after a round, `before` it the adapter's.

    It is as small as the round's devices on the mean, at ratio `most` at the smallest, and never grows. Where nobody
    told anything it stays.
    """
    total = sum(part.weight for part in parts)
    if not total:
        return before.kept, before.scores
    scores = merged(groups, before.scores, parts)
    mean = sum(part.weight * ratio_of(groups, part.kept) for part in parts) / total
    return cut_to(groups, {}, scores, max(ratio_of(groups, before.kept), min(mean, most))), scores


def merged(groups: Sequence[Group], before: Mapping[str, bytes], parts: Sequence[Told]) -> dict[str, bytes]:
    """The fleet's scores after a round: of each device's, in which a unit that is gone has 0, the weighted mean."""
    total = sum(part.weight for part in parts)
    if not total:
        return dict(before)
    found = {group.name: np.zeros(group.count) for group in groups}
    for part in parts:
        for name, values in units.scores_of(groups, part.scores).items():
            found[name] += values * (part.weight / total)
    old = units.unpack_scores(before)
    mixed = {
        name: SMOOTHING * _scaled(old[name]) + (1 - SMOOTHING) * _scaled(values) if name in old else values
        for name, values in found.items()
    }
    return units.pack_scores(mixed)


def _scaled(values: units.FloatArray) -> units.FloatArray:
    total = float(values.sum())
    return values / total if total > 0 else values


def cut_to(
    groups: Sequence[Group], packed: Mapping[str, bytes], scores: Mapping[str, bytes], ratio: float
) -> dict[str, bytes]:
    """What stays where a model of `packed` units is pruned to `ratio` by the fleet's scores."""
    within = units.unpack(groups, packed)
    return units.pack(groups, units.best(groups, units.scores_of(groups, scores), ratio, within))
