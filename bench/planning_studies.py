"""Questions beside the grid of `bench/planning.py`: what each part of a method is worth. One or few tables each.

A study is a set of runs at the rates that the grid's tuning chose; its variants change the job, the fleet or the
planner in one respect.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from bench.planning_grid import BATCH, FULL_ROUNDS, Method, Run
from coordinator.core.planning.fedpipe import FedPipePlanner
from muster.testbed.oracle import planners

SPARSITY = {"half": 0.5, "third": 0.3}
PRUNE_STEPS = (0.2, 0.35, 0.5)
"""The first is also what methods get that have no use for it."""
Rates = Mapping[tuple[str, str], float]
SEEDS = (0, 1, 2)
WHOLE_RANK = 384
"""The width of the base: no matrix has more directions."""
FIVE = (0, 1, 2, 3, 4)


@dataclass(frozen=True)
class Variant:
    """What is other than in the grid. `tables`: of the job; `fields`: of the simulation."""

    tables: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    fields: Mapping[str, Any] = field(default_factory=dict)
    around: Callable[[], AbstractContextManager[object]] = nullcontext


def pruned(sparsity: str, step: float) -> str:
    """The name of the variant that prunes so much, at most `step` of it on a device in a round."""
    return sparsity if step == PRUNE_STEPS[0] else f"{sparsity}-step{step:g}"


VARIANTS: dict[str, Variant] = {
    "": Variant(),
    "equal": Variant(fields={"profile": "equal"}),
    "equal-roomy": Variant(fields={"profile": "equal-roomy"}),
    "short": Variant(fields={"profile": "jetson-short"}),
    # A local epoch as long as in the papers, computed whole: as many seconds as eight steps that are charged as ten.
    "epoch": Variant(fields={"profile": "jetson-short"}, tables={"rounds": {"local_steps": 80}}),
    "oracle": Variant(fields={"oracle": True}),
    "onebatch": Variant(tables={"strategy": {"batch_min": BATCH, "batch_max": BATCH}}),
    # Ranks 2 to 64, the largest as in FLoRA's own experiments with unequal ranks.
    "wide": Variant(tables={"strategy": {"rank": 64, "global_rank": 64}}),
    "falling": Variant(tables={"training": {"schedule": "cosine"}}),
    # As the papers have it, whose servers keep all of a merged update: no matrix here has more directions than the cap.
    "falling-whole": Variant(
        tables={"training": {"schedule": "cosine"}, "strategy": {"energy": 0.999, "global_rank": WHOLE_RANK}}
    ),
    "all": Variant(around=lambda: planners({"fedpipe": partial(FedPipePlanner, wanted=1.0)})),
    "once": Variant(tables={"strategy": {"rescore_every": 1000}}),
    "every3": Variant(tables={"strategy": {"rescore_every": 3}}),
    # Up to a rank at which the adapter's moments weigh something beside so small a base.
    "pair": Variant(
        fields={"profile": "pair", "devices": 2},
        tables={
            "rounds": {"sample": 2, "min_devices": 2},
            "strategy": {"rank": 32, "global_rank": 64, "warm_up_steps": 8},  # it is of the rounds after that
        },
    ),
    **{
        pruned(name, step): Variant(
            tables={
                "strategy": {"prune": share, "prune_step": step, "rank": 8},
                "rounds": {"local_steps": 20},
            }
        )
        for name, share in SPARSITY.items()
        for step in PRUNE_STEPS
    },
    **{
        f"{directions}{energy}": Variant(tables={"strategy": {"directions": directions, "energy": energy}})
        for directions in ("largest", "sampled")
        for energy in (0.99, 0.999)
    },
    # A cap that no matrix here reaches, so that the energy decides.
    **{
        f"whole{energy}": Variant(tables={"strategy": {"energy": energy, "global_rank": WHOLE_RANK}})
        for energy in (0.99, 0.999)
    },
}


@dataclass(frozen=True)
class Study:
    """A question with the (method, variant) pairs that answer it."""

    name: str
    title: str
    pairs: tuple[tuple[Method, str], ...]
    rounds: int
    seeds: tuple[int, ...]
    stop: bool = False
    """At the target: seconds are compared; else quality after `rounds`."""
    alpha: float = 1.0
    ratios: tuple[tuple[str, str], ...] = ()
    """Runs by `label`, the first so many times faster to the target than the second: no claims, but they are told."""
    remark: str = ""
    rates: tuple[tuple[str, float], ...] = ()
    """Of methods whose variants need others than the grid's, by name: chosen on validation rows likewise."""

    def missing(self, rates: Rates) -> list[str]:
        """The methods that have no rate yet."""
        return sorted({method.name for method, _ in self.pairs if _rate(method, rates) is None})

    def runs(self, rates: Rates) -> Iterator[Run]:
        """What is to be run, seed by seed."""
        for seed in self.seeds:
            for method, variant in self.pairs:
                lr = dict(self.rates).get(method.name) or _rate(method, rates)
                if lr is not None:
                    rounds = method.rounds(self.rounds) if self.stop else self.rounds
                    yield Run(method, "dbpedia14", self.alpha, seed, lr, "test", rounds, self.stop, variant)


def label(method: Method, variant: str) -> str:
    """A study's runs of a method, in its table."""
    return f"{method.name}{variant and ', ' + variant}"


def _rate(method: Method, rates: Rates) -> float | None:
    """What differs from a tuned method in its aggregator alone has that method's rate."""
    return rates.get((method.name, "dbpedia14")) or rates.get((f"{method.strategy}+fsr", "dbpedia14"))


_FEDPIPE, _LEGEND, _UNIFORM = Method("fedpipe"), Method("legend"), Method("uniform")
_LEGENDS_RIVALS = ("fedlora", "hetlora", "fedadapter")
_ONE_BATCH = ((_LEGEND, ""), (_LEGEND, "onebatch"), *((Method(rival), "") for rival in _LEGENDS_RIVALS))
_BY_DEPTH_ALONE = tuple(("legend, onebatch", rival) for rival in _LEGENDS_RIVALS)
_TIMED = ("fedpipe", "legend", "fedlora", "hetlora", "fedadapter")
_FEDLORA, _PADDED, _EXACT = Method("fedlora"), Method("hetlora"), Method("hetlora", "fsr")
_FRESH = Method("hetlora", "fresh")
STUDIES = (
    Study(
        "equal", "A fleet of equal devices: is planning in the way?",
        (*((method, "equal") for method in (_FEDPIPE, _LEGEND, _FEDLORA, _UNIFORM, Method("fedadapter"))),
         (Method("full"), "equal-roomy")),
        40, SEEDS, stop=True,
        remark=f"`full` on such a fleet with memory enough for it, given up after {FULL_ROUNDS} rounds as in the grid.",
    ),
    Study(
        "short", "Short rounds: each step charged as one, so that transfers outweigh training",
        tuple((method, "short") for method in (_FEDPIPE, _LEGEND, _UNIFORM, _FEDLORA, Method("fedadapter"))), 40, SEEDS,
        stop=True,
        ratios=tuple((f"{mine}, short", f"{rival}, short") for mine in ("fedpipe", "legend")
                     for rival in ("fedlora", "fedadapter")),
    ),
    Study(
        "epochs", "Rounds of 80 steps, all of them computed and charged as they are",
        tuple((Method(name), "epoch") for name in _TIMED), 20, SEEDS, stop=True,
        ratios=tuple((f"{mine}, epoch", f"{rival}, epoch") for mine in _TIMED[:2] for rival in _TIMED[2:]),
        remark="As many seconds of training as in the grid's rounds. Rates are those of its short ones.",
    ),
    Study(
        "one-batch", "`legend` as its paper has it, with one batch: depth alone meets the round's time",
        _ONE_BATCH, 40, SEEDS, stop=True, ratios=_BY_DEPTH_ALONE,
        remark="All devices of a round end together all the same, which is ours, too.",
    ),
    Study(
        "one-batch-skewed", "The same at Dirichlet 0.1",
        _ONE_BATCH, 40, SEEDS, stop=True, alpha=0.1, ratios=_BY_DEPTH_ALONE,
    ),
    Study(
        "padding", "Exact aggregation against zero-padding at unequal ranks", ((_PADDED, ""), (_EXACT, "")), 20, FIVE
    ),
    Study(
        "padding-wide", "The same at ranks 2 to 64 of a global rank of 64", ((_PADDED, "wide"), (_EXACT, "wide")), 20,
        (*FIVE, 5, 6, 7, 8, 9), rates=((_PADDED.name, 0.01), (_EXACT.name, 0.005)),
        remark="At the grid's rate of 0.02 the exact mean diverges and the padded one nearly so: for each the best of "
        "0.002, 0.005, 0.01 (six rounds on validation rows: accuracy 0.21, 0.57, 0.70 padded, 0.56, 0.72, 0.64 exact). "
        "The interval of the first five seeds had 0 in it (1.5 ± 1.9 points); five more were run.",
    ),
    Study(
        "oracle", "The price of not knowing: planners that are handed the clock's true model",
        tuple((method, how) for method in (_FEDPIPE, _UNIFORM) for how in ("", "oracle")), 40, SEEDS,
        stop=True, ratios=(("fedpipe, oracle", "fedpipe"), ("uniform, oracle", "uniform")),
        remark="`legend` learns its devices' capacity by an average of its own, and can't be handed another's model.",
    ),
    Study(
        "rescore", "Importance scored once against every T rounds, Dirichlet 0.1",
        ((_FEDPIPE, ""), (_FEDPIPE, "once"), (_FEDPIPE, "every3")), 40, (0, 1), stop=True,
        alpha=0.1,  # at 1 most runs end before a second scoring
    ),
    Study(
        "partial",
        "Partial against full aggregation (our reading): the important weights alone tuned and merged, or all of them",
        ((_FEDPIPE, ""), (_FEDPIPE, "all")), 40, SEEDS, stop=True,
    ),
    Study(
        "partial-skewed", "The same at Dirichlet 0.1", ((_FEDPIPE, ""), (_FEDPIPE, "all")), 40, SEEDS, stop=True,
        alpha=0.1,
    ),
    Study(
        "params", "Quality after 30 rounds against full fine-tuning, and parameters trained",
        ((_FEDPIPE, ""), (Method("full"), "")), 30, SEEDS,
    ),
    Study(
        "params-falling", "The same with rates that fall to nothing over the rounds, as a cosine",
        ((_FEDPIPE, "falling"), (Method("full"), "falling")), 30, SEEDS,
        remark="`training.schedule`, for both from the grid's rates, which were tuned as constant ones: most of the "
        "grid's runs end before a schedule would.",
    ),
    Study(
        "params-whole", "The same with all directions that the devices' updates have, to .999 of the energy",
        ((_FEDPIPE, "falling-whole"), (Method("full"), "falling")), 30, SEEDS,
        remark="A server that merges updates into the base's weights drops none. Here they travel as factors: a round "
        "moves several times as many bytes.",
    ),
    Study(
        "fresh", "`fsr` against `fresh` over 50 rounds, energy .99 and .999, largest and sampled directions",
        (
            *((_EXACT, f"{way}{energy}") for way in ("largest", "sampled") for energy in (0.99, 0.999)),
            (_FRESH, "largest0.99"), (_FRESH, "largest0.999"),
        ), 50, (0,),
        remark="Under the grid's cap of 16 on the global rank, which all but `fsr` at .99 reach within four rounds. "
        "These runs are older than AdamW's one pass on a CPU, and differ from newer ones as seeds do.",
    ),
    Study(
        "fresh-whole", "The same without a cap: `fresh` keeps all that the energy asks for",
        tuple((method, f"whole{energy}") for method in (_EXACT, _FRESH) for energy in (0.99, 0.999)), 50, (0,),
    ),
    Study(
        "pair", "Two devices of unequal memory", ((_FEDPIPE, "pair"),), 8, (0,),
        remark="Both have modules of rank 32: how many parameters each trains tells their ranks apart. From the third "
        "round on they are done within 11 % of a round of each other in five of six, at worst 20 % apart.",
    ),
)  # fmt: skip
