"""Is this update what was asked for? Every check says what it found and what was expected.

Layers one and two of the defence against poisoned updates: the schema (names, shapes, numbers that are finite) and
the norm of the change.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np

from coordinator.core.aggregation.base import NORM_BOUND, Expectation
from shared.adapter import Adapter, Places
from shared.norms import change_norm, largest_part

_SCALING_ERROR = 1e-6


def refusal(update: Adapter, expected: Expectation, *, trains_directions: bool) -> str | None:
    """Why `update` must be refused, or None.

    `trains_directions`: the update contains the first min(assigned rank, global rank) directions of the global adapter.
    """
    return (
        identity_fault(update, expected)
        or names_fault("module", update.factors, (name for name, rank in expected.ranks.items() if rank > 0))
        or names_fault("dense tensor", update.dense, _dense_names(expected))
        or _places_fault(update, expected)
        or _modules_fault(update, expected, trains_directions)
        or _dense_fault(update, expected)
        or _numbers_fault(update, expected)
    )


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


def _places_fault(update: Adapter, expected: Expectation) -> str | None:
    """Whether a pruned device's factors are of the rows and columns of the units that it says are left."""
    for name in sorted(update.factors):
        part, left = update.factors[name], expected.places.get(name, {})
        for word, where, wanted in (("rows", part.rows, left.get("out")), ("columns", part.columns, left.get("in"))):
            if where is wanted or (where is not None and wanted is not None and np.array_equal(where, wanted)):
                continue
            if not expected.places:
                return f"module {name!r:.100}: it is pruned, which was not asked for"
            return f"module {name!r:.100}: its {word} are not those of the units that it tells are left"
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
        found = _not_finite(update)
        return f"{found} holds numbers that are not finite" if found else "the change is not finite"
    if norm > expected.norm_bound:
        return f"norm of the change is {norm:.4g}, above the bound {expected.norm_bound:.4g}"
    for name in sorted(update.factors):
        # Directions that cancel have no norm together, but leave their rounding errors; factors are averaged alone.
        size = largest_part(update.factors[name])
        if size > NORM_BOUND:
            return f"module {name!r:.100}: factors or directions of norm {size:.4g}, above the bound {NORM_BOUND:.4g}"
    return None


def _not_finite(update: Adapter) -> str:
    """What of the update is not finite; "": nothing, so that it must be what it is held against."""
    for name in sorted(update.factors):
        part = update.factors[name]
        if not (np.isfinite(part.a).all() and np.isfinite(part.b).all()):
            return f"module {name!r:.100}"
    bad = [name for name in sorted(update.dense) if not np.isfinite(update.dense[name]).all()]
    return f"dense tensor {bad[0]!r:.100}" if bad else ""
