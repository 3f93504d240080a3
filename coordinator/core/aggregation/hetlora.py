"""`hetlora`: zero-padded weighted means of B and of A. HetLoRA (Cho et al., EMNLP 2024, arXiv 2401.06432).

The paper's, by its public digests: a device of rank r_i trains the first r_i columns of the global B and rows of the
global A and drops the rest; its factors are padded with zeros to the largest rank and averaged apart,
"sparsity-weighted".
Our reading: the weights are w_i = |B_i A_i| / sum |B_j A_j| in the Frobenius norm, as far as we recall the paper and
the better of the two in our toy check, so sample counts do not enter, nor does their cap `strategy.max_share`; the
largest rank is that of the round; a module is averaged over the devices that tuned it. The pruning of ranks on the
device is not built.

Biased by design: with the padded factors the result lacks

    sum_i w_i s B_i A_i - s Bbar Abar = s sum_i w_i (B_i - Bbar)(A_i - Abar),

and a column that only few devices have shrinks by the others' zeros, once in B and once in A.
"""

from __future__ import annotations

import numpy as np

from coordinator.core.aggregation import admission
from coordinator.core.aggregation.base import Expectation, Folded, Part, Wide, narrow
from coordinator.core.facts import ModuleSpec
from shared.adapter import Adapter, Factors
from shared.norms import product_norm
from shared.starts import Start


class HetLora:
    """The aggregator `hetlora`. `rank`: the largest that a device trains at."""

    name = "hetlora"
    start: Start = "cut_factors"

    def __init__(self, rank: int) -> None:
        self.global_rank = rank

    def admit(self, update: Adapter, expected: Expectation) -> str | None:
        """Why `update` must be refused, or None."""
        return admission.refusal(update, expected, trains_directions=True)

    # The protocol hands every method its residual.
    def begin(self, module: ModuleSpec, current: Factors | None, residual: Factors | None) -> PaddedFold:  # noqa: ARG002
        """Open the fold of `module`; there is no residual in this method."""
        return PaddedFold(module, current)


class PaddedFold:
    """Norm-weighted means of the padded factors of one module, summed in float64."""

    def __init__(self, module: ModuleSpec, current: Factors | None) -> None:
        self._current = current
        self._scaling = 1.0
        self._weight = 0.0
        self._b: Wide = np.zeros((module.out, 0))
        self._a: Wide = np.zeros((0, module.inp))

    def add(self, part: Part) -> None:
        """Take one device's part."""
        weight = product_norm(part.factors) if part.weight > 0.0 else 0.0
        if weight == 0.0:
            return
        rank = part.factors.rank
        if (more := rank - len(self._a)) > 0:
            self._b = np.pad(self._b, ((0, 0), (0, more)))
            self._a = np.pad(self._a, ((0, more), (0, 0)))
        self._b[:, :rank] += np.multiply(part.factors.b, weight, dtype=np.float64)
        self._a[:rank] += np.multiply(part.factors.a, weight, dtype=np.float64)
        self._weight += weight
        self._scaling = part.factors.scaling

    def finish(self) -> Folded:
        """The means; the current factors where no device's part says anything."""
        factors = self._current
        if self._weight > 0.0:
            b, a = narrow(self._b / self._weight), narrow(self._a / self._weight)
            factors = Factors(b=b, a=a, scaling=self._scaling)
        return Folded(factors=factors, norm=0.0 if factors is None else product_norm(factors))
