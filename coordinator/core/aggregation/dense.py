"""`dense`: FedAvg of every parameter (McMahan et al., AISTATS 2017, arXiv 1602.05629), for full fine-tuning.

The paper's: each device trains the whole model, and the next one is the mean of the devices' models by samples. Our
reading: nothing. There are no factors; the global adapter's dense tensors are all parameters of the base, a shared one
once, from round 0 on.
"""

from __future__ import annotations

from coordinator.core.aggregation import admission
from coordinator.core.aggregation.base import Expectation, Folded, Part
from coordinator.core.facts import ModuleSpec
from shared.adapter import Adapter, Factors
from shared.starts import Start


class Dense:
    """The aggregator `dense`: the mean of dense tensors, which the fold of every method makes, and nothing else."""

    name = "dense"
    start: Start = "dense"
    global_rank = 0

    def admit(self, update: Adapter, expected: Expectation) -> str | None:
        """Why `update` must be refused, or None."""
        if update.factors:
            return f"module {min(update.factors)!r:.100}: {self.name} takes no factors"
        return admission.refusal(update, expected, trains_directions=False)

    # The protocol hands every method a module and its factors.
    def begin(self, module: ModuleSpec, current: Factors | None, residual: Factors | None) -> NoFold:  # noqa: ARG002
        """Nothing is folded by module."""
        return NoFold()


class NoFold:
    """The fold of a module that can't have factors."""

    def add(self, part: Part) -> None:  # noqa: ARG002  # as the protocol has it
        """Raises `ValueError`: admission lets no factors in."""
        raise ValueError("a dense update has no factors")

    def finish(self) -> Folded:
        """No factors."""
        return Folded(factors=None)
