"""The `legend` planner: depth by speed and live load, ranks rising toward the output, a reason for each number."""

from __future__ import annotations

import random
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from coordinator.core.facts import ModelFacts, ModuleSpec
from coordinator.core.planning.base import Candidate, FleetView, RoundReport
from coordinator.core.planning.block_times import FORWARD
from coordinator.core.planning.cost_model import CostModel
from coordinator.core.planning.demand import demand, traffic
from coordinator.core.planning.digest import plan_digest
from coordinator.core.planning.legend import LegendPlanner
from coordinator.core.planning.readings import budget
from coordinator.core.planning.reasons import PATTERN
from coordinator.core.planning.sizing import batch_sizes
from shared.errors import UserError
from shared.jobs import Bits, JobSpec, RoundsSpec
from shared.messages import Work
from tests.unit.lcd_reference import brute_force
from tests.unit.legend_cases import FLEET, RANKS, depth_of, depths_of, learned, planned
from tests.unit.planning_cases import device, gpu_device, job, minilm, result, view

# ---- depth


ONE_BATCH = job(batch=16, batch_min=16, batch_max=16)
"""As in the paper: speed is met by depth alone."""


def test_depth_follows_speed_and_one_batch_stays() -> None:
    plan = planned(*FLEET, spec=ONE_BATCH)
    depths = depths_of(plan)
    assert [depths[c.device] for c in FLEET] == sorted(depths.values())
    assert depths["d00"] < depths["d05"] <= depths["d09"]
    assert {work.batch for work in plan.participants.values()} == {16}
    assert {work.bits for work in plan.participants.values()} == {32}
    assert plan.predicted_s.keys() == plan.participants.keys()


def test_batches_make_equal_what_depth_can_not() -> None:
    """All of a job's batches: at the depths of one batch each takes what the median has time for."""
    fleet = (*FLEET, device("d10", cores=8.0))
    plan, alone = planned(*fleet), planned(*fleet, spec=ONE_BATCH)
    assert depths_of(plan) == depths_of(alone)
    target = float(np.median(list(alone.predicted_s.values()))) * (1 + 1e-9)
    for name, work in plan.participants.items():
        sample_s = alone.predicted_s[name] / 16
        fitting = [size for size in batch_sizes(job().strategy, 1) if size * sample_s <= target]
        assert work.batch == max(fitting) and plan.predicted_s[name] == pytest.approx(work.batch * sample_s)
    batches = [plan.participants[c.device].batch for c in fleet]
    assert batches[0] < 16 < batches[-1]
    spread = [max(p.predicted_s.values()) / min(p.predicted_s.values()) for p in (plan, alone)]
    assert 1.5 * spread[0] < spread[1]


def test_one_speed_for_all_means_full_depth() -> None:
    assert set(depths_of(planned(*(device(name) for name in "abc"))).values()) == {6}


def _times_by_hand(seen: FleetView, spec: JobSpec, planner: LegendPlanner) -> list[list[float]]:
    """t_i(k) without the planner's own arithmetic: 2 P forward; backward 2 P / 6 a block, and 6 a factor.

    The forward pass of six blocks takes as long as 6 `FORWARD` blocks backward.
    """
    rows = []
    params = seen.facts.linear_params
    for candidate in seen.candidates:
        cores, known = candidate.info.cores, planner.times.devices.get(candidate.device)
        row = []
        for depth in range(1, 7):
            tuned = {f"layer.{b}.{part}": RANKS[b] for b in range(6 - depth, 6) for part in "qkvo"}
            block, factor = 64 * 2 * params / 6, 64 * 6 * 4 * 768
            back = depth + factor * sum(RANKS[6 - depth :]) / block
            whole = 6 + factor * sum(RANKS) / block
            if known is None:
                step_s = (6 + whole) * block * 16 / 8e9 / cores
                step_s *= (6 * FORWARD + back) / (6 * FORWARD + whole)
            else:
                forward_s, block_s = known.split(planner.times.forward(6 * FORWARD, gpu=False))
                step_s = (forward_s + block_s * back) * 16 / cores
            down, up, _ = traffic(seen.facts, tuned, min(64, (seen.round - 1) * 10 * 14), "fp32")
            moved = (seen.adapter_bytes or down) + up
            row.append(10 * step_s + moved * (known.byte_s if known else 0.0))
        rows.append(row)
    assert spec.rounds.local_steps == 10
    return rows


@pytest.mark.parametrize("rounds", [0, 1, 3])
def test_the_plan_is_that_of_a_second_implementation(rounds: int) -> None:
    seen, spec = replace(view(*FLEET, round=rounds + 1), adapter_bytes=2_000_000 if rounds else 0), job()
    planner = learned(LegendPlanner(), seen, spec, rounds)
    times = _times_by_hand(seen, spec, planner)
    rows = [1000 + 100 * index for index in range(10)]
    best, eps, _ = brute_force(times, [6] * 10, [False] * 10, [count / sum(rows) for count in rows], RANKS)
    plan = planner.plan(seen, spec)
    assert list(depths_of(plan).values()) == best.depths
    assert f"meets {eps:.0%}" in plan.reason
    for candidate, row, depth in zip(FLEET, times, best.depths, strict=True):
        told = re.match(r"depth \d+: ([\d.]+) s = ", plan.participants[candidate.device].reasons["depth"])
        assert told and float(told[1]) == pytest.approx(row[depth - 1], rel=6e-3)


def test_a_slow_link_lowers_the_depth() -> None:
    """t_i grows with the ranks that are sent; a device a little slower already loses a block by it."""
    seen, spec = view(*FLEET, round=2), job()
    planner = learned(LegendPlanner(), seen, spec)
    devices = {**planner.times.devices, "d05": replace(planner.times.devices["d05"], byte_s=4e-6)}
    slow = replace(planner, times=replace(planner.times, devices=devices))
    before, after = depths_of(planner.plan(seen, spec)), depths_of(slow.plan(seen, spec))
    assert after["d05"] < before["d05"]
    assert "at 0.25 MB/s" in slow.plan(seen, spec).participants["d05"].reasons["steps"]


def test_a_measured_round_that_would_miss_the_deadline_is_not_asked_for() -> None:
    seen, spec = view(device("a"), device("b"), round=2), job(rounds=RoundsSpec(local_steps=10, deadline_s=14.0))
    assert set(depths_of(LegendPlanner().plan(seen, spec)).values()) == {6}
    plan = learned(LegendPlanner(), seen, spec).plan(seen, spec)
    assert set(depths_of(plan).values()) < {1, 2, 3, 4, 5}
    assert "of 13 s, 90% of the deadline" in plan.participants["a"].reasons["depth"]


# ---- memory, bits, batch


def test_memory_caps_depth() -> None:
    fleet = [device(name, memory=memory, bits=(32,)) for name, memory in [("a", 4096), ("b", 520), ("c", 480)]]
    plan = planned(*fleet, spec=ONE_BATCH)
    depths = depths_of(plan)
    assert depths["a"] == 6 > depths["b"] > depths["c"] >= 1
    assert {work.batch for work in plan.participants.values()} == {16}
    told = plan.participants["b"].reasons["depth"]
    assert re.search(rf"; {depths['b'] + 1} would take \d+ MiB of \d+ MiB memory", told)
    for candidate in fleet[1:]:
        work = plan.participants[candidate.device]
        bound = budget(candidate.info, candidate.load, candidate.info.agent_bytes).bytes
        assert _predicted_bytes(candidate, work) <= bound
        deeper = {f"layer.{b}.{p}": RANKS[b] for b in range(5 - depths[candidate.device], 6) for p in "qkvo"}
        assert _predicted_bytes(candidate, replace(work, ranks=deeper)) > bound


def _predicted_bytes(candidate: Candidate, work: Work, planner: LegendPlanner | None = None) -> float:
    model = planner.model if planner else CostModel()
    need = demand(minilm(), job(), work.ranks)
    return model.memory(candidate.device, need, work.bits, work.batch, candidate.info)[0]


def test_a_peak_at_low_depth_does_not_promise_full_depth() -> None:
    """The memory of more blocks is added to what was measured with few."""
    spec, full = job(), device("a", memory=560, bits=(32,))
    shallow = planned(device("a", memory=480, bits=(32,))).participants["a"]
    report = RoundReport(
        round=1, works={"a": shallow}, results={"a": result(batch=16, step_s=1.0, cores_used=1.0, base=330, peak=400)},
        loads={"a": full.load}, facts=minilm(), job=spec,  # type: ignore[dict-item]  # it was heard
    )  # fmt: skip
    planner = LegendPlanner().learn(report)
    deep = planned(device("a")).participants["a"]
    assert depth_of(deep) == 6 > depth_of(shallow)
    more = _predicted_bytes(full, deep, planner) - _predicted_bytes(full, shallow, planner)
    scale = planner.model.devices["a"].activation_scale
    needs = [demand(minilm(), spec, work.ranks) for work in (deep, shallow)]
    wanted = 16 * scale * (needs[0].activations - needs[1].activations)
    wanted += 16 * (needs[0].adapter_params - needs[1].adapter_params)
    assert more == pytest.approx(wanted, abs=2) and more > 10 * 2**20


def test_where_not_even_one_block_fits_the_batch_and_then_the_device_gives_way() -> None:
    spec = job(batch=64, batch_max=64)
    plan = planned(device("a"), device("b", memory=480, bits=(32,)), device("c", memory=400, bits=(32,)), spec=spec)
    small = plan.participants["b"]
    assert (depth_of(small), small.bits) == (1, 32)
    assert 1 < small.batch < 64
    assert "would take" in small.reasons["batch"]
    assert plan.left_out["c"].startswith("memory: 32 bits would take")


def test_fewer_bits_hold_the_jobs_batch_before_the_batch_is_cut() -> None:
    work = planned(device("a", memory=520), spec=job(batch=64, batch_max=64)).participants["a"]
    assert (work.bits, work.batch) == (16, 64)


def test_data_and_limits_cap_the_batch() -> None:
    assert planned(device("a", rows=5)).participants["a"].batch == 5
    planner = LegendPlanner()
    work = planned(device("a", bits=(32,))).participants["a"]
    planner = planner.learn(RoundReport(round=1, works={"a": work}, results={}, batch_limits={"a": 6}))
    capped = planned(device("a", bits=(32,)), planner=planner).participants["a"]
    assert capped.batch == 6 and "7 ran out of memory before (limit 6)" in capped.reasons["batch"]


def test_old_or_missing_telemetry_means_half_the_depth() -> None:
    plan = planned(device("a"), device("b", age_s=41.0), device("c", heard=False))
    assert depths_of(plan) == {"a": 6, "b": 3, "c": 3}
    assert (
        "telemetry is 41 s old (limit 30 s): cautious depth 3 instead of 6" in plan.participants["b"].reasons["depth"]
    )
    assert "no telemetry yet: cautious depth 3 instead of 6" in plan.participants["c"].reasons["depth"]
    assert plan.participants["b"].batch == plan.participants["c"].batch == 16
    assert "16 is the batch of the job, not to be passed by old readings" in plan.participants["b"].reasons["batch"]
    slow = planned(device("a", cores=8.0), device("b", cores=0.5, age_s=41.0)).participants["b"]
    if depth_of(slow) == 1:
        assert "depth 1 is the least already" in slow.reasons["depth"] or "instead of" in slow.reasons["depth"]


def test_gpus_and_agents_are_planned_by_their_own() -> None:
    plan = planned(gpu_device("a"), gpu_device("b", used=0.5))
    assert "of the GPU free" in plan.participants["a"].reasons["depth"]
    double = device("c", cores=4.0)
    double = replace(double, info=replace(double.info, agents=2))
    work = planned(device("a", cores=2.0), double).participants["c"]
    assert work.agents == 2 and "agents" in work.reasons
    assert depth_of(work) == 6


# ---- models of other shapes


def _facts(modules: list[ModuleSpec], blocks: int) -> ModelFacts:
    return replace(minilm(), modules=modules, blocks=blocks)


def test_modules_outside_the_blocks_are_tuned_like_the_top_one() -> None:
    modules = [ModuleSpec(name=f"layer.{b}.q", out=64, inp=64, block=b) for b in range(4)]
    facts = _facts([*modules, ModuleSpec(name="pooler", out=64, inp=64), ModuleSpec(name="thin", out=3, inp=64)], 4)
    fleet = (device("a", cores=4.0), device("b", cores=0.5))
    plan = LegendPlanner().plan(FleetView(round=1, candidates=fleet, facts=facts), job())
    for work in plan.participants.values():
        assert (work.ranks["pooler"], work.ranks["layer.3.q"], work.ranks["thin"]) == (14, 14, 3)
        assert "1 module smaller than that get their size" in work.reasons["rank"]
    # They may lie before the blocks: then no depth saves back-propagation.
    assert "back through 4 of 4 blocks" in plan.participants["b"].reasons["depth"]


def test_only_blocks_with_a_tuned_module_are_steps_of_depth() -> None:
    facts = _facts([ModuleSpec(name=f"layer.{b}.q", out=64, inp=64, block=b) for b in (1, 5)], 6)
    plan = LegendPlanner().plan(FleetView(round=1, candidates=(device("a"),), facts=facts), job())
    work = plan.participants["a"]
    assert work.ranks == {"layer.1.q": 2, "layer.5.q": 14}
    assert "back through 5 of 5 blocks" in work.reasons["depth"]


@pytest.mark.parametrize("block", [0, -1])
def test_a_model_of_one_block_is_tuned_whole(block: int) -> None:
    facts = _facts([ModuleSpec(name="linear", out=64, inp=64, block=block)], 1)
    fleet = (device("a"), device("b", cores=0.2, age_s=99.0))
    plan = LegendPlanner().plan(FleetView(round=1, candidates=fleet, facts=facts), job())
    assert [work.ranks for work in plan.participants.values()] == [{"linear": 8}, {"linear": 8}]


# ---- properties

BITS: list[Bits] = [4, 8, 16, 32]
DEVICES = st.builds(
    device,
    st.just("x"),
    cores=st.floats(0.1, 8.0),
    foreign=st.floats(0.0, 8.0),
    memory=st.integers(200, 1500),
    used=st.integers(0, 200),
    age_s=st.sampled_from([0.0, 29.0, 100.0]),
    rows=st.integers(0, 60),
    bits=st.lists(st.sampled_from(BITS), unique=True).map(tuple),
    heard=st.booleans(),
)
FLEETS = st.lists(DEVICES, min_size=1, max_size=6).map(
    lambda found: [replace(c, device=f"edge-{i}") for i, c in enumerate(found)]
)


@settings(max_examples=80, deadline=None)
@given(FLEETS, st.integers(1, 4), st.integers(1, 40), st.randoms())
def test_plans_are_sound(fleet: list[Candidate], least: int, batch: int, rng: random.Random) -> None:
    spec = job(batch=batch, batch_min=least, batch_max=max(least, 32))
    planner = LegendPlanner()
    try:
        plan = planner.plan(view(*fleet), spec)
    except UserError:
        return
    assert set(plan.participants) | set(plan.left_out) == {candidate.device for candidate in fleet}
    assert not set(plan.participants) & set(plan.left_out)
    by_id = {candidate.device: candidate for candidate in fleet}
    for name, work in plan.participants.items():
        known = by_id[name]
        rows = known.info.datasets["news"].rows
        assert min(least, rows) <= work.batch <= max(least, min(rows, 32))
        assert work.bits in known.info.bits
        need = demand(minilm(), spec, work.ranks)
        size, _ = planner.model.memory(name, need, work.bits, work.batch, known.info)
        assert size <= budget(known.info, known.load, known.info.agent_bytes).bytes
        numbers = {"batch": work.batch, "bits": work.bits, "steps": work.steps, "rank": 14, "depth": depth_of(work)}
        assert work.reasons.keys() == numbers.keys()
        for key, text in work.reasons.items():
            match = PATTERN.fullmatch(text)
            assert match, text
            assert (match["name"], int(match["value"])) == (key, numbers[key])
            assert any(c.isdigit() for c in match["reading"])
            assert any(c.isdigit() for c in match["bound"])
    shuffled = list(fleet)
    rng.shuffle(shuffled)
    again = planner.plan(view(*shuffled), spec)
    assert again == plan
    assert plan_digest(again) == plan_digest(plan)
