"""Norms of what adapters add to a model, from Gram matrices of their factors: nothing dense is built. Needs numpy."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from shared import units
from shared.adapter import Adapter, Factors
from shared.tensors import Array

Wide = npt.NDArray[np.float64]


def column_weights(factors: Factors) -> Wide:
    """What each direction of `factors` is multiplied with: scaling * sigma."""
    sigma = np.ones(factors.rank) if factors.sigma is None else factors.sigma.astype(np.float64)
    return factors.scaling * sigma


def change_norm(update: Adapter, before: Adapter, *, dense: bool = True) -> float:
    """Euclidean norm of what the update changes: of products against the directions they contain and, with `dense`, of
    dense tensors.

    Not finite where a number of the update is not.
    """
    squares = [_change_square(part, before.factors.get(name)) for name, part in update.factors.items()]
    if dense:
        squares += [_difference_square(tensor, before.dense[name]) for name, tensor in update.dense.items()]
    return math.sqrt(sum(squares))


def largest_part(factors: Factors) -> float:
    """The largest of three figures that no directions which cancel can hide: the Frobenius norms of B and of A, and the
    sum over the directions of the norm that each alone adds to W. Not finite where a number is not."""
    with np.errstate(over="ignore", invalid="ignore"):
        b = np.linalg.norm(factors.b.astype(np.float64), axis=0)
        a = np.linalg.norm(factors.a.astype(np.float64), axis=1)
        alone = np.abs(column_weights(factors)) * b * a
        parts = [math.sqrt(float(b @ b)), math.sqrt(float(a @ a)), float(np.sum(alone))]
    return max(parts) if all(math.isfinite(one) for one in parts) else math.inf


def product_norm(factors: Factors) -> float:
    """Frobenius norm of what `factors` add to W."""
    return math.sqrt(_product_square(factors.b.astype(np.float64) * column_weights(factors), factors.a))


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
