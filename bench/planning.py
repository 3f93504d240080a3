"""Strategies against each other on the virtual fleet; writes `docs/results.md`.

    python -m bench.planning [--profile standard|full|smoke] [--only NAME ...] [--minutes N] [--list] [--render]

Every run is `muster simulate` with 80 devices of profile `jetson`, of which 10 are drawn per round. Its result is a
file under `runs/planning`: a finished run is never repeated, a cut one is begun anew. Learning rates are tuned for each
method on a validation split cut from the training rows, with the same budget for each; nothing is chosen on test rows.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import msgspec

from bench.planning_grid import GRIDS, TASKS, Grid, Method, Run, final_runs, methods, tuning_runs
from bench.planning_tables import page
from muster.testbed import inputs, simulated
from muster.testbed.rows import Row, read_rows, write_rows
from muster.testbed.simulate import Simulation, carry_out
from shared.files import write_whole

ROOT = Path(__file__).resolve().parent.parent
RUNS = ROOT / "runs" / "planning"
PAGE = ROOT / "docs" / "results.md"
VALIDATION = 0.15
"""Share of the training rows that rates are tuned on."""
EVALUATED = 400
"""Rows evaluated after each round: more would take as long as the round itself."""
DEVICES, SAMPLE, STEPS = 80, 10, 8


def main(argv: Sequence[str] | None = None) -> int:
    """0: all that was asked is there; 1: the time was up, or there is no data."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--profile", default="standard", choices=sorted(GRIDS))
    parser.add_argument("--only", nargs="*", default=[], help="strategies, or strategy+aggregator")
    parser.add_argument("--minutes", type=float, default=0.0, help="begin no run after so many; 0: no limit")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--list", action="store_true", help="say what is there and what is missing; run nothing")
    parser.add_argument("--render", action="store_true", help="only write the page from the runs that are there")
    options = parser.parse_args(argv)
    grid, chosen = GRIDS[options.profile], methods(options.only)
    if options.list:
        return _list(grid, chosen)
    complete = True
    if not options.render:
        if not os.environ.get("MUSTER_DATA"):
            print("not run: MUSTER_DATA", file=sys.stderr)
            return 1
        until = time.monotonic() + 60 * options.minutes if options.minutes else float("inf")
        complete = _run_all(tuning_runs(grid, chosen), until, options.workers)
        complete = complete and _run_all(final_runs(grid, chosen, rates(grid, chosen)), until, options.workers)
    _render(options.profile, grid, chosen)
    return 0 if complete else 1


def rates(grid: Grid, chosen: Sequence[Method]) -> dict[tuple[str, str], float]:
    """(method, task) -> the rate whose run was best on the validation split, where all of its rates were run."""
    found: dict[tuple[str, str], list[tuple[float, float]]] = {}
    missing: set[tuple[str, str]] = set()
    for run in tuning_runs(grid, chosen):
        key, result = (run.method.name, run.task), result_of(run)
        best = simulated.best_quality(result.rounds) if result is not None else None
        if result is None:
            missing.add(key)
        else:
            found.setdefault(key, []).append((best if best is not None else float("-inf"), -run.lr))
    return {key: -max(values)[1] for key, values in found.items() if key not in missing}


def result_of(run: Run) -> simulated.Result | None:
    """A finished run's result; None: it was not run."""
    path = RUNS / f"{run.name}.json"
    return msgspec.json.decode(path.read_bytes(), type=simulated.Result) if path.is_file() else None


def _run_all(runs: Iterable[Run], until: float, workers: int) -> bool:
    for run in runs:
        if result_of(run) is not None:
            continue
        if time.monotonic() > until:
            print("the time is up; call again to go on", file=sys.stderr)
            return False
        print(f"run {run.name}", flush=True)
        with tempfile.TemporaryDirectory(prefix="muster-planning-") as scratch:
            done = carry_out(simulation(run, Path(scratch), workers), tell=lambda line: print(f"  {line}", flush=True))
        path = RUNS / f"{run.name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, msgspec.json.encode(done.result))
    return True


def simulation(run: Run, scratch: Path, workers: int) -> Simulation:
    """What `muster simulate` is asked for."""
    task = TASKS[run.task]
    job = scratch / "job.toml"
    job.write_text(f'name = "planning"\n[task]\nkind = "{task.kind}"\nmax_tokens = {task.max_tokens}\n')
    over = {
        "base": {"model": task.model},
        "rounds": {
            "count": run.rounds,
            "sample": SAMPLE,
            "local_steps": STEPS,
            "min_devices": DEVICES // 2,
            "deadline_s": 600,
            "target": abs(task.target) if run.stop else 0.0,
        },
        "strategy": {"rank": 8, "batch": 16, "batch_min": 4, "batch_max": 32},
        "training": {"lr": run.lr},
        # Strong skew makes single rounds much worse; the gate is for operators, a comparison must not pause.
        "evaluation": {"rows": EVALUATED, "worse_by": 1000.0},
    }
    return Simulation(
        devices=DEVICES, data=str(_data(run)), job=job, strategy=run.method.strategy, aggregator=run.method.aggregator,
        seed=run.seed, alpha=run.alpha, out=scratch / "out", workers=workers, over=over,
    )  # fmt: skip


def _data(run: Run) -> Path:
    """The task's data folder; for the validation split one whose test rows are cut from the training rows."""
    given = inputs.data_files(TASKS[run.task].data, Path(), print)
    if run.split == "test":
        return given.train.parent
    folder = RUNS / "data" / f"{run.task}-validation"
    if not (folder / "test.jsonl.gz").is_file():
        rows = read_rows(given.train)
        write_rows(folder / "train.jsonl.gz", [row for row in rows if not held_out(row)])
        if given.labels:
            write_whole(folder / "labels.json", msgspec.json.encode({"names": given.labels}))
        write_rows(folder / "test.jsonl.gz", [row for row in rows if held_out(row)])
    return folder


def held_out(row: Row) -> bool:
    """Whether a training row is one of the validation split, by a hash of its content."""
    digest = hashlib.sha256(msgspec.json.encode(row, order="deterministic")).digest()
    return int.from_bytes(digest[:4], "little") < VALIDATION * 2**32


def _list(grid: Grid, chosen: Sequence[Method]) -> int:
    found = rates(grid, chosen)
    missing = 0
    for run in [*tuning_runs(grid, chosen), *final_runs(grid, chosen, found)]:
        there = result_of(run) is not None
        missing += not there
        print("done   " if there else "missing", run.name)
    untuned = len({(m.name, task) for m in chosen for task, _, _ in grid.cells}) - len(found)
    print(f"{missing} runs missing; {untuned} pairs of method and task have no rate yet")
    return 0 if not missing and not untuned else 1


def _render(profile: str, grid: Grid, chosen: Sequence[Method]) -> None:
    found = rates(grid, chosen)
    results = [(run, result) for run in final_runs(grid, chosen, found) if (result := result_of(run)) is not None]
    # The published page is about all methods; parts and rehearsals have a page of their own.
    whole = profile != "smoke" and len(chosen) == len(methods([]))
    path = PAGE if whole else RUNS / "results.md"
    write_whole(path, page(profile, grid, results, found).encode())
    print(f"{len(results)} runs in {path}")


if __name__ == "__main__":
    sys.exit(main())
