"""What planners know of pruned models: what is left of the base at a ratio, and what the fleet found of its units."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from msgspec.structs import replace

from coordinator.core.facts import ModelFacts
from shared import units
from shared.errors import DecodeError
from shared.messages import DeviceInfo, UpdateFacts, Work
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


def facts_of(facts: ModelFacts, work: Work) -> ModelFacts:
    """The base as it is in the middle of a work that prunes."""
    if work.prune is None or not facts.groups:
        return facts
    return facts_at(facts, (ratio_of(facts.groups, work.prune.kept) + work.prune.ratio) / 2)


def ratio_of(groups: Sequence[Group], packed: Mapping[str, bytes]) -> float:
    """The ratio that a model of `packed` units was pruned to: as `units.ratio_of`."""
    counts = {group.name: group.count for group in groups}
    gone = [
        1.0 - int.from_bytes(bits, "little").bit_count() / counts[name]
        for name, bits in packed.items()
        if name in counts
    ]
    return max(gone, default=0.0)


def sound(groups: Sequence[Group], results: Mapping[str, UpdateFacts]) -> dict[str, UpdateFacts]:
    """Those that trained and tell of their units what can be: what a device says of itself is its own claim."""
    counts = {group.name: group.count for group in groups}
    found = {}
    for device, facts in sorted(results.items()):
        told = {name: len(scores) for name, scores in facts.unit_scores.items()}
        if facts.samples and facts.kept.keys() == counts.keys() and told == counts:
            try:
                units.unpack(groups, facts.kept)
            except DecodeError:
                continue
            found[device] = facts
    return found


def merged(
    groups: Sequence[Group], before: Mapping[str, bytes], results: Mapping[str, UpdateFacts]
) -> dict[str, bytes]:
    """The fleet's scores after a round: of each device's, in which a unit that is gone has 0, the mean by samples.

    `results`: those that are `sound`.
    """
    total = sum(facts.samples for facts in results.values())
    if not total:
        return dict(before)
    found = {group.name: np.zeros(group.count) for group in groups}
    for facts in results.values():
        for name, values in units.unpack_scores(facts.unit_scores).items():
            found[name] += values * (facts.samples / total)
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
    known = units.unpack_scores(scores)
    judged = {group.name: known.get(group.name, np.zeros(group.count)) for group in groups}
    return units.pack(groups, units.best(groups, judged, ratio, within))
