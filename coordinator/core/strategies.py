"""What a job's `strategy` table may name, checked in one place for the coordinator and for those who write jobs."""

from __future__ import annotations

from coordinator.core.aggregation import registry as aggregators
from coordinator.core.planning import registry as planners
from shared.jobs import StrategySpec


def faults(strategy: StrategySpec) -> list[str]:
    """Every fault of the table that needs no look at data or base, each with its key."""
    asked = (
        ("name", strategy.name, sorted(planners.PLANNERS)),
        ("aggregator", aggregators.name_of(strategy), aggregators.names()),
    )
    found = [
        f"strategy.{key}: unknown {name!r:.80}; known: {', '.join(known)}"
        for key, name, known in asked
        if name not in known
    ]
    aggregator = aggregators.name_of(strategy)
    if strategy.name in (*planners.UNEQUAL, "fedpipe", "legend") and aggregator in aggregators.EQUAL_RANKS:
        found.append(f"strategy.aggregator: {aggregator} takes one rank only, and {strategy.name} plans unequal ones")
    if strategy.name == "legend" and aggregator in ("flexlora", "hetlora", "ffa"):
        found.append(
            f"strategy.aggregator: {aggregator} holds no rank above strategy.rank, and legend plans larger ones"
        )
    if strategy.server_lr != 1.0 and aggregator not in aggregators.MOVES_FURTHER:
        found.append(f"strategy.server_lr: {aggregator} has none, only {', '.join(sorted(aggregators.MOVES_FURTHER))}")
    if strategy.batch_min > strategy.batch_max:
        found.append("strategy.batch_min: larger than strategy.batch_max")
    return found
