"""The `uniform` planner: bits from memory, batch from speed and live load, a reason for each number."""

from __future__ import annotations

import random

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from coordinator.core.planning import registry
from coordinator.core.planning.base import Candidate, FleetView, Plan, RoundReport
from coordinator.core.planning.demand import demand
from coordinator.core.planning.digest import plan_digest
from coordinator.core.planning.readings import budget
from coordinator.core.planning.reasons import PATTERN
from coordinator.core.planning.sizing import batch_sizes
from coordinator.core.planning.uniform import UniformPlanner
from shared.codec import pack, unpack
from shared.errors import UserError
from shared.jobs import Bits, JobSpec, RoundsSpec, StrategySpec
from tests.unit.planning_cases import device, gpu_device, job, minilm, result, view


def _plan(*candidates: Candidate, spec: JobSpec | None = None, planner: UniformPlanner | None = None) -> Plan:
    return (planner or UniformPlanner()).plan(view(*candidates), spec or job())


def _batches(plan: Plan) -> dict[str, int]:
    return {name: work.batch for name, work in plan.participants.items()}


def _learned(
    planner: UniformPlanner, seen: FleetView, spec: JobSpec, rng: random.Random | None = None
) -> UniformPlanner:
    """`planner` after a round in which each device trained at 0.1 s per sample and core, with noise of 10 %."""
    plan = planner.plan(seen, spec)
    loads = {candidate.device: candidate.load for candidate in seen.candidates if candidate.load}
    results = {}
    for name, work in plan.participants.items():
        load = loads[name]
        used = load.cores if load.foreign_cores == 0 else load.cores / 2
        step_s = 0.1 * work.batch / used * (rng.uniform(0.9, 1.1) if rng else 1.0)
        results[name] = result(batch=work.batch, step_s=step_s, bits=work.bits, cores_used=used)
    return planner.learn(
        RoundReport(round=seen.round, works=plan.participants, results=results, loads=loads, facts=seen.facts, job=spec)
    )


FLEET = (device("a", cores=0.83), device("b", cores=0.5), device("c", cores=0.3), device("d", cores=0.2))

# ---- rank, bits, batch, steps


def test_every_module_gets_the_rank_clipped_to_its_size() -> None:
    plan = _plan(device("a"), spec=job(rank=1000))
    assert set(plan.participants["a"].ranks.values()) == {384}
    assert "24 modules smaller than that get their size" in plan.participants["a"].reasons["rank"]
    assert set(_plan(device("a")).participants["a"].ranks.values()) == {8}


def test_bits_follow_memory() -> None:
    # 268 MiB of agent at work, 64 MiB of reserve, then 124, 81, 70 and 65 MiB for base, adapter and loading.
    fleet = [device(name, memory=memory) for name, memory in [("a", 468), ("b", 418), ("c", 404), ("d", 399)]]
    plan = _plan(*fleet, device("e", memory=348))
    assert {name: work.bits for name, work in plan.participants.items()} == {"a": 32, "b": 16, "c": 8, "d": 4}
    assert "32 bits would take 460 MiB" in plan.participants["b"].reasons["bits"] or "32 bits" in plan.left_out["e"]
    assert plan.left_out["e"].startswith("memory: 32 bits would take")


@pytest.mark.parametrize("peak", [380, 450])
def test_what_has_run_under_the_limit_fits(peak: int) -> None:
    """Even where resident memory was above the limit: shared pages count in it, and no limit is charged for them."""
    tight = device("a", memory=420, bits=(4,))
    facts, spec = minilm(), job(batch=4, batch_min=4)
    first = _plan(tight, spec=spec).participants["a"]
    measured = result(batch=first.batch, bits=4, step_s=0.1, base=330, peak=peak)
    assert tight.load is not None
    report = RoundReport(
        round=1, works={"a": first}, results={"a": measured}, loads={"a": tight.load}, facts=facts, job=spec
    )
    again = _plan(tight, spec=spec, planner=UniformPlanner().learn(report)).participants["a"]
    assert again.bits == 4
    assert "meets 420 MiB memory limit by having run under it" in again.reasons["bits"]


def test_fixed_bits_leave_out_who_can_not() -> None:
    plan = _plan(device("a"), device("b", bits=(4, 8)), device("c", memory=300), spec=job(bits=32))
    assert set(plan.participants) == {"a"}
    assert plan.left_out["b"] == "32 bits not proven here (proven: 4, 8)"
    assert plan.left_out["c"].startswith("memory: 32 bits would take")


def test_bits_that_ran_out_of_memory_at_any_batch_are_not_tried_again() -> None:
    planner, spec = UniformPlanner(), job()
    work = _plan(device("a")).participants["a"]
    planner = planner.learn(RoundReport(round=1, works={"a": work}, results={}, batch_limits={"a": 0}))
    after = _plan(device("a"), spec=spec, planner=planner).participants["a"]
    assert after.bits == 16
    assert "32 bits ran out of memory above batch 0" in after.reasons["bits"]


def test_batches_follow_speed_and_the_median_gets_the_jobs_batch() -> None:
    fleet = [device("a", cores=4.0), device("b"), device("c"), device("d"), device("e", cores=0.3)]
    assert _batches(_plan(*fleet)) == {"a": 32, "b": 16, "c": 16, "d": 16, "e": 5}


def test_the_draw_of_a_round_does_not_move_its_target() -> None:
    """Of a sample the devices met before count, too: the median of all five stays b's, c's and d's time."""
    fleet = [device("a", cores=4.0), device("b"), device("c"), device("d"), device("e", cores=0.3)]
    spec = job(rounds=RoundsSpec(local_steps=10, sample=2))
    planner = _learned(UniformPlanner(), view(*fleet), spec)
    assert _batches(_plan(fleet[0], fleet[4], spec=spec, planner=planner)) == {"a": 32, "e": 5}
    whole = _learned(UniformPlanner(), view(*fleet), job())
    assert _batches(_plan(fleet[0], fleet[4], spec=job(), planner=whole)) == {"a": 32, "e": 10}


def test_measured_speed_replaces_the_count_of_cores() -> None:
    seen, spec = view(device("a"), device("b"), device("c")), job()
    plan = UniformPlanner().plan(seen, spec)
    assert set(_batches(plan).values()) == {16}
    results = {name: result(batch=16, step_s=s, cores_used=1.0) for name, s in [("a", 1.0), ("b", 1.0), ("c", 4.0)]}
    loads = {c.device: c.load for c in seen.candidates if c.load}
    report = RoundReport(round=1, works=plan.participants, results=results, loads=loads, facts=seen.facts, job=spec)
    after = UniformPlanner().learn(report).plan(seen, spec)
    assert _batches(after) == {"a": 16, "b": 16, "c": 4}, "a twentieth of its step does not grow with the batch"
    assert after.predicted_s["a"] == pytest.approx(10.0)
    assert "fitted on 1 round" in after.participants["c"].reasons["batch"]


def test_memory_data_and_limits_cap_the_batch() -> None:
    few = _plan(device("a", rows=5)).participants["a"]
    assert few.batch == 5
    assert "the data set has 5 rows" in few.reasons["batch"]
    assert _plan(device("a", rows=1), spec=job(batch_min=2)).participants["a"].batch == 1
    tight = _plan(device("a", memory=498, bits=(32,))).participants["a"]
    assert 1 < tight.batch < 16
    assert "MiB memory" in tight.reasons["batch"]
    work = msgspec.structs.replace(tight, bits=32)
    planner = UniformPlanner().learn(RoundReport(round=1, works={"a": work}, results={}, batch_limits={"a": 6}))
    capped = _plan(device("a"), planner=planner).participants["a"]
    assert capped.batch == 6
    assert "7 ran out of memory before (limit 6)" in capped.reasons["batch"]


def test_a_fixed_batch_stays_fixed() -> None:
    spec = job(batch=10, batch_min=10, batch_max=10)
    assert set(_batches(_plan(*FLEET, spec=spec)).values()) == {10}


def test_the_test_agents_task_goes_the_same_way() -> None:
    facts = msgspec.structs.replace(
        minilm(), modules=[msgspec.structs.replace(minilm().modules[0], name="w", out=4, inp=8)], dense={},
        linear_params=32, other_params=0, blocks=1, hidden=8,
    )  # fmt: skip
    spec = job(batch=4, batch_min=4, batch_max=4)
    spec = msgspec.structs.replace(spec, task=msgspec.structs.replace(spec.task, kind="least_squares"))
    seen = FleetView(round=1, candidates=(device("a", memory=400),), facts=facts)
    work = UniformPlanner().plan(seen, spec).participants["a"]
    assert (work.batch, work.bits, work.ranks) == (4, 32, {"w": 4})


def test_a_gpu_is_planned_by_its_own_memory() -> None:
    plan = _plan(gpu_device("a", memory=8192), gpu_device("b", memory=638))
    assert plan.participants["a"].bits == 32
    assert "of the GPU free" in plan.participants["a"].reasons["batch"]
    assert plan.participants["b"].bits == 16


def test_steps_and_training_time_are_passed_on() -> None:
    rounds = RoundsSpec(local_steps=7, train_for_s=0.001, deadline_s=60.0)
    plan = _plan(device("a"), spec=job(rounds=rounds))
    work = plan.participants["a"]
    assert (work.steps, work.train_for_s, plan.deadline_s) == (7, 0.001, 60.0)
    whole = _plan(device("a"), spec=job(rounds=msgspec.structs.replace(rounds, train_for_s=0.0)))
    assert plan.predicted_s["a"] == pytest.approx(whole.predicted_s["a"] / 7), "one step is done in any case"
    assert "partial work counts" in work.reasons["steps"]


@pytest.mark.parametrize(
    ("strategy", "accumulation", "sizes"),
    [
        (StrategySpec(batch=16, batch_min=1, batch_max=32), 1, (*range(1, 8), *range(8, 16, 2), *range(16, 33, 4))),
        (
            StrategySpec(batch=12, batch_min=2, batch_max=50),
            1,
            (*range(2, 8), 9, 10, 12, 15, 18, 21, 24, 30, 36, 42, 48),
        ),
        (StrategySpec(batch=16, batch_min=1, batch_max=32), 4, tuple(range(4, 33, 4))),
        (StrategySpec(batch=12, batch_min=1, batch_max=64), 8, tuple(range(8, 57, 8))),
        (StrategySpec(batch=16, batch_min=4, batch_max=8), 1, (4, 5, 6, 7, 8)),
        (StrategySpec(batch=3, batch_min=3, batch_max=3), 2, (3,)),
    ],
)
def test_batches_to_choose_from(strategy: StrategySpec, accumulation: int, sizes: tuple[int, ...]) -> None:
    assert batch_sizes(strategy, accumulation) == sizes


# ---- live


def test_foreign_load_lowers_the_batch_at_once_and_its_end_restores_it() -> None:
    planner, spec = UniformPlanner(), job()
    planner = _learned(planner, view(*FLEET), spec)
    before = planner.plan(view(*FLEET), spec)
    busy = (FLEET[0], device("b", cores=0.5, foreign=0.5), *FLEET[2:])
    during = planner.plan(view(*busy), spec)
    assert during.participants["b"].batch < before.participants["b"].batch
    assert "(foreign 0.50 of 0.50)" in during.participants["b"].reasons["batch"]
    assert {name: batch for name, batch in _batches(during).items() if name != "b"} == {
        name: batch for name, batch in _batches(before).items() if name != "b"
    }
    # The loaded round is learned, and still the old batch comes back with the next plan.
    after = _learned(planner, view(*busy), spec).plan(view(*FLEET), spec)
    assert _batches(after) == _batches(before)


@pytest.mark.parametrize("seed", range(4))
def test_noise_of_ten_percent_does_not_make_batches_flap(seed: int) -> None:
    rng, spec = random.Random(seed), job()
    planner = _learned(UniformPlanner(), view(*FLEET), spec, rng)
    first = _batches(planner.plan(view(*FLEET), spec))
    for _ in range(12):
        noisy = [device(c.device, cores=c.info.cores, foreign=rng.uniform(0, 0.03)) for c in FLEET]
        assert _batches(planner.plan(view(*noisy), spec)) == first
        planner = _learned(planner, view(*FLEET), spec, rng)
    assert _batches(planner.plan(view(*FLEET), spec)) == first


def test_old_or_missing_telemetry_means_half_the_batch() -> None:
    plan = _plan(device("a"), device("b", age_s=41.0), device("c", heard=False))
    assert _batches(plan) == {"a": 16, "b": 8, "c": 8}
    old = plan.participants["b"].reasons["batch"]
    assert "telemetry is 41 s old (limit 30 s): cautious batch 8 instead of 16" in old
    assert "no telemetry yet: cautious batch 8 instead of 16" in plan.participants["c"].reasons["batch"]
    least = _plan(device("a", age_s=41.0), spec=job(batch=4, batch_min=4, batch_max=4))
    assert "batch 4 is the least already" in least.participants["a"].reasons["batch"]


def test_old_telemetry_and_little_memory_mean_fewer_bits() -> None:
    assert _plan(device("a", memory=468)).participants["a"].bits == 32
    work = _plan(device("a", memory=468, age_s=41.0)).participants["a"]
    assert work.bits == 16
    assert "telemetry is 41 s old (limit 30 s): cautious 16 bits instead of 32" in work.reasons["bits"]
    assert _plan(device("a", memory=4000, age_s=41.0)).participants["a"].bits == 32


# ---- who takes part


def test_who_can_not_take_part_is_told_why() -> None:
    other = msgspec.structs.replace(device("x").info, datasets={})
    plan = _plan(
        device("a"), device("b", bits=()), device("c", problem="the agent does not start"), device("d", rows=0),
        Candidate(device="e", info=other),
    )  # fmt: skip
    assert set(plan.participants) == {"a"}
    assert plan.left_out == {
        "b": "no precision proven yet",
        "c": "reports a problem: the agent does not start",
        "d": "data set 'news' has 0 rows",
        "e": "no data set 'news' (it has none)",
    }


def test_nobody_able_is_an_error_that_names_each() -> None:
    with pytest.raises(UserError, match="no device can do job texts: b: no precision proven yet; c: reports a problem"):
        _plan(device("c", problem="hot"), device("b", bits=()))
    with pytest.raises(UserError, match="there are no candidates"):
        _plan()


def test_unknown_planners_are_refused_with_the_known_ones() -> None:
    assert registry.create(StrategySpec()).name == "uniform"
    with pytest.raises(UserError, match="uniform; did you mean 'uniform'"):
        registry.create(StrategySpec(name="unifrom"))


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
    lambda found: [msgspec.structs.replace(c, device=f"edge-{i}") for i, c in enumerate(found)]
)
JOBS = st.builds(
    lambda least, batch, most, accumulation: job(
        batch=batch, batch_min=least, batch_max=max(least, most), accumulation=accumulation
    ),
    st.integers(1, 8),
    st.integers(1, 64),
    st.integers(1, 64),
    st.sampled_from([1, 2, 4]),
)


def _try(planner: UniformPlanner, fleet: list[Candidate], spec: JobSpec) -> Plan | None:
    try:
        return planner.plan(view(*fleet), spec)
    except UserError:
        return None


@settings(max_examples=60)
@given(FLEETS, JOBS, st.randoms())
def test_plans_are_sound(fleet: list[Candidate], spec: JobSpec, rng: random.Random) -> None:
    planner = UniformPlanner()
    plan = _try(planner, fleet, spec)
    if plan is None:
        return
    assert set(plan.participants) | set(plan.left_out) == {candidate.device for candidate in fleet}
    assert not set(plan.participants) & set(plan.left_out)
    by_id = {candidate.device: candidate for candidate in fleet}
    for name, work in plan.participants.items():
        known = by_id[name]
        rows = known.info.datasets["news"].rows
        assert min(spec.strategy.batch_min, rows) <= work.batch <= min(spec.strategy.batch_max, rows)
        assert work.bits in known.info.bits
        need = demand(minilm(), spec, work.ranks)
        size, _ = planner.model.memory(name, need, work.bits, work.batch, known.info)
        assert size <= budget(known.info, known.load, known.info.agent_bytes).bytes
        for key, text in work.reasons.items():
            match = PATTERN.fullmatch(text)
            assert match, text
            assert match["name"] == key
            numbers = {"batch": work.batch, "bits": work.bits, "steps": work.steps, "rank": spec.strategy.rank}
            assert int(match["value"]) == numbers[key]
            assert any(c.isdigit() for c in match["reading"])
            assert any(c.isdigit() for c in match["bound"])
    shuffled = list(fleet)
    rng.shuffle(shuffled)
    again = planner.plan(view(*shuffled), spec)
    assert again == plan
    assert plan_digest(again) == plan_digest(plan)


@settings(max_examples=60)
@given(FLEETS, JOBS, st.integers(0, 5), st.floats(0.0, 4.0))
def test_foreign_load_never_raises_a_batch_and_its_end_restores_the_plan(
    fleet: list[Candidate], spec: JobSpec, index: int, more: float
) -> None:
    planner = UniformPlanner()
    before = _try(planner, fleet, spec)
    chosen = fleet[index % len(fleet)]
    if before is None or chosen.load is None:
        return
    busy = msgspec.structs.replace(chosen.load, foreign_cores=chosen.load.foreign_cores + more)
    loaded = [c if c is not chosen else msgspec.structs.replace(c, load=busy) for c in fleet]
    during = planner.plan(view(*loaded), spec)
    assert set(during.participants) == set(before.participants)
    for name, batch in _batches(during).items():
        assert batch <= _batches(before)[name]
        assert name == chosen.device or batch == _batches(before)[name]
    assert planner.plan(view(*fleet), spec) == before


# ---- digest, state


def test_the_digest_is_that_of_the_content() -> None:
    plan = _plan(*FLEET)
    works = dict(reversed(plan.participants.items()))
    assert plan_digest(msgspec.structs.replace(plan, participants=works)) == plan_digest(plan)
    assert plan_digest(msgspec.structs.replace(plan, deadline_s=901)) != plan_digest(plan)
    assert plan_digest(msgspec.structs.replace(plan, deadline_s=900)) == plan_digest(plan)
    assert plan_digest(unpack(pack(plan), Plan)) == plan_digest(plan)


def test_a_planner_survives_its_way_to_disk_and_back() -> None:
    planner = _learned(UniformPlanner(), view(*FLEET), job())
    back = unpack(pack(planner), UniformPlanner)
    assert back == planner
    assert back.plan(view(*FLEET), job()) == planner.plan(view(*FLEET), job())


def test_a_slow_link_leaves_less_time_for_training() -> None:
    seen, spec = view(*(device(name) for name in "abc")), job()
    first = UniformPlanner().plan(seen, spec)
    results = {
        name: replace(result(batch=16, step_s=1.0, cores_used=1.0), fetch_s=fetch_s)
        for name, fetch_s in [("a", 0.1), ("b", 0.1), ("c", 8.0)]
    }
    loads = {c.device: c.load for c in seen.candidates if c.load}
    report = RoundReport(
        round=1, works=first.participants, results=results, loads=loads, facts=seen.facts, job=spec,
        adapter_bytes=2_000_000,
    )  # fmt: skip
    planner = UniformPlanner().learn(report)
    plan = planner.plan(replace(seen, round=2, adapter_bytes=2_000_000), spec)
    batches = _batches(plan)
    assert batches["a"] == batches["b"] > batches["c"]
    assert "0.25 MB/s" in plan.participants["c"].reasons["steps"]
    assert "link not yet measured" in first.participants["c"].reasons["steps"]


def test_a_device_whose_data_can_not_be_read_is_left_out_with_its_reason() -> None:
    broken = msgspec.structs.replace(device("x").info, datasets={}, faulty={"news": "news.jsonl: row 3 is not JSON"})
    plan = _plan(device("a"), Candidate(device="b", info=broken))
    assert plan.left_out == {"b": "data set 'news' can't be read there: news.jsonl: row 3 is not JSON"}
