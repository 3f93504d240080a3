"""One update of several agents' updates: against dense mathematics."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.core.aggregation.base import product
from edge_daemon.protocol import Merge, Partial
from edge_daemon.training import merging
from shared import adapter as adapters
from shared.adapter import Adapter, Factors
from shared.errors import DecodeError
from tests.unit.session_rig import assignment


def update(rng: np.random.Generator, rank: int, **changes: Any) -> Adapter:
    factors = {
        name: Factors(
            b=rng.standard_normal((out, rank), dtype=np.float32),
            a=rng.standard_normal((rank, inp), dtype=np.float32), scaling=2.0, trained=1,
        )
        for name, (out, inp) in {"q": (7, 5), "v": (3, 9)}.items()
    }  # fmt: skip
    dense = {"head": rng.standard_normal((4, 6), dtype=np.float32)}
    values = {"kind": "update", "job": "job-1", "round": 1, "base_digest": "b" * 64, "device": "dev-1", "attempt": 1}
    return Adapter(**{**values, "factors": factors, "dense": dense, **changes})


@settings(deadline=None, max_examples=50)
@given(seed=st.integers(0, 10**6), rank=st.integers(1, 5), counts=st.lists(st.integers(1, 500), min_size=1, max_size=5))
def test_the_products_are_averaged_exactly(seed: int, rank: int, counts: list[int]) -> None:
    rng = np.random.default_rng(seed)
    updates = [update(rng, rank) for _ in counts]
    weights = [count / sum(counts) for count in counts]
    merged = merging.mean_update(updates, weights, stack=True)
    for name in ("q", "v"):
        wanted = sum(w * product(one.factors[name]) for w, one in zip(weights, updates, strict=True))
        np.testing.assert_allclose(product(merged.factors[name]), wanted, rtol=0, atol=1e-5)
        assert merged.factors[name].rank == rank * len(counts)
        assert (merged.factors[name].trained, merged.factors[name].scaling) == (1, 2.0)
    head = sum(w * one.dense["head"].astype(float) for w, one in zip(weights, updates, strict=True))
    np.testing.assert_allclose(merged.dense["head"], head, atol=1e-6)


def test_factors_are_averaged_where_the_aggregator_does_so_too() -> None:
    rng = np.random.default_rng(1)
    one, two = update(rng, 3), update(rng, 3)
    merged = merging.mean_update([one, two], [0.25, 0.75], stack=False)
    np.testing.assert_allclose(merged.factors["q"].a, 0.25 * one.factors["q"].a + 0.75 * two.factors["q"].a, atol=1e-6)
    assert merged.factors["q"].rank == 3


@pytest.mark.parametrize(
    ("start", "rank"),
    [
        ("directions", 6),
        ("fresh", 6),
        ("cut_directions", 6),
        ("factors", 3),
        ("cut_factors", 3),
        ("frozen_a", 3),
        ("of the future", 6),
    ],
)
def test_the_global_adapter_says_how(tmp_path: Path, start: str, rank: int) -> None:
    rng = np.random.default_rng(2)
    paths = [tmp_path / f"{n}.adapter" for n in range(2)]
    for path in paths:
        path.write_bytes(adapters.write(update(rng, 3)))
    whole = tmp_path / "global.adapter"
    whole.write_bytes(adapters.write(update(rng, 1, kind="global", notes={"start": start})))
    order = Merge(
        assignment=assignment(), partials=[Partial(update_path=str(path), samples=5) for path in paths],
        adapter_path=str(whole), update_path=str(tmp_path / "out.adapter"),
    )  # fmt: skip
    done = merging.merge(order)
    made = adapters.read_file(tmp_path / "out.adapter")
    assert made.factors["q"].rank == rank
    assert (done.size, done.norm) == ((tmp_path / "out.adapter").stat().st_size, merging.norm(made))
    assert (made.device, made.attempt, made.job) == ("dev-1", 1, "job-1")


def test_updates_of_other_modules_are_refused() -> None:
    rng = np.random.default_rng(3)
    one = update(rng, 2)
    with pytest.raises(DecodeError, match="other tensors"):
        merging.mean_update([one, update(rng, 2, dense={})], [0.5, 0.5], stack=True)
