"""A small model, fleets and reports for the tests of the `fedpipe` planner."""

from __future__ import annotations

from typing import Any

from msgspec.structs import replace

from coordinator.core.facts import ModelFacts, ModuleSpec
from coordinator.core.planning.base import Candidate, FleetView, Plan, RoundReport
from coordinator.core.planning.fedpipe import FedPipePlanner
from coordinator.core.planning.reasons import PATTERN
from shared.jobs import JobSpec
from shared.messages import UpdateFacts, Work
from tests.unit.planning_cases import job, result

SIDES = {"k": (2048, 2048), "o": (4096, 2048), "q": (2048, 1024), "v": (2048, 2048)}
SCORES = {"k": 0.4, "o": 0.35, "q": 0.15, "v": 0.1}
NEED_MIB = 431
"""Memory in MiB of a device that holds the small model below at 4 bits with the smallest batch, about."""


def facts() -> ModelFacts:
    """One block whose adapters weigh as much as the base: ranks matter for time and memory."""
    modules = [ModuleSpec(name=name, out=out, inp=inp, block=0) for name, (out, inp) in SIDES.items()]
    return ModelFacts(
        modules=modules, base_digest="d" * 64, linear_params=400_000, other_params=1000, blocks=1, hidden=64,
        intermediate=27_000,
    )  # fmt: skip


def fleet(*candidates: Candidate, round: int = 2) -> FleetView:
    return FleetView(round=round, candidates=tuple(candidates), facts=facts())


def spec(rank: int = 32, every: int = 10, warm_up: int = 1, **given: Any) -> JobSpec:
    made = job(rank=rank, **given)
    return replace(made, strategy=replace(made.strategy, name="fedpipe", rescore_every=every, warm_up_steps=warm_up))


def scored(round: int = 1, scores: dict[str, float] | None = None) -> FedPipePlanner:
    return FedPipePlanner(scores=scores or SCORES, scored=round)


def told(importance: dict[str, float], samples: int = 100) -> UpdateFacts:
    return replace(result(batch=10, step_s=1.0), samples=samples, importance=importance)


def work(score: bool = True, *names: str) -> Work:
    return Work(ranks=dict.fromkeys(names or SCORES, 8), batch=8, bits=32, steps=10, score=score)


def report(results: dict[str, UpdateFacts], round: int = 1, **works: Work) -> RoundReport:
    asked = {device: works.get(device, work()) for device in results}
    return RoundReport(round=round, works=asked, results=results, facts=facts(), job=spec())


def check_reasons(plan: Plan) -> None:
    for name, part in plan.participants.items():
        numbers = {
            "batch": part.batch, "bits": part.bits, "steps": part.steps, "rank": max(part.ranks.values()),
            "weights": len(plan.weights.selected) if plan.weights else -1,
        }  # fmt: skip
        assert set(part.reasons) == set(numbers), name
        for key, text in part.reasons.items():
            match = PATTERN.fullmatch(text)
            assert match, text
            assert (match["name"], int(match["value"])) == (key, numbers[key])
            assert any(c.isdigit() for c in match["reading"]) and any(c.isdigit() for c in match["bound"])
