"""MergeSFL's planner and its rivals: cut, batches, selection, reasons, what rounds teach, a restart."""

from __future__ import annotations

import re
from typing import Any

import msgspec
import pytest
from msgspec.structs import replace

from coordinator.core.aggregation import registry as aggregators
from coordinator.core.aggregation.registry import SPLIT
from coordinator.core.facts import ActivationFacts
from coordinator.core.planning import registry
from coordinator.core.planning.base import Candidate, FleetView, Plan, RoundReport
from coordinator.core.planning.demand import demand
from coordinator.core.planning.lower_part import feature_bytes, lower_demand
from coordinator.core.planning.mergesfl import MergeSflPlanner
from coordinator.core.planning.reasons import PATTERN
from coordinator.core.strategies import job_faults
from shared.errors import UserError
from shared.jobs import JobSpec, RoundsSpec, SplitSpec, StrategySpec
from shared.messages import UpdateFacts
from tests.unit.planning_cases import device, job, minilm, result, view

FAST, MIDDLE, SLOW = 4.0, 2.0, 1.0
TOKENS = 64


def spec(name: str = "mergesfl", *, rounds: dict[str, Any] | None = None, **split: Any) -> JobSpec:
    strategy = StrategySpec(name=name, rank=8, batch=16, batch_max=32, split=SplitSpec(**split))
    return replace(job(rounds=RoundsSpec(count=20, local_steps=20, **(rounds or {}))), strategy=strategy)


def machine(name: str, cores: float, labels: dict[str, int] | None = None, **given: Any) -> Candidate:
    found = device(name, cores=cores, **given)
    data = replace(found.info.datasets["news"], labels=labels or {})
    return replace(found, info=replace(found.info, datasets={"news": data}))


def trio(labels: bool = True) -> FleetView:
    told = [{"0": 50, "1": 50}, {"0": 90, "1": 10}, {"1": 100}] if labels else [None] * 3
    return view(
        *(machine(name, cores, one) for name, cores, one in zip("abc", (FAST, MIDDLE, SLOW), told, strict=True))
    )


def fleet(count: int = 24) -> FleetView:
    """Each device has one of four classes, and a few rows of another."""
    return view(
        *(
            machine(f"d{row:03}", (1.0, 2.0, 4.0)[row % 3], {str(row % 4): 90, str(row // 4 % 4): 10})
            for row in range(count)
        )
    )


def report(plan: Plan, at: FleetView, given: JobSpec, results: dict[str, UpdateFacts], size: int = 0) -> RoundReport:
    return RoundReport(
        round=at.round, works=plan.participants, results=results, facts=at.facts, job=given, adapter_bytes=size,
        infos={one.device: one.info for one in at.candidates},
        loads={one.device: one.load for one in at.candidates if one.load},
    )  # fmt: skip


def kl(plan: Plan) -> float:
    found = re.search(r"KL ([\d.]+)", plan.reason)
    assert found
    return float(found[1])


def test_batches_follow_speed_and_all_finish_together() -> None:
    plan = MergeSflPlanner().plan(trio(), spec(kl=9.0))
    assert {name: work.batch for name, work in plan.participants.items()} == {"a": 16, "b": 8, "c": 4}
    assert len(set(plan.predicted_s.values())) == 1, "merged steps wait for the slowest"
    assert "waiting 0%" in plan.reason and "3 devices selected by genetic search" in plan.reason


def test_a_work_is_that_of_the_lower_blocks() -> None:
    at, given = trio(), spec(block=2)
    work = MergeSflPlanner().plan(at, given).participants["a"]
    assert work.ranks == {one.name: 8 for one in minilm().modules if one.block < 2}
    assert work.split == replace(given.strategy.split, block=2)
    assert (work.steps, work.bits, work.agents) == (20, 32, 1)
    full = MergeSflPlanner().plan(at, spec(block=2, tuning="full")).participants["a"]
    assert (full.ranks, full.bits) == ({}, 32) and full.split is not None and full.split.tuning == "full"


@pytest.mark.parametrize("tuning", ["lora", "full"])
@pytest.mark.parametrize("name", SPLIT)
def test_every_number_has_its_reason(name: str, tuning: str) -> None:
    plan = registry.create(StrategySpec(name=name)).plan(trio(), spec(name, tuning=tuning))
    for work in plan.participants.values():
        assert work.reasons.keys() == {"rank", "batch", "bits", "steps", "split"}
        for key, text in work.reasons.items():
            found = re.fullmatch(PATTERN, text)
            assert found and found["name"] == key, (key, text)
            assert re.search(r"\d", found["reading"]) and re.search(r"\d", found["bound"])
            number = {
                "rank": max(work.ranks.values(), default=0), "batch": work.batch, "bits": work.bits,
                "steps": work.steps, "split": work.split.block if work.split else -1,
            }[key]  # fmt: skip
            assert int(found["value"]) == number


def test_the_words_of_a_batch_are_its_formula() -> None:
    text = MergeSflPlanner().plan(trio(), spec(kl=9.0)).participants["c"].reasons["batch"]
    found = re.match(r"batch (\d+): (\d+) x ([\d.]+) s of a / ([\d.]+) s per sample here", text)
    assert found, text
    assert int(found[1]) == pytest.approx(int(found[2]) * float(found[3]) / float(found[4]), abs=0.1) == 4


def test_the_planner_cuts_where_compute_memory_and_features_are_least() -> None:
    works = MergeSflPlanner().plan(trio(), spec()).participants
    assert {work.split.block for work in works.values() if work.split} == {1}, "blocks of one size: the first"
    # Features that shrink over blocks, as of a convolutional model, over a slow link: later is cheaper.
    narrow = replace(trio(), facts=replace(minilm(), features=[10**6, 10**6, 100, 100, 100, 100]))
    planner, given = MergeSflPlanner(), spec()
    plan = planner.plan(narrow, given)
    told = {name: replace(result(batch=8, step_s=0.1), fetch_s=10.0) for name in plan.participants}
    # Learned from a round without a cut, so that none is held.
    works = {name: replace(work, split=None) for name, work in plan.participants.items()}
    planner = planner.learn(report(replace(plan, participants=works), narrow, given, told, size=10**6))
    assert planner.times.devices == {} and planner.block == 0
    with_link = planner.learn(report(plan, narrow, given, told, size=10**6))
    assert with_link.block == 1, "the cut stays"
    moved = replace(with_link, block=0).plan(narrow, given).participants["a"]
    assert moved.split is not None and moved.split.block == 3
    assert "3" in moved.reasons["split"] and "a sample on" in moved.reasons["split"]


def test_a_cut_that_the_base_lacks_is_refused() -> None:
    with pytest.raises(UserError, match=r"strategy\.split\.block 6: the base has 6 blocks, so at most 5"):
        MergeSflPlanner().plan(trio(), spec(block=6))
    with pytest.raises(UserError, match="1 block"):
        MergeSflPlanner().plan(replace(trio(), facts=replace(minilm(), blocks=1)), spec())


def test_the_lower_part_costs_its_blocks_alone() -> None:
    given, facts = (
        spec(),
        replace(
            minilm(),
            activations={"32": ActivationFacts(fixed=1e6, block=1e5), "16": ActivationFacts(fixed=1e6, block=1e5)},
        ),
    )
    ranks = {one.name: 8 for one in facts.modules if one.block < 2}
    need, whole = lower_demand(facts, given, ranks, 2), demand(facts, given, {one.name: 8 for one in facts.modules})
    assert need.flop == pytest.approx(whole.flop / 3)
    assert need.activations == 2e5 and need.linear_params == pytest.approx(facts.linear_params / 3, abs=1)
    assert need.adapter_params == 8 * 768 * 8, "and no head"
    dense = {f"{one.name}.weight": [384, 384] for one in facts.modules} | {"embed": [1000, 384], "head": [20, 384]}
    blocks = {f"{one.name}.weight": one.block for one in facts.modules} | {"embed": -1, "head": 6}
    full = replace(facts, dense=dense, dense_blocks=blocks)
    tuned = lower_demand(full, spec(tuning="full"), {}, 2)
    assert tuned.adapter_params == 8 * 384 * 384 + 1000 * 384 and tuned.linear_params == 0
    assert feature_bytes(facts, given, 2) == 2 * TOKENS * 384
    assert feature_bytes(facts, spec(codec="int8"), 2) == TOKENS * (384 + 4)


def test_selection_is_of_the_size_asked_and_evens_the_labels() -> None:
    at, rounds = fleet(), {"sample": 4, "min_devices": 2}
    found = {name: MergeSflPlanner(name=name).plan(at, spec(name, rounds=rounds)) for name in SPLIT}
    for plan in found.values():
        assert len(plan.participants) == 4 and len(plan.left_out) == 20
    assert kl(found["mergesfl"]) <= 0.05 < kl(found["mergesfl-random"])
    assert kl(found["mergesfl-uniform"]) <= 0.05
    drawn = {frozenset(found[name].participants) for name in ("splitfed", "adasfl", "mergesfl-random")}
    assert len(drawn) == 1, "one draw for all rivals"
    batches = {name: {work.batch for work in plan.participants.values()} for name, plan in found.items()}
    assert batches["splitfed"] == batches["mergesfl-uniform"] == {16}
    assert len(batches["adasfl"]) > 1
    assert MergeSflPlanner().plan(at, spec(rounds=rounds)) == found["mergesfl"], "deterministic"
    other = MergeSflPlanner(name="splitfed").plan(replace(at, round=2), spec("splitfed", rounds=rounds))
    assert other.participants.keys() != found["splitfed"].participants.keys()


def test_without_merging_each_has_its_own_time() -> None:
    plan = MergeSflPlanner(name="splitfed").plan(trio(), spec("splitfed"))
    assert plan.predicted_s["c"] == pytest.approx(4 * plan.predicted_s["a"])
    assert [aggregators.merges(name) for name in SPLIT] == [name.startswith("mergesfl") for name in SPLIT]


def test_who_took_part_rarely_goes_first() -> None:
    at = view(*(machine(f"d{row}", 1.0) for row in range(12)))
    given, planner, seen = spec(rounds={"sample": 3}), MergeSflPlanner(), set[str]()
    for number in range(1, 5):
        plan = planner.plan(replace(at, round=number), given)
        planner = planner.learn(report(plan, at, given, {}))
        seen |= plan.participants.keys()
    assert len(seen) == 12 and planner.used == dict.fromkeys(sorted(seen), 1)


def test_untold_labels_are_the_mean_mix_and_said_so() -> None:
    mixed = trio()
    last = replace(mixed.candidates[2], info=machine("c", SLOW).info)
    plan = MergeSflPlanner().plan(replace(mixed, candidates=(*mixed.candidates[:2], last)), spec())
    assert "(1 device of untold labels taken as the mean mix)" in plan.reason
    assert "its labels are not told" in plan.participants["c"].reasons["split"]
    assert "not told" not in plan.participants["a"].reasons["split"]
    causal = spec()
    causal = replace(causal, task=replace(causal.task, kind="causal"))
    assert kl(MergeSflPlanner().plan(mixed, causal)) == 0.0


def test_ingress_bounds_the_samples_of_a_step_and_spare_is_used() -> None:
    at, features = trio(), 2 * TOKENS * 384
    free = MergeSflPlanner().plan(at, spec(kl=9.0))
    step_s = next(iter(free.predicted_s.values())) / 20
    tight = MergeSflPlanner().plan(at, spec(kl=9.0, ingress=20.5 * features / step_s))
    assert sum(work.batch for work in tight.participants.values()) <= 20 and len(tight.participants) < 3
    wide = MergeSflPlanner().plan(at, spec(kl=9.0, rounds={"sample": 3}, ingress=56.5 * features / step_s))
    assert {name: work.batch for name, work in wide.participants.items()} == {"a": 32, "b": 16, "c": 8}
    assert "scaled by 2.00 into spare bandwidth, 8 by the formula" in wide.participants["b"].reasons["batch"]
    rival = MergeSflPlanner(name="mergesfl-random").plan(
        at, spec("mergesfl-random", rounds={"sample": 3}, ingress=56.5 * features / step_s)
    )
    assert {name: work.batch for name, work in rival.participants.items()} == {"a": 16, "b": 8, "c": 4}


def test_rows_and_memory_bound_batches() -> None:
    at = view(machine("a", FAST, rows=5), machine("b", FAST), machine("c", FAST, memory=520))
    plan = MergeSflPlanner().plan(at, spec("mergesfl", block=5))
    assert plan.participants["a"].batch == 5
    assert "5 is the most: the data set has 5 rows" in plan.participants["a"].reasons["batch"]
    assert plan.participants["b"].batch == 16
    tight = replace(spec(block=5), strategy=replace(spec(block=5).strategy, batch=4096, batch_max=4096, bits=32))
    bound = MergeSflPlanner().plan(at, tight).participants["c"]
    assert 1 <= bound.batch < 4096 and "would not fit its" in bound.reasons["batch"]


def test_large_fleets_are_planned_over_a_drawn_sample() -> None:
    at = view(*(machine(f"d{row:03}", 1.0) for row in range(230)))
    plan = MergeSflPlanner().plan(at, spec(rounds={"sample": 5}))
    told = list(plan.left_out.values())
    assert told.count("not among the 200 of 230 candidates that the plan is made over") == 30
    assert told.count("not selected for this round") == 195


def test_times_are_learned_by_moving_average_from_own_compute() -> None:
    at, given, planner = trio(labels=False), spec(kl=9.0), MergeSflPlanner()
    plan = planner.plan(at, given)
    # b is as fast as a by its own compute, whatever it waits; c half as fast as its cores say.
    seconds = {"a": 0.16, "b": 0.08, "c": 0.32}
    told = {
        name: replace(result(batch=plan.participants[name].batch, step_s=took), train_s=99.0, wait_s=5.0)
        for name, took in seconds.items()
    }
    learned = planner.learn(report(plan, at, given, told))
    batches = {name: work.batch for name, work in learned.plan(at, given).participants.items()}
    assert batches == {"a": 16, "b": 16, "c": 2}
    cores = {"a": FAST, "b": MIDDLE, "c": SLOW}
    need = lower_demand(at.facts, given, plan.participants["a"].ranks, 1)
    for name, took in seconds.items():
        per_sample = took / plan.participants[name].batch
        assert learned.times.devices[name].flop_s == pytest.approx(per_sample * cores[name] / need.flop)
    again = {name: replace(one, step_s=2 * one.step_s) for name, one in told.items()}
    second = learned.learn(report(plan, at, given, again))
    for name, seen in second.times.devices.items():
        assert seen.flop_s == pytest.approx((0.8 + 0.2 * 2) * learned.times.devices[name].flop_s) and seen.rounds == 2
    assert "averaged over 2 rounds" in second.plan(at, given).participants["a"].reasons["split"]


def test_what_was_learned_of_a_speed_moves_with_the_probe() -> None:
    """A power mode that halves the probe doubles a sample's time, before any round at that mode."""
    at, given, planner = trio(labels=False), spec(kl=9.0), MergeSflPlanner()
    at = replace(at, candidates=tuple(replace(one, info=replace(one.info, flops=1e9)) for one in at.candidates))
    plan = planner.plan(at, given)
    told = {name: result(batch=work.batch, step_s=0.01 * work.batch) for name, work in plan.participants.items()}
    learned = planner.learn(report(plan, at, given, told))
    slower = tuple(
        replace(one, info=replace(one.info, flops=5e8 if one.device == "b" else 1e9)) for one in at.candidates
    )
    before, after = (learned.plan(view, given).participants for view in (at, replace(at, candidates=slower)))
    assert {name: work.batch for name, work in before.items()} == {"a": 16, "b": 16, "c": 16}
    assert {name: work.batch for name, work in after.items()} == {"a": 16, "b": 8, "c": 16}


def test_a_slow_link_lowers_the_batch() -> None:
    at, given, planner = trio(labels=False), spec(kl=9.0), MergeSflPlanner()
    given = replace(given, strategy=replace(given.strategy, batch_max=16))
    plan = planner.plan(at, given)
    told = {
        name: replace(result(batch=work.batch, step_s=0.16), fetch_s=1.0 if name == "a" else 0.1)
        for name, work in plan.participants.items()
    }
    learned = planner.learn(report(plan, at, given, told, size=10**6))
    works = learned.plan(at, given).participants
    # a: 0.01 s to compute and 2 x 48 KiB at 1 MB/s to transmit; b: 0.02 s and at 10 MB/s.
    beta = 2 * 2 * TOKENS * 384 / 1e6
    assert works["b"].batch == 16
    assert works["a"].batch == int(16 * (0.02 + beta / 10) / (0.01 + beta)) == 4
    assert "1.00 MB/s" in works["a"].reasons["split"]


def test_a_restart_from_its_state_plans_alike() -> None:
    at, given, planner = fleet(), spec(rounds={"sample": 6}), MergeSflPlanner()
    plan = planner.plan(at, given)
    told = {
        name: replace(result(batch=work.batch, step_s=0.1), fetch_s=0.5) for name, work in plan.participants.items()
    }
    learned = planner.learn(report(plan, at, given, told, size=10**6))
    again = msgspec.msgpack.decode(msgspec.msgpack.encode(learned), type=MergeSflPlanner)
    later = replace(at, round=2)
    assert again == learned and again.plan(later, given) == learned.plan(later, given)


def test_nobody_able_is_told_with_reasons() -> None:
    with pytest.raises(UserError, match=r"no device can do job .*memory"):
        MergeSflPlanner().plan(view(machine("a", 1.0, memory=100)), spec())


def faults(given: JobSpec) -> list[str]:
    return job_faults(given)


def test_what_a_split_job_can_not_ask() -> None:
    assert faults(spec()) == [] and faults(spec(tuning="full")) == []
    assert faults(replace(spec(), strategy=replace(spec().strategy, aggregator="fsr"))) == [
        "strategy.aggregator: fsr can't fold what mergesfl trains"
    ]
    rows = replace(spec(), task=replace(spec().task, kind="least_squares"))
    assert faults(rows) == ["task.kind: least_squares has no blocks to split"]
    full = spec(tuning="full")
    full = replace(
        full, base=replace(full.base, targets=["q"]), strategy=replace(full.strategy, bits=8),
        training=replace(full.training, codec="bf16"),
    )  # fmt: skip
    assert [one.partition(":")[0] for one in faults(full)] == ["base.targets", "strategy.bits", "training.codec"]
    assert faults(replace(spec(), base=replace(spec().base, targets=["q"]))) == []
