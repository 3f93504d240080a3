"""Strategies against each other on the virtual fleet; writes `docs/results.md`.

    python -m bench.planning [--profile standard|full|smoke] [--only NAME ...] [--minutes N] [--list] [--render]
    python -m bench.planning --studies [NAME ...]

Every run is `muster simulate` with 80 devices of profile `jetson`, of which 10 are drawn per round. Its result is a
file under `bench/runs/planning`: a finished run is never repeated, a cut one is begun anew. What it took of the machine
is a line of `seconds.jsonl`. Runs go side by side, each in a process of its own.

Learning rates are tuned for each method on a validation split cut from the training rows, with the same budget for
each; nothing is chosen on test rows.
"""

from __future__ import annotations

import argparse
import functools
import gzip
import hashlib
import statistics
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec

from bench import planning_plots
from bench.planning_claims import claims, cost, sections
from bench.planning_grid import GRIDS, TASKS, TUNED_ON, Grid, Method, Run, final_runs, methods, on, tuning_runs
from bench.planning_runs import ROOT, VALIDATION, Runners, data_there, is_cut, simulation
from bench.planning_studies import STUDIES
from bench.planning_tables import page
from muster.testbed import device_model, simulated
from muster.testbed.inputs import SMALL_GPT2
from muster.testbed.models import SmallGpt2
from muster.testbed.simulate import STEPS as STEPS_FILE
from shared.files import write_whole

RUNS = ROOT / "bench" / "runs" / "planning"
"""Committed: whoever has no hours can render the page from it, and look behind each figure."""
PAGE = ROOT / "docs" / "results.md"
OTHERS = ROOT / "bench" / "results.json"
ABREAST = 2
"""Runs at a time, by default."""


def main(argv: Sequence[str] | None = None) -> int:
    """0: all that was asked is there; 1: the time was up, or there is no data."""
    options = _options(argv)
    grid = GRIDS[options.profile]
    # Rates may be those of a task that was not asked for.
    needed = {*options.tasks, *(TUNED_ON.get(task, task) for task in options.tasks)}
    grid = replace(grid, cells=tuple(cell for cell in grid.cells if cell[0] in needed))
    everyone = methods(options.only)
    if unknown := set(options.only) - {name for one in methods() for name in (one.name, one.strategy)}:
        raise SystemExit(f"--only: no {', '.join(sorted(unknown))}; there are {', '.join(m.name for m in methods())}")
    chosen = [one for one in everyone if grid.whole or options.only or one.beside == options.beside]
    if options.list:
        return _list(grid, chosen, _finals(grid, chosen, options))
    if not options.render and not data_there():
        return 1
    complete = options.render or run_all(_stages(grid, chosen, options), options.minutes, options.workers)
    _render(options.profile, grid, everyone)
    return 0 if complete else 1


def _stages(grid: Grid, chosen: Sequence[Method], options: argparse.Namespace) -> Iterator[Iterable[Run]]:
    """What is to be run, the runs that choose rates before those that have them."""
    if options.studies is not None:
        yield study_runs(_standard_rates(), options.studies)
        return
    yield tuning_runs(grid, chosen)
    if not options.tune:
        yield _finals(grid, chosen, options)


def _finals(grid: Grid, chosen: Sequence[Method], options: argparse.Namespace) -> list[Run]:
    """The final runs that were asked for, as far as rates are there."""
    found = final_runs(grid, chosen, rates(grid, chosen))
    return [run for run in found if run.task in options.tasks and run.alpha in (options.alphas or [run.alpha])]


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--profile", default="standard", choices=sorted(GRIDS))
    parser.add_argument("--only", nargs="+", default=[], help="strategies, or strategy+aggregator")
    parser.add_argument(
        "--beside",
        action="store_true",
        help="instead of the strategies of the standard profile what belongs to its tables beside them: the floor, and "
        "strategies with the exact aggregator",
    )
    parser.add_argument("--tasks", nargs="+", choices=sorted(TASKS), default=sorted(TASKS), help="only these")
    parser.add_argument("--alphas", nargs="*", type=float, default=[], help="of the final runs only these")
    parser.add_argument("--tune", action="store_true", help="only the runs that choose the learning rates")
    parser.add_argument("--minutes", type=float, default=0.0, help="begin no run after so many; 0: no limit")
    parser.add_argument("--workers", type=int, default=ABREAST, help="runs at a time; 0: one, in this process")
    parser.add_argument(
        "--studies",
        nargs="*",
        choices=[[], *(study.name for study in STUDIES)],
        metavar="NAME",
        help="run the studies, or those named, at the rates that the standard profile tuned",
    )
    parser.add_argument("--list", action="store_true", help="say what is there and what is missing; run nothing")
    parser.add_argument("--render", action="store_true", help="only write the page from the runs that are there")
    return parser.parse_args(argv)


def rates(grid: Grid, chosen: Sequence[Method]) -> dict[tuple[str, str], float]:
    """(method, task) -> the rate whose run was best on the validation split, where all of its rates were run; of equal
    ones that which was better on the way there. With another aggregator a method has the rate of its own."""
    found: dict[tuple[str, str], list[tuple[float, float, float]]] = {}
    missing: set[tuple[str, str]] = set()
    for run in tuning_runs(grid, chosen):
        key, result = (run.method.name, run.task), result_of(run)
        best = simulated.best_quality(result.rounds) if result is not None else None
        if result is None:
            missing.add(key)
        else:
            way = [value for one in result.rounds if (value := simulated.quality(one)) is not None]
            sooner = statistics.fmean(way) if way else float("-inf")
            found.setdefault(key, []).append((best if best is not None else float("-inf"), sooner, -run.lr))
    best_of = {key: -max(values)[2] for key, values in found.items() if key not in missing}
    asked = ((method, task, (method.strategy, TUNED_ON.get(task, task))) for method in chosen for task in TASKS)
    return {(method.name, task): best_of[key] for method, task, key in asked if key in best_of}


def result_of(run: Run) -> simulated.Result | None:
    """A finished run's result; None: it was not run."""
    path = path_of(run)
    return msgspec.json.decode(gzip.decompress(path.read_bytes()), type=simulated.Result) if path.is_file() else None


def path_of(run: Run) -> Path:
    """The file of a run: its name, and a digest of all other settings that determine it; of the code only the versions
    that are named. What the small GPT-2 is made of is, but not its texts, which a page without data could not read."""
    asked = simulation(run, Path())
    fixed = (
        TASKS[run.task], asked.devices, asked.profile, asked.oracle, asked.over, VALIDATION, device_model.VERSION,
        _steps_digest(), *(["cut"] if is_cut(run) else []),
        *([SmallGpt2()] if TASKS[run.task].model == SMALL_GPT2 else []),
    )  # fmt: skip
    digest = hashlib.sha256(msgspec.json.encode(fixed, order="deterministic")).hexdigest()[:8]
    return RUNS / f"{run.name}-{digest}.json.gz"


@functools.cache
def _steps_digest() -> str:
    return hashlib.sha256(STEPS_FILE.read_bytes()).hexdigest()


def keep(run: Run, result: simulated.Result) -> None:
    """Write the file of a finished run; the same result gives the same bytes."""
    path = path_of(run)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, gzip.compress(msgspec.json.encode(result), mtime=0))


def _standard_rates() -> dict[tuple[str, str], float]:
    return rates(GRIDS["standard"], methods())


def study_runs(found: Mapping[tuple[str, str], float], names: Sequence[str]) -> Iterator[Run]:
    """The runs of the studies named, or of all. Raises `SystemExit` where a method's rate was not yet chosen."""
    for study in STUDIES:
        if not names or study.name in names:
            if missing := study.missing(found):
                raise SystemExit(f"study {study.name}: no rate of {', '.join(missing)} yet; run the standard profile")
            yield from study.runs(found)


def run_all(stages: Iterable[Iterable[Run]], minutes: float, workers: int) -> bool:
    """Carry out the runs that are not there, each stage asked for once those before it are done; False: the time was up
    before all were begun. `minutes`: none begins after so many; 0: no limit."""
    until = time.monotonic() + 60 * minutes if minutes else float("inf")
    with Runners(workers) as runners:
        return all(_run_stage(runs, until, runners) for runs in stages)


def _run_stage(runs: Iterable[Run], until: float, runners: Runners) -> bool:
    missing, done = [run for run in runs if result_of(run) is None], 0
    for done, carried in enumerate(runners.each(missing, until), 1):
        keep(carried.run, carried.result)
        took = {
            "run": _file(carried.run), "wall_s": round(carried.wall_s, 1), "cpu_s": round(carried.cpu_s, 1),
            "abreast": runners.count,
        }  # fmt: skip
        with (RUNS / "seconds.jsonl").open("ab") as file:
            file.write(msgspec.json.encode(took) + b"\n")
        print(f"run {done} of {len(missing)}: {carried.run.name}, {carried.wall_s:.0f} s", flush=True)
    if done < len(missing):
        print("the time is up; call again to go on", file=sys.stderr)
    return done == len(missing)


def _list(grid: Grid, chosen: Sequence[Method], finals: Sequence[Run]) -> int:
    found = rates(grid, chosen)
    missing = 0
    for run in [*tuning_runs(grid, chosen), *finals]:
        there = result_of(run) is not None
        missing += not there
        print("done   " if there else "missing", run.name)
    untuned = len({(m.name, task) for task, _, _ in grid.cells for m in on(grid, chosen, task)} - found.keys())
    print(f"{missing} runs missing; {untuned} pairs of method and task have no rate yet")
    return 0 if not missing and not untuned else 1


def _render(profile: str, grid: Grid, chosen: Sequence[Method]) -> None:
    found = rates(grid, chosen)
    finals = list(final_runs(grid, chosen, found))
    results = _those_there(finals)
    standard = _standard_rates()
    studies = {study.name: _those_there(study.runs(standard)) for study in STUDIES}
    asked = [run for run in [*tuning_runs(grid, chosen), *finals] if grid.whole or not run.method.beside]
    files = {_file(run) for run in asked}
    minutes, cpu, counted = cost(_seconds(), files)
    took = f" ({counted} runs, side by side {minutes:.0f} minutes on 2 cores, {cpu:.0f} of CPU)"
    known = minutes if profile == "standard" and counted == len(files) else 0.0
    # The published page is about all methods; parts and rehearsals have a page of their own.
    whole = profile == "standard" and grid == GRIDS[profile] and len(chosen) == len(methods([]))
    path = PAGE if whole else ROOT / "runs" / "planning.md"
    plots = path.with_suffix("")
    text = page(
        profile, grid, results, found, more=list(sections(results, studies)), took=took, plots=plots.name,
        claims=list(claims(results, studies, others=_others() if whole else (), minutes=known)),
    )  # fmt: skip
    planning_plots.write(grid, results, plots)
    write_whole(path, text.encode())
    print(f"{len(results)} runs in {path}")


def _others() -> list[dict[str, Any]]:
    """What other benchmarks have measured."""
    return msgspec.json.decode(OTHERS.read_bytes(), type=list[dict[str, Any]])


def _those_there(runs: Iterable[Run]) -> list[tuple[Run, simulated.Result]]:
    return [(run, result) for run in runs if (result := result_of(run)) is not None]


def _file(run: Run) -> str:
    """The run in `seconds.jsonl`: by its file, since one of other settings has the same name."""
    return str(path_of(run).relative_to(RUNS))


def _seconds() -> list[dict[str, object]]:
    path = RUNS / "seconds.jsonl"
    return [msgspec.json.decode(line) for line in path.read_bytes().splitlines()] if path.is_file() else []


if __name__ == "__main__":
    sys.exit(main())
