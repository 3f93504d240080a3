"""The fleet that the benchmarks of planning plan for: every planner plans for it, after a round it learned from."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import pytest

from coordinator.core import records as rec
from coordinator.core.aggregation.registry import PRUNING
from coordinator.core.planning.pruned import ratio_of
from coordinator.core.planning.registry import PLANNERS
from shared.jobs import StrategySpec

LIB = Path(__file__).parents[2] / "bench" / "lib"


@pytest.fixture
def warm_fleet(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module of the benchmarks, which are no package."""
    monkeypatch.syspath_prepend(str(LIB))
    return importlib.import_module("warm_fleet")


@pytest.mark.parametrize("name", sorted(PLANNERS))
def test_every_planner_plans_the_round_after_the_warm_one(warm_fleet: ModuleType, name: str) -> None:
    tight = name != "full"  # which only the largest devices of the drawn fleet hold
    facts = warm_fleet.transformer(6, 384, name)
    state = warm_fleet.warmed(warm_fleet.job(StrategySpec(name=name)), facts, 24, 1, tight=tight)
    committed = warm_fleet.tick(state)
    assert any(isinstance(record, rec.RoundCommitted) for record in committed.records)
    (planned,) = warm_fleet.tick(committed.state).records
    assert isinstance(planned, rec.RoundPlanned) and planned.round == (3 if name in PRUNING else 2)
    assert planned.plan.participants
    if name in PRUNING:
        orders = [work.prune for work in planned.plan.participants.values()]
        assert all(order is not None and ratio_of(facts.groups, order.kept) > 0 for order in orders), "learned of each"
    if name == "fedpipe":
        weights = planned.plan.weights
        assert weights is not None and 0 < len(weights.selected) < len(facts.modules), "chosen by their scores"
