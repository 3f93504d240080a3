"""FedSpine's aggregation (arXiv 2501.02438): adapters of different units left and different ranks, exact.

**The paper's** (a public note): updates are rebuilt to compatible shapes and merged by weights. **Our reading**: B is
spread over the rows of the whole layer and A over its columns, zero where a device has none, so with G_i what device i
took over (the directions it trains, on its rows and columns) its change is

    D_i = s_i B_i A_i - G_i          zero on what it pruned: there the global value stays

    unbiased                  G' = G + sum_i p_i D_i
    by coverage c             G' = G + sum_i p_i D_i / c    row by row (column by column), c: share of who kept it

Coverage is used where `COVERED` of the round's share kept a row or column: it moves rare units as fast as the others.
Where fewer did, one device's word would weigh too much, and the mean stays unbiased. Sums are those of `fsr`, exact
before recompression; without pruned devices the result is `fsr`'s.
"""

from __future__ import annotations

import numpy as np

from coordinator.core.aggregation.base import Folded, Part, Wide, narrow
from coordinator.core.aggregation.fsr import FoldStackRecompress, Recompression, StackFold
from coordinator.core.aggregation.product_sum import ProductSum
from coordinator.core.facts import ModuleSpec
from shared import units
from shared.adapter import Factors, Places
from shared.norms import column_weights

COVERED = 0.3


class FedSpine(FoldStackRecompress):
    """The aggregator `fedspine`; settings as of `fsr`."""

    name = "fedspine"

    def begin(self, module: ModuleSpec, current: Factors | None, residual: Factors | None) -> CoverageFold:
        """Open the fold of `module`."""
        return CoverageFold(module, current, residual, self.recompression)


class CoverageFold(StackFold):
    """The fold of one module by the formula above."""

    def __init__(
        self, module: ModuleSpec, current: Factors | None, residual: Factors | None, settings: Recompression
    ) -> None:
        super().__init__(module, current, residual, settings)
        self._module = module
        self._change = ProductSum(module.out, module.inp)
        self._rows: Wide = np.zeros(module.out)
        self._columns: Wide = np.zeros(module.inp)

    def add(self, part: Part) -> None:
        """Take one device's part."""
        if part.weight == 0.0:
            return
        self._touched = True
        given, out, inp = part.factors, self._module.out, self._module.inp
        spread = units.expanded(given, out, inp)
        self._change.add(spread.b, spread.a, part.weight * column_weights(given))
        _count(self._rows, given.rows, part.weight)
        _count(self._columns, given.columns, part.weight)
        if given.trained and self._current is not None:
            k = given.trained
            taken = units.expanded(units.left_of(self._current, given.rows, given.columns), out, inp)
            self._change.add(taken.b[:, :k], taken.a[:k], -part.weight * column_weights(self._current)[:k])

    def finish(self) -> Folded:
        """The next state of the module; unchanged where no device tuned it."""
        if not self._touched:
            return super().finish()
        u, sigma, vt = self._change.svd()
        u, vt = u * _by_coverage(self._rows)[:, None], vt * _by_coverage(self._columns)[None, :]
        self._sum.add(narrow(u), narrow(vt), self._settings.server_lr * sigma)
        for factors in (self._current, self._residual):
            if factors is not None:
                self._sum.add(factors.b, factors.a, column_weights(factors))
        return self._recompress(*self._sum.svd())


def _count(covered: Wide, where: Places | None, weight: float) -> None:
    covered[slice(None) if where is None else where] += weight


def _by_coverage(covered: Wide) -> Wide:
    enough = covered >= COVERED
    return np.where(enough, 1.0 / np.where(enough, covered, 1.0), 1.0)
