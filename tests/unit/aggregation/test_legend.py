"""`legend`: the exact mean of local models over the devices that tuned the module."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings

from coordinator.core.aggregation import registry
from coordinator.core.aggregation.base import Aggregator, Folded, Part, Wide, fold_module, product
from coordinator.core.aggregation.fsr import FoldStackRecompress
from coordinator.core.aggregation.legend import Legend
from coordinator.core.facts import ModuleSpec
from coordinator.fold import fold_round
from shared.adapter import Factors
from shared.jobs import StrategySpec
from tests.unit.aggregation.rounds import Round, make_round, rounds, triplets

MODULE = ModuleSpec(name="m", out=20, inp=14)
EXACT = Legend(energy=1.0, global_rank=4096)


def fold(aggregator: Aggregator, round: Round, module: ModuleSpec, residual: Factors | None = None) -> Folded:
    total = sum(round.samples.values())
    parts = [
        Part(round.samples[device] / total, update.factors[module.name])
        for device, update in round.updates.items()
        if module.name in update.factors
    ]
    return fold_module(aggregator, module, round.before.factors.get(module.name), residual, parts)


def dense(folded: Folded, module: ModuleSpec) -> Wide:
    return np.zeros((module.out, module.inp)) if folded.factors is None else product(folded.factors)


def holders_mean(round: Round, name: str) -> Wide | None:
    """The mean of the holders' local models, by the mean over a round of nobody else; None: nobody holds it."""
    updates = {device: update for device, update in round.updates.items() if name in update.factors}
    return replace(round, updates=updates, samples={d: round.samples[d] for d in updates}).mean_of_local_models(
        name
    ) if updates else None  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(rounds())
def test_the_fold_is_the_mean_over_the_holders(round: Round) -> None:
    for module in round.modules:
        wanted = holders_mean(round, module.name)
        result = fold(EXACT, round, module)
        if wanted is None:
            assert result.factors is round.before.factors.get(module.name)
        else:
            scale = max(1.0, float(np.abs(wanted).max()))
            assert np.abs(dense(result, module) - wanted).max() < 1e-5 * scale


def test_by_hand() -> None:
    """Two of three devices hold the module, with 1/2 and 1/4 of the samples: 2/3 and 1/3 of the mean."""
    one = Factors(b=np.array([[3.0], [0.0]], np.float32), a=np.array([[1.0, 0.0]], np.float32))
    two = Factors(b=np.array([[0.0], [6.0]], np.float32), a=np.array([[0.0, 1.0]], np.float32))
    small = ModuleSpec(name="s", out=2, inp=2)
    result = fold_module(EXACT, small, None, None, [Part(0.5, one), Part(0.25, two)])
    assert np.allclose(dense(result, small), [[2.0, 0.0], [0.0, 2.0]], atol=1e-6)
    damped = fold_module(FoldStackRecompress(1.0, 64), small, None, None, [Part(0.5, one), Part(0.25, two)])
    assert np.allclose(dense(damped, small), [[1.5, 0.0], [0.0, 1.5]], atol=1e-6)
    assert result.norm == pytest.approx(8**0.5)


def test_where_all_hold_a_module_it_is_fsr() -> None:
    round = make_round(3, [{"m": 3}, {"m": 5}], [MODULE], global_rank=4, samples=[30, 10])
    one, other = fold(EXACT, round, MODULE), fold(FoldStackRecompress(1.0, 4096), round, MODULE)
    assert np.allclose(dense(one, MODULE), dense(other, MODULE), atol=1e-6)


def test_the_residual_is_added_whole() -> None:
    round = make_round(4, [{"m": 3}, {}], [MODULE], global_rank=4, samples=[30, 10])
    residual = triplets(np.random.default_rng(0), MODULE, 2)
    plain, more = dense(fold(EXACT, round, MODULE), MODULE), dense(fold(EXACT, round, MODULE, residual), MODULE)
    assert np.allclose(more - plain, product(residual), atol=1e-5)


def test_a_direction_that_all_holders_trained_is_theirs_alone() -> None:
    round = make_round(5, [{"m": 6}, {}], [MODULE], global_rank=6, samples=[1, 999])
    own = product(round.updates["edge-000"].factors["m"])
    result = fold(EXACT, round, MODULE)
    assert result.factors is not None and result.factors.rank == 6
    assert np.allclose(dense(result, MODULE), own, atol=1e-5)


@pytest.mark.parametrize(("cap", "shares"), [(1.0, (1.0, 0.0)), (0.5, (0.5, 0.5)), (0.1, (0.1, 0.9))])
def test_a_lone_holder_has_no_more_than_its_cap(cap: float, shares: tuple[float, float]) -> None:
    """What the cap cuts off counts as no change. The round's own cap has been applied to the weight already."""
    before = triplets(np.random.default_rng(6), MODULE, 3)
    update = make_round(6, [{"m": 2}], [MODULE], global_rank=3).updates["edge-000"].factors["m"]
    local = product(update) + product(replace_first(before, 2))
    result = fold_module(Legend(1.0, 64, cap), MODULE, before, None, [Part(min(0.25, cap), update)])
    wanted = shares[0] * local + shares[1] * product(before)
    assert np.allclose(dense(result, MODULE), wanted, atol=1e-5)


def replace_first(part: Factors, count: int) -> Factors:
    """`part` without its first `count` directions."""
    assert part.sigma is not None
    return replace(part, b=part.b[:, count:], a=part.a[count:], sigma=part.sigma[count:])


def test_depths_of_a_round_fold_from_files(tmp_path: Path) -> None:
    """Three blocks, devices of depth 3, 2 and 1: each block is the mean over those that reach it."""
    modules = [ModuleSpec(name=f"b{i}", out=12, inp=10, block=i) for i in range(3)]
    ranks = [{"b0": 2, "b1": 3, "b2": 4}, {"b1": 3, "b2": 4}, {"b2": 4}]
    round = make_round(7, ranks, modules, global_rank=5, samples=[10, 30, 60])
    aggregator = registry.create(StrategySpec(name="legend", energy=1.0))
    assert aggregator.name == "legend"
    result = fold_round(aggregator, modules, round.before, None, round.write(tmp_path), round=5)
    for module in modules:
        wanted = holders_mean(round, module.name)
        assert wanted is not None
        assert np.allclose(product(result.adapter.factors[module.name]), wanted, atol=1e-5)
    head = sum(round.samples[d] / 100 * u.dense["head.bias"].astype(float) for d, u in round.updates.items())
    assert np.allclose(result.adapter.dense["head.bias"], head, atol=1e-6)
