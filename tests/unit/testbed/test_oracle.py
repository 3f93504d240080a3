"""Planners that are handed the clock's model know what the clock will charge, and nothing is left of it afterwards."""

from __future__ import annotations

import math

import pytest

from coordinator.core.facts import ModelFacts, ModuleSpec
from coordinator.core.planning import registry
from coordinator.core.planning.demand import demand
from coordinator.core.planning.readings import Capacity
from coordinator.core.planning.uniform import UniformPlanner
from muster.testbed import device_model as dm
from muster.testbed import oracle
from muster.testbed.simulate import load_steps
from muster.testbed.virtual_device import Base, Clockwork, VirtualDevice
from shared.jobs import StrategySpec
from shared.messages import Work
from tests.unit.planning_cases import job, minilm

STEPS = load_steps()
FREE = Capacity(6.0, 0.0, 6.0, gpu=False)


def _facts() -> ModelFacts:
    return minilm()


def _device(facts: ModelFacts, kind: str = "nx") -> VirtualDevice:
    linears = {one.name: (one.out, one.inp, one.block) for one in facts.modules}
    dense = sum(math.prod(shape) for shape in facts.dense.values())
    shape = dm.Shape(facts.blocks, job().task.max_tokens, facts.linear_params, facts.other_params)
    clock = Clockwork(
        dm.StepTable(STEPS), dm.MemoryTable.of(STEPS),
        Base(shape, linears, dense, lora=sum(out + inp for out, inp, _ in linears.values())),
    )  # fmt: skip
    return VirtualDevice(dm.Device("sim-01", {one.name: one for one in dm.KINDS}[kind], 0), clock)


def _top(facts: ModelFacts, blocks: int) -> list[ModuleSpec]:
    return [module for module in facts.modules if module.block >= facts.blocks - blocks]


@pytest.mark.parametrize("blocks", [1, 3, 6])
@pytest.mark.parametrize("batch", [2, 8, 32])
def test_the_pace_is_what_the_clock_charges_but_for_noise(blocks: int, batch: int) -> None:
    facts = _facts()
    device = _device(facts)
    ranks = {module.name: 8 for module in _top(facts, blocks)}
    model = oracle.TrueModel(nature={"sim-01": device})
    pace = model.pace("sim-01", demand(facts, job(), ranks), 16, FREE)
    work = device._step(Work(ranks=ranks, batch=batch, bits=16, steps=1), batch)
    charged = device.model.step_s(
        device.clock.table, work, device.clock.base.shape, round=1, heat=0.0, noise=1.0, foreign=0.0
    )
    assert pace.step_s(batch) == pytest.approx(charged, rel=1e-9)
    # Its linear form is exact where the chord meets the curve.
    assert pace.fixed_s + 4 * pace.per_sample_s == pytest.approx(pace.step_s(4), rel=1e-9) or pace.fixed_s == 0.0


def test_the_link_is_that_of_the_round_to_come_also_where_an_attempt_is_repeated() -> None:
    device = _device(_facts())
    model = oracle.TrueModel(nature={"sim-01": device})
    device.clock.round = device.clock.committed = 4
    first = model.transfer("sim-01", 1000)[0]
    # The round was planned once and is planned anew.
    device.clock.round = 5
    assert model.transfer("sim-01", 1000)[0] == first == pytest.approx(1000 / device.model.bandwidth(5))


def test_planners_know_it_inside_and_forget_it_outside() -> None:
    device = _device(_facts())
    with oracle.known_to_planners([device]):
        inside = registry.create(StrategySpec(name="uniform"))
        assert isinstance(inside, UniformPlanner) and isinstance(inside.model, oracle.TrueModel)
    outside = registry.create(StrategySpec(name="uniform"))
    assert isinstance(outside, UniformPlanner) and not isinstance(outside.model, oracle.TrueModel)


def test_what_is_tuned_is_charged() -> None:
    """The head alone, a bottleneck adapter in the top block, LoRA on all of it, every weight: each takes longer."""
    facts = _facts()
    device = _device(facts)
    top = f"block.{facts.blocks - 1}"
    base = device.clock.base
    base.linears[top] = (384, 384, facts.blocks - 1)
    found = [
        device._step(Work(ranks=ranks, batch=8, bits=32, steps=1), 8)
        for ranks in ({}, {top: 8}, {module.name: 8 for module in facts.modules})
    ]
    base.whole = True
    found.append(device._step(Work(ranks={}, batch=8, bits=32, steps=1), 8))
    seconds = [device.clock.table.seconds(work, base.shape, 1.0) for work in found]
    peaks = [device.clock.memory.peak(base.shape, work) for work in found]
    assert seconds == sorted(seconds) and len(set(seconds)) == 4
    assert peaks == sorted(peaks) and len(set(peaks)) == 4
    more = Work(ranks={module.name: 32 for module in facts.modules}, batch=8, bits=32, steps=1)
    base.whole = False
    assert device.clock.table.seconds(device._step(more, 8), base.shape, 1.0) > seconds[2]
