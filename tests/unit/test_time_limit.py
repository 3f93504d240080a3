"""How long the work of a round may take on a device (`common.time_limit`)."""

from __future__ import annotations

import re

import pytest
from msgspec.structs import replace

from coordinator.core.planning import registry
from coordinator.core.planning.base import RoundReport
from coordinator.core.planning.common import LATE, time_limit
from coordinator.core.planning.cost_model import CostModel
from shared.jobs import JobSpec
from shared.messages import UpdateFacts, Work
from tests.unit.planning_cases import device, job, minilm, result, view


def report(results: dict[str, UpdateFacts], asked: JobSpec, number: int = 1) -> RoundReport:
    ranks = {module.name: 8 for module in minilm().modules}
    works = {name: Work(ranks=ranks, batch=one.batch, bits=one.bits, steps=10) for name, one in results.items()}
    loads = {name: load for name in results if (load := device(name).load) is not None}
    return RoundReport(round=number, works=works, results=results, loads=loads, facts=minilm(), job=asked)


def test_nothing_is_limited_before_speeds_were_measured() -> None:
    assert time_limit(job(), CostModel(), "a", 32, 10.0) == 0.0
    full = replace(report({"a": result(batch=8, step_s=1.0)}, job()), results={}, batch_limits={"a": 4})
    assert time_limit(job(), CostModel().learn(full), "a", 32, 10.0) == 0.0, "of it the largest batch alone is known"
    bounded = replace(job(), rounds=replace(job().rounds, train_for_s=7.0))
    assert time_limit(bounded, CostModel(), "a", 32, 10.0) == 7.0


def test_a_device_has_a_little_more_than_its_round_and_the_time_to_load_where_it_did_not_yet() -> None:
    seen = {"a": result(batch=8, step_s=1.0, load_s=30.0), "b": result(batch=8, step_s=1.0, load_s=4.0)}
    model = CostModel().learn(report(seen, job()))
    model = model.learn(report({"a": result(batch=8, step_s=1.0)}, job(), 2))
    assert model.load_s == 30.0
    assert time_limit(job(), model, "a", 32, 10.0) == pytest.approx(LATE * 10.0)
    assert time_limit(job(), model, "c", 32, 10.0) == pytest.approx(LATE * 10.0 + 30.0)
    assert time_limit(job(), model, "a", 4, 10.0) == pytest.approx(LATE * 10.0 + 30.0), "another base to load"
    bounded = replace(job(), rounds=replace(job().rounds, train_for_s=7.0))
    assert time_limit(bounded, model, "c", 32, 10.0) == 7.0
    near = replace(job(), rounds=replace(job().rounds, deadline_s=30.0))
    assert time_limit(near, model, "c", 32, 10.0) == pytest.approx(27.0), "what comes after the deadline is lost"


@pytest.mark.parametrize(
    ("name", "limits"), [("fedpipe", True), ("legend", True), ("uniform", False), ("fedlora", False)]
)
def test_methods_with_a_round_time_of_their_own_end_work_that_is_late(name: str, limits: bool) -> None:
    asked = job(batch=8)
    asked = replace(asked, strategy=replace(asked.strategy, name=name))
    here = ("a", "b", "c")
    importance = {module.name: 1.0 / 24 for module in minilm().modules}
    seen = {one: replace(result(batch=8, step_s=1.0, load_s=2.0), importance=importance) for one in here}
    planner = registry.create(asked.strategy)
    first = planner.plan(view(*map(device, here)), asked)
    assert {work.train_for_s for work in first.participants.values()} == {0.0}
    told = replace(report(seen, asked), works={one: replace(first.participants[one], batch=8) for one in here})
    plan = planner.learn(told).plan(view(*map(device, (*here, "new")), round=2), asked)
    for work in plan.participants.values():
        assert (work.train_for_s > 0) == limits
        assert ("training time" in work.reasons["steps"]) == limits
    if limits:
        told = re.search(r"round target ([\d.]+) s: |batches for ([\d.]+) s", plan.reason)
        assert told is not None, plan.reason
        target = float(told[1] or told[2])
        assert plan.participants["a"].train_for_s == pytest.approx(LATE * target, rel=0.01)
        late = plan.participants["new"].train_for_s - plan.participants["a"].train_for_s
        assert late == pytest.approx(2.0), "it has to load the base first"
