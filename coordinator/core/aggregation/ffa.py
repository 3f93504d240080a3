"""`ffa`: A is fixed for the job, B alone is trained and averaged. FFA-LoRA (Sun et al., ICLR 2024, arXiv 2403.12313).

The paper's: with one A for all, sum_i p_i s B_i A = s (sum_i p_i B_i) A, so the mean of B is the exact mean of the
models, at half of LoRA's freedom. Every device draws A from the job's seed (`shared.starts.fixed_rows`), and the
global adapter carries it from the first round on; an update then brings B alone.
Our reading, for unequal ranks: a device of rank r trains the first r columns of B over the first r rows of A, and the
rest rides along frozen. Column k of the mean is then sum of p_i B_i[k] over the devices that trained it, plus what is
left of one times the former column: exact as well. Rows of A that the global adapter lacks come with the update and are
checked, not averaged; with a codec other than fp32 they are the rounded ones, so that round 1 is exact to its error.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from coordinator.core.aggregation import admission
from coordinator.core.aggregation.base import Expectation, Folded, Part, Wide, narrow
from coordinator.core.facts import ModuleSpec
from shared.adapter import Adapter, Factors
from shared.norms import product_norm
from shared.starts import Start, fixed_rows
from shared.tensors import Array

_CODEC_ERROR = 0.01
"""Of the largest entry of A: above what any codec rounds away (int8: 0.4 %), far below another A."""
_UNTRAINED = 1e-12
"""A column of which less than this share remains was trained by every device, up to rounding of the shares."""


class Ffa:
    """The aggregator `ffa`. `rank`: the largest that a device trains at."""

    name = "ffa"
    start: Start = "frozen_a"

    def __init__(self, rank: int) -> None:
        self.global_rank = rank

    def admit(self, update: Adapter, expected: Expectation) -> str | None:
        """Why `update` must be refused, or None: its A must be the job's."""
        whole = replace(
            update,
            factors={name: _whole(part, expected.before.factors.get(name)) for name, part in update.factors.items()},
        )
        return admission.refusal(whole, expected, trains_directions=True) or _foreign_a(whole, expected)

    # The protocol hands every method its residual.
    def begin(self, module: ModuleSpec, current: Factors | None, residual: Factors | None) -> SharedFold:  # noqa: ARG002
        """Open the fold of `module`; there is no residual in this method."""
        return SharedFold(module, current)


class SharedFold:
    """The mean of B of one module, column by column, summed in float64; A as it came first."""

    def __init__(self, module: ModuleSpec, current: Factors | None) -> None:
        self._current = current
        self._scaling = 1.0
        self._a: Array = np.zeros((0, module.inp), np.float32) if current is None else current.a
        self._b: Wide = np.zeros((module.out, len(self._a)))
        self._trained_share: Wide = np.zeros(len(self._a))
        self._touched = False

    def add(self, part: Part) -> None:
        """Take one device's part."""
        if part.weight == 0.0:
            return
        rank, known = part.factors.rank, len(self._a)
        if rank > known:
            self._a = np.concatenate([self._a, part.factors.a[known:]])
            self._b = np.pad(self._b, ((0, 0), (0, rank - known)))
        self._b[:, :rank] += np.multiply(part.factors.b, part.weight, dtype=np.float64)
        self._trained_share[:rank] += part.weight
        self._scaling = part.factors.scaling
        self._touched = True

    def finish(self) -> Folded:
        """The mean; the current factors where no device tuned the module."""
        factors = self._current
        if self._touched:
            if factors is not None:
                remains = 1.0 - self._trained_share
                remains[np.abs(remains) < _UNTRAINED] = 0.0
                self._b[:, : factors.rank] += factors.b * (remains * factors.scaling / self._scaling)
            factors = Factors(b=narrow(self._b), a=narrow(self._a), scaling=self._scaling)
        return Folded(factors=factors, norm=0.0 if factors is None else product_norm(factors))


def _whole(part: Factors, before: Factors | None) -> Factors:
    """`part` with the global adapter's rows of A where it brings none, having trained over those alone."""
    if part.a.shape[1] or before is None or part.rank > before.rank:
        return part
    return replace(part, a=before.a[: part.rank])


def _foreign_a(update: Adapter, expected: Expectation) -> str | None:
    for name in sorted(update.factors):
        found, before = update.factors[name].a, expected.before.factors.get(name)
        wanted = fixed_rows(expected.seed, name, len(found), found.shape[1])
        if before is not None:
            known = min(len(found), before.rank)
            wanted[:known] = before.a[:known]
        apart, largest = float(np.abs(found - wanted).max()), float(np.abs(wanted).max())
        if not apart <= _CODEC_ERROR * largest:
            return f"module {name!r:.100}: A is {apart:.3g} off the job's, whose largest entry is {largest:.3g}"
    return None
