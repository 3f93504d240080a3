"""`fedit` against numpy, and the shares that all aggregators use."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.core.aggregation import registry
from coordinator.core.aggregation.base import DenseFold, Part, fold_module, product, shares
from coordinator.core.aggregation.bottleneck import Bottleneck
from coordinator.core.aggregation.dense import Dense
from coordinator.core.aggregation.fedex import FedEx
from coordinator.core.aggregation.fedit import FedIt
from coordinator.core.aggregation.fedspine import FedSpine
from coordinator.core.aggregation.ffa import Ffa
from coordinator.core.aggregation.flexlora import FlexLora
from coordinator.core.aggregation.flora import Flora
from coordinator.core.aggregation.fresh import Fresh
from coordinator.core.aggregation.fsr import FoldStackRecompress
from coordinator.core.aggregation.hetlora import HetLora
from coordinator.core.aggregation.legend import Legend
from coordinator.core.aggregation.split import Split
from coordinator.core.facts import ModuleSpec
from shared.adapter import Factors
from shared.errors import UserError
from shared.jobs import StrategySpec
from tests.unit.aggregation.rounds import make_round, random

MODULE = ModuleSpec(name="m", out=20, inp=14)


def test_factors_are_averaged_apart_over_the_devices_that_tuned_the_module() -> None:
    rng = np.random.default_rng(0)
    parts = [Factors(b=random(rng, 20, 4), a=random(rng, 4, 14), scaling=2.0) for _ in range(3)]
    weights = [0.5, 0.2, 0.1]
    result = fold_module(FedIt(4), MODULE, None, None, [Part(w, p) for w, p in zip(weights, parts, strict=True)])
    assert result.factors is not None and result.factors.sigma is None and result.factors.scaling == 2.0
    wanted = np.average([p.b for p in parts], axis=0, weights=weights)
    assert result.factors.b == pytest.approx(wanted, rel=1e-6)
    assert result.factors.a == pytest.approx(np.average([p.a for p in parts], axis=0, weights=weights), rel=1e-6)
    assert result.norm == pytest.approx(2 * np.linalg.norm(result.factors.b @ result.factors.a), rel=1e-5)


def test_two_devices_by_hand() -> None:
    # Half of the samples did not tune it: of the others a quarter and three quarters.
    # B: (4, 0) / 4 + (0, 2) * 3/4 = (1, 1.5); A: (1, 2) / 4 + (3, 0) * 3/4 = (2.5, 0.5).
    one = Factors(b=np.array([[4], [0]], np.float32), a=np.array([[1, 2]], np.float32), scaling=2.0)
    two = Factors(b=np.array([[0], [2]], np.float32), a=np.array([[3, 0]], np.float32), scaling=2.0)
    square = ModuleSpec(name="m", out=2, inp=2)
    made = fold_module(FedIt(1), square, None, None, [Part(0.125, one), Part(0.375, two)])
    assert made.factors is not None
    assert (made.factors.b.tolist(), made.factors.a.tolist()) == ([[1.0], [1.5]], [[2.5, 0.5]])
    assert product(made.factors).tolist() == [[5.0, 1.0], [7.5, 1.5]]
    assert made.norm == pytest.approx(84.5**0.5)
    # The mean of the models is 2 [(4 8; 0 0) / 4 + (0 0; 6 0) * 3/4] = (2 4; 9 0); B - Bbar is (3, -1.5) and (-1, 0.5),
    # A - Abar (-1.5, 1.5) and (0.5, -0.5), so 2 [(-4.5 4.5; 2.25 -2.25) / 4 + (-0.5 0.5; 0.25 -0.25) * 3/4] is lacking.
    lacking = np.array([[-3.0, 3.0], [1.5, -1.5]])
    assert (product(made.factors) + lacking).tolist() == [[2.0, 4.0], [9.0, 0.0]]


def test_a_module_nobody_tuned_keeps_its_factors() -> None:
    rng = np.random.default_rng(1)
    current = Factors(b=random(rng, 20, 4), a=random(rng, 4, 14), scaling=2.0)
    assert fold_module(FedIt(4), MODULE, current, None, []).factors is current
    assert fold_module(FedIt(4), MODULE, None, None, []).factors is None


def test_another_rank_is_refused_with_the_rank_that_is_wanted() -> None:
    round = make_round(2, [{"m": 4}, {"m": 3}], [MODULE], global_rank=0)
    assert FedIt(4).admit(round.updates["edge-000"], round.expected("edge-000")) is None
    reason = FedIt(4).admit(round.updates["edge-001"], round.expected("edge-001"))
    assert reason == "module 'm': rank 3, but fedit averages factors of rank 4 only"


def test_unequal_ranks_are_never_averaged() -> None:
    fold = FedIt(4).begin(MODULE, None, None)
    rng = np.random.default_rng(3)
    fold.add(Part(0.5, Factors(b=random(rng, 20, 4), a=random(rng, 4, 14))))
    with pytest.raises(ValueError, match="unequal rank"):
        fold.add(Part(0.5, Factors(b=random(rng, 20, 3), a=random(rng, 3, 14))))


@given(
    samples=st.lists(st.integers(0, 10**6), min_size=1, max_size=20),
    max_share=st.floats(0.01, 1.0),
)
def test_shares_sum_to_one_and_obey_the_cap(samples: list[int], max_share: float) -> None:
    found = shares(samples, max_share)
    assert len(found) == len(samples)
    if not any(samples):
        assert found == [0.0] * len(samples)
        return
    assert sum(found) == pytest.approx(1.0)
    working = [share for share, count in zip(found, samples, strict=True) if count]
    assert max(found) <= max(max_share, 1 / len(working)) * (1 + 1e-12)
    assert all((share > 0) == (count > 0) for share, count in zip(found, samples, strict=True))
    order = sorted(range(len(samples)), key=lambda i: samples[i])
    assert all(found[i] <= found[j] * (1 + 1e-12) for i, j in zip(order, order[1:], strict=False))


def test_shares_by_hand() -> None:
    assert shares([10, 30, 60]) == [0.1, 0.3, 0.6]
    assert shares([10, 30, 60], max_share=0.5) == pytest.approx([0.125, 0.375, 0.5])
    assert shares([1, 1, 98], max_share=0.2) == pytest.approx([1 / 3] * 3)
    assert shares([0, 1, 3], max_share=0.5) == [0.0, 0.5, 0.5]


def test_dense_tensors_are_averaged_by_share() -> None:
    current = np.array([[1.0, 2.0]], np.float32)
    fold = DenseFold(current)
    assert fold.finish() is current
    fold.add(0.25, np.array([[4.0, 0.0]], np.float32))
    fold.add(0.75, np.array([[0.0, 8.0]], np.float32))
    assert fold.finish().tolist() == [[1.0, 6.0]]


def test_the_registry_knows_every_aggregator_by_its_name() -> None:
    made = {name: registry.create(StrategySpec(aggregator=name, rank=3, energy=0.5)) for name in registry.names()}
    assert {name: type(made[name]) for name in made} == {
        "fsr": FoldStackRecompress, "fresh": Fresh, "fedit": FedIt, "hetlora": HetLora, "flexlora": FlexLora,
        "flora": Flora, "ffa": Ffa, "fedex": FedEx, "legend": Legend, "dense": Dense,
        "bottleneck": Bottleneck, "fedspine": FedSpine, "split": Split,
    }  # fmt: skip
    assert all(aggregator.name == name for name, aggregator in made.items())
    assert isinstance(made["fsr"], FoldStackRecompress) and made["fsr"].energy == 0.5
    assert isinstance(made["fedit"], FedIt) and made["fedit"].rank == 3
    with pytest.raises(UserError, match="no 'krum', there are bottleneck, dense, fedex, fedit, .*, fsr, hetlora"):
        registry.create(StrategySpec(aggregator="krum"))
