"""Whether the virtual clock orders strategies as a fleet of real processes does, by the time to a common accuracy.

    python bench/order.py [emulated] [simulated] [--only STRATEGY ...] [--rounds N]

Every strategy runs on six emulated devices (a real mosquitto, real agents, CPU quotas and memory limits: root, and an
idle machine) and under `muster simulate` on virtual devices of the same shapes. What is compared is Kendall's tau
between the two orders (`bench/lib/ranking.py` has the rule for ties). Time counts from the first plan, so that neither
the start of programs nor the preparation of the job is in it. A finished run is a file under `runs/order` and is never
repeated; a cut one is begun anew. Remove the folder to measure again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import psutil
from ranking import Timed, tau, timed

from muster.testbed.cgroups import Groups
from muster.testbed.emulate import Emulation
from muster.testbed.emulate import carry_out as emulate
from muster.testbed.simulate import Simulation
from muster.testbed.simulate import carry_out as simulate
from muster.testbed.simulated import first_plan
from muster.testbed.virtual_fleets import PREFIX
from shared.files import write_whole

DATA = Path(os.environ.get("MUSTER_DATA") or Path(__file__).parents[2] / "shared" / "data")
RUNS = Path(__file__).resolve().parent.parent / "runs" / "order"
STRATEGIES = ("fedpipe", "legend", "uniform", "hetlora")
SEEDS = {"emulated": (0,), "simulated": (0, 1, 2)}
"""Of shares, order, fresh factors and head; an emulation takes its time, a simulation does not."""
PROFILE, DEVICES, ALPHA, CORPUS = "light", 6, 1.0, "dbpedia14"
TARGET, ROUNDS = 0.7, 12
"""Accuracy that all are timed to, and rounds after which one that is not there never gets there. Chosen on validation
rows cut from the training rows, with another seed: the highest of 0.6, 0.65, ... that all reached."""
JOB = """
name = "order"
[base]
model = "minilm3"
[task]
kind = "classification"
max_tokens = 32
[rounds]
count = {rounds}
min_devices = {devices}
local_steps = 8
deadline_s = 600
target = {target}
[strategy]
rank = 8
batch = 8
batch_min = 2
batch_max = 16
bits = 32             # bf16 is fast where the step table was recorded, and slow on a processor without it
[training]
lr = 3e-3
[evaluation]
rows = 300
worse_by = 1000.0     # the gate is for operators: a comparison must not pause
"""


class Commit(msgspec.Struct, frozen=True, kw_only=True):
    """One committed round. `at`: seconds since the first plan; `seconds`: since its own; `trained_s`: of the device
    that trained longest."""

    at: float
    seconds: float
    trained_s: float
    accuracy: float
    accepted: bool


class Course(msgspec.Struct, frozen=True, kw_only=True):
    """What a run left: a file under `runs/order`."""

    half: str
    strategy: str
    seed: int
    date: str
    took_s: float
    """Of this machine's clock, start and end included."""
    busy: float
    """Share of the processor that others used before it began."""
    commits: list[Commit]

    def reached(self) -> Commit | None:
        """The first accepted round at the target."""
        return next((one for one in self.commits if one.accepted and one.accuracy >= TARGET), None)


def main() -> int:
    """0: measured; 1: something that it needs is not there, which is said."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("halves", nargs="*", metavar="emulated|simulated", help="what to run; none: both")
    parser.add_argument("--only", nargs="*", default=list(STRATEGIES), choices=STRATEGIES)
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="fewer for a rehearsal, whose runs are kept apart")
    options = parser.parse_args()
    halves = options.halves or list(SEEDS)
    wrong = set(halves) - SEEDS.keys()
    missing = f"no part {', '.join(sorted(wrong))}; there are {', '.join(SEEDS)}" if wrong else _missing(halves)
    if missing:
        print(f"not run: {missing}", file=sys.stderr)
        return 1
    job = JOB.format(rounds=options.rounds, devices=DEVICES, target=TARGET)
    # Seed by seed, so that strategies meet whatever changes on this machine alike.
    courses = {
        (half, strategy, seed): kept(half, strategy, seed, job)
        for half in halves
        for seed in SEEDS[half]
        for strategy in options.only
    }
    if len(halves) == len(SEEDS):
        for result in results(options.only, list(courses.values())):
            print(json.dumps(result), flush=True)
    return 0


def results(strategies: Sequence[str], courses: Sequence[Course]) -> Iterator[dict[str, Any]]:
    """The agreement of both orders, and the times behind it."""
    halves = {
        half: {
            name: time_of([one for one in courses if (one.half, one.strategy) == (half, name)]) for name in strategies
        }
        for half in SEEDS
    }
    real, virtual = halves["emulated"], halves["simulated"]
    cut = f"accuracy {TARGET:g} on {CORPUS}"
    yield {
        "name": "order.tau",
        "what": f"Kendall's tau between emulated and simulated order of {', '.join(strategies)} by time to {cut}",
        "value": round(tau(list(real.values()), list(virtual.values())), 4), "unit": "", "target": ">= 0.6",
        "note": f"emulated {_order(real)}; simulated {_order(virtual)}; {DEVICES} devices of profile {PROFILE}, "
        f"seeds {_seeds('emulated')} emulated, {_seeds('simulated')} simulated, run on "
        f"{', '.join(sorted({one.date for one in courses}))}; a tie is a difference within the larger spread (over "
        "seeds; with one seed the seconds of the round that reached it); others used up to "
        f"{max(one.busy for one in courses if one.half == 'emulated'):.0%} of the processor before an emulation",
    }  # fmt: skip
    for name in strategies:
        seconds = real[name].seconds
        told = "; ".join(
            _told(half, halves[half][name], [one for one in courses if (one.half, one.strategy) == (half, name)])
            for half in SEEDS
        )
        yield {
            "name": f"order.{name}", "what": f"{name} on {DEVICES} emulated devices: time to {cut}",
            "value": round(seconds, 2) if seconds < math.inf else "never",
            "unit": "s" if seconds < math.inf else "", "target": "", "met": None, "note": told,
        }  # fmt: skip


def time_of(courses: Sequence[Course]) -> Timed:
    """Time to the target of one strategy's runs, one for each seed."""
    reached = [course.reached() for course in courses]
    return timed([one.at if one else math.inf for one in reached], reached[0].seconds if reached[0] else 0.0)


def kept(half: str, strategy: str, seed: int, job: str) -> Course:
    """The run's file, made where it is not there."""
    asked = hashlib.sha256(f"{job} {PROFILE} {DEVICES} {ALPHA} {CORPUS}".encode()).hexdigest()[:8]
    path = RUNS / asked / f"{half}-{strategy}-{seed}.json"
    if path.is_file():
        print(f"order: kept {path}", flush=True)
        return msgspec.json.decode(path.read_bytes(), type=Course)
    print(f"order: {half} {strategy}, seed {seed}", flush=True)
    busy = psutil.cpu_percent(interval=2.0) / 100
    started = time.monotonic()
    with tempfile.TemporaryDirectory(dir="/var/tmp", prefix="muster-order-") as folder:
        path_of_job = Path(folder) / "job.toml"
        path_of_job.write_text(job, encoding="utf-8")
        commits = HALVES[half](strategy, seed, path_of_job, Path(folder) / "out")
    course = Course(
        half=half, strategy=strategy, seed=seed, date=time.strftime("%Y-%m-%d", time.gmtime()),
        took_s=round(time.monotonic() - started, 1), busy=busy, commits=commits,
    )  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, msgspec.json.encode(course))
    return course


def _emulated(strategy: str, seed: int, job: Path, out: Path) -> list[Commit]:
    asked = Emulation(
        devices=DEVICES, profile=PROFILE, data=str(DATA / CORPUS), job=job, strategy=strategy, alpha=ALPHA, seed=seed,
        out=out,
    )  # fmt: skip
    outcome = emulate(asked, command=f"python bench/order.py emulated --only {strategy}")
    if outcome.job.state != "finished":
        raise SystemExit(f"order: {strategy} did not finish: {outcome.job.reason}")
    rounds = [one for one in outcome.job.rounds if one.round in outcome.committed_s]
    first = outcome.committed_s[rounds[0].round] - rounds[0].seconds
    return [
        Commit(
            at=round(outcome.committed_s[one.round] - first, 3), seconds=round(one.seconds, 3),
            trained_s=max((part.facts.train_s for part in one.participants if part.facts), default=0.0),
            accuracy=(one.metrics.accuracy if one.metrics else None) or 0.0, accepted=bool(one.accepted),
        )
        for one in rounds
    ]  # fmt: skip


def _simulated(strategy: str, seed: int, job: Path, out: Path) -> list[Commit]:
    asked = Simulation(
        devices=DEVICES, profile=f"{PREFIX}{PROFILE}", data=str(DATA / CORPUS), job=job, strategy=strategy,
        alpha=ALPHA, seed=seed, out=out,
    )  # fmt: skip
    result = simulate(asked, tell=lambda line: print(f"  {line}", flush=True)).result
    if result.state != "finished":
        raise SystemExit(f"order: {strategy} did not finish: {result.state}")
    first = first_plan(result.rounds)
    return [
        Commit(
            at=round(one.at - first, 3), seconds=round(one.seconds, 3),
            trained_s=max((part.trained_s for part in one.devices), default=0.0),
            accuracy=one.accuracy or 0.0, accepted=one.accepted,
        )
        for one in result.rounds
    ]  # fmt: skip


HALVES: Mapping[str, Callable[[str, int, Path, Path], list[Commit]]] = {
    "emulated": _emulated,
    "simulated": _simulated,
}


def _missing(halves: Sequence[str]) -> str:
    """What a run needs and does not find here; "": nothing."""
    if not DATA.is_dir():
        return f"MUSTER_DATA ({DATA} is no folder)"
    if "emulated" in halves:
        with Groups() as groups:
            if not (groups.available.cpu and groups.available.memory):
                return f"devices can't be limited here: {groups.available.reason}"
    return ""


def _order(times: Mapping[str, Timed]) -> str:
    return " < ".join(f"{name} {_seconds(one)}" for name, one in sorted(times.items(), key=lambda item: item[1]))


def _seconds(one: Timed) -> str:
    return f"{one.seconds:.1f} s (spread {one.spread:.1f})" if one.seconds < math.inf else "never"


def _told(half: str, one: Timed, courses: Sequence[Course]) -> str:
    """A strategy's figures in one half."""
    rounds = ", ".join(str(1 + c.commits.index(r)) if (r := c.reached()) else "-" for c in courses)
    commits = [commit for course in courses for commit in course.commits]
    mean, trained = (sum(getattr(c, key) for c in commits) / len(commits) for key in ("seconds", "trained_s"))
    return f"{half} {_seconds(one)}, round {rounds}, a round {mean:.1f} s of which the slowest trained {trained:.1f} s"


def _seeds(half: str) -> str:
    return ", ".join(map(str, SEEDS[half]))


if __name__ == "__main__":
    sys.exit(main())
