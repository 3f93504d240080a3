"""What a job's `strategy` table may name, checked in one place for the coordinator and for those who write jobs."""

from __future__ import annotations

from coordinator.core.aggregation import registry as aggregators
from coordinator.core.planning import registry as planners
from shared.jobs import JobSpec, StrategySpec


def faults(strategy: StrategySpec) -> list[str]:
    """Every fault of the table that needs no look at data or base, each with its key."""
    asked = (
        ("name", strategy.name, sorted(planners.PLANNERS)),
        ("aggregator", aggregators.name_of(strategy), aggregators.names()),
    )
    found = [
        f"strategy.{key}: unknown {name!r:.80}; known: {', '.join(known)}"
        for key, name, known in asked
        if name not in known
    ]
    aggregator = aggregators.name_of(strategy)
    if strategy.name in (*planners.UNEQUAL, "fedpipe", "legend") and aggregator in aggregators.EQUAL_RANKS:
        found.append(f"strategy.aggregator: {aggregator} takes one rank only, and {strategy.name} plans unequal ones")
    if strategy.name == "legend" and aggregator in ("flexlora", "hetlora", "ffa"):
        found.append(
            f"strategy.aggregator: {aggregator} holds no rank above strategy.rank, and legend plans larger ones"
        )
    if strategy.server_lr != 1.0 and aggregator not in aggregators.MOVES_FURTHER:
        found.append(f"strategy.server_lr: {aggregator} has none, only {', '.join(sorted(aggregators.MOVES_FURTHER))}")
    if strategy.max_share != 1.0 and aggregator == "hetlora":
        found.append("strategy.max_share: hetlora weighs by norm, not by sample counts, and caps no share")
    if strategy.global_codec != "fp32" and aggregator in aggregators.PUBLISHED_WHOLE:
        found.append(f"strategy.global_codec: {strategy.global_codec}, but {aggregator} needs fp32")
    if strategy.directions != "largest" and aggregator not in aggregators.TRAINS_DIRECTIONS:
        known = ", ".join(sorted(aggregators.TRAINS_DIRECTIONS))
        found.append(f"strategy.directions: devices of {aggregator} train none, only those of {known}")
    if aggregator != aggregators.OWN.get(strategy.name) and (
        aggregator in aggregators.EXCLUSIVE or aggregators.OWN.get(strategy.name) in aggregators.EXCLUSIVE
    ):
        found.append(f"strategy.aggregator: {aggregator} can't fold what {strategy.name} trains")
    if strategy.batch_min > strategy.batch_max:
        found.append("strategy.batch_min: larger than strategy.batch_max")
    return found


def job_faults(job: JobSpec) -> list[str]:
    """The faults of the table, and those of what the strategy can't do with the rest of the job."""
    found, name = faults(job.strategy), job.strategy.name
    if name == "head" and job.task.kind != "classification":
        found.append(f"strategy.name: task.kind {job.task.kind} has no head to train alone")
    if name in aggregators.PRUNING and job.base.targets:
        found.append(f"base.targets: {name} prunes and tunes whole blocks; leave it empty")
    if name in aggregators.PRUNING and job.task.kind == "least_squares":
        found.append("task.kind: least_squares has no heads or FFN channels to prune")
    if job.task.kind == "image" and aggregators.name_of(job.strategy) not in ("dense", "split"):
        found.append("strategy.name: task.kind image has no linear layers for LoRA; use full, or split the model")
    if job.task.kind == "image" and len(job.task.labels) < 2:
        found.append("task.labels: name the classes of the pictures, in the order of their numbers")
    if name in aggregators.SPLIT:
        return found + _split_faults(job)
    if aggregators.name_of(job.strategy) not in aggregators.WITHOUT_LORA:
        return found
    if job.base.targets:
        found.append(f"base.targets: {name} chooses what is tuned by itself; leave it empty")
    if name == "fedadapter" and job.task.kind == "least_squares":
        found.append("task.kind: least_squares has no transformer block to put a bottleneck adapter into")
    if name == "full" and job.strategy.bits not in ("auto", 32):
        found.append(f"strategy.bits: {job.strategy.bits}, but full tunes the base itself, at 32 bits")
    if name == "full" and job.training.codec != "fp32":
        found.append(f"training.codec: {job.training.codec} would round the whole model every round; full needs fp32")
    return found


def _split_faults(job: JobSpec) -> list[str]:
    """The faults of a job that splits the model; whether the base has more than `split.block` blocks the plan says."""
    found, strategy = [], job.strategy
    if job.task.kind == "least_squares":
        found.append("task.kind: least_squares has no blocks to split")
    if strategy.max_share != 1.0:
        found.append("strategy.max_share: it would cap the top worker's own part, too; it is not for split learning")
    if strategy.split.mixed and not strategy.split.block:
        found.append("strategy.split.block: name it, where strategy.split.top_tuning is another than tuning")
    if strategy.split.mixed and job.task.kind == "image":
        found.append("strategy.split.top_tuning: convolutional models have no linear layers for LoRA on either side")
    if "full" in (strategy.split.tuning, strategy.split.above) and job.base.targets:
        found.append("base.targets: full tuning of a side of the split tunes every parameter of it; leave it empty")
    if strategy.split.tuning == "lora":
        return found
    if strategy.bits not in ("auto", 32):
        found.append(f"strategy.bits: {strategy.bits}, but strategy.split.tuning full tunes the base itself, at 32")
    if job.training.codec != "fp32":
        found.append(
            f"training.codec: {job.training.codec} would round all parameters every round; strategy.split.tuning full "
            "needs fp32"
        )
    return found
