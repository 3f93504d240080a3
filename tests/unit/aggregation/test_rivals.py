"""`hetlora`, `flexlora`, `flora`, `ffa` and `fedex` by hand and against dense mathematics in float64."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.core.aggregation import registry
from coordinator.core.aggregation.base import Aggregator, Folded, Part, Wide, fold_module, product
from coordinator.core.aggregation.fedex import FedEx
from coordinator.core.aggregation.ffa import Ffa
from coordinator.core.aggregation.flexlora import FlexLora
from coordinator.core.aggregation.flora import Flora
from coordinator.core.aggregation.fresh import Fresh
from coordinator.core.aggregation.hetlora import HetLora
from coordinator.core.facts import ModuleSpec
from coordinator.fold import fold_round
from shared import adapter as adapters
from shared.adapter import Adapter, Factors
from shared.jobs import Codec, StrategySpec
from shared.starts import fixed_rows, unsent_a
from tests.unit.aggregation.rounds import ALPHA_RATIO, BASE, JOB, Round, make_round, random, rounds

MODULE = ModuleSpec(name="m", out=20, inp=14)
SQUARE = ModuleSpec(name="m", out=2, inp=2)


def factors(b: list[list[float]], a: list[list[float]], scaling: float = 1.0, trained: int = 0) -> Factors:
    return Factors(b=np.array(b, np.float32), a=np.array(a, np.float32), scaling=scaling, trained=trained)


def fold(
    aggregator: Aggregator, parts: list[Part], current: Factors | None = None, module: ModuleSpec = MODULE
) -> Folded:
    return fold_module(aggregator, module, current, None, parts)


def dense(part: Factors | None, module: ModuleSpec = MODULE) -> Wide:
    return np.zeros((module.out, module.inp)) if part is None else product(part)


def parts_of(round: Round, name: str) -> list[Part]:
    total = sum(round.samples.values())
    return [
        Part(round.samples[device] / total, update.factors[name])
        for device, update in sorted(round.updates.items())
        if name in update.factors
    ]


def mean_of_products(parts: list[Part]) -> Wide:
    """Over the devices that tuned the module."""
    total: Wide = np.asarray(sum(part.weight * product(part.factors) for part in parts))
    return total / sum(part.weight for part in parts)


def close(found: Wide, wanted: Wide, scale: float = 0.0) -> bool:
    """To 1e-6 of the wanted matrix, or of `scale` where it is larger: what cancels was rounded at its own size."""
    return float(np.linalg.norm(found - wanted)) <= 1e-6 * max(float(np.linalg.norm(wanted)), scale)


def size(parts: list[Part]) -> float:
    return sum(part.weight * float(np.linalg.norm(part.factors.b) * np.linalg.norm(part.factors.a)) for part in parts)


# ---- hetlora


def test_hetlora_by_hand() -> None:
    # Norms of the products 3 and 1, whatever the samples: weights 3/4 and 1/4.
    one = factors([[3.0], [0.0]], [[1.0, 0.0]])
    two = factors([[0.0, 0.0], [0.0, 1.0]], [[4.0, 0.0], [0.0, 1.0]])
    made = fold(HetLora(4), [Part(0.1, one), Part(0.9, two)], module=SQUARE).factors
    assert made is not None and made.sigma is None
    assert made.b.tolist() == [[2.25, 0.0], [0.0, 0.25]]
    assert made.a.tolist() == [[1.75, 0.0], [0.0, 0.25]]


@settings(max_examples=60, deadline=None)
@given(round=rounds())
def test_hetlora_is_biased_as_its_docstring_says(round: Round) -> None:
    module = round.modules[0]
    parts = parts_of(round, module.name)
    if not parts:
        return
    made = fold(HetLora(19), parts, module=module).factors
    assert made is not None and made.rank == max(part.factors.rank for part in parts)
    norms = np.array([np.linalg.norm(product(part.factors)) for part in parts])
    weights = norms / norms.sum()
    padded = [
        (
            np.pad(part.factors.b.astype(float), ((0, 0), (0, made.rank - part.factors.rank))),
            np.pad(part.factors.a.astype(float), ((0, made.rank - part.factors.rank), (0, 0))),
        )
        for part in parts
    ]
    mean_b = np.asarray(sum(w * b for w, (b, _) in zip(weights, padded, strict=True)))
    mean_a = np.asarray(sum(w * a for w, (_, a) in zip(weights, padded, strict=True)))
    exact = ALPHA_RATIO * np.asarray(sum(w * b @ a for w, (b, a) in zip(weights, padded, strict=True)))
    bias = ALPHA_RATIO * np.asarray(
        sum(w * (b - mean_b) @ (a - mean_a) for w, (b, a) in zip(weights, padded, strict=True))
    )
    assert close(dense(made, module) + bias, exact, 10 * size(parts))


def test_padding_shrinks_the_columns_that_few_devices_have() -> None:
    # Both hold the same model; the second lacks nothing but the room for its second direction.
    one = factors([[1.0, 0.0], [0.0, 1.0]], [[1.0, 0.0], [0.0, 1.0]])
    two = factors([[2**0.5], [0.0]], [[1.0, 0.0]])
    made = fold(HetLora(2), [Part(0.5, one), Part(0.5, two)], module=SQUARE).factors
    assert dense(made, SQUARE)[1, 1] == pytest.approx(0.25), "half of B times half of A, where the mean would be half"


# ---- flexlora


def test_flexlora_by_hand() -> None:
    # The mean of diag(8, 0) and diag(0, 2) is diag(4, 1); a rank of one holds 4. Scaling 2: U sigma / 2.
    parts = [
        Part(0.25, factors([[4.0], [0.0]], [[1.0, 0.0]], 2.0)),
        Part(0.25, factors([[0.0], [1.0]], [[0.0, 1.0]], 2.0)),
    ]
    made = fold(FlexLora(1), parts, module=SQUARE)
    assert made.factors is not None
    np.testing.assert_allclose(made.factors.b, [[2.0], [0.0]], atol=1e-6)
    np.testing.assert_allclose(made.factors.a, [[1.0, 0.0]], atol=1e-6)
    assert made.factors.scaling == 2.0
    assert made.residual is None
    assert made.lost_energy == made.forgotten_energy == pytest.approx(1 / 17)


@settings(max_examples=60, deadline=None)
@given(round=rounds(), rank=st.sampled_from([1, 3, 19]))
def test_flexlora_is_the_best_approximation_of_the_exact_mean(round: Round, rank: int) -> None:
    module = round.modules[0]
    parts = parts_of(round, module.name)
    if not parts:
        return
    made = fold(FlexLora(rank), parts, round.before.factors.get(module.name), module)
    exact = mean_of_products(parts)
    u, sigma, vt = np.linalg.svd(exact, full_matrices=False)
    assert made.factors is not None and made.factors.rank <= rank
    assert close(dense(made.factors, module), (u[:, :rank] * sigma[:rank]) @ vt[:rank], 10 * size(parts))
    assert made.lost_energy == pytest.approx(float(np.sum(sigma[rank:] ** 2) / np.sum(sigma**2)), abs=1e-9)
    # Rows of A are directions: a device's first rows are its best approximation.
    np.testing.assert_allclose(made.factors.a @ made.factors.a.T, np.eye(made.factors.rank), atol=1e-5)


# ---- flora


def test_flora_by_hand_for_unequal_ranks() -> None:
    # Scaling 2, and a quarter of the samples did not tune it, which changes nothing there:
    # (0 1; 0 0) + 2/4 (2; 0)(1 0) + 2/2 (0 1; 1 0)(1 2; 3 0) = (0 1; 0 0) + (1 0; 0 0) + (3 0; 1 2) = (4 1; 1 2).
    before = replace(factors([[1.0], [0.0]], [[0.0, 1.0]]), sigma=np.ones(1, np.float32))
    one = factors([[2.0], [0.0]], [[1.0, 0.0]], 2.0)
    two = factors([[0.0, 1.0], [1.0, 0.0]], [[1.0, 2.0], [3.0, 0.0]], 2.0)
    made = fold(Flora(), [Part(0.25, one), Part(0.5, two)], before, SQUARE)
    assert made.factors is not None and made.factors.sigma is not None
    np.testing.assert_allclose(dense(made.factors, SQUARE), [[4.0, 1.0], [1.0, 2.0]], atol=1e-6)
    # Of a symmetric matrix the eigenvalues: x^2 - 6 x + 7 = 0.
    np.testing.assert_allclose(made.factors.sigma, [3 + 2**0.5, 3 - 2**0.5], rtol=1e-6)
    assert made.residual is None


@settings(max_examples=30, deadline=None)
@given(round=rounds(train_directions=False))
def test_flora_is_exact_for_unequal_ranks_and_equals_fresh_without_a_cut(round: Round) -> None:
    for module in round.modules:
        parts, before = parts_of(round, module.name), round.before.factors.get(module.name)
        made = fold(Flora(), parts, before, module)
        assert close(dense(made.factors, module), round.mean_of_local_models(module.name), size(parts))
        assert made.residual is None and made.lost_energy < 1e-12
        same = fold(Fresh(energy=1.0, global_rank=4096), parts, before, module)
        assert dense(same.factors, module).tobytes() == dense(made.factors, module).tobytes()


def test_flora_over_rounds_equals_a_dense_merge_into_the_base(tmp_path: Path) -> None:
    merged, before = np.zeros((20, 14)), make_round(0, [], [MODULE]).before
    for number in range(6):
        round = make_round(number, [{"m": 2}, {"m": 5}, {}], [MODULE], samples=[10, 20, 30], train_directions=False)
        merged += sum(part.weight * product(part.factors) for part in parts_of(round, "m"))
        before = fold_round(
            Flora(), [MODULE], before, None, round.write(tmp_path / str(number)), round=number + 1
        ).adapter
        assert close(dense(before.factors["m"]), merged)
    assert before.factors["m"].rank == 14


# ---- ffa


def test_ffa_by_hand_for_unequal_ranks() -> None:
    a = [[1.0, 2.0], [3.0, 4.0]]
    current = factors([[8.0, 16.0]], a, 2.0)
    one = factors([[4.0, 8.0]], a, 2.0, trained=2)
    two = factors([[12.0]], a[:1], 2.0, trained=1)
    flat = ModuleSpec(name="m", out=1, inp=2)
    # A third of the round did not tune it. Column 1: 4/3 + 12/3 + 8/3; column 2: 8/3 + 16 * 2/3.
    made = fold(Ffa(2), [Part(1 / 3, one), Part(1 / 3, two)], current, flat).factors
    assert made is not None
    np.testing.assert_allclose(made.b, [[8.0, 40 / 3]], rtol=1e-6)
    assert made.a.tolist() == a and made.scaling == 2.0


@settings(max_examples=40, deadline=None)
@given(
    ranks=st.lists(st.sampled_from([0, 1, 3, 8]), min_size=1, max_size=6), known=st.sampled_from([0, 2, 8]),
    seed=st.integers(0, 10**6),
)  # fmt: skip
def test_ffa_is_the_mean_of_the_local_models(ranks: list[int], known: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    shared = fixed_rows(7, "m", 8, MODULE.inp)
    current = Factors(b=random(rng, 20, known), a=shared[:known], scaling=2.0) if known else None
    parts, wanted = [], np.zeros((20, 14))
    for rank in ranks:
        rest = dense(current)
        if rank:
            trained = min(rank, known)
            part = Factors(b=random(rng, 20, rank), a=shared[:rank], scaling=2.0, trained=trained)
            if current is not None:
                rest = product(replace(current, b=current.b[:, trained:], a=current.a[trained:]))
            rest = rest + product(part)
            parts.append(Part(1 / len(ranks), part))
        wanted += rest / len(ranks)
    made = fold(Ffa(8), parts, current).factors
    assert close(dense(made), wanted)
    assert made is None or np.array_equal(made.a, shared[: made.rank])


def ffa_round(known: int, rank: int, a: np.ndarray) -> tuple[Round, Adapter]:  # type: ignore[type-arg]  # any floats
    """A round over fixed rows of seed 7, and an update of `rank` that brings `a`."""
    rng = np.random.default_rng(1)
    round = make_round(1, [{"m": rank}], [MODULE])
    before = replace(round.before, factors={})
    if known:
        part = Factors(b=random(rng, 20, known), a=fixed_rows(7, "m", known, 14), scaling=2.0)
        before = replace(before, factors={"m": part})
    update = round.updates["edge-000"]
    part = replace(update.factors["m"], a=a.astype(np.float32), trained=min(rank, known))
    return replace(round, before=before), replace(update, factors={"m": part})


@pytest.mark.parametrize("codec", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize(("known", "rank", "sent"), [(0, 4, True), (4, 4, True), (4, 4, False), (2, 4, True)])
def test_ffa_admits_the_jobs_a(codec: Codec, known: int, rank: int, sent: bool) -> None:
    round, update = ffa_round(known, rank, fixed_rows(7, "m", rank, 14) if sent else unsent_a(rank))
    expected = replace(round.expected("edge-000", {"m": rank}), seed=7)
    assert Ffa(4).admit(adapters.read(adapters.write(update, codec)), expected) is None


def test_ffa_refuses_another_a() -> None:
    for known in (0, 4):
        round, update = ffa_round(known, 4, fixed_rows(8, "m", 4, 14))
        reason = Ffa(4).admit(update, replace(round.expected("edge-000", {"m": 4}), seed=7))
        assert reason is not None and reason.startswith("module 'm': A is 0.") and "off the job's" in reason
    round, update = ffa_round(2, 4, unsent_a(4))
    reason = Ffa(4).admit(update, replace(round.expected("edge-000", {"m": 4}), seed=7))
    assert reason is not None and "a (4, 0) for a layer of 20 x 14" in reason
    round, update = ffa_round(4, 4, np.full((4, 14), np.nan))
    assert "not finite" in str(Ffa(4).admit(update, replace(round.expected("edge-000", {"m": 4}), seed=7)))


def test_a_smaller_rank_has_the_first_of_the_fixed_rows() -> None:
    assert np.array_equal(fixed_rows(3, "q", 2, 6), fixed_rows(3, "q", 8, 6)[:2])
    assert not np.array_equal(fixed_rows(3, "q", 2, 6), fixed_rows(4, "q", 2, 6))
    assert not np.array_equal(fixed_rows(3, "q", 2, 6), fixed_rows(3, "v", 2, 6))


# ---- fedex


def test_fedex_by_hand() -> None:
    # diag(1, 0) and diag(0, 1): the means' product is a quarter of all ones, the exact mean is half of the identity.
    parts = [Part(0.5, factors([[1.0], [0.0]], [[1.0, 0.0]])), Part(0.5, factors([[0.0], [1.0]], [[0.0, 1.0]]))]
    made = fold(FedEx(1), parts, module=SQUARE).factors
    assert made is not None and made.rank == 2
    assert made.b[:, :1].tolist() == [[0.5], [0.5]] and made.a[:1].tolist() == [[0.5, 0.5]]
    residual = product(replace(made, b=made.b[:, 1:], a=made.a[1:]))
    np.testing.assert_allclose(residual, [[0.25, -0.25], [-0.25, 0.25]], atol=1e-7)


@settings(max_examples=40, deadline=None)
@given(
    tuned=st.lists(st.lists(st.booleans(), min_size=1, max_size=5), min_size=1, max_size=4), rank=st.integers(1, 6),
    seed=st.integers(0, 10**6),
)  # fmt: skip
def test_fedex_is_exact_over_rounds(tuned: list[list[bool]], rank: int, seed: int) -> None:
    """Each round's product is the mean of the devices' models: what they trained, and what rode along frozen."""
    current: Factors | None = None
    for number, who in enumerate(tuned):
        round = make_round(seed + number, [{"m": rank if yes else 0} for yes in who], [MODULE])
        parts = parts_of(round, "m")
        frozen = dense(None if current is None else replace(current, b=current.b[:, rank:], a=current.a[rank:]))
        made = fold(FedEx(rank), parts, current).factors
        if not parts:
            assert made is current
            continue
        assert made is not None
        wanted = mean_of_products(parts) + frozen
        assert close(dense(made), wanted, size(parts))
        weights = [part.weight for part in parts]
        np.testing.assert_allclose(
            made.b[:, :rank], np.average([p.factors.b for p in parts], axis=0, weights=weights), rtol=1e-5, atol=1e-6
        )
        np.testing.assert_allclose(
            made.a[:rank], np.average([p.factors.a for p in parts], axis=0, weights=weights), rtol=1e-5, atol=1e-6
        )
        current = made


def test_fedex_of_one_device_has_no_residual() -> None:
    round = make_round(3, [{"m": 4}], [MODULE])
    made = fold(FedEx(4), parts_of(round, "m")).factors
    assert made is not None and made.rank == 4
    assert np.array_equal(made.b, round.updates["edge-000"].factors["m"].b)


def test_fedex_refuses_unequal_ranks_with_the_reason() -> None:
    round = make_round(2, [{"m": 3}], [MODULE])
    reason = FedEx(4).admit(round.updates["edge-000"], round.expected("edge-000"))
    assert reason == "module 'm': rank 3, but fedex averages factors of rank 4 only"


def test_fedex_admits_the_next_rounds_update() -> None:
    first = make_round(4, [{"m": 4}] * 3, [MODULE])
    made = fold(FedEx(4), parts_of(first, "m")).factors
    assert made is not None and made.rank > 4
    again = make_round(5, [{"m": 4}], [MODULE])
    again = replace(again, before=replace(again.before, factors={"m": made}))
    update = again.updates["edge-000"]
    update = replace(update, factors={"m": replace(update.factors["m"], trained=4)})
    assert FedEx(4).admit(update, again.expected("edge-000")) is None


# ---- all


def of_name(name: str) -> Aggregator:
    return registry.create(StrategySpec(aggregator=name, rank=8))


@pytest.mark.parametrize("name", sorted({*registry.names()} - registry.WITHOUT_LORA))
def test_a_module_nobody_tuned_is_unchanged(name: str) -> None:
    rng = np.random.default_rng(5)
    current = Factors(b=random(rng, 20, 3), a=random(rng, 3, 14), scaling=2.0)
    idle = Part(0.0, Factors(b=random(rng, 20, 8), a=random(rng, 8, 14), scaling=2.0))
    for parts in ([], [idle]):
        assert fold(of_name(name), parts, current).factors is current
        assert fold(of_name(name), parts).factors is None


@pytest.mark.parametrize("name", registry.names())
def test_any_order_of_arrival_gives_the_same_bytes(tmp_path: Path, name: str) -> None:
    unequal = name not in registry.EQUAL_RANKS
    ranks = [{"m": 8}, {"m": 2 if unequal else 8}, {"m": 4 if unequal else 8}, {}]
    round = make_round(6, ranks, [MODULE], samples=[7, 11, 13, 5], train_directions=name not in ("fresh", "flora"))
    updates = round.write(tmp_path)
    before = Adapter(kind="global", job=JOB, round=4, base_digest=BASE, factors={}, dense=round.before.dense)
    made = {
        adapters.write(fold_round(of_name(name), [MODULE], before, None, given, round=5).adapter)
        for given in (updates, updates[::-1], updates[2:] + updates[:2])
    }
    assert len(made) == 1
