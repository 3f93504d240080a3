"""The `fedpipe` planner: which weights matter, and when they are scored again."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from coordinator.core.facts import ModuleSpec
from coordinator.core.planning.base import RoundReport
from coordinator.core.planning.digest import plan_digest
from coordinator.core.planning.fedpipe import FedPipePlanner, gain, important, merged_scores, rank_levels
from shared.codec import pack, unpack
from shared.jobs import StrategySpec
from tests.unit.fedpipe_cases import (
    NEED_MIB,
    SCORES,
    SIDES,
    check_reasons,
    facts,
    fleet,
    report,
    scored,
    spec,
    told,
    work,
)
from tests.unit.planning_cases import device, result

# ---- which weights


def test_scores_are_merged_by_samples() -> None:
    merged = merged_scores(report({"a": told({"q": 1.0}, 300), "b": told({"q": 0.5, "v": 0.5}, 100)}))
    assert merged == pytest.approx({"q": 0.875, "v": 0.125})


def test_what_a_device_may_not_claim_does_not_count() -> None:
    """Modules that it was not asked for, claims of more than there is, scores that nobody asked for."""
    results = {"a": told({"q": 1.0, "k": 1.0, "o": 0.9, "gate": 0.7}), "b": told({"v": 1.0}), "c": told({"v": 1.0})}
    found = merged_scores(report(results, a=work(True, "q", "k"), b=work(True, "q", "v"), c=work(False)))
    assert found == pytest.approx({"q": 0.25, "k": 0.25, "v": 0.5})
    assert merged_scores(report({"a": told({})})) == {}
    assert merged_scores(report({"a": told({"q": 1.0}, 0)})) == {}
    capped = report({"a": told({"q": 1.0}, 10**9), "b": told({"v": 1.0}, 1), "c": told({"v": 1.0}, 1)})
    capped = replace(capped, job=replace(spec(), strategy=StrategySpec(max_share=0.4)))
    assert merged_scores(capped) == pytest.approx({"q": 0.4, "v": 0.6})


def test_the_smallest_set_with_four_fifths_of_the_score_is_chosen() -> None:
    modules = facts().modules
    assert [module.name for module in important(SCORES, modules)] == ["k", "o", "q"]
    assert [module.name for module in important({"k": 0.8, "o": 0.2}, modules)] == ["k"]
    assert [module.name for module in important({"k": 0.79, "o": 0.21}, modules)] == ["k", "o"]
    # Of equal scores q (3072 a rank) is cheaper than k and v (4096), and those than o (6144).
    assert [module.name for module in important(dict.fromkeys(SCORES, 0.25), modules)] == ["k", "o", "q", "v"]
    equal = {"k": 0.3, "o": 0.3, "q": 0.3, "v": 0.1}
    assert [module.name for module in important(equal, modules)] == ["k", "o", "q"]
    assert [module.name for module in important({"k": 0.0, "o": 0.4, "q": 0.4, "v": 0.4}, modules[:3])] == ["o", "q"]
    assert [module.name for module in important({"k": 0.5, "o": 0.2, "q": 0.2, "v": 0.2}, modules)] == ["k", "q", "v"]


def test_ranks_to_choose_from() -> None:
    big, small = ModuleSpec(name="q", out=64, inp=64), ModuleSpec(name="q", out=5, inp=64)
    assert rank_levels(big, 32) == (0, 2, 4, 8, 16, 32)
    assert rank_levels(big, 8) == (0, 2, 4, 8)
    assert rank_levels(big, 12) == (0, 2, 4, 8, 12)
    assert rank_levels(big, 1) == (0, 1)
    assert rank_levels(small, 32) == (0, 2, 4, 5)
    assert (gain(0, 32), gain(32, 32)) == (0.0, 1.0)


# ---- when


def test_the_first_round_scores_everything_at_a_low_rank() -> None:
    plan = FedPipePlanner().plan(fleet(device("a"), device("b"), round=1), spec())
    for part in plan.participants.values():
        assert part.score
        assert part.ranks == dict.fromkeys(SIDES, 8)
    assert plan.weights is not None and (plan.weights.scores, plan.weights.scored) == ({}, 0)
    assert "0 steps and no scores before round 1 meets the warm-up of 1 step" in plan.reason
    check_reasons(plan)
    low = FedPipePlanner().plan(fleet(device("a"), round=1), spec(rank=4))
    assert set(low.participants["a"].ranks.values()) == {4}


@pytest.mark.parametrize(("warm_up", "last"), [(1, 1), (10, 1), (11, 2), (20, 2), (21, 3), (50, 5)])
def test_scores_are_asked_for_at_the_end_of_the_warm_up(warm_up: int, last: int) -> None:
    """Rounds of 10 local steps."""
    for number in range(1, last + 3):
        plan = FedPipePlanner().plan(fleet(device("a"), round=number), spec(warm_up=warm_up))
        asked = plan.participants["a"]
        check_reasons(plan)
        assert (asked.score, set(asked.ranks)) == (number >= last, set(SIDES))


@pytest.mark.parametrize(
    ("every", "scoring"), [(10, {1, 11, 21}), (3, {1, 4, 7, 10, 13, 16, 19, 22}), (1, set(range(1, 23)))]
)
def test_scores_are_renewed_every_few_rounds(every: int, scoring: set[int]) -> None:
    planner, found = FedPipePlanner(), set()
    for number in range(1, 23):
        plan = planner.plan(fleet(device("a"), round=number), spec(every=every))
        asked = plan.participants["a"]
        check_reasons(plan)
        if asked.score:
            found.add(number)
            assert set(asked.ranks) == set(SIDES), "what is not tuned has no gradient"
        facts_of = told(SCORES) if asked.score else told({})
        planner = planner.learn(
            RoundReport(round=number, works=plan.participants, results={"a": facts_of}, facts=facts(), job=spec())
        )
    assert found == scoring


def test_a_round_that_told_no_scores_is_followed_by_another() -> None:
    planner = FedPipePlanner().learn(report({"a": told({})}))
    assert planner.plan(fleet(device("a")), spec()).participants["a"].score
    planner = scored(1).learn(report({"a": told({})}, round=11))
    late = planner.plan(fleet(device("a"), round=12), spec()).participants["a"]
    assert late.score
    assert "scores of round 1 are 11 rounds old" in late.reasons["weights"]


def test_new_scores_replace_the_old() -> None:
    planner = scored(1).learn(report({"a": told({"v": 0.9, "q": 0.1})}, round=11))
    plan = planner.plan(fleet(device("a"), round=12), spec())
    assert plan.weights is not None
    assert (plan.weights.selected, plan.weights.scored) == (["v"], 11)
    assert set(plan.participants["a"].ranks) == {"v"}
    assert (
        "0.900 of the score of round 11 on 1 of 4 modules meets 0.8 wanted" in plan.participants["a"].reasons["weights"]
    )


def test_a_restart_learns_the_same() -> None:
    """The log's reports, learned again, give the same planner, and it the same plan."""
    planner, reports = FedPipePlanner(), []
    devices = [device("a"), device("b", cores=0.4), device("c", memory=NEED_MIB + 3)]
    for number in range(1, 6):
        seen = fleet(*devices, round=number)
        plan = planner.plan(seen, spec(every=3))
        results = {
            name: replace(
                result(batch=part.batch, step_s=0.1 * part.batch, bits=part.bits, cores_used=0.4),
                importance={"q": 0.6, "o": 0.4} if part.score else {},
            )
            for name, part in plan.participants.items()
        }
        loads = {c.device: c.load for c in devices if c.load and c.device in results}
        reports.append(
            RoundReport(
                round=number, works=plan.participants, results=results, loads=loads, facts=facts(), job=spec(every=3)
            )
        )
        planner = planner.learn(reports[-1])
    again = FedPipePlanner()
    for one in reports:
        again = again.learn(unpack(pack(one), RoundReport))
    assert again == planner
    assert unpack(pack(planner), FedPipePlanner) == planner
    assert plan_digest(again.plan(fleet(*devices, round=6), spec())) == plan_digest(
        planner.plan(fleet(*devices, round=6), spec())
    )
