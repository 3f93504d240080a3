"""The grid of `bench/planning.py`: methods, tasks, seeds and learning rates, and what has to be run for which table."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from coordinator.core.aggregation import registry as aggregators
from coordinator.core.planning import registry as planners
from shared.jobs import StrategySpec

Split = Literal["validation", "test"]
RATES = (5e-3, 1e-2, 2e-2, 5e-2)
"""Learning rates tried for every method and task, with the same budget."""
FULL_RATES = (1e-4, 3e-4, 1e-3, 3e-3)
"""As many for `full`: what moves every weight wants smaller steps."""
SMALL_RATES = (5e-3, 1e-2, 3e-2, 1e-1)
"""Of `fedadapter`, which trains little: it was best at the upper edge of the others'."""
HEAD_RATES = (1e-2, 3e-2, 1e-1, 3e-1)
"""Of `head`, which trains least."""
TUNING_SEED = 100
"""Of the runs on the validation split; no table's seed."""
BATCH = 8
"""Of methods with one batch; where a method moves it, what it begins with."""
FULL_ROUNDS = 8
"""Of a final run of `full`: each takes three to six times another's to compute, and by then all others have long
arrived."""
MAX_SHARE, STRONG_SKEW = 0.12, 0.3
"""Of a round's mean, below that Dirichlet parameter, where batches differ: by samples alone the fleet learns
the data of its fast devices. Chosen on validation rows."""
UNEQUAL_BATCHES = frozenset({"fedpipe", "legend", "uniform", "head"})
"""The others have one batch, so nearly equal shares."""
EXACT = "fsr"
FLOOR = "head"


@dataclass(frozen=True)
class Method:
    """A strategy with an aggregator; empty: its own."""

    strategy: str
    aggregator: str = ""

    @property
    def name(self) -> str:
        """As in the tables."""
        return f"{self.strategy}+{self.aggregator}" if self.aggregator else self.strategy

    @property
    def beside(self) -> bool:
        """Whether it is the floor, or tells gains of aggregation from gains of planning: no strategy of its own."""
        return self.strategy == FLOOR or bool(self.aggregator)

    def rounds(self, most: int) -> int:
        """Of a run to a target: `most`, but for `full`."""
        return min(most, FULL_ROUNDS) if self.strategy == "full" else most

    @property
    def rates(self) -> tuple[float, ...]:
        """The learning rates to choose from."""
        return {"full": FULL_RATES, "fedadapter": SMALL_RATES, FLOOR: HEAD_RATES}.get(self.strategy, RATES)


@dataclass(frozen=True)
class Task:
    """A data set with the job it needs. `target`: the common quality (accuracy, or minus the loss)."""

    data: str
    kind: str
    model: str
    target: float
    max_tokens: int = 32


TASKS = {
    "dbpedia14": Task("dbpedia14", "classification", "minilm3-narrow", 0.75),
    "20news": Task("20news", "classification", "minilm3-narrow", 0.35),
    "e2e": Task("e2e", "causal", "gpt2-small", -4.5),
}
"""The targets were set from the tuning runs, before a run on test rows."""
TUNED_ON = {"20news": "dbpedia14"}
"""Task -> the one whose rates it has: of the same kind, on the same base."""


@dataclass(frozen=True)
class Run:
    """One simulation. Its name is its file: a finished run is never repeated. `variant`: of a study."""

    method: Method
    task: str
    alpha: float
    seed: int
    lr: float
    split: Split
    rounds: int
    stop: bool = False
    """Whether it ends once it reaches the task's target."""
    variant: str = ""

    @property
    def capped(self) -> bool:
        """Whether a device's share of a round is bounded."""
        return self.alpha < STRONG_SKEW and self.method.strategy in UNEQUAL_BATCHES

    @property
    def name(self) -> str:
        """Unique, and readable."""
        return (
            f"{self.split}/{self.task}/{self.method.name}{self.variant and '-' + self.variant}/alpha{self.alpha:g}"
            f"-seed{self.seed}-lr{self.lr:g}-rounds{self.rounds}{'-stop' if self.stop else ''}"
        )


@dataclass(frozen=True)
class Grid:
    """What is run: `cells` of (task, alpha, seeds) for methods; `rounds` of a run, `tuning` of one that tunes."""

    cells: tuple[tuple[str, float, tuple[int, ...]], ...]
    few: frozenset[str]
    """Tasks that only the methods and their best rivals run on."""
    rounds: int = 40
    tuning: int = 6
    stop: bool = True
    """Whether a run ends once it reaches the target."""
    whole: bool = False
    """Whether the floor and the methods with the exact aggregator are part of it; else they are asked for apart."""


GRIDS = {
    "standard": Grid(
        cells=(("dbpedia14", 1.0, (0, 1, 2)), ("dbpedia14", 0.1, (0, 1, 2)), ("20news", 1.0, (0,)), ("e2e", 1.0, (0,))),
        few=frozenset({"20news", "e2e"}),
    ),
    "full": Grid(
        cells=tuple((task, alpha, (0, 1, 2)) for task in TASKS for alpha in (0.1, 0.5, 1.0)),
        few=frozenset(),
        whole=True,
    ),
    "smoke": Grid(cells=(("dbpedia14", 1.0, (0, 1)),), few=frozenset(), rounds=2, tuning=1, whole=True),
}
FEW = ("fedpipe", "legend", "hetlora", "flora", FLOOR)
"""The methods, the two rivals that were best on validation rows of the first task, and the floor."""
SAME_RUNS = {
    "ffa+fsr": "fedlora+fsr", "fedex+fsr": "fedlora+fsr",
    "flexlora+fsr": "hetlora+fsr", "flora+fsr": "hetlora+fsr",
}  # fmt: skip
"""Rivals are planned by one planner, with equal or with unequal ranks: given the exact aggregator they are the same."""


def methods(only: Sequence[str] = ()) -> list[Method]:
    """Every planner with its own aggregator, and with the exact one where that is another run; or those named."""
    found: list[Method] = []
    others = {*aggregators.PRUNING, *aggregators.SPLIT}
    for strategy in sorted(set(planners.PLANNERS) - others, key=lambda name: (name == "full", name)):
        found.append(Method(strategy))
        own, exact = aggregators.name_of(StrategySpec(name=strategy)), Method(strategy, EXACT)
        if own != EXACT and own not in aggregators.WITHOUT_LORA and exact.name not in SAME_RUNS:
            found.append(exact)
    return [method for method in found if not only or method.name in only or method.strategy in only]


def tuning_runs(grid: Grid, chosen: Sequence[Method]) -> Iterator[Run]:
    """The runs that choose each method's rate on each task that has rates of its own, at its first alpha, with the
    method's own aggregator."""
    own = [Method(strategy) for strategy in dict.fromkeys(method.strategy for method in chosen)]
    done: set[str] = set()
    for task, alpha, _ in grid.cells:
        if task in done or task in TUNED_ON:
            continue
        done.add(task)
        for method in on(grid, own, task):
            for lr in method.rates:
                yield Run(method, task, alpha, TUNING_SEED, lr, "validation", grid.tuning)


def final_runs(grid: Grid, chosen: Sequence[Method], rates: dict[tuple[str, str], float]) -> Iterator[Run]:
    """The runs of the tables, at each method's own rate; seed by seed, so that a cut leaves whole seeds."""
    for place in range(max(len(seeds) for _, _, seeds in grid.cells)):
        for task, alpha, seeds in grid.cells:
            for method in on(grid, chosen, task) if place < len(seeds) else ():
                if (method.name, task) in rates:
                    rounds = method.rounds(grid.rounds)
                    yield Run(method, task, alpha, seeds[place], rates[method.name, task], "test", rounds, grid.stop)


def on(grid: Grid, chosen: Sequence[Method], task: str) -> list[Method]:
    """Those that run on a task."""
    fit = [method for method in chosen if TASKS[task].kind == "classification" or method.strategy != FLOOR]
    return [method for method in fit if task not in grid.few or method.name in FEW]
