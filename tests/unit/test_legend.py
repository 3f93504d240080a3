"""The `legend` planner: depth by speed and live load, ranks rising toward the output, a reason for each number."""

from __future__ import annotations

import random
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from coordinator.core import strategies
from coordinator.core.facts import ModelFacts, ModuleSpec
from coordinator.core.planning import registry
from coordinator.core.planning.base import Candidate, FleetView, Plan, RoundReport
from coordinator.core.planning.block_times import FORWARD
from coordinator.core.planning.cost_model import BITS_TIME, CostModel
from coordinator.core.planning.demand import demand, traffic
from coordinator.core.planning.digest import plan_digest
from coordinator.core.planning.legend import LegendPlanner
from coordinator.core.planning.readings import budget
from coordinator.core.planning.reasons import PATTERN
from coordinator.core.planning.sizing import batch_sizes
from shared.codec import pack, unpack
from shared.errors import UserError
from shared.jobs import Bits, JobSpec, RoundsSpec, StrategySpec
from shared.messages import Work
from tests.unit.lcd_reference import brute_force
from tests.unit.planning_cases import device, gpu_device, job, minilm, result, view

RANKS = (2, 4, 7, 9, 12, 14)
"""Of MiniLM's six blocks at rank 8."""
FLEET = tuple(
    device(f"d{index:02d}", cores=cores, rows=1000 + 100 * index)
    for index, cores in enumerate([0.5, 0.55, 0.6, 1.0, 1.1, 1.2, 1.3, 2.0, 2.1, 2.2])
)


def _plan(*candidates: Candidate, spec: JobSpec | None = None, planner: LegendPlanner | None = None) -> Plan:
    return (planner or LegendPlanner()).plan(view(*candidates), spec or job())


def _depth(work: Work) -> int:
    """Blocks that the work tunes; they must be the last ones, with the ranks of the fleet."""
    blocks = sorted({int(name.split(".")[1]) for name in work.ranks})
    assert blocks == list(range(6 - len(blocks), 6))
    assert work.ranks == {f"layer.{block}.{part}": RANKS[block] for block in blocks for part in "qkvo"}
    return len(blocks)


def _depths(plan: Plan) -> dict[str, int]:
    return {name: _depth(work) for name, work in plan.participants.items()}


def _report(
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


def _learned(planner: LegendPlanner, seen: FleetView, spec: JobSpec, rounds: int = 1) -> LegendPlanner:
    for _ in range(rounds):
        planner = planner.learn(_report(planner.plan(seen, spec), seen, spec))
    return planner


# ---- depth


ONE_BATCH = job(batch=16, batch_min=16, batch_max=16)
"""As in the paper: speed is met by depth alone."""


def test_depth_follows_speed_and_one_batch_stays() -> None:
    plan = _plan(*FLEET, spec=ONE_BATCH)
    depths = _depths(plan)
    assert [depths[c.device] for c in FLEET] == sorted(depths.values())
    assert depths["d00"] < depths["d05"] <= depths["d09"]
    assert {work.batch for work in plan.participants.values()} == {16}
    assert {work.bits for work in plan.participants.values()} == {32}
    assert plan.predicted_s.keys() == plan.participants.keys()


def test_batches_make_equal_what_depth_can_not() -> None:
    """All of a job's batches: at the depths of one batch each takes what the median has time for."""
    fleet = (*FLEET, device("d10", cores=8.0))
    plan, alone = _plan(*fleet), _plan(*fleet, spec=ONE_BATCH)
    assert _depths(plan) == _depths(alone)
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
    assert set(_depths(_plan(*(device(name) for name in "abc"))).values()) == {6}


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
    planner = _learned(LegendPlanner(), seen, spec, rounds)
    times = _times_by_hand(seen, spec, planner)
    rows = [1000 + 100 * index for index in range(10)]
    best, eps, _ = brute_force(times, [6] * 10, [False] * 10, [count / sum(rows) for count in rows], RANKS)
    plan = planner.plan(seen, spec)
    assert list(_depths(plan).values()) == best.depths
    assert f"meets {eps:.0%}" in plan.reason
    for candidate, row, depth in zip(FLEET, times, best.depths, strict=True):
        told = re.match(r"depth \d+: ([\d.]+) s = ", plan.participants[candidate.device].reasons["depth"])
        assert told and float(told[1]) == pytest.approx(row[depth - 1], rel=6e-3)


def test_a_slow_link_lowers_the_depth() -> None:
    """t_i grows with the ranks that are sent; a device a little slower already loses a block by it."""
    seen, spec = view(*FLEET, round=2), job()
    planner = _learned(LegendPlanner(), seen, spec)
    devices = {**planner.times.devices, "d05": replace(planner.times.devices["d05"], byte_s=4e-6)}
    slow = replace(planner, times=replace(planner.times, devices=devices))
    before, after = _depths(planner.plan(seen, spec)), _depths(slow.plan(seen, spec))
    assert after["d05"] < before["d05"]
    assert "at 0.25 MB/s" in slow.plan(seen, spec).participants["d05"].reasons["steps"]


def test_a_measured_round_that_would_miss_the_deadline_is_not_asked_for() -> None:
    seen, spec = view(device("a"), device("b"), round=2), job(rounds=RoundsSpec(local_steps=10, deadline_s=14.0))
    assert set(_depths(LegendPlanner().plan(seen, spec)).values()) == {6}
    plan = _learned(LegendPlanner(), seen, spec).plan(seen, spec)
    assert set(_depths(plan).values()) < {1, 2, 3, 4, 5}
    assert "of 13 s, 90% of the deadline" in plan.participants["a"].reasons["depth"]


# ---- capacity


def _after(planner: LegendPlanner, candidate: Candidate, depth: int, step_s: float, fetch_s: float) -> LegendPlanner:
    """After a round of so many blocks, measured on half a core."""
    ranks = {f"layer.{b}.{part}": RANKS[b] for b in range(6 - depth, 6) for part in "qkvo"}
    work = Work(ranks=ranks, batch=16, bits=32, steps=10)
    told = replace(result(batch=16, step_s=step_s, cores_used=0.5), fetch_s=fetch_s)
    loads = {candidate.device: candidate.load} if candidate.load else {}
    return planner.learn(
        RoundReport(
            round=1, works={candidate.device: work}, results={candidate.device: told}, loads=loads, facts=minilm(),
            job=job(), adapter_bytes=1_000_000,
        )
    )  # fmt: skip


def test_capacity_is_a_moving_average_of_core_seconds() -> None:
    """By hand: a step of 16 samples at full depth takes 2 s on 0.5 cores; then 4 s."""
    planner, one = LegendPlanner(), device("a", cores=0.5)
    for step_s, fetch_s in ((2.0, 1.0), (4.0, 2.0)):
        planner = _after(planner, one, 6, step_s, fetch_s)
    found = planner.times.devices["a"]
    step_s = 0.8 * 2.0 + 0.2 * 4.0
    # 6 blocks of 2 P / 6, and 6 FLOP a token and parameter of 4 factors of 768 per block and rank.
    blocks = 6 + 6 * 4 * 768 * sum(RANKS) / (2 * minilm().linear_params / 6)
    assert (found.rounds, found.blocks) == (2, pytest.approx(blocks))
    assert found.time == pytest.approx(step_s * 0.5 / 16)
    assert found.byte_s == pytest.approx(0.8 * 1e-6 + 0.2 * 2e-6)
    usual = 6 * FORWARD
    forward, block = found.split(usual)
    assert forward == pytest.approx(found.time * usual / (usual + blocks))
    assert block == pytest.approx(found.time / (usual + blocks))
    after = _plan(one, planner=planner)
    assert after.predicted_s["a"] == pytest.approx(10 * step_s)
    assert "averaged over 2 rounds" in after.participants["a"].reasons["depth"]


@pytest.mark.parametrize("forward_s", [0.2, 1.0, 3.0])
def test_depths_that_were_seen_tell_forward_from_backward(forward_s: float) -> None:
    """Steps of forward_s + 0.3 s a block, whatever is usual, as soon as the depths differ."""
    planner, one = LegendPlanner(), device("a", cores=0.5)
    for depth in (6, 1, 5, 2, 6, 1):
        blocks = _after(LegendPlanner(), one, depth, 1.0, 1.0).times.devices["a"].blocks
        planner = _after(planner, one, depth, forward_s + 0.3 * blocks, 1.0)
    phi = planner.times.forward(6 * FORWARD, gpu=False)
    assert phi == pytest.approx(forward_s / 0.3, rel=0.25)
    forward, block = planner.times.devices["a"].split(phi)
    assert (forward * 16 / 0.5, block * 16 / 0.5) == pytest.approx((forward_s, 0.3), rel=0.25)
    # Of the other kind of machine nothing was told.
    assert planner.times.forward(6 * FORWARD, gpu=True) == 6 * FORWARD


def test_one_depth_tells_nothing_of_the_parts() -> None:
    planner, one = LegendPlanner(), device("a", cores=0.5)
    for step_s in (1.0, 1.2, 0.9, 1.1):
        planner = _after(planner, one, 4, step_s, 1.0)
    assert planner.times.forward(6 * FORWARD, gpu=False) == pytest.approx(6 * FORWARD, rel=1e-6)


def test_more_blocks_in_less_time_make_no_time_negative() -> None:
    """Something else changed; both parts stay positive and add up to the mean."""
    planner, one = LegendPlanner(), device("a", cores=0.5)
    for depth, step_s in ((6, 0.1), (1, 30.0), (6, 0.1), (1, 30.0)):
        planner = _after(planner, one, depth, step_s, 1.0)
    found = planner.times.devices["a"]
    forward, block = found.split(planner.times.forward(6 * FORWARD, gpu=False))
    assert forward > 0 and block > 0
    assert forward + block * found.blocks == pytest.approx(found.time)


def test_small_downloads_measure_no_link() -> None:
    seen, spec = view(device("a")), job()
    report = _report(LegendPlanner().plan(seen, spec), seen, spec, adapter_bytes=1000)
    assert LegendPlanner().learn(report).times.devices["a"].byte_s == 0.0


def test_devices_not_yet_met_take_the_median_of_the_fleet() -> None:
    spec = job()
    planner = _learned(LegendPlanner(), view(device("a"), device("b")), spec)
    plan = planner.plan(view(device("a"), device("b"), device("c")), spec)
    assert plan.predicted_s["c"] == pytest.approx(plan.predicted_s["a"], rel=0.01)
    assert "median of the fleet, 0 rounds of its own" in plan.participants["c"].reasons["depth"]


def test_live_load_lowers_depth_at_once_and_its_end_raises_it_again() -> None:
    seen, spec = view(*FLEET, round=2), job()
    planner = _learned(LegendPlanner(), seen, spec)
    before = planner.plan(seen, spec)
    busy = [c if c.device != "d06" else device("d06", cores=1.3, foreign=1.3, rows=1600) for c in FLEET]
    during = planner.plan(view(*busy, round=2), spec)
    assert _depths(during)["d06"] < _depths(before)["d06"]
    assert "(foreign 1.30 of 1.30)" in during.participants["d06"].reasons["depth"]
    assert planner.plan(seen, spec) == before
    # The loaded round is learned, and still the old depth comes back.
    after = planner.learn(_report(during, view(*busy, round=2), spec)).plan(seen, spec)
    assert _depths(after)["d06"] == _depths(before)["d06"]


# ---- memory, bits, batch


def test_memory_caps_depth() -> None:
    fleet = [device(name, memory=memory, bits=(32,)) for name, memory in [("a", 4096), ("b", 520), ("c", 480)]]
    plan = _plan(*fleet, spec=ONE_BATCH)
    depths = _depths(plan)
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
    shallow = _plan(device("a", memory=480, bits=(32,))).participants["a"]
    report = RoundReport(
        round=1, works={"a": shallow}, results={"a": result(batch=16, step_s=1.0, cores_used=1.0, base=330, peak=400)},
        loads={"a": full.load}, facts=minilm(), job=spec,  # type: ignore[dict-item]  # it was heard
    )  # fmt: skip
    planner = LegendPlanner().learn(report)
    deep = _plan(device("a")).participants["a"]
    assert _depth(deep) == 6 > _depth(shallow)
    more = _predicted_bytes(full, deep, planner) - _predicted_bytes(full, shallow, planner)
    scale = planner.model.devices["a"].activation_scale
    needs = [demand(minilm(), spec, work.ranks) for work in (deep, shallow)]
    wanted = 16 * scale * (needs[0].activations - needs[1].activations)
    wanted += 16 * (needs[0].adapter_params - needs[1].adapter_params)
    assert more == pytest.approx(wanted, abs=2) and more > 10 * 2**20


def test_where_not_even_one_block_fits_the_batch_and_then_the_device_gives_way() -> None:
    spec = job(batch=64, batch_max=64)
    plan = _plan(device("a"), device("b", memory=480, bits=(32,)), device("c", memory=400, bits=(32,)), spec=spec)
    small = plan.participants["b"]
    assert (_depth(small), small.bits) == (1, 32)
    assert 1 < small.batch < 64
    assert "would take" in small.reasons["batch"]
    assert plan.left_out["c"].startswith("memory: 32 bits would take")


def test_fewer_bits_hold_the_jobs_batch_before_the_batch_is_cut() -> None:
    work = _plan(device("a", memory=520), spec=job(batch=64, batch_max=64)).participants["a"]
    assert (work.bits, work.batch) == (16, 64)


def test_data_and_limits_cap_the_batch() -> None:
    assert _plan(device("a", rows=5)).participants["a"].batch == 5
    planner = LegendPlanner()
    work = _plan(device("a", bits=(32,))).participants["a"]
    planner = planner.learn(RoundReport(round=1, works={"a": work}, results={}, batch_limits={"a": 6}))
    capped = _plan(device("a", bits=(32,)), planner=planner).participants["a"]
    assert capped.batch == 6 and "7 ran out of memory before (limit 6)" in capped.reasons["batch"]


def test_old_or_missing_telemetry_means_half_the_depth() -> None:
    plan = _plan(device("a"), device("b", age_s=41.0), device("c", heard=False))
    assert _depths(plan) == {"a": 6, "b": 3, "c": 3}
    assert (
        "telemetry is 41 s old (limit 30 s): cautious depth 3 instead of 6" in plan.participants["b"].reasons["depth"]
    )
    assert "no telemetry yet: cautious depth 3 instead of 6" in plan.participants["c"].reasons["depth"]
    assert plan.participants["b"].batch == plan.participants["c"].batch == 16
    assert "16 is the batch of the job, not to be passed by old readings" in plan.participants["b"].reasons["batch"]
    slow = _plan(device("a", cores=8.0), device("b", cores=0.5, age_s=41.0)).participants["b"]
    if _depth(slow) == 1:
        assert "depth 1 is the least already" in slow.reasons["depth"] or "instead of" in slow.reasons["depth"]


def test_gpus_and_agents_are_planned_by_their_own() -> None:
    plan = _plan(gpu_device("a"), gpu_device("b", used=0.5))
    assert "of the GPU free" in plan.participants["a"].reasons["depth"]
    double = device("c", cores=4.0)
    double = replace(double, info=replace(double.info, agents=2))
    work = _plan(device("a", cores=2.0), double).participants["c"]
    assert work.agents == 2 and "agents" in work.reasons
    assert _depth(work) == 6


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
        numbers = {"batch": work.batch, "bits": work.bits, "steps": work.steps, "rank": 14, "depth": _depth(work)}
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


# ---- state


def test_a_restart_loses_no_learning() -> None:
    """From the recorded reports alone, and from a state that went to disk and back in between."""
    seen, spec, rng = view(*FLEET, round=2), job(), random.Random(0)
    planner, reports = LegendPlanner(), []
    for _ in range(3):
        reports.append(_report(planner.plan(seen, spec), seen, spec, rng))
        planner = planner.learn(reports[-1])
    replayed = LegendPlanner()
    for report in reports:
        replayed = unpack(pack(replayed.learn(unpack(pack(report), RoundReport))), LegendPlanner)
    assert replayed == planner
    assert plan_digest(replayed.plan(seen, spec)) == plan_digest(planner.plan(seen, spec))


def test_it_goes_by_its_name() -> None:
    assert isinstance(registry.create(StrategySpec(name="legend")), LegendPlanner)
    assert LegendPlanner().name == "legend"


def test_an_aggregator_of_one_rank_does_not_go_with_it() -> None:
    (fault,) = strategies.faults(StrategySpec(name="legend", aggregator="fedit"))
    assert fault.startswith("strategy.aggregator: fedit takes one rank only")
    assert strategies.faults(StrategySpec(name="legend")) == strategies.faults(StrategySpec(aggregator="fedit")) == []


def test_nobody_able_is_an_error_that_names_each() -> None:
    with pytest.raises(UserError, match="no device can do job texts: b: no precision proven yet; c: reports a problem"):
        _plan(device("c", problem="hot"), device("b", bits=()))


def test_a_fleet_of_thousands_is_planned_in_one_sweep() -> None:
    """No quadratic cost: 2000 devices of six blocks; the figure for 10,000 is in the lab log."""
    rng = np.random.default_rng(0)
    fleet = [device(f"d{i:04d}", cores=float(rng.uniform(0.5, 4.0))) for i in range(2000)]
    plan = _plan(*fleet)
    assert len(plan.participants) == 2000
    assert len({id(work.ranks) for work in plan.participants.values()}) <= 6


@pytest.mark.parametrize("forward_blocks", [0.5, 1.5, 6.0])
def test_depths_settle_whatever_a_forward_pass_really_costs(forward_blocks: float) -> None:
    """Forward as long as so many blocks backward: the prior is wrong, and the plan still stops moving."""
    spec, planner, plans = job(), LegendPlanner(), []
    for round in range(1, 41):
        seen = view(*FLEET, round=round)
        plan = planner.plan(seen, spec)
        plans.append(_depths(plan))
        report = _report(plan, seen, spec)
        for name, work in plan.participants.items():
            blocks = (demand(seen.facts, spec, work.ranks).flop - 6 * _BLOCK_FLOP) / _BLOCK_FLOP
            step_s = (forward_blocks + blocks) * 0.2 / report.loads[name].cores * work.batch / 16
            report.results[name] = replace(report.results[name], step_s=step_s, train_s=10 * step_s)
        planner = planner.learn(report)
    assert plans[-1] == plans[-2] == plans[-3] == plans[-4]


_BLOCK_FLOP = 2 * 64 * minilm().linear_params / 6
