"""MergeSFL against its rivals on a virtual fleet; writes `docs/results-mergesfl.md`.

    python -m bench.mergesfl [--minutes N] [--workers N] [--tasks digits ...] [--seeds 0 1 2] [--render]

Methods, fleet and clock: `bench/mergesfl_fleet.py`. Every method's learning rate is the best of the task's `rates` on
a seed of its own. Runs are kept in `bench/runs/mergesfl`, and done once.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import repeat
from multiprocessing import get_context
from pathlib import Path
from typing import Literal, NamedTuple

import msgspec
import numpy as np
import torch

from bench.mergesfl_clock import World
from bench.mergesfl_fleet import FEDAVG, Method, RoundOutcome
from bench.planning_runs import data_there
from coordinator.core.aggregation.registry import SPLIT
from muster.testbed import digits, inputs, partition
from muster.testbed.rows import read_rows, write_rows
from shared.files import write_whole
from shared.jobs import BaseSpec, JobSpec, RoundsSpec, SplitSpec, StrategySpec, TaskSpec, TrainingSpec
from shared.modeling import base_model, convolutional
from shared.modeling.data import TokenData, tokenize

ROOT = Path(__file__).resolve().parent.parent
RUNS = ROOT / "bench" / "runs" / "mergesfl"
PAGE = ROOT / "docs" / "results-mergesfl.md"
METHODS = (FEDAVG, *SPLIT)
RIVALS = (FEDAVG, "splitfed")
DEVICES, SAMPLE = 80, 10
SKEWS = ("dirichlet", "dominant")
ALPHA, DOMINANT = 0.1, 0.8
TUNING_SEED = 100
_scratch = Path()


class Task(NamedTuple):
    """A task with its sizes. `sample_s`: as in `World`; `lower`: share of the compute below the cut.
    `target`: of the texts the highest multiple of 0.05 that mergesfl's tuning runs reach under both skews, set before a
    final run was looked at."""

    name: str
    rounds: int
    steps: int
    batch: int
    rates: tuple[float, ...]
    tuning_rounds: int
    block: int
    sample_s: float
    lower: float
    target: float
    seeds: tuple[int, ...]
    rows: int = 0
    """Held-out rows of an evaluation; 0: all."""


TASKS = {
    "digits": Task("digits", 40, 10, 16, (1e-3, 3e-3, 1e-2), 15, 2, 0.04, 0.9, 0.9, (0, 1, 2)),
    "dbpedia14": Task("dbpedia14", 15, 5, 8, (3e-3, 1e-2), 15, 1, 0.25, 1 / 3, 0.6, (0, 1, 2), 400),
    "20news": Task("20news", 15, 5, 8, (3e-3, 1e-2), 15, 1, 0.5, 1 / 3, 0.15, (0, 1, 2), 400),
}


class Run(NamedTuple):
    """One run of a method."""

    task: str
    skew: str
    method: str
    seed: int
    lr: float
    rounds: int

    @property
    def path(self) -> Path:
        """Where its rounds are kept."""
        return RUNS / self.task / self.skew / f"{self.method}-seed{self.seed}-lr{self.lr:g}-rounds{self.rounds}.json"


def main(argv: Sequence[str] | None = None) -> int:
    """0: all runs are there; 1: the time was up, or there is no data."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=0.0, help="begin no run after so many; 0: no limit")
    parser.add_argument("--workers", type=int, default=2, help="runs at a time")
    parser.add_argument("--tasks", nargs="+", choices=sorted(TASKS), default=sorted(TASKS))
    parser.add_argument("--skews", nargs="+", choices=SKEWS, default=list(SKEWS))
    parser.add_argument("--seeds", nargs="+", type=int, default=None, help="instead of the task's own")
    parser.add_argument("--render", action="store_true", help="only write the page from the runs that are there")
    options = parser.parse_args(argv)
    complete = options.render or _run_all(options)
    write_whole(PAGE, page().encode())
    return 0 if complete else 1


def _run_all(options: argparse.Namespace) -> bool:
    """Whether all runs that were asked for are there."""
    until = time.time() + 60 * options.minutes if options.minutes else float("inf")
    texts = [one for one in options.tasks if one != "digits"]
    missing = texts if texts and not data_there() else []
    for task in missing:
        print(f"{task} not run", file=sys.stderr)
    worlds = [(task, skew) for task in options.tasks if task not in missing for skew in options.skews]
    spawn = get_context("spawn")
    with (
        tempfile.TemporaryDirectory(prefix="muster-bench-") as scratch,
        ProcessPoolExecutor(options.workers, spawn, initializer=_begin, initargs=(scratch,)) as pool,
    ):

        def done(runs: Iterable[Run]) -> bool:
            return None not in list(pool.map(carry_out, runs, repeat(until)))

        tuned = done(run for one in worlds for run in tuning(*one))
        # The rates come from these: only now is it known which runs there are. Seed by seed, so that a run that is
        # broken off leaves whole tables.
        rest = sorted((run for one in worlds for run in finals(*one, options.seeds)), key=lambda run: run.seed)
        return done(rest) and tuned and not missing


def _begin(scratch: str) -> None:
    """Of a worker: one thread, and files that no other writes over."""
    global _scratch  # noqa: PLW0603  # set once, before any run
    torch.set_num_threads(1)
    _scratch = Path(scratch) / str(os.getpid())
    _scratch.mkdir()


def tuning(task: str, skew: str) -> Iterator[Run]:
    """What chooses each method's rate."""
    for method in METHODS:
        for lr in TASKS[task].rates:
            yield Run(task, skew, method, TUNING_SEED, lr, TASKS[task].tuning_rounds)


def rate(task: str, skew: str, method: str) -> float | None:
    """The rate of the best accuracy over the last rounds of its tuning runs; None: they are not all there."""
    found = []
    for lr in TASKS[task].rates:
        rounds = kept(Run(task, skew, method, TUNING_SEED, lr, TASKS[task].tuning_rounds))
        if rounds is None:
            return None
        found.append((statistics.fmean(one.accuracy for one in rounds[-3:]), -lr))
    return -max(found)[1]


def finals(task: str, skew: str, seeds: Sequence[int] | None = None) -> Iterator[Run]:
    """The runs that the figures are made of, as far as rates are chosen."""
    for seed in seeds if seeds is not None else TASKS[task].seeds:
        for method in METHODS:
            lr = rate(task, skew, method)
            if lr is not None:
                yield Run(task, skew, method, seed, lr, TASKS[task].rounds)


def kept(run: Run) -> list[RoundOutcome] | None:
    """The rounds of a run that was done."""
    return msgspec.json.decode(run.path.read_bytes(), type=list[RoundOutcome]) if run.path.is_file() else None


def carry_out(run: Run, until: float = float("inf")) -> list[RoundOutcome] | None:
    """The rounds of `run`, done now if they are not there; None: the time is up."""
    if (found := kept(run)) is not None:
        return found
    if time.time() > until:  # a clock that the workers share
        return None
    began = time.monotonic()
    method = Method(world(run), run.method, run.lr, TASKS[run.task].rows)
    for _ in range(run.rounds):
        method.run()
    last = method.rounds[-1]
    print(
        f"{run.task} {run.skew} {run.method} seed {run.seed} lr {run.lr:g}: accuracy {last.accuracy:.3f}, "
        f"{last.at:.0f} s virtual, {time.monotonic() - began:.0f} s here",
        flush=True,
    )
    run.path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(run.path, msgspec.json.encode(method.rounds))
    return method.rounds


# ---- worlds


def world(run: Run) -> World:
    """The fleet that `run` meets; the same for all methods of a seed."""
    task = TASKS[run.task]
    scratch = _scratch
    spec, model, rows, held_out = _digits(scratch, run.seed) if run.task == "digits" else _text(run.task)
    labels = [row["label"] for row in rows]
    shares = (
        partition.dirichlet(labels, DEVICES, ALPHA, run.seed)
        if run.skew == "dirichlet"
        else dominant(labels, DEVICES, DOMINANT, run.seed)
    )
    base = base_model.load(model, spec, 32)
    path = scratch / f"{run.task}-{run.seed}.jsonl.gz"
    write_rows(path, rows)
    whole = tokenize(str(path), spec, base.tokenizer)
    names = [f"sim-{number + 1:02d}" for number in range(DEVICES)]
    held = scratch / f"{run.task}-{run.seed}-held.jsonl.gz"
    write_rows(held, held_out)
    tuning_kind: Literal["full", "lora"] = "full" if run.task == "digits" else "lora"
    job = JobSpec(
        name="bench", base=BaseSpec(model="base"), task=spec, seed=run.seed,
        rounds=RoundsSpec(count=task.rounds, local_steps=task.steps, sample=SAMPLE, deadline_s=1e6, min_devices=SAMPLE),
        strategy=StrategySpec(
            rank=4, batch=task.batch, batch_min=1, batch_max=4 * task.batch, bits=32,
            split=SplitSpec(block=task.block, tuning=tuning_kind),
        ),
        training=TrainingSpec(schedule="constant"),
    )  # fmt: skip
    return World(
        folder=scratch, job=job, model=model, held_out=tokenize(str(held), spec, base.tokenizer), seed=run.seed,
        shares={name: _only(whole, share) for name, share in zip(names, shares, strict=True)},
        labels={name: dict(Counter(str(labels[i]) for i in share)) for name, share in zip(names, shares, strict=True)},
        sample_s=task.sample_s, lower_share=task.lower,
    )  # fmt: skip


def dominant(labels: Sequence[object], devices: int, ratio: float, seed: int) -> list[list[int]]:
    """Each class has a few devices that own `ratio` of it; the rest of it goes to all others alike."""
    rng = np.random.default_rng([seed, 0xD0])
    classes = sorted(set(map(str, labels)))
    owners = [list(one) for one in np.array_split(rng.permutation(devices), len(classes))]
    shares: list[list[int]] = [[] for _ in range(devices)]
    for label, own in zip(classes, owners, strict=True):
        rows = rng.permutation([i for i, one in enumerate(labels) if str(one) == label])
        cut = int(ratio * len(rows))
        others = [device for device in range(devices) if device not in own]
        for place, row in enumerate(rows):
            group = own if place < cut else others
            shares[group[place % len(group)]].append(int(row))
    return [sorted(share) for share in shares]


def _only(data: TokenData, share: Sequence[int]) -> TokenData:
    return data._only(np.asarray(share, dtype=np.int64))


def _digits(scratch: Path, seed: int) -> tuple[TaskSpec, Path, list[dict[str, object]], list[dict[str, object]]]:
    model = convolutional.write(scratch / f"cnn-{seed}", channels=[16, 32, 32], pools=[0, 1], hidden=64, seed=seed)
    rows = digits.rows()
    return TaskSpec(kind="image", dataset="digits", labels=digits.LABELS), model, rows[450:], rows[:450]


def _text(name: str) -> tuple[TaskSpec, Path, list[dict[str, object]], list[dict[str, object]]]:
    """A share of the training rows, and as many of the test rows as an evaluation takes."""
    folder = Path(os.environ["MUSTER_DATA"])
    found = inputs.data_files(name, folder, lambda _text: None)
    train, test = read_rows(found.train), read_rows(found.test)
    rng = np.random.default_rng(7)
    some = [train[i] for i in sorted(rng.permutation(len(train))[:8000])]
    held = [test[i] for i in sorted(rng.permutation(len(test))[:1000])]
    labels = sorted({row["label"] for row in train}, key=lambda one: (str(type(one)), one))
    names = [str(one) for one in labels]
    spec = TaskSpec(kind="classification", dataset=name, labels=names, max_tokens=32 if name == "dbpedia14" else 48)
    model = inputs.base_model(inputs.MINILM3_NARROW, {}, None, lambda _text: None)
    return spec, Path(model), some, held


# ---- the page


def page() -> str:
    """What the runs say, as Markdown."""
    lines = [
        "# MergeSFL against its rivals", "",
        "Made by `make bench-mergesfl` (`bench/mergesfl.py`, which says how); don't edit. 80 virtual devices (30 TX2, "
        "40 NX, 10 AGX; speeds 1 : 2 : 4; links of 1 to 30 Mb/s), 10 in a round, real gradients, virtual seconds. "
        "Rates are tuned per method on a seed of their own (other shares and first values, the same held-out rows). "
        "The server's compute and its link count nothing. Waiting leaves out transfers of models, and the first round.",
    ]  # fmt: skip
    for task in TASKS:
        for skew in SKEWS:
            lines += _section(task, skew)
    return "\n".join(lines) + "\n"


def _section(task: str, skew: str) -> list[str]:
    there: dict[int, dict[str, list[RoundOutcome]]] = {}
    for run in finals(task, skew):
        if (found := kept(run)) is not None:
            there.setdefault(run.seed, {})[run.method] = found
    # Seeds of which some runs are missing would compare means over different worlds.
    whole = [one for one in there.values() if len(one) == len(METHODS)]
    runs = {method: [one[method] for one in whole] for method in METHODS} if whole else {}
    about = TASKS[task]
    how = f"Dirichlet {ALPHA}" if skew == "dirichlet" else f"one owner of {DOMINANT:.0%} of each class"
    head = ["", f"## {task}, {how}", ""]
    if not runs:
        return [*head, "Not run."]
    count = min(map(len, runs.values()))
    head.append(
        f"{about.rounds} rounds of {about.steps} steps, batch {about.batch}, {count} seed{'s' * (count > 1)}; target "
        f"{about.target:.2f}; accuracies are means over seeds."
    )
    table = [
        "", "| method | rate | accuracy at the end | best | seconds to target | waiting | KL, mean | MB moved |",
        "|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    table += [_row(task, skew, method, runs[method]) for method in METHODS]
    return [*head, *table, "", *_claims(task, runs)]


def _row(task: str, skew: str, method: str, runs: list[list[RoundOutcome]]) -> str:
    ends = [statistics.fmean(one.accuracy for one in run[-3:]) for run in runs]
    spread = f" ± {statistics.stdev(ends):.3f}" if len(ends) > 1 else ""
    best = statistics.fmean(max(one.accuracy for one in run) for run in runs)
    reached = [to_target(run, TASKS[task].target) for run in runs]
    known = [one for one in reached if one is not None]
    all_do = len(known) == len(reached)
    when = f"{statistics.fmean(known):.0f}" if all_do else f"{len(known)} of {len(reached)} reach it"
    waiting = statistics.fmean(one.waiting for run in runs for one in run[1:])
    kl = statistics.fmean(one.kl for run in runs for one in run)
    moved = statistics.fmean(sum(one.bytes_moved for one in run) for run in runs) / 1e6
    return (
        f"| {method} | {rate(task, skew, method):g} | {statistics.fmean(ends):.3f}{spread} | {best:.3f} | {when} | "
        f"{waiting:.1%} | {kl:.4f} | {moved:.0f} |"
    )


def to_target(run: Sequence[RoundOutcome], target: float) -> float | None:
    """Virtual seconds to the first round at the target; None: it is not reached."""
    return next((one.at for one in run if one.accuracy >= target), None)


def _claims(task: str, runs: dict[str, list[list[RoundOutcome]]]) -> list[str]:
    """The figures of the issue, each with its bar."""
    curves = {name: np.mean([[one.accuracy for one in run] for run in found], axis=0) for name, found in runs.items()}
    best = np.max([np.maximum.accumulate(curves[name]) for name in RIVALS], axis=0)
    within = [index for index in range(len(best)) if best[index] <= 0.85]
    lines = ["| claim | asked | measured |", "|---|---|---|"]
    if within:
        budget = within[-1]
        for name in RIVALS:
            gain = 100 * (curves["mergesfl"][budget] - curves[name][budget])
            lines.append(f"| points above {name} after {budget + 1} rounds | >= 5.8 | {gain:+.1f} |")
    mine = [to_target(run, TASKS[task].target) for run in runs["mergesfl"]]
    for name in RIVALS:
        pairs = [(a, to_target(run, TASKS[task].target), run[-1].at) for a, run in zip(mine, runs[name], strict=False)]
        if any(a is None for a, _, _ in pairs):
            there = sum(a is not None for a, _, _ in pairs)
            lines.append(
                f"| time to target against {name} | >= 1.74x | mergesfl reaches it in {there} of {len(pairs)} |"
            )
            continue
        ratios = [(b if b is not None else end) / a for a, b, end in pairs if a is not None]
        least = "at least " if any(b is None for _, b, _ in pairs) else ""
        lines.append(f"| time to target against {name} | >= 1.74x | {least}{statistics.fmean(ratios):.2f}x |")
    kls = {name: statistics.fmean(one.kl for run in runs[name] for one in run) for name in runs}
    random = kls.get("mergesfl-random", float("nan"))
    lines.append(f"| KL of the merged mix (random selection {random:.3f}) | <= 0.01 | {kls['mergesfl']:.4f} |")
    waits = {name: statistics.fmean(one.waiting for run in runs[name] for one in run[1:]) for name in runs}
    uniform = waits.get("mergesfl-uniform", float("nan"))
    lines.append(f"| waiting (uniform batches {uniform:.0%}) | <= 10 % | {waits['mergesfl']:.1%} |")
    return lines


if __name__ == "__main__":
    raise SystemExit(main())
