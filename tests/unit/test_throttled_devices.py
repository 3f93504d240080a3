"""A throttled GPU is planned by the steps it measured, not by its flag (docs/decisions/0017)."""

from __future__ import annotations

import msgspec
import pytest

from coordinator.core.planning.base import Candidate, RoundReport
from coordinator.core.planning.cost_model import CostModel
from coordinator.core.planning.demand import demand
from coordinator.core.planning.fit import BAND
from coordinator.core.planning.readings import capacity
from shared.messages import Work
from tests.unit.planning_cases import gpu_device, job, minilm, result

RANKS = {module.name: 8 for module in minilm().modules}
BATCH = 16


def throttled(case: Candidate) -> Candidate:
    """The same device, whose driver says that it slows it down."""
    assert case.load is not None
    gpu = msgspec.structs.replace(case.load.gpus[0], throttled=True, throttle=["heat"], clock_mhz=600)
    return Candidate(
        device=case.device, info=case.info, load=msgspec.structs.replace(case.load, gpus=[gpu]),
        load_age_s=case.load_age_s,
    )  # fmt: skip


def after(model: CostModel, case: Candidate, step_s: float) -> CostModel:
    """The model that saw one more round of this device."""
    assert case.load is not None
    return model.learn(
        RoundReport(
            round=1,
            works={"edge-1": Work(ranks=RANKS, batch=BATCH, bits=16, steps=10)},
            loads={"edge-1": case.load},
            results={"edge-1": result(batch=BATCH, step_s=step_s, bits=16)},
            facts=minilm(),
            job=job(),
        )  # fmt: skip
    )


def step_s(model: CostModel, case: Candidate) -> float:
    """What a step is predicted to take."""
    need = demand(minilm(), job(), RANKS)
    return model.step("edge-1", need, 16, BATCH, capacity(case.info, case.load))[0]


def test_the_flag_alone_changes_no_plan() -> None:
    case = gpu_device("edge-1")
    model = after(CostModel(), case, 1.0)
    assert capacity(case.info, case.load) == capacity(case.info, throttled(case).load)
    assert step_s(model, throttled(case)) == step_s(model, case) == pytest.approx(1.0)


def test_slower_steps_are_believed_after_a_round_and_faster_ones_after_a_few() -> None:
    """Within the band in which the model holds its values."""
    case = gpu_device("edge-1")
    model = after(after(CostModel(), case, 1.0), case, 1.0)
    model = after(model, throttled(case), 1.5)
    assert 1.5 / BAND <= step_s(model, case) <= 1.5
    for _ in range(4):
        model = after(model, case, 1.0)
    assert 1.0 <= step_s(model, case) <= 1.0 * BAND


def test_a_penalty_on_top_would_count_the_heat_twice() -> None:
    """After the device was measured hot, its prediction is what it then takes: nothing is left to take away."""
    case, model = gpu_device("edge-1"), CostModel()
    for _ in range(4):
        model = after(model, throttled(case), 1.5)
    assert step_s(model, throttled(case)) == pytest.approx(1.5, rel=0.05)
