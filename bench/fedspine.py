"""FedSpine against its rivals on the virtual fleet; writes `docs/results-fedspine.md`.

    python -m bench.fedspine [--minutes N] [--workers N] [--seeds ...] [--only ...] [--variants ...] [--render]

As `bench/planning.py` (its runs, files and fleet), with 20 local steps a round, the model evaluated at the size that it
was pruned to. All methods have one rate, that of `bench/planning.py`'s tuning for LoRA on this task: tuning each would
take hours. The largest share that may go in a round (`strategy.prune_step`) is chosen for the method on the validation
split, by its time to `TUNED_TO`. Time to a target counts from the first plan to the first round whose model has the
sparsity asked for and reaches the target.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from bench import bandit, planning
from bench.planning_grid import TASKS, TUNING_SEED, Method, Run
from bench.planning_runs import ROOT, data_there
from bench.planning_studies import PRUNE_STEPS, SPARSITY, pruned
from bench.planning_tables import interval
from coordinator.core.aggregation.registry import PRUNING
from muster.testbed import simulated
from muster.testbed.models import SmallGpt2
from shared.files import write_whole

PAGE = ROOT / "docs" / "results-fedspine.md"
TASK, ALPHA, SEEDS = "dbpedia14", 1.0, (0, 1, 2)
RATE, ROUNDS = 0.02, 12
WHOLE = "hetlora"
METHODS = (*PRUNING, WHOLE)
STEPPED = ("fedspine", "fedspine-fixed")
"""Those that go by a share a round."""
TUNED_TO = 0.85
TARGETS = (TASKS[TASK].target, 0.85, 0.9)
"""The common one of `bench/planning.py`, which with 20 local steps all pass while they still prune; two above it."""
NEAR = 0.02
"""A model this much above the sparsity asked for counts as there: shares of units are whole units."""
MINE = "fedspine"
OTHERS = {"20news": (0.3, 0.35), "e2e": (-3.5, -3.0)}
"""Further tasks, one seed, half gone, with their targets: accuracy, or minus the loss."""
BEST = (MINE, "loraprune", "magprune")
"""On those the method and its two best rivals of the first task."""
Results = dict[tuple[str, str], dict[int, simulated.Result]]
"""(method, sparsity) -> seed -> run."""


def main(argv: Sequence[str] | None = None) -> int:
    """0: all runs are there; 1: the time was up, or there is no data."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=0.0, help="begin no run after so many; 0: no limit")
    parser.add_argument("--workers", type=int, default=2, help="runs at a time; 0: one, in this process")
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--only", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--variants", nargs="+", choices=sorted(SPARSITY), default=list(SPARSITY))
    parser.add_argument("--tasks", nargs="*", choices=sorted(OTHERS), default=sorted(OTHERS), help="further ones")
    parser.add_argument("--render", action="store_true", help="only write the page from the runs that are there")
    options = parser.parse_args(argv)
    if not options.render and not data_there():
        return 1
    complete = options.render or planning.run_all(_stages(options), options.minutes, options.workers)
    write_whole(PAGE, page().encode())
    return 0 if complete else 1


def _stages(options: argparse.Namespace) -> Iterator[Iterable[Run]]:
    yield tuning_runs()
    asked = (options.seeds, options.variants, options.only)
    yield [run for run, sparsity in final_runs() if _is_of(run, sparsity, *asked)]
    yield [run for task in options.tasks for run in other_runs(task)]


def _is_of(run: Run, sparsity: str, seeds: Sequence[int], variants: Sequence[str], names: Sequence[str]) -> bool:
    return run.seed in seeds and sparsity in variants and run.method.name in names


def tuning_runs() -> Iterator[Run]:
    """What chooses the share that may go in a round, in the order of `PRUNE_STEPS`."""
    for step in PRUNE_STEPS:
        variant = pruned("half", step)
        yield Run(Method(MINE), TASK, ALPHA, TUNING_SEED, RATE, "validation", ROUNDS, variant=variant)


def prune_step() -> float | None:
    """The share whose run is first at `TUNED_TO`; None: the runs are not all there."""
    found = []
    for step, run in zip(PRUNE_STEPS, tuning_runs(), strict=True):
        if (result := planning.result_of(run)) is None:
            return None
        arrived = reached(result, SPARSITY["half"], TUNED_TO)
        found.append((math.inf if arrived is None else arrived, step))
    return min(found)[1]


def _variant(name: str, sparsity: str, step: float | None) -> str:
    """Of a method; `step`: the share that was chosen, which is for those that go by one."""
    return pruned(sparsity, (step if name in STEPPED else None) or PRUNE_STEPS[0])


def final_runs() -> Iterator[tuple[Run, str]]:
    """The runs of the tables with their sparsity, seed by seed; the unpruned rival once."""
    step = prune_step()
    for seed in SEEDS:
        for sparsity in SPARSITY:
            for name in METHODS:
                if name != WHOLE or sparsity == "half":
                    variant = _variant(name, sparsity, step)
                    yield Run(Method(name), TASK, ALPHA, seed, RATE, "test", ROUNDS, variant=variant), sparsity


def other_runs(task: str) -> Iterator[Run]:
    """The runs on a further task."""
    step = prune_step()
    for name in BEST:
        variant = _variant(name, "half", step)
        yield Run(Method(name), task, ALPHA, SEEDS[0], RATE, "test", ROUNDS, variant=variant)


def results() -> Results:
    """The runs that are there."""
    found: Results = {}
    for run, sparsity in final_runs():
        result = planning.result_of(run)
        if result is not None:
            found.setdefault((run.method.name, sparsity), {})[run.seed] = result
    return found


def at_size(result: simulated.Result, share: float) -> list[simulated.RoundResult]:
    """The rounds whose model is as small as asked for."""
    return [one for one in result.rounds if one.pruned >= share - NEAR]


def reached(result: simulated.Result, share: float, target: float) -> float | None:
    """Seconds to `target` at this sparsity."""
    for one in at_size(result, share):
        found = simulated.quality(one)
        if one.accepted and found is not None and found >= target:
            return one.at - simulated.first_plan(result.rounds)
    return None


def last_quality(result: simulated.Result, share: float) -> float | None:
    """Mean quality of the last three rounds at this sparsity: accuracy, or minus the loss."""
    last = [found for one in at_size(result, share)[-3:] if (found := simulated.quality(one)) is not None]
    return statistics.fmean(last) if last else None


def page() -> str:
    """The tables."""
    found = results()
    lines = [
        "# FedSpine against its rivals", "",
        "`python -m bench.fedspine` (`make bench-fedspine`). 80 virtual devices, 10 a round, 20 local steps, "
        f"{TASK}, Dirichlet {ALPHA:g}, {ROUNDS} rounds; the model is evaluated at the size it was pruned to.", "",
        "The runs are older than the present model of memory ([lab log](lab-log.md), 2026-11-29, ever smaller "
        "batches): devices that had not trained yet were given less than they hold, rivals too.", "",
        *_tuned(),
    ]  # fmt: skip
    for variant, share in SPARSITY.items():
        to = " | ".join(f"s to {target:g}" for target in TARGETS)
        lines += [f"## {share:.0%} of heads and channels gone", ""]
        lines += [f"| method | lr | seeds | {to} | accuracy, last 3 rounds | s a round | largest peak, MiB |"]
        lines += ["|---|---|---|" + "---|" * len(TARGETS) + "---|---|---|"]
        for name in METHODS:
            lines.append(_row(name, list(of(found, name, variant).values()), share_of(name, variant)))
        lines += ["", *_claims(found, variant), ""]
    for task in OTHERS:
        lines += [*_other(task), ""]
    lines += ["## The bandit on synthetic rewards", "", "`python -m bench.bandit`", "", *bandit.table(), ""]
    return "\n".join(lines)


def _tuned() -> list[str]:
    """What chose `strategy.prune_step`."""
    step = prune_step()
    if step is None:
        return []
    lines = [
        f"On the validation split, seed {TUNING_SEED}, half gone; {step:g} is taken for {' and '.join(STEPPED)}.", "",
        f"| largest share in a round | s to {TUNED_TO:g} | accuracy, last 3 rounds |", "|---|---|---|",
    ]  # fmt: skip
    for one, run in zip(PRUNE_STEPS, tuning_runs(), strict=True):
        result = planning.result_of(run)
        assert result is not None
        arrived, quality = reached(result, SPARSITY["half"], TUNED_TO), last_quality(result, SPARSITY["half"])
        lines.append(f"| {one:g} | {_told([arrived], '{:.0f}')} | {_told([quality], '{:.4f}')} |")
    return [*lines, ""]


def of(found: Results, name: str, variant: str) -> dict[int, simulated.Result]:
    """Seed -> run; the unpruned rival's are the same for each sparsity."""
    return found.get((name, "half" if name == WHOLE else variant), {})


def share_of(name: str, variant: str) -> float:
    """What has to be gone before a model of the method counts."""
    return 0.0 if name == WHOLE else SPARSITY[variant]


def _other(task: str) -> list[str]:
    """The table of a further task."""
    targets, share = OTHERS[task], SPARSITY["half"]
    lines = [f"## {task}, half gone, one seed", ""]
    runs = [(run.method.name, planning.result_of(run)) for run in other_runs(task)]
    if not any(result for _, result in runs):
        return [*lines, "Not run."]
    lines += [f"The rate of the first task ({RATE:g}) for all, not tuned for this one.", ""]
    if TASKS[task].kind == "causal":
        lines += [f"The base is a small GPT-2 that is trained here for {SmallGpt2.steps} steps: a poor one.", ""]
    what = "accuracy" if targets[0] > 0 else "minus the loss"
    to = " | ".join(f"s to {target:g}" for target in targets)
    lines += [f"| method | {to} | {what}, last 3 rounds | s a round |", "|---|" + "---|" * len(targets) + "---|---|"]
    for name, result in runs:
        if result is None:
            lines.append(f"| {name} | {'not run | ' * len(targets)}not run | - |")
            continue
        cells = [
            name, *(_told([reached(result, share, target)], "{:.0f}") for target in targets),
            _told([last_quality(result, share)], "{:.4f}"),
            f"{simulated.whole_run(result.rounds) / len(result.rounds):.1f}",
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _claims(found: Results, variant: str) -> list[str]:
    """Each rival against the method, seed by seed."""
    mine = of(found, MINE, variant)
    if not mine:
        return []
    lines = ["| claim | asked | measured | seeds |", "|---|---|---|---|"]
    for name in (one for one in METHODS if one != MINE):
        pairs = [(mine[seed], theirs) for seed, theirs in of(found, name, variant).items() if seed in mine]
        if not pairs:
            continue
        shares = SPARSITY[variant], share_of(name, variant)
        for target in TARGETS:
            ratio = _times(pairs, *shares, target)
            lines.append(f"| time to {target:g} against {name} | >= 1.4x | {ratio} | {len(pairs)} |")
        both = [(last_quality(a, shares[0]), last_quality(b, shares[1])) for a, b in pairs]
        points = [100 * (a - b) for a, b in both if a is not None and b is not None]
        asked = ">= +0.4" if name in PRUNING else "reported"
        lines.append(f"| points above {name} | {asked} | {_told(points, '{:+.2f}')} | {len(points)} |")
        if name == WHOLE:
            ratios = [_peak(a) / _peak(b) for a, b in pairs]
            lines.append(
                f"| largest peak of memory to {name}'s | <= 1.15 | {_told(ratios, '{:.2f}')} | {len(ratios)} |"
            )
    return lines


def _times(
    pairs: Sequence[tuple[simulated.Result, simulated.Result]], share: float, rivals: float, target: float
) -> str:
    """How much longer the rival takes; what does not arrive took its whole run at least."""
    ratios, least = [], False
    for one, other in pairs:
        mine, theirs = reached(one, share, target), reached(other, rivals, target)
        if mine is None:
            return "fedspine does not reach it in every seed"
        least |= theirs is None
        ratios.append((simulated.whole_run(other.rounds) if theirs is None else theirs) / mine)
    return ("at least " if least else "") + _told(ratios, "{:.2f}x")


def _peak(result: simulated.Result) -> float:
    return max(part.peak for one in result.rounds for part in one.devices)


def _row(name: str, mine: list[simulated.Result], share: float) -> str:
    if not mine:
        return f"| {name} | - | 0 of {len(SEEDS)} | {'not run | ' * len(TARGETS)}not run | - | - |"
    cells = [
        name, f"{RATE:g}", f"{len(mine)} of {len(SEEDS)}",
        *(_told([reached(one, share, target) for one in mine], "{:.0f}") for target in TARGETS),
        _told([last_quality(one, share) for one in mine], "{:.4f}"),
        _told([simulated.whole_run(one.rounds) / len(one.rounds) for one in mine], "{:.1f}"),
        f"{max(map(_peak, mine)) / 2**20:.0f}",
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"


def _told(values: Sequence[Any], form: str) -> str:
    there = [value for value in values if value is not None]
    if not there:
        return "not reached"
    mean, half = interval(there)
    some = "" if len(there) == len(values) else f" ({len(there)} of {len(values)})"
    return form.format(mean) + ("" if math.isnan(half) else f" ± {form.format(half)}") + some


if __name__ == "__main__":
    sys.exit(main())
