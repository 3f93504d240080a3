"""FedSpine's fold against dense math: different units left, different ranks, with and without enough coverage."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from coordinator.core.aggregation.base import Part, fold_module, product
from coordinator.core.aggregation.fedspine import COVERED, FedSpine
from coordinator.core.aggregation.fsr import FoldStackRecompress
from coordinator.core.facts import ModuleSpec
from shared import units
from shared.adapter import Factors

MODULE = ModuleSpec(name="m", out=12, inp=9, block=0)
CASES = list(itertools.product([1, 2, 3, 4], ["rows", "columns"]))


def device(rng: np.random.Generator, current: Factors | None, rank: int, side: str, share: float) -> Factors:
    rows = columns = None
    size = MODULE.out if side == "rows" else MODULE.inp
    where = np.sort(rng.choice(size, max(1, round(share * size)), replace=False)) if share < 1 else None
    if side == "rows":
        rows = where
    else:
        columns = where
    out = MODULE.out if rows is None else len(rows)
    inp = MODULE.inp if columns is None else len(columns)
    b = rng.normal(size=(out, rank)).astype(np.float32)
    a = rng.normal(size=(rank, inp)).astype(np.float32)
    trained = min(rank, current.rank) if current is not None else 0
    return Factors(b=b, a=a, scaling=2.0, trained=trained, rows=rows, columns=columns)


def by_hand(current: Factors, parts: list[Part]) -> np.ndarray:  # type: ignore[type-arg]  # dense float64
    """G + sum p_i D_i / c, entry by entry."""
    whole = product(current)
    change, covered = np.zeros_like(whole), np.zeros_like(whole)
    for part in parts:
        given = part.factors
        mask = np.zeros(whole.shape)
        rows = np.arange(MODULE.out) if given.rows is None else given.rows
        columns = np.arange(MODULE.inp) if given.columns is None else given.columns
        mask[np.ix_(rows, columns)] = 1.0
        own = np.zeros(whole.shape)
        own[np.ix_(rows, columns)] = 2.0 * given.b.astype(np.float64) @ given.a.astype(np.float64)
        assert current.sigma is not None
        k = given.trained
        begun = product(Factors(b=current.b[:, :k], a=current.a[:k], sigma=current.sigma[:k]))
        change += part.weight * (own - mask * begun)
        covered += part.weight * mask
    return whole + change / np.where(covered >= COVERED - 1e-12, np.maximum(covered, 1e-9), 1.0)


@pytest.mark.parametrize(("seed", "side"), CASES)
def test_the_sum_is_that_of_dense_math(seed: int, side: str) -> None:
    rng = np.random.default_rng(seed)
    u, _ = np.linalg.qr(rng.normal(size=(12, 4)))
    v, _ = np.linalg.qr(rng.normal(size=(9, 4)))
    current = Factors(b=u.astype(np.float32), a=v.T.astype(np.float32), sigma=np.array([4, 3, 2, 1], np.float32))
    weights = rng.dirichlet([1.0] * 4)
    given = [device(rng, current, rank, side, share) for rank, share in ((2, 0.5), (3, 0.25), (6, 1.0), (1, 0.75))]
    parts = [Part(float(weight), one) for weight, one in zip(weights, given, strict=True)]
    found = fold_module(FedSpine(1.0, 64), MODULE, current, None, parts)
    assert found.factors is not None
    assert product(found.factors) == pytest.approx(by_hand(current, parts), abs=2e-5)


def test_whole_models_are_folded_as_by_fsr() -> None:
    rng = np.random.default_rng(9)
    current = Factors(
        b=np.eye(12, 3, dtype=np.float32), a=np.eye(3, 9, dtype=np.float32), sigma=np.array([3, 2, 1], np.float32)
    )
    parts = [Part(weight, device(rng, current, rank, "rows", 1.0)) for weight, rank in ((0.3, 2), (0.7, 5))]
    ours = fold_module(FedSpine(0.99, 6), MODULE, current, None, parts)
    fsr = fold_module(FoldStackRecompress(0.99, 6), MODULE, current, None, parts)
    assert ours.factors is not None and fsr.factors is not None
    assert product(ours.factors) == pytest.approx(product(fsr.factors), abs=1e-5)


def test_a_row_that_one_device_of_little_weight_kept_is_not_blown_up() -> None:
    rows = np.array([0])
    b, a = np.ones((1, 1), np.float32), np.ones((1, 9), np.float32)
    little = Part(0.1, Factors(b=b, a=a, rows=rows))
    other = Part(0.9, Factors(b=np.zeros((11, 1), np.float32), a=a, rows=np.arange(1, 12)))
    found = fold_module(FedSpine(1.0, 8), MODULE, None, None, [little, other])
    assert found.factors is not None
    assert product(found.factors)[0] == pytest.approx(np.full(9, 0.1), rel=1e-5)
    much = Part(0.4, Factors(b=b, a=a, rows=rows))
    found = fold_module(FedSpine(1.0, 8), MODULE, None, None, [much, Part(0.6, other.factors)])
    assert found.factors is not None
    assert product(found.factors)[0] == pytest.approx(np.ones(9), rel=1e-5), "all who kept it said one"


def test_bits_and_places() -> None:
    groups = [
        units.Group(
            name="0.channels", block=0, kind="channels", count=11,
            slices=(units.Slice(module="up", side="out", width=1), units.Slice(module="down", side="in", width=1)),
        ),
        units.Group(
            name="0.heads", block=0, kind="heads", count=3,
            slices=(units.Slice(module="qkv", side="out", width=2, starts=(0, 6, 12)),),
        ),
    ]  # fmt: skip
    kept = {"0.channels": [0, 3, 10], "0.heads": [1]}
    packed = units.pack(groups, kept)
    assert {name: len(bits) for name, bits in packed.items()} == {"0.channels": 2, "0.heads": 1}
    assert units.unpack(groups, packed) == kept
    where = units.places(groups, kept)
    assert where["up"]["out"].tolist() == where["down"]["in"].tolist() == [0, 3, 10]
    assert where["qkv"]["out"].tolist() == [2, 3, 8, 9, 14, 15]
    scores = {"0.channels": np.arange(11.0), "0.heads": np.array([0.5, 0.5, 0.1])}
    assert units.best(groups, scores, 0.5) == {"0.channels": [5, 6, 7, 8, 9, 10], "0.heads": [0, 1]}
    assert units.best(groups, scores, 0.9, kept) == {"0.channels": [3, 10], "0.heads": [1]}
    assert units.ratio_of(groups, kept) == pytest.approx(8 / 11)
    sizes = {"up": (11, 4), "down": (4, 11), "qkv": (18, 4), "other": (2, 2)}
    assert units.sizes_left(groups, kept, sizes) == {"up": (3, 4), "down": (4, 3), "qkv": (6, 4), "other": (2, 2)}
