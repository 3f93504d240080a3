"""`fedit`: the mean of B and the mean of A, apart. The common baseline (FedIT, Zhang et al., arXiv 2305.05644).

The paper's: FedAvg of the parameters that LoRA trains: devices continue the global B and A as they are, of one rank,
and the server takes sum_i p_i B_i and sum_i p_i A_i, p_i the device's share of the samples.
Our reading: p_i are shares of the samples of the devices that tuned the module; one that nobody tuned keeps its
factors; an update of another rank is refused.

Inexact: s Bbar Abar lacks s sum_i p_i (B_i - Bbar)(A_i - Abar) of the mean of the products.
"""

from __future__ import annotations

import math

import numpy as np

from coordinator.core.aggregation import admission
from coordinator.core.aggregation.base import Expectation, Folded, Part, Wide, narrow
from coordinator.core.facts import ModuleSpec
from shared.adapter import Adapter, Factors
from shared.norms import product_norm
from shared.starts import Start


class FedIt:
    """The aggregator `fedit`. `rank`: the one rank all devices train at."""

    name = "fedit"
    start: Start = "factors"

    def __init__(self, rank: int) -> None:
        self.rank = self.global_rank = rank

    def admit(self, update: Adapter, expected: Expectation) -> str | None:
        """Why `update` must be refused, or None: every tuned module must have the job's rank, if it is that large."""
        for name in sorted(update.factors):
            rank = update.factors[name].rank
            module = expected.modules.get(name)
            wanted = self.rank if module is None else min(self.rank, module.out, module.inp)
            if rank != wanted:
                return f"module {name!r:.100}: rank {rank}, but {self.name} averages factors of rank {wanted} only"
        return admission.refusal(update, expected, trains_directions=True)

    # The protocol hands every method its residual.
    def begin(self, module: ModuleSpec, current: Factors | None, residual: Factors | None) -> MeanFold:  # noqa: ARG002
        """Open the fold of `module`; there is no residual in this method."""
        return MeanFold(module, current)


class MeanFold:
    """Weighted means of the factors of one module, summed in float64."""

    def __init__(self, module: ModuleSpec, current: Factors | None) -> None:
        self._module = module
        self._current = current
        self._scaling = 1.0
        self._weight = 0.0
        self._b: Wide | None = None
        self._a: Wide | None = None

    def add(self, part: Part) -> None:
        """Take one device's part. Raises `ValueError` where its rank differs from the others'."""
        if part.weight == 0.0:
            return
        factors = part.factors
        if self._b is None or self._a is None:
            self._b = np.zeros((self._module.out, factors.rank))
            self._a = np.zeros((factors.rank, self._module.inp))
            self._scaling = factors.scaling
        if factors.b.shape != self._b.shape or not math.isclose(factors.scaling, self._scaling, rel_tol=1e-5):
            raise ValueError(f"module {self._module.name}: can't average factors of unequal rank or scaling")
        self._b += np.multiply(factors.b, part.weight, dtype=np.float64)
        self._a += np.multiply(factors.a, part.weight, dtype=np.float64)
        self._weight += part.weight

    def finish(self) -> Folded:
        """The means; the current factors where nobody tuned the module."""
        factors = self._current
        if self._b is not None and self._a is not None:
            mean_b, mean_a = narrow(self._b / self._weight), narrow(self._a / self._weight)
            factors = Factors(b=mean_b, a=mean_a, scaling=self._scaling)
        return Folded(factors=factors, norm=0.0 if factors is None else product_norm(factors))
