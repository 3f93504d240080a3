"""Admission: what was asked for passes, each fault is refused with a reason of its own."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from coordinator.core.aggregation.base import narrow, product
from coordinator.core.aggregation.fedspine import FedSpine
from coordinator.core.aggregation.fresh import Fresh
from coordinator.core.aggregation.fsr import FoldStackRecompress
from coordinator.core.facts import ModuleSpec
from shared.adapter import Adapter
from shared.norms import change_norm, product_norm
from shared.tensors import Array
from tests.unit.aggregation.rounds import first, make_round

MODULES = [ModuleSpec(name="m0", out=12, inp=9), ModuleSpec(name="m1", out=5, inp=12)]
ROUND = make_round(0, [{"m0": 4, "m1": 2}], MODULES, global_rank=3)
UPDATE = ROUND.updates["edge-000"]
EXPECTED = ROUND.expected("edge-000")
FSR = FoldStackRecompress(0.99, 64)


def with_part(**changes: object) -> Adapter:
    """The update with another part of module m0."""
    return replace(UPDATE, factors={**UPDATE.factors, "m0": replace(UPDATE.factors["m0"], **changes)})  # type: ignore[arg-type]  # any field


def with_dense(name: str, tensor: Array) -> Adapter:
    return replace(UPDATE, dense={**UPDATE.dense, name: tensor})


def poisoned(array: Array, value: float) -> Array:
    bad = array.copy()
    bad.flat[3] = value
    return bad


def without(name: str) -> Adapter:
    return replace(UPDATE, factors={n: p for n, p in UPDATE.factors.items() if n != name})


PART, OTHER = UPDATE.factors["m0"], UPDATE.factors["m1"]
FAULTS: dict[str, tuple[Adapter, str]] = {
    "a global adapter": (replace(UPDATE, kind="global"), "kind is 'global', expected 'update'"),
    "another job": (replace(UPDATE, job="other"), "job is 'other', expected 'topics-1'"),
    "an old round": (replace(UPDATE, round=4), "round is 4, expected 5"),
    "an old attempt": (replace(UPDATE, attempt=0), "attempt is 0, expected 1"),
    "another device's": (replace(UPDATE, device="edge-666"), "device is 'edge-666', expected 'edge-000'"),
    "another base": (replace(UPDATE, base_digest="cd"), "base digest is 'cd', expected 'abababab"),
    "no m1": (without("m1"), "module 'm1' is missing"),
    "one module more": (
        replace(UPDATE, factors={**UPDATE.factors, "m2": PART}),
        "module 'm2' was not asked for",
    ),
    "another rank": (with_part(b=PART.b[:, :2], a=PART.a[:2], trained=2), "module 'm0': rank 2, expected 4"),
    "another shape": (with_part(b=PART.b[:11]), "module 'm0': b (11, 4) and a (4, 9) for a layer of 12 x 9"),
    "turned": (with_part(b=PART.a.T, a=PART.b.T), "module 'm0': b (9, 4) and a (4, 12) for a layer of 12 x 9"),
    "a sigma": (with_part(sigma=np.ones(4, np.float32)), "module 'm0': an update has no sigma"),
    "another scaling": (with_part(scaling=200.0), "module 'm0': scaling 200, expected 2"),
    "no scaling": (with_part(scaling=float("nan")), "module 'm0': scaling nan, expected 2"),
    "false claim of directions": (with_part(trained=0), "module 'm0': 0 trained directions, expected 3"),
    "NaN in b": (with_part(b=poisoned(PART.b, np.nan)), "module 'm0' holds numbers that are not finite"),
    "infinity in a": (with_part(a=poisoned(PART.a, np.inf)), "module 'm0' holds numbers that are not finite"),
    "infinity times nothing": (
        with_part(b=np.zeros_like(PART.b), a=poisoned(PART.a, -np.inf)),
        "module 'm0' holds numbers that are not finite",
    ),
    "NaN in the head": (
        with_dense("head.bias", np.array([0.0, np.nan, 0.0], np.float32)),
        "dense tensor 'head.bias' holds numbers that are not finite",
    ),
    "norm bomb": (with_part(b=PART.b * np.float32(1e6)), "norm of the change is"),
    "norm bomb in float32's last corner": (
        with_part(b=np.full_like(PART.b, 3e38), a=np.full_like(PART.a, 3e38)),
        "norm of the change is",
    ),
    "no head": (replace(UPDATE, dense={}), "dense tensor 'head.bias' is missing"),
    "one dense tensor more": (with_dense("embedding", np.ones(3, np.float32)), "dense tensor 'embedding' was not"),
    "a head of another shape": (
        with_dense("head.weight", np.ones((4, 3), np.float32)),
        "dense tensor 'head.weight': shape (4, 3), expected (3, 4)",
    ),
}


def test_what_was_asked_for_passes() -> None:
    assert FSR.admit(UPDATE, EXPECTED) is None
    zeros = {"m0": 4, "m1": 2, "m2": 0}
    assert FSR.admit(UPDATE, ROUND.expected("edge-000", zeros)) is None


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_is_refused_with_its_reason(fault: str) -> None:
    update, reason = FAULTS[fault]
    found = FSR.admit(update, EXPECTED)
    assert found is not None and found.startswith(reason)


def test_fresh_takes_no_direction_of_the_global_adapter() -> None:
    fresh = Fresh(0.99, 64)
    reason = fresh.admit(UPDATE, EXPECTED)
    assert reason == "module 'm0': 3 trained directions, expected 0"
    parts = {name: replace(part, trained=0) for name, part in UPDATE.factors.items()}
    assert fresh.admit(replace(UPDATE, factors=parts), EXPECTED) is None


def test_the_norm_is_that_of_the_change() -> None:
    squares = 0.0
    for name, part in UPDATE.factors.items():
        start = product(first(ROUND.before.factors[name], part.trained))
        squares += float(np.sum((product(part) - start) ** 2))
    for name, tensor in UPDATE.dense.items():
        squares += float(np.sum((tensor.astype(float) - ROUND.before.dense[name]) ** 2))
    norm = change_norm(UPDATE, ROUND.before)
    assert norm == pytest.approx(np.sqrt(squares), rel=1e-6)
    assert FSR.admit(UPDATE, replace(EXPECTED, norm_bound=norm * 1.001)) is None
    assert "above the bound" in (FSR.admit(UPDATE, replace(EXPECTED, norm_bound=norm * 0.999)) or "")


def test_an_update_that_returns_its_start_changes_nothing() -> None:
    before = ROUND.before.factors["m0"]
    assert before.sigma is not None
    b = np.concatenate([before.b * before.sigma / 2, np.zeros((12, 1))], axis=1).astype(np.float32)
    a = np.concatenate([before.a, np.ones((1, 9))]).astype(np.float32)
    same = replace(UPDATE, factors={"m0": replace(PART, b=b, a=a)}, dense=ROUND.before.dense)
    assert change_norm(same, ROUND.before) < 1e-6


def test_norm_of_a_product_without_the_product() -> None:
    part = ROUND.before.factors["m0"]
    assert product_norm(part) == pytest.approx(np.linalg.norm(product(part)), rel=1e-6)


def test_factors_of_several_agents_lie_side_by_side() -> None:
    """Each of the assigned rank; the directions of the global adapter are in their mean once."""
    pair = {
        name: replace(part, b=np.hstack([part.b, part.b]) / 2, a=np.vstack([part.a, part.a]))
        for name, part in UPDATE.factors.items()
    }
    update, expected = replace(UPDATE, factors=pair), replace(EXPECTED, stacked=2)
    assert FSR.admit(update, expected) is None
    assert FSR.admit(update, EXPECTED) == "module 'm0': rank 8, expected 4"
    assert FSR.admit(UPDATE, expected) == "module 'm0': rank 4, expected 8"
    assert change_norm(update, ROUND.before) == pytest.approx(change_norm(UPDATE, ROUND.before), rel=1e-5)


def pruned(rows: Array, told: Array) -> str | None:
    """What admission says of an update with these rows of m0 by a device that tells that `told` are left."""
    part = UPDATE.factors["m0"]
    update = with_part(b=part.b[rows], rows=rows)
    places = {"m0": {"out": told}}
    return FedSpine(0.99, 64).admit(update, replace(EXPECTED, places=places))


def test_a_pruned_updates_rows_are_those_of_the_units_that_its_device_tells() -> None:
    told = np.array([0, 1, 4, 5, 8, 9])
    assert pruned(told, told) is None
    for rows in (np.array([0, 1, 4, 5, 8, 10]), np.arange(12), np.array([0])):
        assert pruned(rows, told) == "module 'm0': its rows are not those of the units that it tells are left"
    whole = FedSpine(0.99, 64).admit(UPDATE, replace(EXPECTED, places={"m0": {"out": told}}))
    assert whole == "module 'm0': its rows are not those of the units that it tells are left"
    asked = FedSpine(0.99, 64).admit(with_part(b=UPDATE.factors["m0"].b[told], rows=told), EXPECTED)
    assert asked == "module 'm0': it is pruned, which was not asked for"


@pytest.mark.parametrize("size", [1e16, 1e30, 1e37])
def test_directions_that_cancel_are_refused(size: float) -> None:
    """Their norm is 0, their rounding errors in the fold are not."""
    b, a = PART.b.copy(), PART.a.copy()
    b[:, 2], a[2] = size, 1.0
    b[:, 3], a[3] = size, -1.0
    update = with_part(b=b, a=a)
    assert change_norm(update, EXPECTED.before) < EXPECTED.norm_bound / 1000
    assert "above the bound" in (FSR.admit(update, EXPECTED) or "")


@pytest.mark.parametrize("size", [1e7, 1e20, 1e35])
def test_factors_whose_size_only_their_product_hides_are_refused(size: float) -> None:
    """Aggregators that average factors alone multiply each with those of other devices."""
    for b, a in ((size, 1 / size), (1 / size, size)):
        update = with_part(b=PART.b * np.float32(b), a=PART.a * np.float32(a))
        assert FSR.admit(update, EXPECTED) is not None


def test_an_update_against_a_global_adapter_that_is_not_finite_is_not_blamed() -> None:
    before = replace(
        EXPECTED.before, dense={name: np.full_like(one, np.inf) for name, one in EXPECTED.before.dense.items()}
    )
    assert FSR.admit(UPDATE, replace(EXPECTED, before=before)) == "the change is not finite"


def test_an_aggregate_that_is_not_finite_is_none() -> None:
    assert narrow(np.array([1.0, 3e38])).dtype == np.float32
    for number in (1e39, np.inf, np.nan):
        with pytest.raises(FloatingPointError, match="not finite"):
            narrow(np.array([1.0, number]))
