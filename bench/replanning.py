"""A re-plan for 10,000 devices, by every planner: `python bench/replanning.py [NAME] [--devices N]`.

As the coordinator does it: the tick that commits a round, after which the planner learns what all devices delivered,
and the tick that plans the next one over all of them, with the plan's digest, its record and the assignments to
publish, with the collector set as there. Writing and sending them is not part of it. One thread; prints one JSON object
a figure.
"""

from __future__ import annotations

import os

os.environ["OPENBLAS_NUM_THREADS"] = "1"  # before numpy is imported

import argparse
import json
import sys
import time
from collections.abc import Callable
from statistics import median
from typing import Any, NamedTuple

from warm_fleet import job, tick, transformer, view, warmed

from coordinator.core import records as rec
from coordinator.core.commands import PublishAssign
from coordinator.core.planning.registry import PLANNERS
from coordinator.core.turn import State
from shared.allocator import collect_rarely
from shared.jobs import StrategySpec

BLOCKS, HIDDEN = 6, 384
"""MiniLM."""
SEED = 1


class Timed(NamedTuple):
    """Wall seconds of the tick that learns, of that which plans, of the planner in it; CPU seconds of both ticks."""

    learned: float
    planned: float
    planner: float
    cpu: float

    @property
    def whole(self) -> float:
        """Of both ticks."""
        return self.learned + self.planned


def main() -> int:
    """Print the results, one JSON object a line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--devices", type=int, default=10_000)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("planner", nargs="?", choices=sorted(PLANNERS), help="only this one")
    options = parser.parse_args()
    collect_rarely()
    for name in [options.planner] if options.planner else sorted(PLANNERS):
        print(json.dumps(measure(name, options.devices, options.repeat)), flush=True)
    return 0


def measure(name: str, devices: int, repeat: int) -> dict[str, Any]:
    """The figure of one planner."""
    state = warmed(job(StrategySpec(name=name)), transformer(BLOCKS, HIDDEN, name), devices, SEED)
    runs = [_replan(state) for _ in range(repeat + 1)][1:]  # the first one warms up
    whole, learned, planned, planner, cpu = (
        median(found)
        for found in zip(*((one.whole, one.learned, one.planned, one.planner, one.cpu) for one in runs), strict=True)
    )
    taking = _participants(state)
    note = (
        f"{taking} of {devices} take part; {learned:.2f} s to learn, {planned:.2f} s to plan, of which the planner "
        f"{planner:.2f} s; {cpu:.2f} CPU s; {BLOCKS} blocks of {HIDDEN}, fleet `jetson`, after a round in which all "
        f"participants delivered; median of {repeat}"
    )
    return {
        "name": f"replanning.{name}", "what": f"re-plan for {devices:,} devices, `{name}`",
        "value": round(whole, 4), "unit": "s", "target": "<= 1", "note": note,
    }  # fmt: skip


def _replan(state: State) -> Timed:
    """One re-plan from `state`, which stays as it is."""
    begun = time.process_time()
    learned, committed = _timed(lambda: tick(state).state)
    planned, _ = _timed(lambda: tick(committed))
    cpu = time.process_time() - begun
    (waiting,) = committed.jobs.values()
    seen = view(committed)
    planner, _ = _timed(lambda: waiting.planner.plan(seen, waiting.spec))
    return Timed(learned, planned, planner, cpu)


def _participants(state: State) -> int:
    """How many the next plan asks; that it is a plan, and published."""
    planned = tick(tick(state).state)
    (record,) = planned.records
    assert isinstance(record, rec.RoundPlanned), planned.state.notices
    asked = [one for one in planned.commands if isinstance(one, PublishAssign) and one.assign.assignment]
    assert len(asked) == len(record.plan.participants)
    return len(asked)


def _timed(call: Callable[[], Any]) -> tuple[float, Any]:
    begun = time.perf_counter()
    found = call()
    return time.perf_counter() - begun, found


if __name__ == "__main__":
    sys.exit(main())
