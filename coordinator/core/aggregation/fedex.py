"""`fedex`: the means of B and of A, and beside them what they lack. FedEx-LoRA (Singhal et al., ACL 2025, arXiv
2410.09432).

The paper's: devices continue Bbar and Abar, and the base takes up the residual of their product,

    W0 += sum_i p_i s B_i A_i - s Bbar Abar,

which makes the model of every round the exact mean of the devices' models. For one rank only; an update of another is
refused.
Our reading: W0 itself stays as it is, since it may be quantized. The residuals of all rounds are carried in the
global adapter, frozen, behind the columns that are trained: as directions of their sum, cut at the noise of float32
alone, so up to the rank of the module. p_i are shares of the samples of the devices that tuned the module, as in
`fedit`. The agents of one device average their factors: exact is what happens between devices.
"""

from __future__ import annotations

import numpy as np

from coordinator.core.aggregation.base import UNBOUNDED, Folded, Part, narrow
from coordinator.core.aggregation.fedit import FedIt, MeanFold
from coordinator.core.aggregation.product_sum import NOISE, ProductSum
from coordinator.core.facts import ModuleSpec
from shared.adapter import Factors
from shared.norms import column_weights, product_norm


class FedEx(FedIt):
    """The aggregator `fedex`. `rank`: the one rank all devices train at."""

    name = "fedex"

    def __init__(self, rank: int) -> None:
        super().__init__(rank)
        self.global_rank = UNBOUNDED

    # The protocol hands every method its residual.
    def begin(self, module: ModuleSpec, current: Factors | None, residual: Factors | None) -> ExactMeanFold:  # noqa: ARG002
        """Open the fold of `module`; the residual of this method is part of its global factors."""
        return ExactMeanFold(module, current)


class ExactMeanFold(MeanFold):
    """The means of the factors of one module, and the products that they lack."""

    def __init__(self, module: ModuleSpec, current: Factors | None) -> None:
        super().__init__(module, current)
        self._sum = ProductSum(module.out, module.inp)

    def add(self, part: Part) -> None:
        """Take one device's part. Raises `ValueError` where its rank differs from the others'."""
        super().add(part)
        if part.weight > 0.0:
            self._sum.add(part.factors.b, part.factors.a, part.weight * column_weights(part.factors))

    def finish(self) -> Folded:
        """The means and, behind them, the residuals; the current factors where nobody tuned the module."""
        folded = super().finish()
        mean = folded.factors
        if mean is None or self._weight == 0.0:
            return folded
        # The sum is that of the products times their weights: what is added counts as often.
        self._sum.add(mean.b, mean.a, -self._weight * column_weights(mean))
        if self._current is not None:
            frozen = self._weight * column_weights(self._current)[mean.rank :]
            self._sum.add(self._current.b[:, mean.rank :], self._current.a[mean.rank :], frozen)
        u, sigma, vt = self._sum.svd()
        sigma = sigma / self._weight
        count = int(np.count_nonzero(sigma > NOISE * max(folded.norm, *sigma[:1])))
        root = np.sqrt(sigma[:count] / mean.scaling)
        b = np.concatenate([mean.b, narrow(u[:, :count] * root)], axis=1)
        a = np.concatenate([mean.a, narrow(vt[:count] * root[:, None])])
        factors = Factors(b=b, a=a, scaling=mean.scaling)
        return Folded(factors=factors, norm=product_norm(factors))
