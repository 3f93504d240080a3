"""Fleets and reports for the tests of the `legend` planner."""

from __future__ import annotations

import random

from msgspec.structs import replace

from coordinator.core.planning.base import Candidate, FleetView, Plan, RoundReport
from coordinator.core.planning.cost_model import BITS_TIME
from coordinator.core.planning.demand import demand
from coordinator.core.planning.legend import LegendPlanner
from shared.jobs import JobSpec
from shared.messages import Work
from tests.unit.planning_cases import device, job, result, view

RANKS = (2, 4, 7, 9, 12, 14)
"""Of MiniLM's six blocks at rank 8."""
FLEET = tuple(
    device(f"d{index:02d}", cores=cores, rows=1000 + 100 * index)
    for index, cores in enumerate([0.5, 0.55, 0.6, 1.0, 1.1, 1.2, 1.3, 2.0, 2.1, 2.2])
)


def planned(*candidates: Candidate, spec: JobSpec | None = None, planner: LegendPlanner | None = None) -> Plan:
    return (planner or LegendPlanner()).plan(view(*candidates), spec or job())


def depth_of(work: Work) -> int:
    """Blocks that the work tunes; they must be the last ones, with the ranks of the fleet."""
    blocks = sorted({int(name.split(".")[1]) for name in work.ranks})
    assert blocks == list(range(6 - len(blocks), 6))
    assert work.ranks == {f"layer.{block}.{part}": RANKS[block] for block in blocks for part in "qkvo"}
    return len(blocks)


def depths_of(plan: Plan) -> dict[str, int]:
    return {name: depth_of(work) for name, work in plan.participants.items()}


def reported(
    plan: Plan, seen: FleetView, spec: JobSpec, rng: random.Random | None = None, adapter_bytes: int = 2_000_000
) -> RoundReport:
    """A round in which each device took a core-second for 10 GFLOP."""
    loads = {candidate.device: candidate.load for candidate in seen.candidates if candidate.load}
    results = {}
    for index, (name, work) in enumerate(sorted(plan.participants.items())):
        load = loads[name]
        cores = load.cores if load.foreign_cores == 0 else load.cores / 2
        sample_s = demand(seen.facts, spec, work.ranks).flop / 1e10
        step_s = sample_s * work.batch * BITS_TIME[work.bits] / cores * (rng.uniform(0.9, 1.1) if rng else 1.0)
        told = result(batch=work.batch, step_s=step_s, bits=work.bits, cores_used=cores)
        results[name] = replace(told, fetch_s=1.0 + 0.1 * index)
    return RoundReport(
        round=seen.round, works=plan.participants, results=results, loads=loads, facts=seen.facts, job=spec,
        adapter_bytes=adapter_bytes,
    )  # fmt: skip


def learned(planner: LegendPlanner, seen: FleetView, spec: JobSpec, rounds: int = 1) -> LegendPlanner:
    for _ in range(rounds):
        planner = planner.learn(reported(planner.plan(seen, spec), seen, spec))
    return planner
