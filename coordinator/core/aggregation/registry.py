"""Aggregators by the name that a job's `strategy.aggregator` gives."""

from __future__ import annotations

from collections.abc import Callable

from coordinator.core.aggregation.base import Aggregator
from coordinator.core.aggregation.fedit import FedIt
from coordinator.core.aggregation.fresh import Fresh
from coordinator.core.aggregation.fsr import FoldStackRecompress
from shared.errors import UserError
from shared.jobs import StrategySpec

_FACTORIES: dict[str, Callable[[StrategySpec], Aggregator]] = {
    "fsr": lambda spec: FoldStackRecompress(spec.energy, spec.global_rank),
    "fresh": lambda spec: Fresh(spec.energy, spec.global_rank),
    "fedit": lambda spec: FedIt(spec.rank),
}


def names() -> list[str]:
    """All names, sorted."""
    return sorted(_FACTORIES)


def create(spec: StrategySpec) -> Aggregator:
    """The aggregator that `spec` names, with its settings. Raises `UserError` for an unknown name."""
    factory = _FACTORIES.get(spec.aggregator)
    if factory is None:
        raise UserError(f"strategy.aggregator: no {spec.aggregator!r}, there are {', '.join(names())}")
    return factory(spec)
