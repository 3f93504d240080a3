"""`fsr` and `fresh` against dense mathematics in float64."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.core.aggregation import registry
from coordinator.core.aggregation.base import Folded, Part, Wide, fold_module, product
from coordinator.core.aggregation.fresh import Fresh
from coordinator.core.aggregation.fsr import FoldStackRecompress, drawn_order
from coordinator.core.aggregation.product_sum import ProductSum, workspace_bytes
from coordinator.core.facts import ModuleSpec
from shared.adapter import Factors
from shared.jobs import Codec, StrategySpec
from shared.tensors import rounded
from tests.unit.aggregation.rounds import ALPHA_RATIO, Round, make_round, random, rounds, triplets

EXACT = FoldStackRecompress(energy=1.0, global_rank=4096)
MODULE = ModuleSpec(name="m", out=20, inp=14)


def parts_of(round: Round, name: str) -> list[Part]:
    total = sum(round.samples.values())
    return [
        Part(round.samples[device] / total, update.factors[name])
        for device, update in sorted(round.updates.items())
        if name in update.factors
    ]


def fold(aggregator: FoldStackRecompress, round: Round, module: ModuleSpec, residual: Factors | None = None) -> Folded:
    return fold_module(
        aggregator, module, round.before.factors.get(module.name), residual, parts_of(round, module.name)
    )


def dense(part: Factors | None, module: ModuleSpec) -> Wide:
    return np.zeros((module.out, module.inp)) if part is None else product(part)


def error(found: Wide, wanted: Wide) -> float:
    """Frobenius distance relative to the wanted matrix."""
    return float(np.linalg.norm(found - wanted) / max(np.linalg.norm(wanted), 1e-30))


@settings(max_examples=60, deadline=None)
@given(round=rounds())
def test_without_a_cut_the_fold_is_the_mean_of_the_local_models(round: Round) -> None:
    for module in round.modules:
        result = fold(EXACT, round, module)
        assert error(dense(result.factors, module), round.mean_of_local_models(module.name)) < 1e-6
        assert result.residual is None
        assert result.lost_energy < 1e-12


@settings(max_examples=60, deadline=None)
@given(round=rounds(), energy=st.sampled_from([0.5, 0.9, 0.99]), cap=st.sampled_from([1, 3, 64]))
def test_factors_and_residual_are_the_sum_but_for_what_is_reported_forgotten(
    round: Round, energy: float, cap: int
) -> None:
    module = round.modules[0]
    wanted = round.mean_of_local_models(module.name)
    if not parts_of(round, module.name):
        return
    result = fold(FoldStackRecompress(energy, cap), round, module)
    kept, carried = dense(result.factors, module), dense(result.residual, module)
    total = float(np.sum(wanted**2))
    assert np.sum((wanted - kept) ** 2) / total == pytest.approx(result.lost_energy, abs=1e-6)
    assert np.sum((wanted - kept - carried) ** 2) / total == pytest.approx(result.forgotten_energy, abs=1e-6)
    assert result.norm == pytest.approx(np.linalg.norm(kept), rel=1e-5)
    assert result.factors is not None and result.factors.rank <= cap
    assert result.residual is None or result.residual.rank <= cap
    if result.factors.rank < cap:
        assert result.lost_energy <= 1 - energy + 1e-9


@settings(max_examples=30, deadline=None)
@given(round=rounds(train_directions=False))
def test_fresh_adds_to_the_whole_global_adapter_and_equals_fsr_where_no_direction_was_trained(round: Round) -> None:
    fresh = Fresh(energy=1.0, global_rank=4096)
    total = sum(round.samples.values())
    for module in round.modules:
        before = dense(round.before.factors.get(module.name), module)
        changes = [
            round.samples[device] / total * product(update.factors[module.name])
            for device, update in round.updates.items()
            if module.name in update.factors
        ]
        result = fold(fresh, round, module)
        assert error(dense(result.factors, module), before + sum(changes)) < 1e-6
        same = fold(EXACT, round, module).factors
        if result.factors is not None and same is not None:
            assert result.factors.b.tobytes() == same.b.tobytes()


def test_the_fewest_directions_that_hold_the_energy_are_kept() -> None:
    sigma = np.array([4.0, 2.0, 1.0, 0.5], dtype=np.float32)
    rng = np.random.default_rng(0)
    part = triplets(rng, MODULE, 4)
    update = Factors(b=part.b * sigma, a=part.a)
    squares = sigma.astype(float) ** 2
    for kept in (1, 2, 3, 4):
        energy = float(squares[:kept].sum() / squares.sum())
        result = fold_module(FoldStackRecompress(energy - 1e-4, 64), MODULE, None, None, [Part(1.0, update)])
        assert result.factors is not None and result.factors.sigma is not None
        assert result.factors.rank == kept
        assert result.factors.sigma == pytest.approx(sigma[:kept], rel=1e-5)
        assert result.lost_energy == pytest.approx(1 - energy, abs=1e-6)


def test_what_a_round_cuts_off_the_next_round_adds_again() -> None:
    aggregator = FoldStackRecompress(energy=1.0, global_rank=2)
    one = make_round(1, [{"m": 3}], [MODULE])
    first = fold(aggregator, one, MODULE)
    assert first.factors is not None and first.residual is not None
    assert (first.factors.rank, first.residual.rank) == (2, 1)
    zero = Part(1.0, Factors(b=np.zeros((20, 2), np.float32), a=np.zeros((2, 14), np.float32)))
    second = fold_module(FoldStackRecompress(1.0, 4), MODULE, first.factors, first.residual, [zero])
    assert error(dense(second.factors, MODULE), one.mean_of_local_models("m")) < 1e-6


@settings(max_examples=40, deadline=None)
@given(round=rounds(), codec=st.sampled_from(["bf16", "int8"]), cap=st.sampled_from([3, 64]))
def test_what_rounding_takes_is_carried_over(round: Round, codec: Codec, cap: int) -> None:
    module = round.modules[0]
    if not parts_of(round, module.name):
        return
    wanted = round.mean_of_local_models(module.name)
    result = fold(FoldStackRecompress(1.0, cap, codec=codec), round, module)
    sent = result.factors
    assert sent is not None and sent.sigma is not None
    whole = fold(FoldStackRecompress(1.0, cap), round, module).factors
    assert whole is not None and sent.rank == whole.rank
    for side in (sent.b, sent.a):
        np.testing.assert_allclose(side, rounded(side, codec), rtol=1e-6)
    kept, carried, total = dense(sent, module), dense(result.residual, module), float(np.sum(wanted**2))
    assert np.sum((wanted - kept) ** 2) / total == pytest.approx(result.lost_energy, rel=1e-3, abs=1e-6)
    assert np.sum((wanted - kept - carried) ** 2) / total == pytest.approx(result.forgotten_energy, rel=1e-3, abs=1e-6)
    assert result.norm == pytest.approx(np.linalg.norm(kept), rel=1e-5)
    if cap == 64:
        assert error(kept + carried, wanted) < 1e-6


def test_roundings_do_not_add_up() -> None:
    """Nor where the adapter is as wide as it may be, and every direction of what rounding takes is one too many."""
    aggregator = FoldStackRecompress(energy=1.0, global_rank=4, codec="int8")
    one = make_round(1, [{"m": 4}], [MODULE])
    wanted, state = one.mean_of_local_models("m"), fold(aggregator, one, MODULE)
    zero = Part(1.0, Factors(b=np.zeros((20, 2), np.float32), a=np.zeros((2, 14), np.float32)))
    means = dense(state.factors, MODULE)
    for _ in range(20):
        state = fold_module(aggregator, MODULE, state.factors, state.residual, [zero])
        assert error(dense(state.factors, MODULE) + dense(state.residual, MODULE), wanted) < 1e-5
        means += dense(state.factors, MODULE)
    assert 1e-3 < error(dense(state.factors, MODULE), wanted) < 0.02
    assert error(means / 21, wanted) < 0.005, "what one rounding takes the next gives back"


def test_a_lone_device_that_trained_every_direction_gives_its_own_model() -> None:
    round = make_round(2, [{"m": 6}], [MODULE], global_rank=6)
    result = fold(EXACT, round, MODULE)
    own = product(round.updates["edge-000"].factors["m"])
    assert error(dense(result.factors, MODULE), own) < 1e-6


def test_devices_that_return_their_start_leave_the_global_adapter_as_it_was() -> None:
    before = triplets(np.random.default_rng(3), MODULE, 5)
    assert before.sigma is not None
    parts = []
    for weight, rank in ((0.25, 2), (0.5, 5), (0.25, 4)):
        b = before.b[:, :rank] * before.sigma[:rank] * np.float32(np.sqrt(3) / ALPHA_RATIO)
        a = before.a[:rank] / np.float32(np.sqrt(3))
        parts.append(Part(weight, Factors(b=b, a=a, scaling=ALPHA_RATIO, trained=rank)))
    result = fold_module(EXACT, MODULE, before, None, parts)
    assert result.factors is not None and result.factors.rank == 5
    assert error(product(result.factors), product(before)) < 1e-6


def test_a_device_that_skipped_a_module_counts_as_no_change() -> None:
    round = make_round(4, [{"m": 3}, {}], [MODULE], global_rank=4, samples=[30, 10])
    before = product(round.before.factors["m"])
    wanted = round.mean_of_local_models("m")
    assert error(dense(fold(EXACT, round, MODULE).factors, MODULE), wanted) < 1e-6
    assert error(wanted, before) > 0.1


def test_a_module_nobody_tuned_keeps_factors_and_residual() -> None:
    rng = np.random.default_rng(5)
    current, residual = triplets(rng, MODULE, 3), triplets(rng, MODULE, 2)
    idle = Part(0.0, Factors(b=random(rng, 20, 2), a=random(rng, 2, 14)))
    result = fold_module(EXACT, MODULE, current, residual, [idle])
    assert result.factors is current and result.residual is residual
    assert result.norm == pytest.approx(np.linalg.norm(product(current)), rel=1e-6)


def test_changes_that_cancel_leave_an_untuned_module() -> None:
    rng = np.random.default_rng(6)
    b, a = random(rng, 20, 3), random(rng, 3, 14)
    parts = [Part(0.5, Factors(b=np.zeros_like(b), a=a)), Part(0.5, Factors(b=b, a=np.zeros_like(a)))]
    assert fold_module(EXACT, MODULE, None, None, parts).factors is None


def test_large_opposite_updates_do_not_swallow_a_small_one() -> None:
    rng = np.random.default_rng(7)
    big, small = random(rng, 20, 4) * np.float32(1e3), random(rng, 20, 1)
    a, row = random(rng, 4, 14), random(rng, 1, 14)
    parts = [Part(0.5, Factors(b=big, a=a)), Part(0.25, Factors(b=-2 * big, a=a)), Part(0.25, Factors(b=small, a=row))]
    result = fold_module(EXACT, MODULE, None, None, parts)
    assert error(dense(result.factors, MODULE), 0.25 * small.astype(float) @ row.astype(float)) < 1e-6


@pytest.mark.parametrize("columns", [5, 30, 300, 1000])
def test_stack_and_dense_sum_agree_whatever_the_width(columns: int) -> None:
    rng = np.random.default_rng(8)
    out, inp = 40, 32
    added, wanted = ProductSum(out, inp), np.zeros((out, inp))
    for start in range(0, columns, 7):
        rank = min(7, columns - start)
        b, a, weights = random(rng, out, rank), random(rng, rank, inp), rng.uniform(0, 1, rank)
        weights[rng.uniform(size=rank) < 0.2] = 0.0
        added.add(b, a, weights)
        wanted += (b.astype(float) * weights) @ a
    u, sigma, vt = added.svd()
    assert error((u * sigma) @ vt, wanted) < 1e-12
    assert np.all(np.diff(sigma) <= 0)
    assert error(u.T @ u, np.eye(len(sigma))) < 1e-12
    assert np.all(u[np.abs(u).argmax(axis=0), np.arange(len(sigma))] > 0)


def test_one_update_wider_than_a_block_is_taken_whole() -> None:
    rng = np.random.default_rng(9)
    b, a = random(rng, 8, 700), random(rng, 700, 12)
    added = ProductSum(8, 12)
    added.add(b, a, np.ones(700))
    u, sigma, vt = added.svd()
    assert error((u * sigma) @ vt, b.astype(float) @ a.astype(float)) < 1e-12


@pytest.mark.parametrize(("out", "inp"), [(96, 96), (48, 300), (7, 5)])
def test_the_bound_of_the_workspace_holds_after_every_part(out: int, inp: int) -> None:
    rng = np.random.default_rng(10)
    b, a, weights = random(rng, out, 8), random(rng, 8, inp), np.ones(8)
    tracemalloc.start()
    try:
        added, held = ProductSum(out, inp), 0
        for _ in range(100):
            added.add(b, a, weights)
            held = max(held, tracemalloc.get_traced_memory()[0])
    finally:
        tracemalloc.stop()
    assert 8 * out * inp < held <= workspace_bytes(out, inp) + 16384


@settings(max_examples=60, deadline=None)
@given(round=rounds(), server_lr=st.sampled_from([0.5, 1.5, 2.0]))
def test_a_server_learning_rate_scales_the_change_of_the_round(round: Round, server_lr: float) -> None:
    further = FoldStackRecompress(energy=1.0, global_rank=4096, server_lr=server_lr)
    for module in round.modules:
        before = dense(round.before.factors.get(module.name), module)
        wanted = before + server_lr * (round.mean_of_local_models(module.name) - before)
        if parts_of(round, module.name):
            found = dense(fold(further, round, module).factors, module)
            assert np.linalg.norm(found - wanted) < 2e-6 * max(np.linalg.norm(wanted), np.linalg.norm(before))


@settings(max_examples=60, deadline=None)
@given(round=rounds(), cap=st.sampled_from([2, 64]))
def test_drawn_directions_are_those_of_the_largest_in_another_order(round: Round, cap: int) -> None:
    largest, drawn = (
        registry.create(StrategySpec(energy=0.99, global_rank=cap, directions=directions))
        for directions in ("largest", "sampled")
    )
    assert isinstance(largest, FoldStackRecompress) and isinstance(drawn, FoldStackRecompress)
    for module in round.modules:
        one, other = fold(largest, round, module), fold(drawn, round, module)
        assert error(dense(other.factors, module), dense(one.factors, module)) < 1e-6
        if parts_of(round, module.name) and one.factors is not None:
            assert one.factors.sigma is not None and other.factors is not None and other.factors.sigma is not None
            order = drawn_order(one.factors.sigma.astype(np.float64), module.name)
            assert np.array_equal(other.factors.sigma, one.factors.sigma[order])
        again = fold(drawn, round, module).factors
        assert again is None or (other.factors is not None and again.b.tobytes() == other.factors.b.tobytes())
        assert (one.residual is None) == (other.residual is None)
        if one.residual is not None and other.residual is not None:
            assert one.residual.b.tobytes() == other.residual.b.tobytes()


def test_a_direction_is_drawn_first_in_proportion_to_its_singular_value() -> None:
    sigma = np.array([3.0, 2.0, 1.0])
    firsts = [int(drawn_order(sigma, f"m{draw}")[0]) for draw in range(6000)]
    # One standard error of a share is at most 0.0065.
    assert [firsts.count(place) / 6000 for place in range(3)] == pytest.approx([1 / 2, 1 / 3, 1 / 6], abs=0.026)
    assert sorted(drawn_order(sigma, "m")) == [0, 1, 2]
