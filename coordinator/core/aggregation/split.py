"""`split`: each side's tensors are averaged over those who trained them (MergeSFL, arXiv 2311.13348).

The paper's: the bottom models are averaged, weighted by the batch of their device, w_b = sum of d_i w_{b,i} / sum of
d_i; the top model is the coordinator's own. Our reading: weights are samples done, which is the batch where all did the
same steps; products of LoRA factors are averaged exactly, as `legend` does it over the holders of a module. The top
worker's update takes part like any other: what it trained nobody else holds, so it stands as it is. Where each device
had a top of its own, these are averaged by samples, too.
"""

from __future__ import annotations

from coordinator.core.aggregation.dense import Dense
from coordinator.core.aggregation.legend import Legend
from shared.starts import Start


class Split(Legend):
    """The aggregator `split` of jobs that tune LoRA."""

    name = "split"


class SplitSides(Split):
    """The aggregator `split` of jobs that tune LoRA on one side and every parameter on the other."""

    start: Start = "sides"


class SplitDense(Dense):
    """The aggregator `split` of jobs that tune every parameter."""

    name = "split"
