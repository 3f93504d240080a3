"""`flexlora`: the mean of the products, cut to one rank by SVD. FlexLoRA (Bai et al., NeurIPS 2024, arXiv
2402.11505).

The paper's, by its public digests: the server forms dW = sum_i p_i s B_i A_i, decomposes it as U Sigma V^T, and a
device of rank r_i gets the first r_i directions, B = U Sigma and A = V^T. The sum is exact; what a device's rank does
not hold is lost to it, and since the next sum is made of what devices return, lost to all but the devices of larger
rank.
Our reading: the global state is cut to the job's largest rank (nothing larger is ever handed out); p_i are shares of
the samples of the devices that tuned the module; B is divided by the scaling s, so that the product is dW itself.
"""

from __future__ import annotations

import numpy as np

from coordinator.core.aggregation import admission
from coordinator.core.aggregation.base import Expectation, Folded, Part, narrow
from coordinator.core.aggregation.product_sum import NOISE, ProductSum
from coordinator.core.facts import ModuleSpec
from shared.adapter import Adapter, Factors
from shared.norms import column_weights, product_norm
from shared.starts import Start


class FlexLora:
    """The aggregator `flexlora`. `rank`: the largest that a device trains at."""

    name = "flexlora"
    start: Start = "cut_directions"

    def __init__(self, rank: int) -> None:
        self.global_rank = rank

    def admit(self, update: Adapter, expected: Expectation) -> str | None:
        """Why `update` must be refused, or None."""
        return admission.refusal(update, expected, trains_directions=True)

    # The protocol hands every method its residual.
    def begin(self, module: ModuleSpec, current: Factors | None, residual: Factors | None) -> CutFold:  # noqa: ARG002
        """Open the fold of `module`; what is cut off is gone."""
        return CutFold(module, current, self.global_rank)


class CutFold:
    """The first directions of the mean product of one module."""

    def __init__(self, module: ModuleSpec, current: Factors | None, rank: int) -> None:
        self._sum = ProductSum(module.out, module.inp)
        self._current = current
        self._rank = rank
        self._weight = 0.0
        self._scaling = 1.0

    def add(self, part: Part) -> None:
        """Take one device's part."""
        if part.weight == 0.0:
            return
        self._sum.add(part.factors.b, part.factors.a, part.weight * column_weights(part.factors))
        self._weight += part.weight
        self._scaling = part.factors.scaling

    def finish(self) -> Folded:
        """The cut mean; the current factors where no device tuned the module."""
        if self._weight == 0.0:
            norm = 0.0 if self._current is None else product_norm(self._current)
            return Folded(factors=self._current, norm=norm)
        u, sigma, vt = self._sum.svd()
        sigma = sigma / self._weight
        total = float(np.sum(sigma**2))
        if total == 0.0:
            return Folded(factors=None)
        kept = min(self._rank, int(np.count_nonzero(sigma > NOISE * sigma[0])))
        lost = float(np.sum(sigma[kept:] ** 2))
        b = narrow(u[:, :kept] * (sigma[:kept] / self._scaling))
        return Folded(
            factors=Factors(b=b, a=narrow(vt[:kept]), scaling=self._scaling),
            lost_energy=lost / total,
            forgotten_energy=lost / total,
            norm=float(np.sqrt(total - lost)),
        )
