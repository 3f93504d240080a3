"""How long the work of a round may take on a device (`common.Ends`)."""

from __future__ import annotations

import re

import pytest
from msgspec.structs import replace

from coordinator.core.planning import registry
from coordinator.core.planning.base import Plan, Planner, RoundReport
from coordinator.core.planning.common import (
    ASSUMED_LINK,
    LINK_LATE,
    End,
    Ends,
    Moved,
    global_rank,
    moved,
    steps_reason,
    steps_within,
)
from coordinator.core.planning.cost_model import CostModel
from shared.jobs import JobSpec
from shared.messages import UpdateFacts, Work
from tests.unit.planning_cases import device, job, minilm, result, view

NONE = Moved(0, 0)


def report(results: dict[str, UpdateFacts], asked: JobSpec, number: int = 1) -> RoundReport:
    ranks = {module.name: 8 for module in minilm().modules}
    works = {name: Work(ranks=ranks, batch=one.batch, bits=one.bits, steps=10) for name, one in results.items()}
    loads = {name: load for name in results if (load := device(name).load) is not None}
    return RoundReport(round=number, works=works, results=results, loads=loads, facts=minilm(), job=asked)


def asked_of(name: str) -> JobSpec:
    asked = job(batch=8)
    return replace(asked, strategy=replace(asked.strategy, name=name))


def planned_and_learned(asked: JobSpec, seen: dict[str, UpdateFacts], down: int = 0) -> tuple[Plan, Planner]:
    """The plan of a first round, and the planner after `seen` came of it, at batch 8 and with scores."""
    importance = {module.name: 1.0 / 24 for module in minilm().modules}
    planner = registry.create(asked.strategy)
    first = planner.plan(view(*map(device, seen)), asked)
    works = {one: replace(first.participants[one], batch=8) for one in seen}
    told = report({one: replace(facts, importance=importance) for one, facts in seen.items()}, asked)
    return first, planner.learn(replace(told, works=works, adapter_bytes=down))


def test_nothing_is_limited_before_speeds_were_measured() -> None:
    assert Ends(job(), CostModel()).of("a", 32, 10.0, 10, NONE) == End(0.0)
    full = replace(report({"a": result(batch=8, step_s=1.0)}, job()), results={}, batch_limits={"a": 4})
    of_batch = CostModel().learn(full)
    assert Ends(job(), of_batch).of("a", 32, 10.0, 10, NONE) == End(0.0), "of it the largest batch alone is known"
    bounded = replace(job(), rounds=replace(job().rounds, train_for_s=7.0))
    assert Ends(bounded, CostModel()).of("a", 32, 10.0, 10, NONE) == End(7.0)


def test_work_ends_with_its_round_and_a_device_that_has_to_load_first_has_half_its_time_left_at_least() -> None:
    """Of ten steps in 10 s the last that begins before 9.5 s ends before 10.5 s at the planned speed."""
    seen = {"a": result(batch=8, step_s=1.0, load_s=30.0), "b": result(batch=8, step_s=1.0, load_s=4.0)}
    model = CostModel().learn(report(seen, job()))
    model = model.learn(report({"a": result(batch=8, step_s=1.0)}, job(), 2))
    assert model.load_s == 30.0
    ends = Ends(job(), model)
    assert ends.of("a", 32, 10.0, 10, NONE).limit == pytest.approx(9.5)
    assert ends.of("a", 32, 10.0, 1, NONE).limit == pytest.approx(5.0), "one step is done in any case"
    assert ends.of("c", 32, 10.0, 10, NONE) == End(pytest.approx(4.75 + 30.0), 0, 30.0)
    assert ends.of("a", 4, 10.0, 10, NONE) == End(pytest.approx(4.75 + 30.0), 0, 30.0), "another base to load"
    assert ends.of("c", 32, 100.0, 10, NONE) == End(pytest.approx(95.0), 3, 30.0), "that is soon: it ends with all"
    bounded = replace(job(), rounds=replace(job().rounds, train_for_s=7.0))
    assert Ends(bounded, model).of("c", 32, 10.0, 10, NONE).limit == 7.0
    near = replace(job(), rounds=replace(job().rounds, deadline_s=30.0))
    assert Ends(near, model).of("c", 32, 10.0, 10, NONE).limit == pytest.approx(27.0), (
        "what comes after the deadline is lost"
    )


def test_all_deliver_at_one_time_but_for_links_that_leave_no_time_to_train() -> None:
    adapter = 4_000_000
    seen = {
        name: replace(result(batch=8, step_s=1.0), fetch_s=adapter / link)
        for name, link in (("slow", 2e5), ("usual", 1e6), ("fast", 4e6))
    }
    model = CostModel().learn(replace(report(seen, job()), adapter_bytes=adapter))
    ends = Ends(job(), model)
    for up in (0, 8_000_000):
        moves = Moved(adapter, up)
        usual_s = moves.both / 1e6
        for name, link in (("usual", 1e6), ("fast", 4e6), ("new", 1e6)):
            found = ends.of(name, 32, 10.0, 10, moves, usual_s).limit
            assert found + up / link == pytest.approx(9.5 + usual_s), (name, up)
        # Its target is shorter by what its link takes too long; half of that is left where the download takes twice as
        # long as it should, and all where it doesn't.
        found = ends.of("slow", 32, 10.0, 10, moves, usual_s).limit
        assert found == pytest.approx(4.75 + LINK_LATE * 20.0) and found >= 9.5 + 20.0
        assert ends.of("slow", 32, 10.0, 10, moves, usual_s).extra == 0, "as planned it ends with the others"


def test_a_device_may_go_on_for_a_quarter_of_its_steps_where_something_ends_it() -> None:
    model = CostModel().learn(report({"a": result(batch=8, step_s=1.0)}, job()))
    assert [Ends(job(), model).of("a", 32, 10.0, steps, NONE).extra for steps in (1, 4, 8, 10)] == [1, 1, 2, 3]
    assert Ends(job(), CostModel()).of("a", 32, 10.0, 8, NONE).extra == 0, "nothing ends it"


def test_extra_steps_are_expected_where_there_is_time_for_them() -> None:
    def expected(limit: float, begins_s: float) -> float:
        seconds, why = steps_reason(job(), 8, 1.0, "", End(limit, 2, begins_s))
        assert ("up to 2 more while there is time" in why) and (" meets " in why) == (limit > 7.0)
        return seconds

    assert [expected(limit, 0.0) for limit in (5.0, 7.5, 8.0, 8.5, 9.5, 99.0)] == [5.0, 8.0, 8.0, 9.0, 10.0, 10.0]
    assert [expected(limit, 3.0) for limit in (10.5, 11.5, 12.5)] == [8.0, 9.0, 10.0]


def test_what_goes_as_planned_and_meets_the_deadline_is_never_cut() -> None:
    down, up = 4_000_000, 1_000_000
    seen = {
        name: replace(result(batch=8, step_s=1.0), fetch_s=down / link)
        for name, link in (("slow", 5e5), ("usual", 1e6), ("fast", 4e6))
    }
    model = CostModel().learn(replace(report(seen, job()), adapter_bytes=down))
    for deadline_s in (20.0, 30.0, 100.0):
        near = replace(job(), rounds=replace(job().rounds, deadline_s=deadline_s))
        ends = Ends(near, model)
        for name, link in (("slow", 5e5), ("usual", 1e6), ("fast", 4e6)):
            train_s = 0.9 * deadline_s - (down + up) / link
            limit = ends.of(name, 32, train_s, 8, Moved(down, up)).limit
            assert limit >= down / link + train_s * 7 / 8 - 1e-9, f"the last step begins: {name}, {deadline_s}"
            assert limit + up / link <= deadline_s, "what is delivered then still counts"
    soon = Ends(replace(job(), rounds=replace(job().rounds, deadline_s=20.0)), model)
    assert soon.of("slow", 32, 50.0, 8, Moved(0, 10 * down)).limit == pytest.approx(8.0), "0 would be no limit"


@pytest.mark.parametrize(
    ("name", "limits"), [("fedpipe", True), ("legend", True), ("uniform", False), ("fedlora", False)]
)
def test_methods_with_a_round_time_of_their_own_end_work_that_is_late(name: str, limits: bool) -> None:
    asked, here = asked_of(name), ("a", "b", "c")
    first, planner = planned_and_learned(asked, dict.fromkeys(here, result(batch=8, step_s=1.0, load_s=2.0)))
    assert {work.train_for_s for work in first.participants.values()} == {0.0}
    now = view(*map(device, (*here, "new")), round=2)
    plan = planner.plan(now, asked)
    for work in plan.participants.values():
        assert (work.train_for_s > 0) == limits
        assert ("training time" in work.reasons["steps"]) == limits
    if limits:
        told = re.search(r"round target ([\d.]+) s: |batches for ([\d.]+) s", plan.reason)
        assert told is not None, plan.reason
        # No link was measured, so that the target of `legend` has no transfer in it.
        train_s = float(told[1] or told[2])
        work = plan.participants["a"]
        size = moved(now, asked, work.ranks, global_rank(now, asked, max(work.ranks.values())), 1).down
        down_s = size / ASSUMED_LINK
        ends_s = train_s * (1 - 0.5 / work.steps)
        assert work.train_for_s == pytest.approx(max(ends_s + down_s, ends_s / 2 + LINK_LATE * down_s), rel=0.01)
        assert plan.participants["new"].train_for_s == pytest.approx(
            max(ends_s + down_s, ends_s / 2 + LINK_LATE * down_s), rel=0.01
        ), "it has to load the base first, and ends with the others"


def test_a_work_of_one_step_that_begins_too_late_is_said_to_be() -> None:
    told = [steps_reason(job(), 1, 10.0, "", End(7.0, 0, begins_s)) for begins_s in (0.0, 6.0, 7.0, 30.0)]
    assert [seconds for seconds, _ in told] == [10.0] * 4, "it is done in any case"
    assert [" meets " in why for _, why in told] == [True, True, False, False]


@pytest.mark.parametrize("name", ["fedpipe", "legend"])
def test_nobody_waits_for_a_device_that_loads_its_base(name: str) -> None:
    """Equal devices on equal links; 3 s to load, of a round of ten steps of 1 s."""
    asked, here, down = asked_of(name), ("a", "b", "c"), 1_000_000
    told = replace(result(batch=8, step_s=1.0, load_s=3.0), fetch_s=1.0)
    _, planner = planned_and_learned(asked, dict.fromkeys(here, told), down)
    plan = planner.plan(replace(view(*map(device, (*here, "new")), round=2), adapter_bytes=down), asked)
    limits = {one: work.train_for_s for one, work in plan.participants.items()}
    assert limits["new"] == pytest.approx(limits["a"], rel=0.02)
    assert plan.predicted_s["new"] < plan.predicted_s["a"]
    assert " from 4 s on, the last from " in plan.participants["new"].reasons["steps"]
    assert " from 1 s on, the last from " in plan.participants["a"].reasons["steps"]


@pytest.mark.parametrize("link", [0.0, 5e5, 4e6])
@pytest.mark.parametrize("name", ["fedpipe", "legend"])
def test_a_device_that_goes_as_planned_does_all_its_steps(name: str, link: float) -> None:
    """Equal devices, so that each is the median one; over a link that was not measured (0), a slow and a fast one."""
    asked, here, down = asked_of(name), ("a", "b", "c"), 2_000_000
    told = replace(result(batch=8, step_s=1.0), fetch_s=down / link if link else 0.0)
    _, planner = planned_and_learned(asked, dict.fromkeys(here, told), down)
    plan = planner.plan(replace(view(*map(device, here), round=2), adapter_bytes=down), asked)
    for work in plan.participants.values():
        asked_for = re.search(r"asked x ([\d.]+) s", work.reasons["steps"])
        assert asked_for is not None
        step_s = float(asked_for[1])
        fetched_s = down / (link or ASSUMED_LINK)
        assert fetched_s + (work.steps - 1) * step_s < work.train_for_s
        assert " meets " in work.reasons["steps"]


def test_steps_that_begin_within_a_limit_are_done() -> None:
    assert [steps_within(limit, 8, 1.0) for limit in (0.0, 0.5, 1.0, 1.5, 7.5, 99.0)] == [8, 1, 1, 2, 8, 8]
    assert steps_within(5.0, 8, 0.0) == 8


@pytest.mark.parametrize("name", ["fedpipe", "legend"])
def test_a_link_that_was_not_measured_counts_as_the_median_one(name: str) -> None:
    """Equal devices at 0.5, 1 and 4 MB/s, and one that is new."""
    asked, down = asked_of(name), 4_000_000
    links = {"slow": 5e5, "usual": 1e6, "fast": 4e6}
    seen = {one: replace(result(batch=8, step_s=1.0), fetch_s=down / link) for one, link in links.items()}
    _, planner = planned_and_learned(asked, seen, down)
    plan = planner.plan(replace(view(*map(device, (*seen, "new")), round=2), adapter_bytes=down), asked)
    batches = {one: work.batch for one, work in plan.participants.items()}
    assert batches["new"] == batches["usual"] > batches["slow"]
    assert "(link not yet measured: the median's 1.00 MB/s)" in plan.participants["new"].reasons["steps"]
