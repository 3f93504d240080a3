"""Is this update what was asked for? Every check says what it found and what was expected.

Layers one and two of the defence against poisoned updates: the schema (names, shapes, numbers that are finite) and
the norm of the change. Norms of products come from Gram matrices of their factors, so nothing dense is built.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np

from coordinator.core.aggregation.base import Expectation, Wide, column_weights
from shared import units
from shared.adapter import Adapter, Factors, Places
from shared.tensors import Array

_SCALING_ERROR = 1e-6


def refusal(
    update: Adapter, expected: Expectation, *, trains_directions: bool, may_be_pruned: bool = False
) -> str | None:
    """Why `update` must be refused, or None.

    `trains_directions`: the update contains the first min(assigned rank, global rank) directions of the global adapter.
    `may_be_pruned`: its factors may lack rows and columns of the whole layers, which they name.
    """
    return (
        identity_fault(update, expected)
        or names_fault("module", update.factors, (name for name, rank in expected.ranks.items() if rank > 0))
        or names_fault("dense tensor", update.dense, _dense_names(expected))
        or _places_fault(update, expected, may_be_pruned)
        or _modules_fault(update, expected, trains_directions)
        or _dense_fault(update, expected)
        or _numbers_fault(update, expected)
    )


def change_norm(update: Adapter, before: Adapter) -> float:
    """Euclidean norm of what the update changes: of products against the directions they contain, of dense tensors.

    Not finite where a number of the update is not.
    """
    squares = [_change_square(part, before.factors.get(name)) for name, part in update.factors.items()]
    squares += [_difference_square(tensor, before.dense[name]) for name, tensor in update.dense.items()]
    return math.sqrt(sum(squares))


def product_norm(factors: Factors) -> float:
    """Frobenius norm of what `factors` add to W."""
    return math.sqrt(_product_square(factors.b.astype(np.float64) * column_weights(factors), factors.a))


def identity_fault(update: Adapter, expected: Expectation) -> str | None:
    """Why `update` is not of the work that was asked for, or None."""
    pairs: tuple[tuple[str, object, object], ...] = (
        ("kind", update.kind, "update"),
        ("job", update.job, expected.job),
        ("round", update.round, expected.round),
        ("attempt", update.attempt, expected.attempt),
        ("device", update.device, expected.device),
        ("base digest", update.base_digest, expected.base_digest),
    )
    for word, found, wanted in pairs:
        if found != wanted:
            return f"{word} is {found!r:.80}, expected {wanted!r:.80}"
    return None


def names_fault(word: str, found: Iterable[str], wanted: Iterable[str]) -> str | None:
    """Which name of `wanted` is missing, or of `found` was not asked for; None: the names are the same."""
    names, asked = set(found), set(wanted)
    if asked - names:
        return f"{word} {min(asked - names)!r:.100} is missing"
    if names - asked:
        return f"{word} {min(names - asked)!r:.100} was not asked for"
    return None


def _dense_names(expected: Expectation) -> Iterable[str]:
    return expected.before.dense if expected.dense is None else expected.dense


def _places_fault(update: Adapter, expected: Expectation, may_be_pruned: bool) -> str | None:
    for name in sorted(update.factors):
        part, module = update.factors[name], expected.modules[name]
        for word, where, size in (("rows", part.rows, module.out), ("columns", part.columns, module.inp)):
            if where is not None and not may_be_pruned:
                return f"module {name!r:.100}: it is pruned, which was not asked for"
            if where is not None and int(where[-1]) >= size:
                return f"module {name!r:.100}: {word} up to {int(where[-1])} of a layer of {module.out} x {module.inp}"
    return None


def _modules_fault(update: Adapter, expected: Expectation, trains_directions: bool) -> str | None:
    for name in sorted(update.factors):
        part, module, given = update.factors[name], expected.modules[name], expected.ranks[name]
        before = expected.before.factors.get(name)
        trained = min(given, before.rank) if trains_directions and before is not None else 0
        rank = given * expected.stacked
        out, inp = _side(part.rows, module.out), _side(part.columns, module.inp)
        fault = None
        if part.rank != rank:
            fault = f"rank {part.rank}, expected {rank}"
        elif (part.b.shape, part.a.shape) != ((out, rank), (rank, inp)):
            fault = f"b {part.b.shape} and a {part.a.shape} for a layer of {module.out} x {module.inp}"
        elif part.sigma is not None:
            fault = "an update has no sigma"
        elif not abs(part.scaling - expected.alpha_ratio) <= _SCALING_ERROR * expected.alpha_ratio:
            fault = f"scaling {part.scaling:g}, expected {expected.alpha_ratio:g}"
        elif part.trained != trained:
            fault = f"{part.trained} trained directions, expected {trained}"
        if fault:
            return f"module {name!r:.100}: {fault}"
    return None


def _side(where: Places | None, size: int) -> int:
    return size if where is None else len(where)


def _dense_fault(update: Adapter, expected: Expectation) -> str | None:
    for name in sorted(update.dense):
        shape, wanted = update.dense[name].shape, expected.before.dense[name].shape
        if shape != wanted:
            return f"dense tensor {name!r:.100}: shape {shape}, expected {wanted}"
    return None


def _numbers_fault(update: Adapter, expected: Expectation) -> str | None:
    norm = change_norm(update, expected.before)
    if not math.isfinite(norm):
        return f"{_not_finite(update)} holds numbers that are not finite"
    if norm > expected.norm_bound:
        return f"norm of the change is {norm:.4g}, above the bound {expected.norm_bound:.4g}"
    return None


def _not_finite(update: Adapter) -> str:
    for name in sorted(update.factors):
        part = update.factors[name]
        if not (np.isfinite(part.a).all() and np.isfinite(part.b).all()):
            return f"module {name!r:.100}"
    bad = (name for name in sorted(update.dense) if not np.isfinite(update.dense[name]).all())
    return f"dense tensor {next(bad, '')!r:.100}"


def _change_square(part: Factors, before: Factors | None) -> float:
    left, right = part.b.astype(np.float64) * part.scaling, part.a.astype(np.float64)
    if before is not None and part.trained > 0:
        begun = units.left_of(before, part.rows, part.columns)
        start = begun.b[:, : part.trained] * column_weights(begun)[: part.trained]
        left = np.concatenate([left, -start], axis=1)
        right = np.concatenate([right, begun.a[: part.trained]])
    return _product_square(left, right)


def _product_square(left: Wide, right: Wide | Array) -> float:
    """||left @ right||_F^2; never below zero, and not a number where one in either factor is not finite."""
    wide = right.astype(np.float64, copy=False)
    # An infinity times zero, or less infinity, is not a number: that is the answer, not an accident.
    with np.errstate(invalid="ignore"):
        square = float(np.sum((left.T @ left) * (wide @ wide.T)))
    return max(square, 0.0) if math.isfinite(square) else math.nan


def _difference_square(tensor: Array, before: Array) -> float:
    with np.errstate(invalid="ignore"):
        difference = (tensor.astype(np.float64) - before).ravel()
        return float(difference @ difference)
