"""The rivals' planner: ranks by capability, their reasons, and all else as `uniform` has it."""

from __future__ import annotations

import random

import pytest
from msgspec.structs import replace

from coordinator.core import strategies
from coordinator.core.aggregation import registry as aggregators
from coordinator.core.facts import ModuleSpec
from coordinator.core.planning import ranks, registry
from coordinator.core.planning.base import Candidate, Plan, Planner, RoundReport
from coordinator.core.planning.demand import traffic
from coordinator.core.planning.reasons import PATTERN
from coordinator.core.planning.uniform import UniformPlanner
from shared.codec import pack, unpack
from shared.jobs import Codec, JobSpec, StrategySpec
from tests.unit.planning_cases import device, gpu_device, job, minilm, result, view

FLEET = (device("a", cores=4.0), device("b", cores=2.0), device("c"), device("d", cores=0.1))


def named(name: str, spec: JobSpec | None = None, **strategy: object) -> JobSpec:
    spec = spec or job(rank=16)
    return replace(spec, strategy=replace(spec.strategy, name=name, **strategy))


def ranks_of(plan: Plan) -> dict[str, int]:
    return {name: max(work.ranks.values()) for name, work in plan.participants.items()}


def learned(planner: Planner, spec: JobSpec, fleet: tuple[Candidate, ...], seconds: dict[str, float]) -> Planner:
    """`planner` after a round in which each device took `seconds` per step at batch 16, on all its cores."""
    plan = planner.plan(view(*fleet), spec)
    works = {name: replace(plan.participants[name], batch=16) for name in seconds}
    loads = {one.device: one.load for one in fleet if one.load}
    results = {n: result(batch=16, step_s=s, cores_used=loads[n].cores) for n, s in seconds.items()}
    return planner.learn(RoundReport(round=1, works=works, results=results, loads=loads, facts=minilm(), job=spec))


# ---- names


@pytest.mark.parametrize(
    ("name", "aggregator"),
    [
        ("uniform", "fsr"), ("fedlora", "fedit"), ("hetlora", "hetlora"), ("flexlora", "flexlora"),
        ("flora", "flora"), ("ffa", "ffa"), ("fedex", "fedex"),
    ],
)  # fmt: skip
def test_every_strategy_has_its_planner_and_the_aggregator_of_its_paper(name: str, aggregator: str) -> None:
    strategy = StrategySpec(name=name)
    assert strategies.faults(strategy) == []
    rounded = strategies.faults(replace(strategy, global_codec="int8"))
    whole = aggregators.name_of(strategy) in ("fedex", "ffa", "flora")
    assert [fault.partition(":")[0] for fault in rounded] == (["strategy.global_codec"] if whole else [])
    assert (registry.create(strategy).name, aggregators.create(strategy).name) == (name, aggregator)
    for exact in ("fsr", "fresh", "ffa"):
        given = StrategySpec(name=name, aggregator=exact)
        assert strategies.faults(given) == [] and aggregators.create(given).name == exact


def test_unequal_ranks_and_an_aggregator_of_one_rank_are_a_fault() -> None:
    for name in registry.UNEQUAL:
        for aggregator in ("fedit", "fedex"):
            (fault,) = strategies.faults(StrategySpec(name=name, aggregator=aggregator))
            assert fault == f"strategy.aggregator: {aggregator} takes one rank only, and {name} plans unequal ones"


def test_directions_are_drawn_only_where_devices_train_any() -> None:
    for name, aggregator in (("uniform", "fsr"), ("uniform", "legend"), ("fedspine", "")):
        assert strategies.faults(StrategySpec(name=name, aggregator=aggregator, directions="sampled")) == []
    (fault,) = strategies.faults(StrategySpec(aggregator="fresh", directions="sampled"))
    assert fault == "strategy.directions: devices of fresh train none, only those of fedspine, fsr, legend"


def test_a_cap_of_shares_is_refused_where_sample_counts_weigh_nothing() -> None:
    (fault,) = strategies.faults(StrategySpec(aggregator="hetlora", max_share=0.5))
    assert fault == "strategy.max_share: hetlora weighs by norm, not by sample counts, and caps no share"


@pytest.mark.parametrize("name", ["fedlora", "ffa", "fedex"])
def test_strategies_of_one_rank_plan_as_uniform_does_but_for_the_batch(name: str) -> None:
    planned = registry.create(StrategySpec(name=name)).plan(view(*FLEET), named(name))
    ours = UniformPlanner().plan(view(*FLEET), job(rank=16))
    assert {one.batch for one in planned.participants.values()} == {job().strategy.batch}
    assert len({one.batch for one in ours.participants.values()}) > 1
    for device_id, work in planned.participants.items():
        own = ours.participants[device_id]
        reasons = {**work.reasons, "rank": own.reasons["rank"]}
        assert work == replace(own, batch=work.batch, reasons=reasons)
    assert planned.reason == "batch 16 for every device that holds it; 4 of 4 candidates take part"


@pytest.mark.parametrize("name", ["fedlora", "ffa", "fedex", "hetlora", "flexlora", "flora", "full", "fedadapter"])
def test_rivals_have_one_batch_and_only_memory_makes_it_smaller(name: str) -> None:
    blocks = [ModuleSpec(name=f"encoder.layer.{n}", out=384, inp=384, block=n) for n in range(6)]
    facts = replace(minilm(), modules=blocks) if name == "fedadapter" else minilm()
    fleet = [
        device("small", memory={"full": 440, "fedadapter": 500}.get(name, 700), cores=4.0),
        device("slow", cores=0.2),
        device("quick", cores=4.0),
    ]
    spec = named(name, job(rank=4, batch=32, bits=32))
    plan = registry.create(spec.strategy).plan(replace(view(*fleet), facts=facts), spec)
    found = {one: work.batch for one, work in plan.participants.items()}
    assert found["slow"] == found["quick"] == 32 and found.get("small", 0) < 32
    for one, work in plan.participants.items():
        assert ("32 is the batch of the job, as every device has it" in work.reasons["batch"]) == (found[one] == 32)
        # What a slow device takes is told, and not what it would take at a batch of its own.
        said = PATTERN.fullmatch(work.reasons["batch"])
        assert said is not None and int(said["value"]) == work.batch
    assert plan.predicted_s["slow"] > 4 * plan.predicted_s["quick"]


# ---- ranks


@pytest.mark.parametrize(
    ("largest", "sizes"), [(16, (2, 4, 8, 16)), (12, (2, 4, 8, 12)), (3, (2, 3)), (2, (2,)), (1, (1,))]
)
def test_ranks_to_choose_from(largest: int, sizes: tuple[int, ...]) -> None:
    assert ranks.rank_sizes(largest, "capability") == sizes
    assert ranks.rank_sizes(largest, "equal") == (largest,)


@pytest.mark.parametrize("name", registry.UNEQUAL)
def test_before_anything_is_measured_ranks_follow_what_devices_say_and_tell_so(name: str) -> None:
    plan = registry.create(StrategySpec(name=name)).plan(view(*FLEET), named(name))
    assert ranks_of(plan) == {"a": 16, "b": 8, "c": 4, "d": 2}
    for work in plan.participants.values():
        assert "(assumed speed)" in work.reasons["rank"]
        assert (
            "nothing was measured yet: devices are taken to be as fast as their probes, or alike"
            in work.reasons["rank"]
        )
    assert "rank 2: " in plan.participants["d"].reasons["rank"]
    assert " exceeds " in plan.participants["d"].reasons["rank"]
    assert "the least rank all the same" in plan.participants["d"].reasons["rank"]


def test_measured_speed_decides_the_ranks() -> None:
    spec, fleet = named("hetlora"), (device("a"), device("b"), device("c"), device("d"))
    planner = registry.create(spec.strategy)
    assert set(ranks_of(planner.plan(view(*fleet), spec)).values()) == {16}
    planner = learned(planner, spec, fleet, {"a": 1.0, "b": 2.0, "c": 8.0})
    plan = planner.plan(view(*fleet), spec)
    # The median of the fleet stands for the device that was not measured.
    assert ranks_of(plan) == {"a": 16, "b": 8, "c": 2, "d": 8}
    told = plan.participants["b"].reasons["rank"]
    assert told.startswith("rank 8: step ") and "fitted on 1 round" in told
    assert "for 8 of 16 (a, the fastest, takes " in told and "measured" not in told
    assert plan.participants["d"].reasons["rank"].endswith("not measured itself yet")


@pytest.mark.parametrize("seed", range(4))
def test_noise_of_ten_percent_moves_no_rank(seed: int) -> None:
    rng, spec = random.Random(seed), named("flora")
    fleet = (device("a"), device("b"), device("c"))
    planner = registry.create(spec.strategy)
    for _ in range(6):
        noisy = {name: s * rng.uniform(0.9, 1.1) for name, s in (("a", 1.0), ("b", 2.0), ("c", 4.0))}
        planner = learned(planner, spec, fleet, noisy)
        assert ranks_of(planner.plan(view(*fleet), spec)) == {"a": 16, "b": 8, "c": 4}


def test_live_load_moves_no_rank() -> None:
    spec = named("hetlora")
    planner = registry.create(spec.strategy)
    busy = (device("a", cores=4.0, foreign=3.0), *FLEET[1:])
    assert ranks_of(planner.plan(view(*busy), spec)) == ranks_of(planner.plan(view(*FLEET), spec))


def test_memory_lowers_a_rank_before_it_costs_bits() -> None:
    spec = named("hetlora", job(rank=1024, batch=1))
    fleet = [device(f"d{memory}", memory=memory) for memory in (440, 480, 520, 4096)]
    plan = registry.create(spec.strategy).plan(view(*fleet), spec)
    found = {name: (work.bits, max(work.ranks.values())) for name, work in plan.participants.items()}
    assert found["d4096"] == (32, 384)
    assert found["d480"][0] == 32 and found["d480"][1] < 384
    assert "would leave memory for 16 bits only" in plan.participants["d480"].reasons["rank"]
    assert found["d440"][1] < found["d480"][1] or found["d440"][0] < 32


@pytest.mark.parametrize("name", registry.UNEQUAL)
def test_every_reason_is_in_the_form_of_the_house(name: str) -> None:
    spec = named(name)
    planner = registry.create(spec.strategy)
    for current in (planner, learned(planner, spec, FLEET, {"a": 1.0, "c": 3.0})):
        plan = current.plan(view(*FLEET, gpu_device("g"), device("t", memory=470)), spec)
        for work in plan.participants.values():
            match = PATTERN.fullmatch(work.reasons["rank"])
            assert match, work.reasons["rank"]
            assert int(match["value"]) == max(work.ranks.values())
            assert any(c.isdigit() for c in match["reading"]) and any(c.isdigit() for c in match["bound"])


def test_a_planner_of_unequal_ranks_survives_its_way_to_disk_and_back() -> None:
    spec = named("flexlora")
    planner = learned(registry.create(spec.strategy), spec, FLEET, {"a": 1.0, "b": 1.5})
    assert isinstance(planner, UniformPlanner)
    back = unpack(pack(planner), UniformPlanner)
    assert back == planner and back.plan(view(*FLEET), spec) == planner.plan(view(*FLEET), spec)


def test_without_a_half_of_the_factors_is_sent() -> None:
    facts = replace(minilm(), dense={})
    of_all = {module.name: 8 for module in facts.modules}
    codecs: list[Codec] = ["fp32", "bf16", "int8"]
    for codec in codecs:
        both, one = (traffic(facts, of_all, 8, codec, sends_a=yes)[1] for yes in (True, False))
        # int8: a float32 scale for each row of B and of A.
        assert one == pytest.approx(both / 2, rel=0.25 if codec == "int8" else 0.0)
