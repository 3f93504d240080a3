"""Strategies against each other on the virtual fleet; writes `docs/results.md`.

    python -m bench.planning [--profile standard|full|smoke] [--only NAME ...] [--minutes N] [--list] [--render]
    python -m bench.planning --studies [NAME ...]

Every run is `muster simulate` with 80 devices of profile `jetson`, of which 10 are drawn per round. Its result is a
file under `bench/runs/planning`: a finished run is never repeated, a cut one is begun anew. What it took of the machine
is a line of `seconds.jsonl`.

Learning rates are tuned for each method on a validation split cut from the training rows, with the same budget for
each; nothing is chosen on test rows.
"""

from __future__ import annotations

import argparse
import functools
import gzip
import hashlib
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import msgspec
import psutil

from bench.planning_claims import claims, cost, sections
from bench.planning_grid import (
    GRIDS,
    MAX_SHARE,
    TASKS,
    UNEQUAL_BATCHES,
    Grid,
    Method,
    Run,
    final_runs,
    methods,
    tuning_runs,
)
from bench.planning_studies import STUDIES, VARIANTS
from bench.planning_tables import page
from muster.testbed import device_model, inputs, simulated, toml
from muster.testbed.rows import Row, read_rows, write_rows
from muster.testbed.runs import RunFailed
from muster.testbed.simulate import STEPS as STEPS_FILE
from muster.testbed.simulate import Session, Simulation
from muster.testbed.simulate import result_of as result_of_simulation
from shared.files import write_whole

ROOT = Path(__file__).resolve().parent.parent
RUNS = ROOT / "bench" / "runs" / "planning"
"""Committed: whoever has no hours can render the page from it, and look behind each figure."""
PAGE = ROOT / "docs" / "results.md"
VALIDATION = 0.15
"""Share of the training rows that rates are tuned on."""
EVALUATED = 256
"""Rows evaluated after each round: more would take as long as the round itself."""
BATCH = 8
MOST, MOST_OF_ONE = 8 * BATCH, 4 * BATCH
"""The largest batch that a planner may ask for: at 4 times the job's, GPUs of the fleet are done in half of a round's
time (validation rows, lab log). Methods with one batch never ask for more than the job's; theirs is what it was, so
that their runs need not be made anew."""
DEVICES, SAMPLE, STEPS = 80, 10, 8
GLOBAL_RANK = 16
"""Twice the devices' rank: the default, for long jobs, is half of these small matrices and doubles downloads."""
LORA_PLUS = 8.0
"""Every method of LoRA diverges at the rates that its B and the head want where A gets them, too."""


def main(argv: Sequence[str] | None = None) -> int:
    """0: all that was asked is there; 1: the time was up, or there is no data."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--profile", default="standard", choices=sorted(GRIDS))
    parser.add_argument("--only", nargs="*", default=[], help="strategies, or strategy+aggregator")
    parser.add_argument("--tasks", nargs="*", default=sorted(TASKS), help="only these")
    parser.add_argument("--alphas", nargs="*", type=float, default=[], help="of the final runs only these")
    parser.add_argument("--tune", action="store_true", help="only the runs that choose the learning rates")
    parser.add_argument("--minutes", type=float, default=0.0, help="begin no run after so many; 0: no limit")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument(
        "--studies",
        nargs="*",
        choices=[[], *(study.name for study in STUDIES)],
        metavar="NAME",
        help="run the studies, or those named, at the rates that the standard profile tuned",
    )
    parser.add_argument("--list", action="store_true", help="say what is there and what is missing; run nothing")
    parser.add_argument("--render", action="store_true", help="only write the page from the runs that are there")
    options = parser.parse_args(argv)
    grid, chosen = GRIDS[options.profile], methods(options.only)
    grid = replace(grid, cells=tuple(cell for cell in grid.cells if cell[0] in options.tasks))
    if options.list:
        return _list(grid, chosen)
    complete = True
    if not options.render:
        if not os.environ.get("MUSTER_DATA"):
            print("not run: MUSTER_DATA", file=sys.stderr)
            return 1
        until = time.monotonic() + 60 * options.minutes if options.minutes else float("inf")
        with Session(options.workers) as session:
            if options.studies is not None:
                complete = _run_all(study_runs(_standard_rates(), options.studies), until, session)
            else:
                complete = _run_all(tuning_runs(grid, chosen), until, session)
                finals = final_runs(grid, chosen, rates(grid, chosen))
                finals = (run for run in finals if not options.alphas or run.alpha in options.alphas)
                complete = complete and (options.tune or _run_all(finals, until, session))
    _render(options.profile, grid, chosen)
    return 0 if complete else 1


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
    pairs = ((method, task) for method in chosen for task in TASKS)
    return {(m.name, task): best_of[m.strategy, task] for m, task in pairs if (m.strategy, task) in best_of}


def result_of(run: Run) -> simulated.Result | None:
    """A finished run's result; None: it was not run."""
    path = path_of(run)
    return msgspec.json.decode(gzip.decompress(path.read_bytes()), type=simulated.Result) if path.is_file() else None


def path_of(run: Run) -> Path:
    """The file of a run: its name, and a digest of all else that determines it."""
    asked = simulation(run, Path())
    fixed = (
        TASKS[run.task], asked.devices, asked.profile, asked.oracle, asked.over, VALIDATION, device_model.VERSION,
        _steps_digest(),
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


def _run_all(runs: Iterable[Run], until: float, session: Session) -> bool:
    for run in runs:
        if result_of(run) is not None:
            continue
        if time.monotonic() > until:
            print("the time is up; call again to go on", file=sys.stderr)
            return False
        print(f"run {run.name}", flush=True)
        wall, cpu = time.monotonic(), _cpu_s()
        with tempfile.TemporaryDirectory(prefix="muster-planning-") as scratch, VARIANTS[run.variant].around():
            asked = simulation(run, Path(scratch))
            write_job(run, asked)
            done = _carried_out(run, replace(asked, data=str(_data(run))), session)
        keep(run, done)
        took = {"run": _file(run), "wall_s": round(time.monotonic() - wall, 1), "cpu_s": round(_cpu_s() - cpu, 1)}
        with (RUNS / "seconds.jsonl").open("ab") as file:
            file.write(msgspec.json.encode(took) + b"\n")
    return True


def _carried_out(run: Run, asked: Simulation, session: Session) -> simulated.Result:
    """The result; that of a run which got stuck has no rounds, and its state says so."""
    try:
        return result_of_simulation(asked, session, lambda line: print(f"  {line}", flush=True))
    except RunFailed as error:
        print(f"  failed: {error}", flush=True)
        return simulated.Result(
            job="planning", state="failed", strategy=run.method.strategy, aggregator=run.method.aggregator,
            profile=asked.profile, devices=asked.devices, data=run.task, alpha=run.alpha, seed=run.seed, lr=run.lr,
            baseline=None, rounds=[], bytes_by_device={},
        )  # fmt: skip


def write_job(run: Run, asked: Simulation) -> None:
    """The job file of a run."""
    assert asked.job is not None
    task = TASKS[run.task]
    asked.job.write_text(f'name = "planning"\n[task]\nkind = "{task.kind}"\nmax_tokens = {task.max_tokens}\n')


def _cpu_s() -> float:
    """CPU seconds of this process and of those that compute gradients, so far."""
    me = psutil.Process()
    times = [me.cpu_times(), *(child.cpu_times() for child in me.children())]
    return float(sum(one.user + one.system for one in times))


def simulation(run: Run, scratch: Path) -> Simulation:
    """What `muster simulate` is asked for, but for its data."""
    task, variant = TASKS[run.task], VARIANTS[run.variant]
    # Of `fedadapter` the cap would bound the widths that it may try.
    widths = {"rank": 8} if run.method.strategy == "fedadapter" else {"rank": 8, "global_rank": GLOBAL_RANK}
    shares = {"max_share": MAX_SHARE} if run.capped else {}
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
        "strategy": {
            **widths,
            **shares,
            "batch": BATCH,
            "batch_min": BATCH // 4,
            "batch_max": MOST if run.method.strategy in UNEQUAL_BATCHES else MOST_OF_ONE,
        },
        "training": {"lr": run.lr, "lora_plus": LORA_PLUS},
        # Strong skew makes single rounds much worse; the gate is for operators, a comparison must not pause.
        "evaluation": {"rows": EVALUATED, "worse_by": 1000.0},
    }
    over = toml.merged(over, {name: dict(table) for name, table in variant.tables.items()})
    asked = Simulation(
        devices=DEVICES, job=scratch / "job.toml", strategy=run.method.strategy, aggregator=run.method.aggregator,
        seed=run.seed, alpha=run.alpha, over=over,
    )  # fmt: skip
    # No other method needs that much memory; granting it to all would take their choice of bits away.
    granted = {"profile": "jetson-roomy"} if run.method.strategy == "full" else {}
    return replace(asked, **{**granted, **variant.fields})


def _data(run: Run) -> Path:
    """The task's data folder; for the validation split one whose test rows are cut from the training rows."""
    given = inputs.data_files(TASKS[run.task].data, Path(), print)
    if run.split == "test":
        return given.train.parent
    folder = ROOT / "runs" / "planning-data" / f"{run.task}-validation"
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
    finals = list(final_runs(grid, chosen, found))
    results = _those_there(finals)
    standard = _standard_rates()
    studies = {study.name: _those_there(study.runs(standard)) for study in STUDIES}
    files = {_file(run) for run in [*tuning_runs(grid, chosen), *finals]}
    wall, cpu, counted = cost(_seconds(), files)
    took = f" ({counted} runs, {wall:.0f} minutes on 2 cores shared with other work, {cpu:.0f} of CPU)"
    # The published page is about all methods; parts and rehearsals have a page of their own.
    whole = profile == "standard" and grid == GRIDS[profile] and len(chosen) == len(methods([]))
    path = PAGE if whole else ROOT / "runs" / "planning.md"
    path.parent.mkdir(exist_ok=True)
    text = page(
        profile, grid, results, found, claims=list(claims(results, studies)), more=list(sections(results, studies)),
        took=took,
    )  # fmt: skip
    write_whole(path, text.encode())
    print(f"{len(results)} runs in {path}")


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
