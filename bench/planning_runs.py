"""One run of `bench/planning.py`: what `muster simulate` is asked for, and several carried out side by side."""

from __future__ import annotations

import hashlib
import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import replace
from multiprocessing import active_children, get_context
from pathlib import Path
from typing import NamedTuple

import msgspec

from bench.planning_grid import BATCH, MAX_SHARE, TASKS, UNEQUAL_BATCHES, Run
from bench.planning_studies import VARIANTS
from muster.testbed import inputs, simulated, toml
from muster.testbed.rows import Row, read_rows, write_rows
from muster.testbed.runs import RunFailed
from muster.testbed.simulate import Session, Simulation
from muster.testbed.simulate import result_of as result_of_simulation
from shared.files import write_whole
from shared.processes import die_with_parent

ROOT = Path(__file__).resolve().parent.parent
VALIDATION = 0.15
"""Share of the training rows that rates are tuned on."""
CUT = frozenset({"e2e"})
"""Tasks whose test rows are unlike all that can be trained on (lab log): as much again is cut from the training rows
for them, and the grid tests on that."""
EVALUATED = 256
"""Rows evaluated after each round: more would take as long as the round itself."""
MOST, MOST_OF_ONE = 8 * BATCH, 4 * BATCH
"""The largest batch that a planner may ask for: at 4 times the job's, GPUs of the fleet are done in half of a round's
time (validation rows, lab log). Methods with one batch never ask for more than the job's; theirs is what it was, so
that their runs need not be made anew."""
DEVICES, SAMPLE, STEPS = 80, 10, 8
GLOBAL_RANK = 16
"""Twice the devices' rank: the default, for long jobs, is half of these small matrices and doubles downloads."""
LORA_PLUS = 8.0
"""Every method of LoRA diverges at the rates that its B and the head want where A gets them, too."""


def data_there() -> bool:
    """Have data sets looked for in `MUSTER_DATA`, by default where tests do; False, which is said: it is no folder."""
    folder = Path(os.environ.get("MUSTER_DATA") or ROOT.parent / "shared" / "data")
    if not folder.is_dir():
        print(f"not run: MUSTER_DATA ({folder} is no folder)", file=sys.stderr)
        return False
    os.environ["MUSTER_DATA"] = str(folder)
    return True


class Carried(NamedTuple):
    """A finished run, and the seconds that it took of the machine."""

    run: Run
    result: simulated.Result
    wall_s: float
    cpu_s: float


class Runners:
    """Carries out runs, `count` at a time, each in one process (0: in this one); a context manager.

    What a run gives does not depend on it: each computes on its own, from its seed. Side by side all cores are busy;
    with the devices of one run side by side instead, those but one would rest while its coordinator evaluates.
    """

    def __init__(self, count: int) -> None:
        self.count = max(1, count)
        """Runs at a time."""
        self._here = Session(0) if count == 0 else None
        if count:
            # An evaluation has two threads; where others want the cores, too, they must not wait for each other without
            # sleeping. It is read where torch is loaded, which is before an initializer of a process is called.
            os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        self._scratch = tempfile.TemporaryDirectory(prefix="muster-planning-")
        """Of all processes: what one that is broken off leaves goes with it."""
        self._pool = (
            ProcessPoolExecutor(count, get_context("spawn"), initializer=_open, initargs=(self._scratch.name,))
            if count
            else None
        )

    def __enter__(self) -> Runners:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._pool is not None:
            # What was broken off is begun anew next time: nobody waits for its end.
            for process in active_children() if kind is not None else ():
                process.terminate()
            self._pool.shutdown(wait=True, cancel_futures=True)
        self._scratch.cleanup()

    def each(self, runs: Iterable[Run], until: float) -> Iterator[Carried]:
        """The runs as they finish; none is begun after `until` (`time.monotonic`)."""
        runs, under_way = iter(runs), set[Future[Carried]]()
        while True:
            while len(under_way) < self.count and time.monotonic() <= until and (run := next(runs, None)) is not None:
                folder = data_of(run)
                if self._pool is None:
                    assert self._here is not None
                    yield carried_out(run, folder, self._here)
                else:
                    under_way.add(self._pool.submit(_carry_out, run, folder))
            if not under_way:
                return
            done, under_way = wait(under_way, return_when=FIRST_COMPLETED)
            yield from (one.result() for one in done)


_session: Session | None = None


def _open(scratch: str) -> None:
    """Begin a process; Ctrl-C is for the one that started it, and its end is this one's end, however it comes."""
    global _session  # noqa: PLW0603 - a process of the pool has one
    tempfile.tempdir = scratch
    die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _session = Session(0)


def _carry_out(run: Run, folder: Path) -> Carried:
    assert _session is not None
    return carried_out(run, folder, _session)


def carried_out(run: Run, folder: Path, session: Session) -> Carried:
    """Carry out one run on the data in `folder`; one that got stuck has no rounds, and its state says so."""

    def tell(line: str) -> None:
        print(f"  {run.name}: {line}", flush=True)

    wall, cpu = time.monotonic(), time.process_time()
    with tempfile.TemporaryDirectory(prefix="muster-planning-") as scratch, VARIANTS[run.variant].around():
        asked = simulation(run, Path(scratch))
        write_job(run, asked)
        try:
            result = result_of_simulation(replace(asked, data=str(folder)), session, tell)
        except RunFailed as error:
            tell(f"failed: {error}")
            result = simulated.Result(
                job="planning", state="failed", strategy=run.method.strategy, aggregator=run.method.aggregator,
                profile=asked.profile, devices=asked.devices, data=run.task, alpha=run.alpha, seed=run.seed, lr=run.lr,
                baseline=None, rounds=[], bytes_by_device={},
            )  # fmt: skip
    return Carried(run, result, time.monotonic() - wall, time.process_time() - cpu)


def write_job(run: Run, asked: Simulation) -> None:
    """The job file of a run."""
    assert asked.job is not None
    task = TASKS[run.task]
    asked.job.write_text(f'name = "planning"\n[task]\nkind = "{task.kind}"\nmax_tokens = {task.max_tokens}\n')


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


def is_cut(run: Run) -> bool:
    """Whether its test rows are cut from the training rows."""
    return run.split == "test" and run.task in CUT and not run.variant


def data_of(run: Run) -> Path:
    """The task's data folder; where rows are held out of the training rows one that is made of these."""
    given = inputs.data_files(TASKS[run.task].data, Path(), print)
    if run.split == "test" and not is_cut(run):
        return given.train.parent
    first, name = (0.0, "validation") if run.split == "validation" else (VALIDATION, "test")
    folder = ROOT / "runs" / "planning-data" / f"{run.task}-{name}"
    if not (folder / "test.jsonl.gz").is_file():
        rows = read_rows(given.train)
        write_rows(folder / "train.jsonl.gz", [row for row in rows if not held_out(row, first)])
        if given.labels:
            write_whole(folder / "labels.json", msgspec.json.encode({"names": given.labels}))
        write_rows(folder / "test.jsonl.gz", [row for row in rows if held_out(row, first)])
    return folder


def held_out(row: Row, first: float = 0.0) -> bool:
    """Whether a training row is in the `VALIDATION` of all rows that begins at `first`, by a hash of its content."""
    digest = hashlib.sha256(msgspec.json.encode(row, order="deterministic")).digest()
    return first * 2**32 <= int.from_bytes(digest[:4], "little") < (first + VALIDATION) * 2**32
