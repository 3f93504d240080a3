"""`fedpipe`'s search against others and the optimum: `python bench/search.py [--instances N] [--fleet tight|drawn]`.

An instance is a fleet of 32 devices (`muster simulate`'s `jetson`) after a warm-up round: what they measured, and what
they told of the modules' importance. `tight` devices have memory for few samples beside the base, so that it bounds the
ranks of many; as they are `drawn`, it bounds those of few, and most choices are trivial. All searches choose from the
same batches, under-trainings and ranks within the same memory and round target, and maximise the same objective, the
sum over the devices of J = (1 - u) sum_m S_m g(r_m).

The two-stage search values one candidate for each batch and under-training that a device can take: the ranks that the
greedy gives them. Random search (`rank_search`) draws as many candidates for each device, or a multiple. The optimum is
HiGHS's. One thread; prints one JSON object a figure.
"""

from __future__ import annotations

import os

os.environ["OPENBLAS_NUM_THREADS"] = "1"  # before numpy is imported

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from statistics import fmean
from typing import Any

import numpy as np
from rank_search import equal_ranks, random_search
from warm_fleet import job, tick, transformer, view, warmed

from coordinator.core.planning.demand import tuned_modules
from coordinator.core.planning.fedpipe import FedPipePlanner, Search, important, searched
from coordinator.core.planning.knapsack import Numbers
from coordinator.core.planning.rank_choice import Options, choose
from shared.jobs import StrategySpec

BASES = {36: (6, 384), 144: (24, 1024)}
"""Modules -> (blocks, width): MiniLM, BERT-large."""
DEVICES = 32
TIMES = (1, 10, 100)
"""Candidates of random search for one of the two-stage search."""
SEARCHES = {
    "greedy": "two-stage search (greedy ranks)",
    "equal": "the highest equal rank that fits",
    **{f"random_{times}": f"random search with {times} x its candidates" for times in TIMES},
}
STRATEGY = StrategySpec(name="fedpipe", rank=32, batch=16, batch_min=4, batch_max=32)


@dataclass
class Record:
    """What one search reached, instance by instance, and its CPU seconds."""

    fleets: list[float] = field(default_factory=list)
    """Objective as a share of the optimum's."""
    short: list[float] = field(default_factory=list)
    """The same of each single device whose bounds do not hold the highest ranks everywhere at all steps."""
    seconds: float = 0.0

    def add(self, reached: Numbers, best: Numbers, most: float) -> None:
        """One instance: J of each device, by this search and at best; `most`: where nothing bounds it."""
        self.fleets.append(float(reached.sum() / best.sum()))
        bound = (best > 0) & (best < most * (1 - 1e-9))
        self.short += (reached[bound] / best[bound]).tolist()


def main() -> int:
    """Print the results, one JSON object a line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--instances", type=int, default=30)
    parser.add_argument("--fleet", choices=("tight", "drawn"), default="tight")
    parser.add_argument("--modules", type=int, nargs="*", default=list(BASES), choices=list(BASES))
    options = parser.parse_args()
    for modules in options.modules:
        for found in measure(modules, options.instances, tight=options.fleet == "tight"):
            print(json.dumps(found), flush=True)
    return 0


def measure(modules: int, instances: int, *, tight: bool) -> Iterator[dict[str, Any]]:
    """The figures over fleets that tune a base of so many modules."""
    records = {name: Record() for name in ("exact", "stage_one", *SEARCHES)}
    chosen: list[int] = []
    candidates: list[float] = []
    for seed in range(instances):
        search, whole = _instance(modules, seed, tight=tight)
        _compare(search, whole, np.random.default_rng([seed, modules]), records)
        chosen.append(len(search.task.items))
        candidates.append(int((Options(search.sites, search.task).places >= 0).sum()) / len(search.sites))
    case = (
        f"{instances} {'tight ' if tight else ''}fleets of {DEVICES} devices; {min(chosen)} to {max(chosen)} of "
        f"{modules} modules chosen, {fmean(candidates):.1f} candidates a device"
    )
    yield from _figures(modules, records, case)


def _compare(search: Search, whole: Search, rng: np.random.Generator, records: dict[str, Record]) -> None:
    """All searches over one instance."""
    items, options = search.task.items, Options(search.sites, search.task)
    calls: dict[str, Callable[[], Numbers]] = {
        "greedy": partial(_objectives, search, exactly=False),
        "equal": partial(equal_ranks, options, items),
        **{f"random_{times}": partial(random_search, rng, options, items, times) for times in TIMES},
    }
    most = math.fsum(item.values[-1] for item in items)
    best = _timed(records["exact"], partial(_objectives, search, exactly=True))
    for name, call in calls.items():
        records[name].add(_timed(records[name], call), best, most)
    records["stage_one"].add(calls["greedy"](), _objectives(whole, exactly=True), most=0.0)


def _instance(modules: int, seed: int, *, tight: bool) -> tuple[Search, Search]:
    """The second stage over the modules that the first one chose, and over all of them."""
    state = warmed(job(STRATEGY), transformer(*BASES[modules]), DEVICES, seed, tight=tight)
    (waiting,) = tick(state).state.jobs.values()
    planner, seen = waiting.planner, view(tick(state).state)
    assert isinstance(planner, FedPipePlanner) and planner.scores
    every = tuned_modules(seen.facts, waiting.spec.base)
    first = important(planner.scores, every)
    stage, whole = (searched(seen, waiting.spec, found, planner.scores, planner.model) for found in (first, every))
    return stage, whole


def _objectives(search: Search, *, exactly: bool) -> Numbers:
    """J of each device."""
    return np.array([choice.objective for choice in choose(search.sites, search.task, exactly)])


def _timed(record: Record, call: Callable[[], Numbers]) -> Numbers:
    begun = time.process_time()
    found = call()
    record.seconds += time.process_time() - begun
    return found


def _figures(modules: int, records: dict[str, Record], case: str) -> Iterator[dict[str, Any]]:
    """A figure for each search, and one for the times."""
    quick = records["greedy"].seconds
    for name, what in SEARCHES.items():
        record, short = records[name], records[name].short
        few = (
            f"of the {len(short)} devices short of room mean {100 * fmean(short):.2f} %, worst {100 * min(short):.2f} %"
        )
        note = (
            f"mean; worst fleet {100 * min(record.fleets):.3f} %; {few if short else 'no device is short of room'}; "
            f"{record.seconds / quick:.3g} x the CPU time of the two-stage search; {case}"
        )
        yield _figure(f"{name}_{modules}", f"{what}, {modules} modules: objective, of the optimum", record, note)
    whole = records["stage_one"]
    note = f"the first stage leaves out a fifth of the score; worst fleet {100 * min(whole.fleets):.2f} %; {case}"
    what = f"two-stage search, {modules} modules: objective, of the optimum over all modules"
    yield _figure(f"stage_one_{modules}", what, whole, note)
    note = (
        f"{1000 * quick / len(whole.fleets):.1f} CPU ms a fleet by the two-stage search, "
        f"{1000 * records['exact'].seconds / len(whole.fleets):.0f} exactly, by HiGHS where the relaxation leaves a "
        f"doubt; {case}"
    )
    what = f"exact search, {modules} modules: CPU time, to the two-stage one"
    ratio = round(records["exact"].seconds / quick, 3)
    yield {
        "name": f"search.exact_time_{modules}",
        "what": what,
        "value": ratio,
        "unit": "x",
        "target": "",
        "note": note,
    }


def _figure(name: str, what: str, record: Record, note: str) -> dict[str, Any]:
    share = round(100 * fmean(record.fleets), 4)
    return {"name": f"search.{name}", "what": what, "value": share, "unit": "%", "target": "", "note": note}


if __name__ == "__main__":
    sys.exit(main())
