"""Planners by the name a job gives in `strategy.name`."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from functools import partial

from coordinator.core.aggregation.registry import PRUNING, SPLIT
from coordinator.core.planning.base import Planner
from coordinator.core.planning.fedadapter import FedAdapterPlanner
from coordinator.core.planning.fedpipe import FedPipePlanner
from coordinator.core.planning.fedspine import FedSpinePlanner
from coordinator.core.planning.head import HeadPlanner
from coordinator.core.planning.legend import LegendPlanner
from coordinator.core.planning.mergesfl import MergeSflPlanner
from coordinator.core.planning.uniform import UniformPlanner
from shared.errors import UserError
from shared.jobs import StrategySpec

EQUAL = ("fedlora", "ffa", "fedex")
UNEQUAL = ("hetlora", "flexlora", "flora")
"""Strategies that are ways to aggregate; their planner differs by its ranks alone."""
PLANNERS: Mapping[str, Callable[[], Planner]] = {
    "uniform": UniformPlanner,
    **{name: partial(UniformPlanner, name=name, one_batch=True) for name in EQUAL},
    **{name: partial(UniformPlanner, name=name, ranks="capability", one_batch=True) for name in UNEQUAL},
    "full": partial(UniformPlanner, name="full", ranks="none", one_batch=True),
    "fedadapter": FedAdapterPlanner,
    "fedpipe": FedPipePlanner,
    "legend": LegendPlanner,
    **{name: partial(FedSpinePlanner, name=name) for name in PRUNING},
    **{name: partial(MergeSflPlanner, name=name) for name in SPLIT},
    "head": HeadPlanner,
}
"""Name -> a planner that has seen nothing yet."""


def create(strategy: StrategySpec) -> Planner:
    """A fresh planner for `strategy`. Raises `UserError` naming the known ones."""
    if strategy.name not in PLANNERS:
        near = difflib.get_close_matches(strategy.name, PLANNERS, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise UserError(
            f"strategy.name {strategy.name!r:.80}: no such planner, use {', '.join(sorted(PLANNERS))}{hint}"
        )
    return PLANNERS[strategy.name]()
