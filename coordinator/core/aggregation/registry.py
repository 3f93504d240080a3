"""Aggregators by the name that a job's `strategy.aggregator` gives, or else by the strategy they belong to."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypedDict

from coordinator.core.aggregation.base import Aggregator
from coordinator.core.aggregation.bottleneck import Bottleneck
from coordinator.core.aggregation.dense import Dense
from coordinator.core.aggregation.fedex import FedEx
from coordinator.core.aggregation.fedit import FedIt
from coordinator.core.aggregation.fedspine import FedSpine
from coordinator.core.aggregation.ffa import Ffa
from coordinator.core.aggregation.flexlora import FlexLora
from coordinator.core.aggregation.flora import Flora
from coordinator.core.aggregation.fresh import Fresh
from coordinator.core.aggregation.fsr import FoldStackRecompress
from coordinator.core.aggregation.hetlora import HetLora
from coordinator.core.aggregation.legend import Legend
from coordinator.core.aggregation.split import Split, SplitDense, SplitSides
from shared.errors import UserError
from shared.jobs import Codec, StrategySpec

_FACTORIES: dict[str, Callable[[StrategySpec], Aggregator]] = {
    "fsr": lambda spec: FoldStackRecompress(spec.energy, spec.global_rank, spec.server_lr, **_published(spec)),
    "fresh": lambda spec: Fresh(spec.energy, spec.global_rank, spec.server_lr, codec=spec.global_codec),
    "fedit": lambda spec: FedIt(spec.rank),
    "hetlora": lambda spec: HetLora(spec.rank),
    "flexlora": lambda spec: FlexLora(spec.rank),
    "flora": lambda _spec: Flora(),
    "ffa": lambda spec: Ffa(spec.rank),
    "fedex": lambda spec: FedEx(spec.rank),
    "legend": lambda spec: Legend(spec.energy, spec.global_rank, spec.max_share, spec.server_lr, **_published(spec)),
    "fedspine": lambda spec: FedSpine(spec.energy, spec.global_rank, spec.server_lr, **_published(spec)),
    "split": lambda spec: _split(spec),
    "dense": lambda _spec: Dense(),
    "bottleneck": lambda spec: Bottleneck(spec.global_rank),
}

DEFAULT = "fsr"
PRUNING = ("fedspine", "fedspine-fixed", "fedspine-once", "loraprune", "llmpruner", "magprune")
"""Strategies whose devices prune their model."""
SPLIT = ("mergesfl", "mergesfl-uniform", "mergesfl-random", "splitfed", "adasfl")
"""Strategies that split the model between devices and coordinator."""
OWN: dict[str, str] = {
    "fedlora": "fedit",
    "hetlora": "hetlora",
    "flexlora": "flexlora",
    "flora": "flora",
    "ffa": "ffa",
    "fedex": "fedex",
    "legend": "legend",
    **dict.fromkeys(PRUNING, "fedspine"),
    **dict.fromkeys(SPLIT, "split"),
    "full": "dense",
    "fedadapter": "bottleneck",
}
"""Strategy -> the aggregator of its paper, where that is another than the default."""
WITHOUT_LORA = frozenset({"dense", "bottleneck"})
"""Aggregators of what is no LoRA."""
EXCLUSIVE = WITHOUT_LORA | {"fedspine", "split"}
"""Aggregators of what no other can fold: each goes with its own strategies alone, and these with no other."""
EQUAL_RANKS = frozenset({"fedit", "fedex"})
"""Aggregators that refuse an update of another rank than the job's."""

MOVES_FURTHER = frozenset({"fsr", "fresh", "legend", "fedspine"})
"""Aggregators that know `strategy.server_lr`."""
TRAINS_DIRECTIONS = frozenset({"fsr", "legend", "fedspine"})
"""Aggregators whose devices train directions of the global adapter, so that `strategy.directions` means something."""
PUBLISHED_WHOLE = frozenset({"dense", "fedex", "ffa", "flora", "split"})
"""Aggregators whose global adapter goes down in fp32 alone: `dense` would round the whole model in every round, `fedex`
and `flora` all that was learned so far, the A of `ffa` is the job's own, and split learning sends features."""


class _Published(TypedDict):
    """How the global adapter of `fsr` and its kind is published."""

    sampled: bool
    codec: Codec


def _published(spec: StrategySpec) -> _Published:
    return {"sampled": spec.directions == "sampled", "codec": spec.global_codec}


def _split(spec: StrategySpec) -> Aggregator:
    if spec.split.tuning == spec.split.above == "full":
        return SplitDense()
    kind = SplitSides if spec.split.mixed else Split
    return kind(spec.energy, spec.global_rank, spec.max_share)


def names() -> list[str]:
    """All names, sorted."""
    return sorted(_FACTORIES)


def name_of(spec: StrategySpec) -> str:
    """The aggregator that `spec` asks for, by itself or by its strategy."""
    return spec.aggregator or OWN.get(spec.name, DEFAULT)


def create(spec: StrategySpec) -> Aggregator:
    """The aggregator that `spec` asks for, with its settings. Raises `UserError` for an unknown name."""
    name = name_of(spec)
    factory = _FACTORIES.get(name)
    if factory is None:
        raise UserError(f"strategy.aggregator: no {name!r}, there are {', '.join(names())}")
    return factory(spec)


def merges(strategy: str) -> bool:
    """Whether the features of all devices are merged into one batch; else each device has a top of its own."""
    return strategy.startswith("mergesfl")
