"""The strategy `head`: `uniform` without its ranks."""

from __future__ import annotations

import pytest

from coordinator.core.facts import ModelFacts, ModuleSpec
from coordinator.core.planning import registry
from coordinator.core.planning.base import Candidate, FleetView, RoundReport
from coordinator.core.planning.head import HeadPlanner
from coordinator.core.planning.reasons import PATTERN
from coordinator.core.planning.uniform import UniformPlanner
from shared.errors import UserError
from shared.jobs import BaseSpec, JobSpec, StrategySpec, TaskSpec
from shared.messages import DatasetFacts, DeviceInfo, Load, UpdateFacts

GIB = 1024**3
FACTS = ModelFacts(
    modules=[ModuleSpec(name="layer.0.query", out=64, inp=64, block=0)], dense={"classifier": [4, 64]},
    base_digest="b" * 64, linear_params=64 * 64, other_params=1000, blocks=1, hidden=64,
)  # fmt: skip
JOB = JobSpec(
    name="floor", base=BaseSpec(model="tiny"), strategy=StrategySpec(name="head"),
    task=TaskSpec(kind="classification", dataset="d", labels=["a", "b", "c", "d"], max_tokens=16),
)  # fmt: skip


def _view(facts: ModelFacts = FACTS) -> FleetView:
    candidates = tuple(
        Candidate(
            device=f"dev-{number}",
            info=DeviceInfo(epoch=1, cores=2.0, memory_bytes=4 * GIB, bits=[16], datasets={"d": DatasetFacts(rows=50)}),
            load=Load(epoch=1, seq=1, cores=2.0, memory_available=3 * GIB, memory_limit=4 * GIB),
        )
        for number in range(2)
    )
    return FleetView(round=1, candidates=candidates, facts=facts)


def test_only_the_ranks_and_the_time_differ_from_uniform() -> None:
    floor, uniform = registry.create(JOB.strategy).plan(_view(), JOB), UniformPlanner().plan(_view(), JOB)
    for device, work in floor.participants.items():
        other = uniform.participants[device]
        assert work.ranks == {} and (work.batch, work.bits, work.steps) == (other.batch, other.bits, other.steps)
        assert 0 < floor.predicted_s[device] < uniform.predicted_s[device]
        assert all(PATTERN.fullmatch(reason) for reason in work.reasons.values()), work.reasons
        assert "256 parameters of the head" in work.reasons["rank"]


def test_it_learns_as_uniform_does() -> None:
    plan = HeadPlanner().plan(_view(), JOB)
    facts = UpdateFacts(
        samples=8, steps=10, batch=16, bits=16, loss_first=1.0, loss_last=0.9, step_s=0.5, train_s=5.0, cores_used=2.0
    )
    report = RoundReport(
        round=1, works=plan.participants, results={"dev-0": facts}, facts=FACTS, job=JOB,
        loads={c.device: c.load for c in _view().candidates if c.load},
    )  # fmt: skip
    learned = HeadPlanner().learn(report)
    assert learned.model == UniformPlanner().learn(report).model
    assert learned.plan(_view(), JOB).predicted_s["dev-0"] == pytest.approx(5.0, rel=0.3)


def test_a_base_without_a_head_can_not_be_trained() -> None:
    with pytest.raises(UserError, match="no head"):
        HeadPlanner().plan(
            _view(ModelFacts(**{**{f: getattr(FACTS, f) for f in FACTS.__struct_fields__}, "dense": {}})), JOB
        )
