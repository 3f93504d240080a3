"""`full` planned: fp32 or no part in the round, costs by hand, reasons in the form of the house, faults of jobs."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from coordinator.core import strategies
from coordinator.core.facts import ModelFacts, ModuleSpec
from coordinator.core.planning import registry
from coordinator.core.planning.base import FleetView, Plan, Planner, RoundReport
from coordinator.core.planning.demand import demand, traffic
from coordinator.core.planning.reasons import PATTERN
from shared.errors import UserError
from shared.jobs import BaseSpec, Bits, Codec, JobSpec, StrategySpec, TrainingSpec
from tests.unit.planning_cases import MIB, Candidate, device, gpu_device, job, minilm, result

FLEET = (device("a", cores=4.0), device("b", cores=2.0), device("c"), device("half", bits=(4, 8, 16)),
         device("small", memory=512))  # fmt: skip


def spec(bits: Bits | None = None, codec: Codec = "fp32", targets: list[str] | None = None) -> JobSpec:
    made = job(bits=bits)
    return replace(
        made, strategy=replace(made.strategy, name="full"), training=replace(made.training, codec=codec),
        base=replace(made.base, targets=targets or []),
    )  # fmt: skip


def whole() -> ModelFacts:
    """MiniLM's facts with every parameter dense: 22.7 million of them."""
    facts = minilm()
    dense = {f"{module.name}.weight": [module.out, module.inp] for module in facts.modules}
    rest = facts.linear_params + facts.other_params - 24 * 384 * 384
    return replace(facts, dense={**dense, "others": [rest]})


def planned(*fleet: Candidate, planner: Planner | None = None) -> Plan:
    planner = planner or registry.create(StrategySpec(name="full"))
    return planner.plan(FleetView(round=1, candidates=fleet, facts=whole()), spec())


def test_every_participant_trains_all_parameters_in_fp32_with_one_batch() -> None:
    plan = planned(*FLEET)
    assert sorted(plan.participants) == ["a", "b", "c"]
    assert all(work.bits == 32 and work.ranks == {} for work in plan.participants.values())
    batches = [plan.participants[name].batch for name in "abc"]
    assert batches == [16, 16, 16]


def test_a_device_that_cannot_is_left_out_with_the_reason() -> None:
    plan = planned(*FLEET)
    assert plan.left_out["half"] == "32 bits not proven here (proven: 4, 8, 16)"
    told = plan.left_out["small"]
    # 16 bytes for each of 22.7 million parameters are 347 MiB, beside an agent of 200 MiB.
    assert told.startswith("memory: 32 bits would take ") and "at batch 1, over 448 MiB memory budget" in told
    with pytest.raises(UserError, match="no device can do job texts: half: 32 bits not proven here"):
        planned(FLEET[3])


def test_every_reason_is_in_the_form_of_the_house() -> None:
    planner = registry.create(StrategySpec(name="full"))
    fleet = (*FLEET, gpu_device("g"))
    plan = planned(*fleet, planner=planner)
    loads = {one.device: one.load for one in fleet if one.load}
    results = {name: result(batch=work.batch, step_s=0.5, cores_used=1.0, peak=900) for name, work in
               plan.participants.items()}  # fmt: skip
    report = RoundReport(
        round=1, works=plan.participants, results=results, loads=loads, facts=whole(), job=spec(), adapter_bytes=MIB
    )
    for current in (plan, planned(*fleet, planner=planner.learn(report))):
        assert set(current.participants) == {"a", "b", "c", "g"}
        for work in current.participants.values():
            assert set(work.reasons) == {"rank", "batch", "bits", "steps"}
            for name, reason in work.reasons.items():
                match = PATTERN.fullmatch(reason)
                assert match and match["name"] == name, reason
                assert any(c.isdigit() for c in match["reading"]) and any(c.isdigit() for c in match["bound"])
        assert current.participants["a"].reasons["rank"] == (
            "rank 0: 22716832 parameters trained themselves meets 0 factors asked"
        )
    assert "base 0 MiB frozen, 347 MiB tuned itself" in plan.participants["a"].reasons["bits"]


def test_costs_by_hand() -> None:
    facts = ModelFacts(
        modules=[ModuleSpec(name="m", out=3, inp=2, block=0)], dense={"m.weight": [3, 2], "e": [10, 2]},
        base_digest="d", linear_params=6, other_params=20, blocks=1, hidden=2,
    )  # fmt: skip
    given = spec()
    need = demand(facts, given, {})
    tokens = given.task.max_tokens
    # Forward, gradient of the inputs and gradient of the weights: 2 each per parameter and token.
    assert need.flop == tokens * 6 * 6
    assert (need.adapter_params, need.frozen_params, need.weight_bytes(32)) == (26, 0, 0)
    assert need.fixed_bytes(32) == 16 * 26
    frozen = demand(replace(facts, dense={}), given, {})
    assert frozen.flop == tokens * 2 * 6, "nothing is tuned: forward alone"
    down, up, _ = traffic(facts, {}, 0, "fp32")
    assert (down, up) == (4 * 26, 4 * 26)
    causal = replace(given, task=replace(given.task, kind="causal", labels=[]))
    # The logits' matrix of 20 parameters, forward and both gradients.
    assert demand(facts, causal, {}).flop == tokens * 6 * (6 + 20)


@pytest.mark.parametrize(
    ("given", "fault"),
    [
        (spec(), None),
        (spec(bits=32), None),
        (spec(bits=8), "strategy.bits: 8, but full tunes the base itself, at 32 bits"),
        (spec(codec="int8"), "training.codec: int8 would round the whole model every round; full needs fp32"),
        (spec(targets=["q"]), "base.targets: full chooses what is tuned by itself; leave it empty"),
    ],
)
def test_what_a_job_of_full_may_ask(given: JobSpec, fault: str | None) -> None:
    assert strategies.job_faults(given) == ([fault] if fault else [])


@pytest.mark.parametrize(("name", "aggregator"), [("full", "fsr"), ("uniform", "dense"), ("legend", "dense")])
def test_what_is_no_lora_goes_with_its_own_aggregator_alone(name: str, aggregator: str) -> None:
    (fault,) = strategies.faults(StrategySpec(name=name, aggregator=aggregator))
    assert fault == f"strategy.aggregator: {aggregator} can't fold what {name} trains"
    assert strategies.faults(StrategySpec(name="full", aggregator="dense")) == []


def test_faults_of_other_jobs_are_what_they_were() -> None:
    given = replace(job(), base=BaseSpec(model="m", targets=["q"]), training=TrainingSpec(codec="int8"))
    assert strategies.job_faults(given) == []
