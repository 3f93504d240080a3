"""The page `docs/results.md`: a table for each task and alpha, mean and 95 % interval over the seeds."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from statistics import fmean, stdev

from bench.planning_grid import (
    FLOOR,
    FULL_RATES,
    HEAD_RATES,
    RATES,
    SMALL_RATES,
    TASKS,
    Grid,
    Run,
)
from bench.planning_words import NOTES, RECIPE, TRIED
from muster.testbed import simulated

Results = Sequence[tuple[Run, simulated.Result]]
Figure = Callable[[simulated.Result], float | None]


def interval(values: Sequence[float]) -> tuple[float, float]:
    """(mean, half width of its 95 % interval by Student's t); the width of one value is not a number."""
    mean = fmean(values)
    if len(values) < 2:
        return mean, math.nan
    from scipy.stats import t

    return mean, float(t.ppf(0.975, len(values) - 1)) * stdev(values) / math.sqrt(len(values))


def page(
    profile: str, grid: Grid, results: Results, rates: dict[tuple[str, str], float], *, claims: Sequence[str] = (),
    more: Sequence[str] = (), took: str = "", plots: str = "",
) -> str:  # fmt: skip
    """The whole page. `claims`, `more`: lines before and after the tables; `took`: what the runs cost; `plots`: the
    folder that has them."""
    lines = [
        "# Results of planning",
        "",
        "<!-- Written by bench/planning.py from the files in bench/runs/planning: run `make bench-planning`. -->",
        "",
        "Pages of their own: [FedSpine](results-fedspine.md), prune and tune; [MergeSFL](results-mergesfl.md), split "
        "learning. Re-planning of 10,000 devices, the order of strategies over mosquitto against the virtual clock's, "
        "perplexity by bits, the two-stage search, LoRA depth and bytes on the wire are [benchmarks](benchmarks.md).",
        "",
        f"`python -m bench.planning --profile {profile}`{took}: 80 virtual devices (TX2 / NX / AGX / GPU), 10 drawn "
        f"per round, 8 local steps, {'until the target or ' if grid.stop else ''}{grid.rounds} rounds. Times are "
        "virtual seconds from the first plan, under a device model that no planner knows. `full` fits no Jetson: its "
        "fleet has the same devices with memory enough for it. Verdicts are on the mean.",
        "Mean and 95 % interval (Student's t) over the seeds; (n of m) where not all reached the target. Rates were "
        f"chosen from {_listed(RATES)} (`full`: {_listed(FULL_RATES)}, `fedadapter`: {_listed(SMALL_RATES)}, "
        f"`head`: {_listed(HEAD_RATES)}) "
        "for each method on a validation split cut from "
        f"the training rows, {grid.tuning} rounds each at the task's first Dirichlet parameter, one seed; `head` "
        "trains no LoRA and is the floor. A method with `+fsr` "
        f"has the exact aggregator in place of its own{'' if grid.whole else ' (these and the floor: `--beside`)'}, at "
        "the rate tuned with its own; with it `ffa` and `fedex` are the same method as `fedlora`, `flexlora` and "
        "`flora` the same as `hetlora`. The task `20news` has the rates of `dbpedia14`, whose kind and base it has.",
        "",
        RECIPE,
        *claims,
        TRIED.rstrip(),
    ]
    for task, alpha, seeds in grid.cells:
        here = [(run, result) for run, result in results if (run.task, run.alpha) == (task, alpha)]
        lines += ["", f"## {task}, Dirichlet {alpha:g}", ""]
        lines += _table(here, TASKS[task].target, rates, task, len(seeds)) if here else ["Not run."]
        if any(result.rounds for _, result in here):
            lines += ["", f"![Quality over time, and means to the target]({plots}/{plot_name(task, alpha)})"]
    return "\n".join([*lines, *more]) + "\n"


def plot_name(task: str, alpha: float) -> str:
    """The file of a cell's plot."""
    return f"{task}-{alpha:g}.svg"


def _listed(rates: Sequence[float]) -> str:
    return ", ".join(f"{rate:g}" for rate in rates)


def _table(
    results: Results, target: float, rates: dict[tuple[str, str], float], task: str, seeds: int
) -> Iterator[str]:
    word = f"accuracy {target:g}" if target > 0 else f"loss {-target:g}"
    yield f"Target: {word}.{NOTES.get(task, '')}"
    yield ""
    yield (
        "| method | lr | seeds | best quality | s to target | MB to target | s per round | waiting | prediction error "
        "| M parameters trained |"
    )
    yield "|---|---|---|---|---|---|---|---|---|---|"
    names = sorted({run.method.name for run, _ in results})
    rows = []
    for name in names:
        mine = [result for run, result in results if run.method.name == name]
        times = told(mine, lambda one: simulated.time_to(one.rounds, target), "{:.0f}")
        order = [t for one in mine if (t := simulated.time_to(one.rounds, target)) is not None]
        cells = [
            name, f"{rates[name, task]:g}", f"{len(mine)} of {seeds}",
            told(mine, _best, "{:.4f}"), times,
            told(mine, lambda one: _mega(simulated.bytes_to(one.rounds, target)), "{:.1f}"),
            told(mine, seconds_a_round, "{:.1f}"),
            told(mine, lambda one: 100 * simulated.mean_waiting(one.rounds), "{:.1f} %"),
            told(mine, prediction_error, "{:.0f} %"), told(mine, trained, "{:.3f}"),
        ]  # fmt: skip
        rows.append((-len(order), fmean(order) if order else math.inf, f"| {' | '.join(cells)} |"))
    for row in sorted(rows):
        yield row[2]
    if any(run.method.strategy == FLOOR for run, _ in results) and _arrived(results, target):
        yield ""
        yield "The floor arrives in every seed: here the target is within what a head alone can learn."
    untuned = {result.baseline.loss for _, result in results if result.baseline is not None}
    if target < 0 and untuned:
        losses = ", ".join(f"{loss:.4f}" for loss in sorted(untuned))
        yield from ("", f"A causal model has no head to train alone; the base as it is has a loss of {losses}.")
    compared = [(run, result) for run, result in results if run.method.strategy != FLOOR]
    bests = [simulated.best_quality(result.rounds) for _, result in compared]
    reached = [best for best in bests if best is not None]
    if reached and len(reached) == len(bests) and min(reached) < target:
        yield from _shared(compared, min(reached), [name for name in names if name != FLOOR])


def _arrived(results: Results, target: float) -> bool:
    floor = [result for run, result in results if run.method.strategy == FLOOR]
    return all(simulated.time_to(result.rounds, target) is not None for result in floor)


def _best(result: simulated.Result) -> float | None:
    """Best accuracy, or least loss."""
    found = simulated.best_quality(result.rounds)
    return None if found is None else abs(found)


def _shared(results: Results, quality: float, names: Sequence[str]) -> Iterator[str]:
    """Seconds to the quality that every run reached, where not all are at the target. `results`: without the floor."""
    found = []
    for name in names:
        mine = [result for run, result in results if run.method.name == name]
        times = [t for one in mine if (t := simulated.time_to(one.rounds, quality)) is not None]
        found.append((fmean(times), f"`{name}` {fmean(times):.0f}"))
    word = f"accuracy {quality:.4f}" if quality > 0 else f"loss {-quality:.4f}"
    yield ""
    told = ", ".join(text for _, text in sorted(found))
    yield f"Seconds to what every run reached, {word} (a description, seen afterwards, and no claim): {told}."


def seconds_a_round(result: simulated.Result) -> float | None:
    """Mean virtual seconds of a round, what lies between two of them included."""
    return simulated.whole_run(result.rounds) / len(result.rounds) if result.rounds else None


def prediction_error(result: simulated.Result) -> float | None:
    """Mean percent over the rounds but the first, before which no planner knows anything."""
    later = [one.prediction_error for one in result.rounds[1:] if one.prediction_error is not None]
    return 100 * fmean(later) if later else None


def trained(result: simulated.Result) -> float | None:
    """Millions of factor parameters that a device trains in the mean."""
    found = [part.params / 1e6 for one in result.rounds for part in one.devices]
    return fmean(found) if found else None


def _mega(count: int | None) -> float | None:
    return None if count is None else count / 1e6


def told(results: Sequence[simulated.Result], figure: Figure, form: str) -> str:
    """Mean and interval of a figure over runs, by a format."""
    values = [value for one in results if (value := figure(one)) is not None]
    if not values:
        return "-"
    mean, half = interval(values)
    some = "" if len(values) == len(results) else f" ({len(values)} of {len(results)})"
    return form.format(mean) + ("" if math.isnan(half) else f" ± {form.format(half)}") + some
