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
from coordinator.core.planning.cost_model import CostModel
from coordinator.core.planning.fedspine import FedSpinePlanner, Left, _point, _rank
from coordinator.core.planning.pruned import Told, class_of, cut_to, facts_at, fault, merged, model_left, ratio_of
from coordinator.core.planning.reasons import PATTERN
from shared import units
from shared.adapter import Adapter
from shared.errors import UserError
from shared.jobs import JobSpec, RoundsSpec, StrategySpec
from shared.messages import UpdateFacts, Work
from shared.pruning_order import Pruning
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


SCORES = {group.name: np.linspace(1.0, 0.1, group.count) for group in GROUPS}
PACKED = units.pack_scores(SCORES)


def told(
    ratio: float, *, loss: tuple[float, float] = (1.0, 0.8), step_s: float = 1.0, change: float = 1.0
) -> UpdateFacts:
    """What a device that pruned to `ratio` tells; its first units are the best."""
    kept = units.best(GROUPS, SCORES, ratio)
    return replace(
        result(batch=16, step_s=step_s), loss_first=loss[0], loss_last=loss[1], change=change,
        kept=units.pack(GROUPS, kept),
    )  # fmt: skip


def left(ratio: float) -> Left:
    """What is left of its model, as the planner knows it."""
    return Left(told(ratio).kept, ratio_of(GROUPS, told(ratio).kept))


def ordered(plan: Plan, ratio: float | None = None) -> dict[str, Work]:
    """The works of a plan, as if all of them were to prune to `ratio`."""
    works = {}
    for name, work in plan.participants.items():
        assert work.prune is not None
        works[name] = work if ratio is None else replace(work, prune=replace(work.prune, ratio=ratio))
    return works


def report(
    plan: Plan, at: FleetView, given: JobSpec, results: Mapping[str, UpdateFacts], *, ratio: float | None = None,
    accepted: bool = True,
) -> RoundReport:  # fmt: skip
    return RoundReport(
        round=at.round, works=ordered(plan, ratio), results=dict(results), facts=at.facts, job=given,
        infos={one.device: one.info for one in at.candidates}, accepted=accepted,
    )  # fmt: skip


def adapter(ratio: float = 0.0) -> Adapter:
    """The global adapter of a model of which so much is gone."""
    kept = cut_to(GROUPS, {}, PACKED, ratio) if ratio else {}
    return Adapter(
        kind="global",
        job="j",
        round=1,
        base_digest="d",
        factors={},
        dense={},
        kept=kept,
        scores=PACKED if ratio else {},
    )


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
    planner = planner.learn(report(planner.plan(at, given), at, given, {"a": told(0.25), "b": told(0.25)}, ratio=0.25))
    assert planner.ratios == {"Orin": pytest.approx(0.25)}
    later = seen(machine("a"), machine("late"), machine("other", "T4"), round=2)
    plan = planner.plan(later, given)
    orders = {name: work.prune for name, work in plan.participants.items()}
    assert orders["a"] is not None and orders["late"] is not None and orders["other"] is not None
    assert (orders["a"].kept, orders["a"].begin) == (told(0.25).kept, 0.0)
    assert (orders["late"].kept, orders["late"].begin) == ({}, 0.25), "by the fleet's scores, on the device"
    assert (orders["other"].kept, orders["other"].begin) == ({}, 0.0), "of a class that has not pruned yet"
    assert min(orders["a"].ratio, orders["late"].ratio) >= 0.25
    after = planner.learn(report(plan, later, given, {"late": told(0.25)}))
    assert after.ratios["Orin"] == pytest.approx(0.25)
    # A device whose own model is larger than its class's is brought there, by its own units that are left.
    behind = replace(planner, kept={"a": left(0.1)}).plan(later, given).participants["a"].prune
    assert behind is not None and (behind.kept, behind.begin) == (told(0.1).kept, 0.25)


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
    tenths = tuple(i / 10 for i in range(1, 11))
    planner = FedSpinePlanner(gains=tenths, norms=tuple(2 * one for one in tenths))
    # dF = 0.45 over the quantile 0.9; Q = 0.9 over 1.8; 10 s against a median of 8 s.
    found = planner.reward(told(0.1, loss=(1.0, 0.55), step_s=1.0, change=0.9), 0.6, 8.0, planner.most())
    assert found == pytest.approx((0.5 * 0.5 + 0.3 * 0.6 + 0.2 * 0.5) / (1 + 2 * 0.25))
    assert planner.reward(told(0.1, loss=(1.0, 1.5), change=0.9), 0.0, 10.0, planner.most()) == pytest.approx(0.2 * 0.5)
    assert planner.reward(
        replace(told(0.1, loss=(1.0, 1.0), change=0.9), norm=1e6), 0.0, 10.0, planner.most()
    ) == pytest.approx(0.1), "the norm of the factors, which grows with the rank, is no reward"


def test_one_claim_moves_no_reference() -> None:
    given, planner = spec(), FedSpinePlanner()
    names = [f"d{index}" for index in range(10)]
    at = seen(*(machine(name) for name in names))
    plan = planner.plan(at, given)
    honest = {name: told(0.1, change=1.0) for name in names}
    liar = replace(told(0.1, change=1e15), train_s=1e15)
    after = planner.learn(report(plan, at, given, {**honest, "d0": liar}, ratio=0.1))
    calm = planner.learn(report(plan, at, given, honest, ratio=0.1))
    assert after.reward(honest["d1"], 0.5, 10.0, after.most()) == pytest.approx(
        calm.reward(honest["d1"], 0.5, 10.0, calm.most())
    )
    rewards = [sorted(r.mean for r in one.bandits["Orin"].regions if r.pulls)[-3:] for one in (after, calm)]
    assert rewards[0] == pytest.approx(rewards[1], rel=0.15), "the others are not late because one says that it was"


def test_what_a_refused_round_did_is_not_counted_but_known_to_be_bad() -> None:
    given, planner = spec(), FedSpinePlanner()
    at = seen(machine("a"), machine("b"))
    plan = planner.plan(at, given)
    results = {"a": told(0.1), "b": told(0.1)}
    refused = planner.learn(report(plan, at, given, results, ratio=0.1, accepted=False))
    assert (refused.ratios, refused.kept, refused.gains) == ({}, {}, ())
    pulled = [region for region in refused.bandits["Orin"].regions if region.pulls]
    assert pulled and all(region.mean == 0.0 for region in pulled)
    accepted = planner.learn(report(plan, at, given, results, ratio=0.1))
    assert accepted.ratios and max(region.mean for region in accepted.bandits["Orin"].regions) > 0.3


def test_progress_is_what_was_done_not_what_was_ordered() -> None:
    given, planner = spec(prune_step=0.2), FedSpinePlanner()
    at = seen(machine("a"))
    plan = planner.plan(at, given)

    def reward(gone: float) -> float:
        flat = told(gone, loss=(1.0, 1.0), change=0.0)
        known = planner.learn(report(plan, at, given, {"a": replace(flat, ended="time")}, ratio=0.2))
        return max(region.mean for region in known.bandits["Orin"].regions)

    assert reward(0.0) == pytest.approx(0.0)
    assert reward(0.17) == pytest.approx(0.3 * (2 / 12) / 0.2)


def test_at_the_target_the_rank_alone_is_chosen_and_learned() -> None:
    given, planner = spec(), FedSpinePlanner()
    at = seen(machine("a"), machine("b"))
    planner = planner.learn(report(planner.plan(at, given), at, given, {"a": told(0.5), "b": told(0.5)}, ratio=0.5))
    ranks: list[int] = []
    for round in range(2, 42):
        at = seen(machine("a"), machine("b"), round=round)
        plan = planner.plan(at, given)
        results = {}
        for name, work in plan.participants.items():
            rank = max(work.ranks.values())
            ranks.append(rank)
            assert work.prune is not None and work.prune.ratio == pytest.approx(0.5)
            assert "arm (0.00, " in work.reasons["rank"]
            results[name] = told(0.5, loss=(1.0, 0.9 - 0.4 * (4 <= rank <= 7)), change=1.0)
        planner = planner.learn(report(plan, at, given, results))
    last = ranks[-20:]
    assert sum(4 <= rank <= 7 for rank in last) >= 16, ranks
    visited = [region for region in planner.bandits["Orin"].regions if region.x == 0.0 and region.pulls]
    assert len(visited) >= 3


def test_near_the_target_an_arm_is_credited_where_it_was_chosen() -> None:
    given, planner = spec(prune_step=0.1), FedSpinePlanner(ratios={"Orin": 0.48})
    at = seen(*(machine(f"d{index}") for index in range(20)))
    plan = planner.plan(at, given)
    for work in plan.participants.values():
        x = float(re.findall(r"arm \((\d\.\d\d)", work.reasons["rank"])[0])
        assert work.prune is not None and x <= 0.2 + 0.005
        assert work.prune.ratio == pytest.approx(0.48 + 0.1 * x, abs=0.001)


def test_a_class_that_took_no_part_forgets_as_fast() -> None:
    given, planner = spec(), FedSpinePlanner()
    for round, kinds in enumerate((("Orin", "T4"), ("Orin",), ("Orin",)), start=1):
        at = seen(*(machine(kind.lower(), kind) for kind in kinds), round=round)
        plan = planner.plan(at, given)
        planner = planner.learn(report(plan, at, given, {one.device: told(0.0) for one in at.candidates}))
    assert sum(region.pulls for region in planner.bandits["T4"].regions) == pytest.approx(0.98**2)


def test_one_agent_trains_with_the_memory_and_the_rows_of_the_device() -> None:
    one = machine("a", memory=700)
    several = replace(one, info=replace(one.info, agents=2))
    given = spec()
    assert (
        FedSpinePlanner().plan(seen(several), given).participants["a"]
        == FedSpinePlanner().plan(seen(one), given).participants["a"]
    )


def test_the_demand_of_works_that_prune_alike_is_worked_out_once(monkeypatch: pytest.MonkeyPatch) -> None:
    given, planner = spec(), FedSpinePlanner()
    at = seen(*(machine(f"d{index}") for index in range(60)))
    plan = planner.plan(at, given)
    calls: list[float] = []
    from coordinator.core.planning import cost_model

    monkeypatch.setattr(cost_model, "facts_at", lambda facts, ratio: calls.append(ratio) or facts_at(facts, ratio))
    CostModel().learn(report(plan, at, given, {one.device: told(0.0) for one in at.candidates}, ratio=0.1))
    assert 0 < len(calls) <= 16, "by ratio and rank, not by device"


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
    known = FedSpinePlanner(name=name, ratios={"Orin": 0.25}, kept={"a": left(0.25)})
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
            results[name] = told(0.0, loss=(1.0, 0.4 if good else 0.95))
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
    gone = {name: np.where(np.arange(12) < 6, values, 0.0) for name, values in SCORES.items()}
    parts = [Told(0.25, told(0.5).kept, units.pack_scores(gone)), Told(0.75, told(0.0).kept, PACKED)]
    found = units.unpack_scores(merged(GROUPS, {}, parts))["0.heads"]
    scores = np.linspace(1.0, 0.1, 12)
    by_hand = np.where(np.arange(12) < 6, scores, 0.75 * scores)
    assert found == pytest.approx(by_hand / by_hand.max(), rel=0.05)
    assert merged(GROUPS, {"0.heads": b"x"}, []) == {"0.heads": b"x"}


def test_the_model_of_a_round_is_as_small_as_its_devices_and_never_grows() -> None:
    parts = [Told(0.75, told(0.5).kept, PACKED), Told(0.25, told(0.25).kept, PACKED)]
    kept, scores = model_left(GROUPS, adapter(), parts, 0.5)
    assert ratio_of(GROUPS, kept) == pytest.approx(np.floor(12 * 0.4375) / 12), "the mean, not the smallest class"
    assert kept == cut_to(GROUPS, {}, scores, 0.4375)
    assert model_left(GROUPS, adapter(0.5), parts, 0.5)[0] == adapter(0.5).kept
    assert model_left(GROUPS, adapter(0.25), [], 0.5) == (adapter(0.25).kept, PACKED), "nobody told anything: it stays"
    assert ratio_of(GROUPS, model_left(GROUPS, adapter(), [Told(1.0, told(0.75).kept, PACKED)], 0.5)[0]) == 0.5


@pytest.mark.parametrize(
    ("kept", "reason"),
    [
        ({"0.heads": b"\x01"}, "does not tell which units"),
        ({**told(0.25).kept, "0.heads": b"\x00\x00"}, "at least one unit"),
        ({**told(0.25).kept, "0.heads": b"\x01" * 9}, "9 bytes for the units"),
        (told(0.75).kept, "3 units are left, 8 to 10 were asked for"),
        (told(0.0).kept, "kept units that were gone"),
        (told(0.1).kept, "kept units that were gone"),
    ],
)
def test_what_a_device_says_of_its_units_is_its_own_claim(kept: dict[str, bytes], reason: str) -> None:
    given = spec(prune_step=0.2)
    planner = FedSpinePlanner(ratios={"Orin": 1 / 6}, kept={"a": left(1 / 6), "b": left(1 / 6)})
    at = seen(machine("a"), machine("b"))
    plan = planner.plan(at, given)
    order = ordered(plan, 1 / 3)["b"].prune
    assert order is not None and reason in fault(GROUPS, order, replace(told(0.25), kept=kept))
    assert not fault(GROUPS, order, told(0.25))
    lied = {"a": told(0.25), "b": replace(told(0.25), kept=kept)}
    known = planner.learn(report(plan, at, given, lied, ratio=1 / 3))
    alone = planner.learn(report(plan, at, given, {"a": told(0.25)}, ratio=1 / 3))
    assert (known.kept, known.ratios, known.bandits) == (alone.kept, alone.ratios, alone.bandits)
    assert known.ratios["Orin"] == pytest.approx(0.25)
    assert known.plan(seen(machine("a"), machine("b"), round=2), given).participants.keys() == {"a", "b"}


def test_who_was_to_begin_smaller_has_to() -> None:
    order = Pruning(ratio=0.5, begin=0.25)
    assert "12 units are left, 6 to 9 were asked for" in fault(GROUPS, order, told(0.0))
    assert not fault(GROUPS, order, told(0.25)) and not fault(GROUPS, order, told(0.5))


def test_no_class_goes_further_than_the_job() -> None:
    given, planner = spec(prune=0.25), FedSpinePlanner()
    at = seen(machine("a"))
    after = planner.learn(report(planner.plan(at, given), at, given, {"a": told(0.5)}, ratio=0.5))
    assert after.ratios == {"Orin": 0.25}


def test_the_class_is_the_gpu_else_the_hardware() -> None:
    assert class_of(machine("a", "Jetson Orin Nano").info) == "Jetson Orin Nano"
    assert class_of(device("a").info) == "unknown"
