"""FedSpine's planner and its rivals: arms by hand, ratios that never fall, late devices, reasons, a restart."""

from __future__ import annotations

import re
from collections.abc import Mapping

import numpy as np
import pytest
from msgspec.structs import replace

from coordinator.core.facts import ModelFacts
from coordinator.core.planning import registry
from coordinator.core.planning.bandit import Bandit
from coordinator.core.planning.base import Candidate, FleetView, Plan, RoundReport
from coordinator.core.planning.fedspine import FedSpinePlanner, _point, _rank
from coordinator.core.planning.pruned import class_of, cut_to, facts_at, merged, ratio_of
from coordinator.core.planning.reasons import PATTERN
from shared import units
from shared.errors import UserError
from shared.jobs import JobSpec, RoundsSpec, StrategySpec
from shared.messages import UpdateFacts
from shared.units import Group, Slice
from tests.unit.planning_cases import device, job, minilm, result, view

GROUPS = [
    Group(
        name=f"{block}.heads", block=block, kind="heads", count=12,
        slices=(
            *(Slice(module=f"layer.{block}.{part}", side="out", width=32) for part in "qkv"),
            Slice(module=f"layer.{block}.o", side="in", width=32),
        ),
    )
    for block in range(6)
]  # fmt: skip


def facts() -> ModelFacts:
    return replace(minilm(), groups=GROUPS)


def spec(name: str = "fedspine", **strategy: object) -> JobSpec:
    given = StrategySpec(name=name, rank=16, batch=16, **strategy)  # type: ignore[arg-type]  # its own keywords
    return replace(job(rounds=RoundsSpec(count=20, local_steps=20)), strategy=given)


def seen(*candidates: Candidate, round: int = 1) -> FleetView:
    return replace(view(*candidates, round=round), facts=facts())


def machine(name: str, kind: str = "Orin", cores: float = 2.0, memory: int = 4096) -> Candidate:
    found = device(name, cores=cores, memory=memory)
    return replace(found, info=replace(found.info, hardware=kind))


def told(
    ratio: float, *, loss: tuple[float, float] = (1.0, 0.8), step_s: float = 1.0, norm: float = 1.0
) -> UpdateFacts:
    """What a device that pruned to `ratio` tells; its first units are the best."""
    scores = {group.name: np.linspace(1.0, 0.1, group.count) for group in GROUPS}
    kept = units.best(GROUPS, scores, ratio)
    return replace(
        result(batch=16, step_s=step_s), loss_first=loss[0], loss_last=loss[1], norm=norm,
        kept=units.pack(GROUPS, kept), unit_scores=units.pack_scores(scores),
    )  # fmt: skip


def report(plan: Plan, at: FleetView, given: JobSpec, results: Mapping[str, UpdateFacts]) -> RoundReport:
    return RoundReport(
        round=at.round, works=plan.participants, results=dict(results), facts=at.facts, job=given,
        infos={one.device: one.info for one in at.candidates},
    )  # fmt: skip


def test_an_arm_is_a_share_and_a_rank() -> None:
    given = spec(prune_step=0.2)
    plan = FedSpinePlanner().plan(seen(machine("a"), machine("b")), given)
    for work in plan.participants.values():
        assert work.prune is not None
        assert 0.0 <= work.prune.ratio <= 0.2 and work.prune.kept == {}
        assert 2 <= max(work.ranks.values()) <= 16
        assert work.agents == 1 and work.prune.every == 20
    arms = {(work.prune.ratio, max(work.ranks.values())) for work in plan.participants.values() if work.prune}
    assert len(arms) == 2, "devices of one class try different arms at once"
    assert [_rank(given, height) for height in (0.0, 1 / 3, 2 / 3, 0.999)] == [2, 4, 8, 16]
    for rank in (2, 4, 8, 16):
        dp, height = _point(given, 0.1, rank)
        assert (dp, _rank(given, height)) == (pytest.approx(0.5), rank)


def test_every_number_has_its_reason() -> None:
    plan = FedSpinePlanner().plan(seen(machine("a")), spec())
    (work,) = plan.participants.values()
    assert work.reasons.keys() == {"rank", "batch", "bits", "steps", "prune"}
    for name, text in work.reasons.items():
        assert re.fullmatch(PATTERN, text), (name, text)
    assert re.search(r"arm \(0\.\d\d, 0\.\d\d\) of Orin: estimate 0\.000 \+ bonus unknown", work.reasons["rank"])
    assert work.prune is not None
    assert work.reasons["prune"].startswith(f"prune {round(100 * work.prune.ratio)}: 0.0% was gone, ")


def test_the_ratio_of_a_class_never_falls_and_late_devices_begin_there() -> None:
    given, planner = spec(), FedSpinePlanner()
    at = seen(machine("a"), machine("b"))
    planner = planner.learn(report(planner.plan(at, given), at, given, {"a": told(0.25), "b": told(0.25)}))
    assert planner.ratios == {"Orin": pytest.approx(0.25)}
    later = seen(machine("a"), machine("late"), machine("other", "T4"), round=2)
    plan = planner.plan(later, given)
    orders = {name: work.prune for name, work in plan.participants.items()}
    assert orders["a"] is not None and orders["late"] is not None and orders["other"] is not None
    assert orders["a"].kept == told(0.25).kept
    assert orders["late"].kept == told(0.25).kept, "the fleet's scores are those of its devices"
    assert orders["other"].kept == {}, "of a class that has not pruned yet"
    assert min(orders["a"].ratio, orders["late"].ratio) >= 0.25
    after = planner.learn(report(plan, later, given, {"late": told(0.1)}))
    assert after.ratios["Orin"] == pytest.approx(0.25)
    # A device whose own model is larger than its class's is brought there, by its own units that are left.
    behind = replace(planner, kept={"a": told(0.1).kept}).plan(later, given).participants["a"].prune
    assert behind is not None and ratio_of(GROUPS, behind.kept) == pytest.approx(0.25)


def test_pruning_ends_where_the_job_says() -> None:
    given, planner = spec(prune=0.5, prune_step=0.5), FedSpinePlanner()
    at = seen(machine("a"))
    for round in range(1, 12):
        at = seen(machine("a"), round=round)
        plan = planner.plan(at, given)
        order = plan.participants["a"].prune
        assert order is not None and order.ratio <= 0.5
        planner = planner.learn(report(plan, at, given, {"a": told(order.ratio)}))
    assert planner.ratios["Orin"] == pytest.approx(0.5)


def test_the_reward_by_hand() -> None:
    planner = FedSpinePlanner(gains=tuple(i / 10 for i in range(1, 11)), norm=2.0)
    # dF = 0.45 over the quantile 0.9; Q = 1/2; 10 s against a mean of 8 s.
    found = planner.reward(told(0.1, loss=(1.0, 0.55), step_s=1.0, norm=1.0), 0.6, 8.0)
    assert found == pytest.approx((0.5 * 0.5 + 0.3 * 0.6 + 0.2 * 0.5) / (1 + 2 * 0.25))
    assert planner.reward(told(0.1, loss=(1.0, 1.5)), 0.0, 10.0) == pytest.approx(0.2 * 0.5)


def test_what_memory_does_not_hold_is_never_offered() -> None:
    given = spec(batch_min=16)

    def ranks(memory: int) -> set[int]:
        plans = [FedSpinePlanner().plan(seen(machine(f"d{index}", memory=memory)), given) for index in range(30)]
        return {max(work.ranks.values()) for plan in plans for work in plan.participants.values()}

    assert max(ranks(4096)) > 8
    tight = next(memory for memory in range(460, 520) if _takes_part(machine("d0", memory=memory), given))
    assert max(ranks(tight)) <= 4, "the arms above take more than there is"


def _takes_part(candidate: Candidate, given: JobSpec) -> bool:
    try:
        return bool(FedSpinePlanner().plan(seen(candidate), given).participants)
    except UserError as error:
        assert "memory" in str(error)
        return False


@pytest.mark.parametrize(
    ("name", "ratios", "criterion", "rank"),
    [
        ("fedspine-fixed", (0.05, 0.3), "lora", 16),
        ("loraprune", (0.5 * (1 - 0.9**3), 0.5 * (1 - 0.5**3)), "lora", 16),
        ("llmpruner", (0.5, 0.5), "lora", 16),
        ("magprune", (0.5, 0.5), "magnitude", 16),
    ],
)
def test_the_rivals_prune_as_their_papers_do(name: str, ratios: tuple[float, float], criterion: str, rank: int) -> None:
    given = spec(name)
    planner = registry.create(given.strategy)
    at = seen(machine("a"), machine("b", cores=0.5))
    works = planner.plan(at, given).participants.values()
    assert [work.prune.ratio for work in works if work.prune] == pytest.approx([ratios[0]] * 2, abs=1e-6)
    assert {work.prune.criterion for work in works if work.prune} == {criterion}
    assert {max(work.ranks.values()) for work in works} == {rank}
    if name != "fedspine-fixed":
        assert len({work.batch for work in works}) == 1, "one batch, as in their papers"
    known = FedSpinePlanner(
        name=name, ratios={"Orin": 0.25}, kept={"a": told(0.25).kept}, scores=told(0.25).unit_scores
    )
    order = known.plan(seen(machine("a"), round=5), given).participants["a"].prune
    assert order is not None and order.ratio == pytest.approx(ratios[1], abs=1e-6)


def test_all_at_once_without_iteration() -> None:
    order = (
        FedSpinePlanner(name="fedspine-once").plan(seen(machine("a")), spec("fedspine-once")).participants["a"].prune
    )
    assert order is not None and (order.ratio, order.every) == (0.5, 20)


def test_the_bandit_of_a_class_learns_what_paid() -> None:
    given, planner = spec(), FedSpinePlanner()
    for round in range(1, 60):
        at = seen(machine("a"), machine("b"), round=round)
        plan = planner.plan(at, given)
        results = {}
        for name, work in plan.participants.items():
            good = max(work.ranks.values()) >= 8
            results[name] = told(0.0, loss=(1.0, 0.4 if good else 0.95), norm=1.0)
        planner = planner.learn(report(plan, at, given, results))
    best = [max(work.ranks.values()) for work in plan.participants.values()]
    assert min(best) >= 6, best
    assert set(planner.bandits) == {"Orin"} and isinstance(planner.bandits["Orin"], Bandit)


def test_a_replay_gives_the_same_plan() -> None:
    given, reports = spec(), []
    planner = FedSpinePlanner()
    for round in range(1, 4):
        at = seen(machine("a"), machine("b", "T4"), round=round)
        plan = planner.plan(at, given)
        results = {n: told(w.prune.ratio if w.prune else 0.0) for n, w in plan.participants.items()}
        reports.append(report(plan, at, given, results))
        planner = planner.learn(reports[-1])
    again = FedSpinePlanner()
    for one in reports:
        again = again.learn(one)
    at = seen(machine("a"), machine("b", "T4"), round=4)
    assert again.plan(at, given) == planner.plan(at, given)


def test_facts_of_a_smaller_model_by_hand() -> None:
    half = facts_at(facts(), 0.5)
    assert {(m.out, m.inp) for m in half.modules} == {(192, 384), (384, 192)}
    assert half.linear_params == minilm().linear_params - 24 * 384 * 192
    assert facts_at(facts(), 0.0) == facts() and facts_at(minilm(), 0.5) == minilm()


def test_the_fleets_scores_count_what_is_gone_as_nothing() -> None:
    one, other = told(0.5), replace(told(0.0), samples=480)
    gone = units.unpack_scores(one.unit_scores)
    for values in gone.values():
        values[6:] = 0.0
    one = replace(one, unit_scores=units.pack_scores(gone), samples=160)
    found = units.unpack_scores(merged(GROUPS, {}, {"a": one, "b": other}))["0.heads"]
    scores = np.linspace(1.0, 0.1, 12)
    by_hand = np.where(np.arange(12) < 6, scores, 0.75 * scores)
    assert found == pytest.approx(by_hand / by_hand.max(), rel=0.05)
    assert merged(GROUPS, {"0.heads": b"x"}, {}) == {"0.heads": b"x"}


def test_the_model_of_a_round_is_as_small_as_its_devices() -> None:
    planner = FedSpinePlanner(ratios={"Orin": 0.2})
    kept, scores = planner.model_left(
        {"a": replace(told(0.5), samples=300), "b": replace(told(0.25), samples=100)}, facts()
    )
    assert ratio_of(GROUPS, kept) == pytest.approx(np.floor(12 * 0.4375) / 12)
    assert kept == cut_to(GROUPS, {}, scores, 0.4375)
    assert FedSpinePlanner().model_left({}, facts())[0] == {}


@pytest.mark.parametrize(
    "odd",
    [
        {"kept": {"0.heads": b"\x01"}}, {"kept": {**told(0.0).kept, "0.heads": b"\x00\x00"}},
        {"kept": {**told(0.0).kept, "0.heads": b"\x01" * 9}}, {"unit_scores": {"x": b"\x01"}}, {"unit_scores": {}},
    ],
)  # fmt: skip
def test_what_a_device_says_of_its_units_is_its_own_claim(odd: dict[str, dict[str, bytes]]) -> None:
    given, planner = spec(), FedSpinePlanner()
    at = seen(machine("a"), machine("b"))
    plan = planner.plan(at, given)
    known = planner.learn(report(plan, at, given, {"a": told(0.25), "b": replace(told(0.25), **odd)}))
    alone = planner.learn(report(plan, at, given, {"a": told(0.25)}))
    assert (known.kept, known.scores, known.ratios) == (alone.kept, alone.scores, alone.ratios)
    assert known.plan(seen(machine("a"), machine("b"), round=2), given).participants.keys() == {"a", "b"}


def test_the_class_is_the_gpu_else_the_hardware() -> None:
    assert class_of(machine("a", "Jetson Orin Nano").info) == "Jetson Orin Nano"
    assert class_of(device("a").info) == "unknown"
