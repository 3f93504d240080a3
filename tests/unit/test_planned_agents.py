"""Devices with several agents in the plans of `uniform`: who gets how many, and what each of them has."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from coordinator.core.planning.base import Candidate, Plan, RoundReport
from coordinator.core.planning.reasons import PATTERN
from coordinator.core.planning.uniform import UniformPlanner
from shared.jobs import JobSpec
from shared.messages import DatasetFacts, Gpu
from tests.unit.planning_cases import device, gpu_device, job, minilm, result, view


def _plan(*candidates: Candidate, spec: JobSpec | None = None) -> Plan:
    return UniformPlanner().plan(view(*candidates), spec or job())


def _of_agents(candidate: Candidate, agents: int, **info: object) -> Candidate:
    return replace(candidate, info=replace(candidate.info, agents=agents, **info))


def _gpus(count: int) -> list[Gpu]:
    return [Gpu(uuid=f"GPU-{number}", memory_bytes=2**33) for number in range(count)]


@pytest.mark.parametrize(
    ("candidate", "agents"),
    [(_of_agents(gpu_device("a"), 64), 1), (_of_agents(device("a", cores=1.5), 64), 2)],
    ids=["one GPU", "two cores"],
)
def test_a_device_that_claims_more_agents_than_it_can_have_gets_no_more_work(candidate: Candidate, agents: int) -> None:
    assert _plan(candidate).participants["a"].agents == agents


def test_every_gpu_of_a_device_trains() -> None:
    one, two = gpu_device("a"), _of_agents(gpu_device("b"), 2, gpus=_gpus(2))
    plan = _plan(one, two)
    assert [plan.participants[name].agents for name in "ab"] == [1, 2]
    assert plan.participants["a"].batch == plan.participants["b"].batch, "each has a GPU of its own"
    assert "agents" not in plan.participants["a"].reasons
    reason = plan.participants["b"].reasons["agents"]
    assert reason == "agents 2: 2 ready, 2 GPUs and 5000 rows on the device meets 1 GPU and 1 row for each"
    assert PATTERN.fullmatch(reason)


def test_agents_on_the_cpu_share_its_memory_and_cores() -> None:
    fleet = [device("a", cores=2.0, memory=936), _of_agents(device("b", cores=2.0, memory=936), 2)]
    plan = _plan(*fleet, device("c", cores=1.0, memory=468), spec=job(batch=4, batch_max=4))
    assert [plan.participants[name].bits for name in "abc"] == [32, 32, 32]
    assert plan.predicted_s["b"] == pytest.approx(plan.predicted_s["c"])
    assert "(foreign 0.00 of 1.00)" in plan.participants["b"].reasons["batch"]
    tight = _plan(_of_agents(device("b", cores=2.0, memory=836), 2)).participants["b"]
    assert (tight.bits, tight.agents) == (16, 2)
    assert "limit 418 MiB" in tight.reasons["bits"]


def test_no_agent_is_asked_to_train_on_nothing() -> None:
    plan = _plan(_of_agents(gpu_device("a"), 3, gpus=_gpus(3), datasets={"news": DatasetFacts(rows=2)}))
    assert (plan.participants["a"].agents, plan.participants["a"].batch) == (2, 1)
    assert plan.participants["a"].reasons["agents"].startswith("agents 2: 3 ready")


def test_the_speed_of_agents_on_a_cpu_is_learned_by_the_cores_of_each() -> None:
    """Two agents on two cores and one on one core measure the same: the next round predicts it for both."""
    spec, fleet = job(), (_of_agents(device("a", cores=2.0), 2), device("b", cores=1.0))
    planner = UniformPlanner()
    for _ in range(3):
        plan = planner.plan(view(*fleet), spec)
        results = {
            name: replace(
                result(batch=work.batch, step_s=0.1 * work.batch, cores_used=1.0), agents=work.agents,
                samples=10 * work.batch * work.agents,
            )
            for name, work in plan.participants.items()
        }  # fmt: skip
        loads = {one.device: one.load for one in fleet if one.load}
        planner = planner.learn(
            RoundReport(round=1, works=plan.participants, results=results, loads=loads, facts=minilm(), job=spec)
        )
    plan = planner.plan(view(*fleet), spec)
    assert plan.participants["a"].batch == plan.participants["b"].batch
    for name, work in plan.participants.items():
        assert plan.predicted_s[name] == pytest.approx(10 * 0.1 * work.batch, rel=0.05)
