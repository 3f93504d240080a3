"""`flora`: stack, fold all of it into the base, begin anew. FLoRA (Wang et al., NeurIPS 2024, arXiv 2409.05976).

The paper's: B = [B_1 .. B_K] and A = [p_1 A_1; ..; p_K A_K] give sum_i p_i B_i A_i exactly, for unequal ranks; the
stack is merged into W0 and every device initialises a new LoRA. Our reading: p_i are shares of the samples of all
devices that reported, one that did not tune a module changes nothing there.

That is our `fresh` without its cut: the sum of all rounds is kept (as its directions, up to float32 noise, of any
rank) instead of merged, and rides along frozen. The models are equal; the traffic is not. A device fetches the whole
sum, at most the size of the dense matrices, in every round, where FLoRA's fetch the stack of one round (the sum of
all ranks) and must have been there since the first.
"""

from __future__ import annotations

from coordinator.core.aggregation.base import UNBOUNDED
from coordinator.core.aggregation.fresh import Fresh


class Flora(Fresh):
    """The aggregator `flora`: `fresh` with all energy and no bound on the rank."""

    name = "flora"

    def __init__(self) -> None:
        super().__init__(energy=1.0, global_rank=UNBOUNDED)
