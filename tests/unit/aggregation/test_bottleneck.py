"""`bottleneck`: means over holders by hand, configurations that differ, and what admission refuses."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from coordinator.core.aggregation import registry
from coordinator.core.aggregation.base import Aggregator, Expectation
from coordinator.core.aggregation.bottleneck import HoldersFold, tensors_of, union
from coordinator.core.facts import ModuleSpec
from coordinator.fold import FoldResult, Reported, fold_round
from shared import adapter as adapters
from shared.adapter import Adapter, Factors
from shared.jobs import StrategySpec
from shared.starts import START_NOTE
from shared.tensors import Array

LOW, TOP = ModuleSpec(name="low", out=3, inp=3, block=0), ModuleSpec(name="top", out=3, inp=3, block=1)


def bottleneck() -> Aggregator:
    return registry.create(StrategySpec(name="fedadapter"))


def tensors(widths: dict[str, int], value: float) -> dict[str, Array]:
    """Adapters of these widths and a head, every number of them `value`."""
    shapes: dict[str, tuple[int, ...]] = {"head.bias": (2,)}
    for module in (LOW, TOP):
        if width := widths.get(module.name, 0):
            shapes |= tensors_of(module, width)
    return {name: np.full(shape, value, np.float32) for name, shape in shapes.items()}


def before(widths: dict[str, int], value: float) -> Adapter:
    return Adapter(
        kind="global", job="j", round=0, base_digest="b", factors={}, dense=tensors(widths, value),
        notes={START_NOTE: "bottleneck"},
    )  # fmt: skip


def update(device: str, widths: dict[str, int], value: float) -> Adapter:
    return Adapter(
        kind="update", job="j", round=1, base_digest="b", factors={}, dense=tensors(widths, value), attempt=1,
        device=device,
    )  # fmt: skip


def folded(folder: Path, start: Adapter, *updates: tuple[Adapter, int], memory: int = 2**20) -> FoldResult:
    reported = []
    for one, samples in updates:
        path = folder / one.device
        path.write_bytes(adapters.write(one))
        reported.append(Reported(one.device, samples, path))
    return fold_round(bottleneck(), [LOW, TOP], start, None, reported, round=1, memory_bytes=memory)


def test_each_number_is_the_mean_over_those_who_hold_it(tmp_path: Path) -> None:
    made = folded(
        tmp_path, before({"top": 2}, 9.0), (update("a", {"top": 2}, 1.0), 10), (update("b", {"top": 4}, 4.0), 20),
        (update("c", {"top": 2, "low": 2}, 7.0), 10),
    ).adapter  # fmt: skip
    # (10 * 1 + 20 * 4 + 10 * 7) / 40, and beyond width 2 device b alone.
    assert made.dense["top.bottleneck.down.weight"].tolist() == [[4] * 3] * 4
    assert made.dense["top.bottleneck.up.weight"].tolist() == [[4] * 4] * 3
    assert made.dense["top.bottleneck.up.bias"].tolist() == [4] * 3
    assert made.dense["low.bottleneck.down.weight"].tolist() == [[7] * 3] * 2
    assert made.dense["head.bias"].tolist() == [4, 4]
    assert made.notes == {START_NOTE: "bottleneck"} and made.factors == {}


def test_unequal_values_by_hand() -> None:
    fold = HoldersFold(np.array([[5.0, 5.0], [5.0, 5.0]], np.float32))
    fold.add(0.25, np.array([[1.0, 2.0]], np.float32))
    fold.add(0.75, np.array([[5.0, 6.0]], np.float32))
    assert fold.finish().tolist() == [[4.0, 5.0], [5.0, 5.0]], "what nobody holds keeps its value"


def test_a_smaller_configuration_drops_what_is_no_part_of_it(tmp_path: Path) -> None:
    made = folded(tmp_path, before({"top": 4, "low": 4}, 9.0), (update("a", {"top": 2}, 1.0), 10)).adapter
    assert sorted(made.dense) == ["head.bias", *sorted(tensors_of(TOP, 2))]
    assert made.dense["top.bottleneck.down.weight"].shape == (2, 3)


def test_passes_and_order_change_no_byte(tmp_path: Path) -> None:
    parts = [(update("a", {"top": 2}, 0.1), 7), (update("b", {"top": 4, "low": 2}, 0.3), 11)]
    made = {
        adapters.write(folded(tmp_path, before({"top": 2}, 1.0), *given, memory=memory).adapter)
        for given in (parts, parts[::-1])
        for memory in (1, 2**20)
    }
    assert len(made) == 1


def test_the_union_pads_with_zeros_what_is_new() -> None:
    held = [tensors({"top": 1}, 0.0), tensors({"top": 3}, 0.0)]
    found = union(before({"top": 2}, 5.0).dense, held)
    assert found["top.bottleneck.down.bias"].tolist() == [5, 5, 0]


def expected(widths: dict[str, int]) -> Expectation:
    return Expectation(
        job="j", round=1, attempt=1, device="a", base_digest="b", ranks=widths,
        modules={module.name: module for module in (LOW, TOP)}, alpha_ratio=2.0, before=before({"top": 2}, 0.5),
    )  # fmt: skip


@pytest.mark.parametrize("widths", [{"top": 2}, {"top": 4}, {"top": 1}, {"top": 2, "low": 2}, {"top": 2, "low": 0}])
def test_the_configuration_of_the_work_is_admitted(widths: dict[str, int]) -> None:
    assert bottleneck().admit(update("a", widths, 1.0), expected(widths)) is None


ASKED = {"top": 2}
GOOD = update("a", ASKED, 1.0)
NAN = np.array([1, np.nan], np.float32)
FAULTS = {
    "dense tensor 'low.bottleneck.down.bias' was not asked for": update("a", {"top": 2, "low": 2}, 1.0),
    "dense tensor 'top.bottleneck.down.bias': shape (4,), expected (2,)": update("a", {"top": 4}, 1.0),
    "dense tensor 'top.bottleneck.down.bias' is missing": replace(
        GOOD, dense={name: one for name, one in GOOD.dense.items() if "down.bias" not in name}
    ),
    "dense tensor 'head.bias' is missing": replace(
        GOOD, dense={name: one for name, one in GOOD.dense.items() if "head" not in name}
    ),
    "dense tensor 'head.bias' holds numbers that are not finite": replace(GOOD, dense={**GOOD.dense, "head.bias": NAN}),
    "norm of the change is 4.359e+06, above the bound 1e+06": update("a", ASKED, 1e6),
    "module 'top' was not asked for": replace(
        GOOD, factors={"top": Factors(b=np.zeros((3, 1), np.float32), a=np.zeros((1, 3), np.float32))}
    ),
    "device is 'b', expected 'a'": replace(GOOD, device="b"),
}


@pytest.mark.parametrize("reason", FAULTS)
def test_another_configuration_is_refused_with_the_reason(reason: str) -> None:
    assert bottleneck().admit(FAULTS[reason], expected(ASKED)) == reason
