"""`dense`: the mean of whole models by hand, what admission refuses, and a fold in several passes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from coordinator.core.aggregation import registry
from coordinator.core.aggregation.base import Aggregator, Expectation
from coordinator.core.facts import ModuleSpec
from coordinator.fold import Reported, fold_round
from shared import adapter as adapters
from shared.adapter import Adapter, Factors
from shared.jobs import StrategySpec
from shared.starts import START_NOTE
from shared.tensors import Array

MODULES = [ModuleSpec(name="m", out=2, inp=2, block=0)]


def dense() -> Aggregator:
    return registry.create(StrategySpec(name="full"))


def tensors(weight: list[list[float]], bias: list[float]) -> dict[str, Array]:
    return {"m.weight": np.array(weight, np.float32), "m.bias": np.array(bias, np.float32)}


BEFORE = Adapter(
    kind="global", job="j", round=0, base_digest="b", factors={}, dense=tensors([[1, 0], [0, 1]], [0, 0]),
    notes={START_NOTE: "dense"},
)  # fmt: skip


def update(device: str, weight: list[list[float]], bias: list[float]) -> Adapter:
    return Adapter(
        kind="update", job="j", round=1, base_digest="b", factors={}, dense=tensors(weight, bias), attempt=1,
        device=device,
    )  # fmt: skip


UPDATES = [update("a", [[2, 0], [0, 4]], [1, 0]), update("b", [[6, 4], [0, 0]], [5, -4])]


def reported(folder: Path) -> list[Reported]:
    found = []
    for one, samples in zip(UPDATES, (30, 10), strict=True):
        path = folder / one.device
        path.write_bytes(adapters.write(one))
        found.append(Reported(one.device, samples, path))
    return found


def test_the_next_model_is_the_mean_by_samples(tmp_path: Path) -> None:
    made = fold_round(dense(), MODULES, BEFORE, None, reported(tmp_path), round=1)
    # 3/4 of the first and 1/4 of the second.
    assert made.adapter.dense["m.weight"].tolist() == [[3, 1], [0, 3]]
    assert made.adapter.dense["m.bias"].tolist() == [2, -1]
    assert (made.adapter.factors, made.residual, made.modules) == ({}, None, {})
    assert made.adapter.notes == {START_NOTE: "dense"} and made.weights == {"a": 0.75, "b": 0.25}


def test_a_small_memory_takes_more_passes_and_gives_the_same_bytes(tmp_path: Path) -> None:
    found = reported(tmp_path)
    whole, cut = (
        fold_round(dense(), MODULES, BEFORE, None, found, round=1, memory_bytes=memory) for memory in (2**20, 1)
    )
    assert adapters.write(whole.adapter) == adapters.write(cut.adapter)


def expected() -> Expectation:
    return Expectation(
        job="j", round=1, attempt=1, device="a", base_digest="b", ranks={}, modules={one.name: one for one in MODULES},
        alpha_ratio=2.0, before=BEFORE,
    )  # fmt: skip


def test_a_whole_model_is_admitted() -> None:
    assert dense().admit(UPDATES[0], expected()) is None


def changed(**given: Array) -> Adapter:
    return replace(
        UPDATES[0], dense={**UPDATES[0].dense, **{name.replace("_", "."): one for name, one in given.items()}}
    )


FAULTS = {
    "dense tensor 'm.bias' is missing": replace(UPDATES[0], dense={"m.weight": UPDATES[0].dense["m.weight"]}),
    "dense tensor 'm.more' was not asked for": changed(m_more=np.zeros(2, np.float32)),
    "dense tensor 'm.bias': shape (3,), expected (2,)": changed(m_bias=np.zeros(3, np.float32)),
    "dense tensor 'm.bias' holds numbers that are not finite": changed(m_bias=np.array([1, np.nan], np.float32)),
    "module 'm': dense takes no factors": replace(
        UPDATES[0], factors={"m": Factors(b=np.zeros((2, 1), np.float32), a=np.zeros((1, 2), np.float32))}
    ),
    "round is 2, expected 1": replace(UPDATES[0], round=2),
}


@pytest.mark.parametrize("reason", FAULTS)
def test_another_model_is_refused_with_the_reason(reason: str) -> None:
    assert dense().admit(FAULTS[reason], expected()) == reason
