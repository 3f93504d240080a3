"""What the lower part of a split model costs its device, and what of it crosses the link.

The device runs embeddings and the first `block` blocks, forward and backward; head and logits are the coordinator's.
All of what stays at full precision is counted with it, since the embeddings are most of that: an upper bound.
"""

from __future__ import annotations

from collections.abc import Mapping

from msgspec.structs import replace

from coordinator.core.facts import ModelFacts
from coordinator.core.planning.demand import BYTES_CODEC, Demand, demand, tokens_of
from shared.jobs import JobSpec
from shared.messages import UpdateFacts, Work


def lower_facts(facts: ModelFacts, block: int, *, full: bool) -> ModelFacts:
    """The base as a device holds it with `block` blocks. `full`: every parameter of them is tuned itself."""
    modules = [module for module in facts.modules if module.block < block]
    upper = tuple(f"{module.name}." for module in facts.modules if module.block >= block)
    dense = {}
    if full:
        dense = {
            name: shape
            for name, shape in facts.dense.items()
            if facts.dense_blocks.get(name, -1) < block and not name.startswith(upper or ("\0",))
        }
    # Above the blocks nothing is kept for a backward pass: that is the coordinator's.
    activations, on_gpu = (
        {bits: replace(found, fixed=0.0) for bits, found in counted.items()}
        for counted in (facts.activations, facts.activations_gpu)
    )
    return replace(
        facts, modules=modules, dense=dense, activations=activations, activations_gpu=on_gpu, blocks=block, groups=[],
        linear_params=round(facts.linear_params * block / max(1, facts.blocks)),
    )  # fmt: skip


def lower_demand(facts: ModelFacts, job: JobSpec, ranks: Mapping[str, int], block: int, bound: int = 0) -> Demand:
    """The costs of the lower `block` blocks alone; `bound` as in `demand`."""
    # No logits down there, whatever the task.
    below = job if job.task.kind == "least_squares" else replace(job, task=replace(job.task, kind="classification"))
    return demand(lower_facts(facts, block, full=job.strategy.split.tuning == "full"), below, ranks, bound)


def demand_of(facts: ModelFacts, job: JobSpec, work: Work) -> Demand:
    """The costs of a work that is split."""
    assert work.split is not None
    return lower_demand(facts, job, work.ranks, work.split.block)


def own_compute(result: UpdateFacts, work: Work) -> UpdateFacts:
    """`result` as speeds are learned from it: of a split work the seconds from first to last step are mostly waiting,
    while `step_s` and `cores_used` are of the device's own compute."""
    return result if work.split is None else replace(result, train_s=0.0)


def feature_bytes(facts: ModelFacts, job: JobSpec, block: int) -> float:
    """Bytes of a sample's features after `block` blocks on the wire; its gradient takes as many."""
    numbers = facts.features[block - 1] if facts.features else tokens_of(job) * facts.hidden
    codec = job.strategy.split.codec
    # int8 carries a scale for each token.
    return float(numbers * BYTES_CODEC[codec] + (4 * tokens_of(job) if codec == "int8" else 0))
