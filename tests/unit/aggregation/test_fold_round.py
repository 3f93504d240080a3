"""Folding a round from files: the whole result, its bytes, its memory."""

from __future__ import annotations

import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.core.aggregation import registry
from coordinator.core.aggregation.base import Aggregator, DenseFold, product
from coordinator.core.aggregation.fsr import FoldStackRecompress
from coordinator.core.facts import ModuleSpec
from coordinator.fold import FoldResult, Reported, fold_round
from shared import adapter as adapters
from shared.errors import DecodeError
from shared.jobs import StrategySpec
from shared.starts import START_NOTE
from tests.unit.aggregation.rounds import Round, make_round, rounds

MODULES = [ModuleSpec(name=f"m{i}", out=20, inp=14) for i in range(3)]


def run(aggregator: Aggregator, round: Round, updates: list[Reported], **options: int) -> FoldResult:
    return fold_round(aggregator, round.modules, round.before, None, updates, round=5, **options)


def written(result: FoldResult) -> tuple[bytes, bytes]:
    residual = b"" if result.residual is None else adapters.write(result.residual)
    return adapters.write(result.adapter), residual


@settings(max_examples=25, deadline=None)
@given(round=rounds(), order=st.randoms(use_true_random=False))
def test_any_order_of_arrival_and_any_budget_gives_the_same_bytes(
    tmp_path_factory: pytest.TempPathFactory, round: Round, order: object
) -> None:
    updates = round.write(tmp_path_factory.mktemp("updates"))
    aggregator = FoldStackRecompress(0.9, 6)
    wanted = written(run(aggregator, round, updates))
    order.shuffle(updates)  # type: ignore[attr-defined]  # hypothesis' Random
    assert written(run(aggregator, round, updates)) == wanted
    assert written(run(aggregator, round, updates, memory_bytes=1)) == wanted


@pytest.mark.parametrize("name", sorted({*registry.names()} - registry.WITHOUT_LORA))
def test_the_result_is_the_next_global_adapter(tmp_path: Path, name: str) -> None:
    ranks = [{"m0": 4, "m1": 4}, {"m0": 4}]
    round = make_round(1, ranks, MODULES, samples=[30, 10], train_directions=name not in ("fresh", "flora"))
    aggregator = registry.create(StrategySpec(aggregator=name, rank=4, energy=1.0))
    result = run(aggregator, round, round.write(tmp_path))
    made = adapters.read(adapters.write(result.adapter))
    assert (made.kind, made.job, made.round, made.base_digest) == ("global", "topics-1", 5, round.before.base_digest)
    assert made.notes[START_NOTE] == aggregator.start
    assert set(made.factors) == {"m0", "m1"}
    assert {name: stats.rank for name, stats in result.modules.items()} == {
        "m0": made.factors["m0"].rank,
        "m1": made.factors["m1"].rank,
        "m2": 0,
    }
    assert result.weights == {"edge-000": 0.75, "edge-001": 0.25}
    for tensor in round.before.dense:
        one, two = (round.updates[d].dense[tensor].astype(float) for d in ("edge-000", "edge-001"))
        assert made.dense[tensor] == pytest.approx(0.75 * one + 0.25 * two, rel=1e-6, abs=1e-7)
    norms = [np.linalg.norm(product(part)) for part in made.factors.values()]
    assert result.norm == pytest.approx(np.linalg.norm(norms), rel=1e-5)


def test_rounds_with_a_tight_cap_lose_nothing_that_the_residual_holds(tmp_path: Path) -> None:
    modules = [MODULES[0]]
    one = make_round(2, [{"m0": 3}, {"m0": 3}], modules)
    aggregator = FoldStackRecompress(1.0, 4)
    first = run(aggregator, one, one.write(tmp_path / "one"))
    assert first.residual is not None
    total = product(first.adapter.factors["m0"]) + product(first.residual.factors["m0"])
    wanted = one.mean_of_local_models("m0")
    assert np.linalg.norm(total - wanted) < 1e-6 * np.linalg.norm(wanted)
    assert first.modules["m0"].lost_energy == pytest.approx(first.lost_energy)
    assert 0 < first.lost_energy < 1
    again = fold_round(
        FoldStackRecompress(1.0, 64),
        modules,
        first.adapter,
        adapters.read(adapters.write(first.residual)),
        [
            Reported("edge-000", 0, tmp_path / "one" / "edge-000"),
            Reported("edge-001", 7, tmp_path / "one" / "edge-001"),
        ],
        round=6,
    )
    wanted = total + product(one.updates["edge-001"].factors["m0"])
    assert np.linalg.norm(product(again.adapter.factors["m0"]) - wanted) < 1e-6 * np.linalg.norm(wanted)
    assert again.residual is None


def test_a_cap_on_the_share_weighs_a_boastful_device_less(tmp_path: Path) -> None:
    round = make_round(3, [{"m0": 2}] * 3, MODULES, samples=[1, 1, 10**9])
    updates = round.write(tmp_path)
    result = fold_round(FoldStackRecompress(0.99, 64), MODULES, round.before, None, updates, round=5, max_share=0.5)
    assert result.weights == pytest.approx({"edge-000": 0.25, "edge-001": 0.25, "edge-002": 0.5})


def test_a_round_without_samples_changes_nothing(tmp_path: Path) -> None:
    round = make_round(4, [{"m0": 2}], MODULES, global_rank=2, samples=[0])
    result = run(FoldStackRecompress(0.5, 64), round, round.write(tmp_path))
    assert result.adapter.factors == round.before.factors
    assert result.adapter.dense == round.before.dense


def test_small_moves_of_rounded_tensors_arrive(tmp_path: Path) -> None:
    """Each is less than half of what int8 can tell: without what rounding took they would all be lost."""
    round = make_round(7, [{"m0": 2}], MODULES)
    name, start = next(iter(round.before.dense.items()))
    step = np.float32(np.abs(start).max() / 127 / 10)
    before, residual = round.before, None
    for _ in range(50):
        moved = replace(round.updates["edge-000"], dense={**before.dense, name: before.dense[name] + step})
        path = tmp_path / "update"
        path.write_bytes(adapters.write(moved))
        result = fold_round(
            FoldStackRecompress(1.0, 64, codec="int8"), MODULES, before, residual, [Reported("edge-000", 3, path)],
            round=5, codec="int8",
        )  # fmt: skip
        before, residual = result.adapter, result.residual
        assert adapters.read(adapters.write(before, "int8")).dense[name] == pytest.approx(before.dense[name], rel=1e-5)
    np.testing.assert_allclose(before.dense[name], start + 50 * step, atol=1.5 * np.abs(start).max() / 127)
    assert np.mean(before.dense[name] - start) == pytest.approx(50 * step, rel=0.1)


def test_an_update_counts_once(tmp_path: Path) -> None:
    round = make_round(5, [{"m0": 2}], MODULES)
    updates = round.write(tmp_path)
    with pytest.raises(ValueError, match="each device once"):
        run(FoldStackRecompress(0.99, 64), round, [*updates, *updates])
    with pytest.raises(ValueError, match="at least one update"):
        run(FoldStackRecompress(0.99, 64), round, [])


def test_a_rotten_file_ends_the_fold(tmp_path: Path) -> None:
    round = make_round(6, [{"m0": 2}, {"m0": 2}], MODULES)
    updates = round.write(tmp_path)
    updates[1].path.write_bytes(updates[1].path.read_bytes()[:-9])
    with pytest.raises(DecodeError):
        run(FoldStackRecompress(0.99, 64), round, updates)


def _peak(aggregator: Aggregator, round: Round, updates: list[Reported]) -> int:
    tracemalloc.start()
    try:
        run(aggregator, round, updates)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", registry.names())
def test_memory_does_not_grow_with_the_number_of_devices(tmp_path: Path, name: str) -> None:
    modules = [ModuleSpec(name=f"m{i}", out=96, inp=64) for i in range(4)]
    round = make_round(7, [{m.name: 8 for m in modules}] * 128, modules)
    updates = round.write(tmp_path)
    aggregator = registry.create(StrategySpec(aggregator=name, rank=8))
    some, many = (_peak(aggregator, round, updates[:count]) for count in (16, 128))
    whole = sum(update.path.stat().st_size for update in updates[16:])
    assert many - some < 0.05 * whole


def test_memory_does_not_grow_with_the_number_of_modules_beyond_the_budget(tmp_path: Path) -> None:
    peaks = []
    for count in (4, 16):
        modules = [ModuleSpec(name=f"m{i}", out=96, inp=96) for i in range(count)]
        round = make_round(8, [{m.name: 8 for m in modules}] * 24, modules)
        updates = round.write(tmp_path / str(count))
        tracemalloc.start()
        try:
            run(FoldStackRecompress(0.5, 1), round, updates, memory_bytes=2**20)
            peaks.append(tracemalloc.get_traced_memory()[1])
        finally:
            tracemalloc.stop()
    assert peaks[1] < 1.3 * peaks[0]


def test_a_server_learning_rate_moves_dense_tensors_too() -> None:
    fold = DenseFold(np.array([1.0, 2.0], dtype=np.float32), 1.5)
    fold.add(0.25, np.array([5.0, 2.0], dtype=np.float32))
    fold.add(0.75, np.array([1.0, 4.0], dtype=np.float32))
    # Means 2.0 and 3.5: the change times 1.5.
    assert fold.finish().tolist() == [2.5, 4.25]
