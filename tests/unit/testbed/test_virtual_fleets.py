"""Virtual devices that stand for emulated ones have their names, quotas and memory, and nothing happens to them."""

from __future__ import annotations

import inspect
import re

import pytest

from muster.cli import emulate, simulate
from muster.testbed import device_model as dm
from muster.testbed import profiles, virtual_fleets
from muster.testbed.simulate import load_steps
from muster.testbed.virtual_device import Base, Clockwork, VirtualDevice
from shared.errors import UserError
from shared.messages import Work

STEPS = load_steps()
TABLE = dm.StepTable(STEPS)
SHAPE = dm.Shape(STEPS.blocks, STEPS.tokens, STEPS.linear_params, 12_000_000)
LINEARS = {f"layer.{block}.dense": (384, 384, block) for block in range(3)}
CLOCK = Clockwork(TABLE, dm.MemoryTable.of(STEPS), Base(SHAPE, LINEARS, 5000, lora=STEPS.factor_params))


def _devices(profile: str, count: int) -> list[VirtualDevice]:
    return [VirtualDevice(model, CLOCK) for model in virtual_fleets.fleet(profile, count, 0)]


@pytest.mark.parametrize("name", sorted(profiles.PROFILES))
def test_each_is_as_the_emulated_one(name: str) -> None:
    devices = _devices(f"{virtual_fleets.PREFIX}{name}", 6)
    shapes = profiles.shapes(name, 6, STEPS.agent_bytes)
    machines = [device.machine() for device in devices]
    assert [device.model.name for device in devices] == [shape.name for shape in shapes]
    assert [machine.cores for machine in machines] == [shape.cores for shape in shapes]
    assert [machine.memory_bytes for machine in machines] == [shape.memory_bytes for shape in shapes]
    assert {device.bits for device in devices} == {(4, 8, 16, 32)}


def test_the_other_profiles_are_those_of_the_device_model() -> None:
    assert virtual_fleets.fleet("jetson", 9, 3) == dm.fleet("jetson", 9, 3)
    assert set(dm.PROFILES) < set(virtual_fleets.names())
    with pytest.raises(UserError, match="unknown profile 'huge'"):
        virtual_fleets.fleet("emulated-huge", 4, 0)


def test_nothing_happens_to_them() -> None:
    for device in _devices("emulated-light", 4):
        model = device.model
        assert list(dm.happenings(model)) == [(0.0, "join")]
        assert {model.power(round) for round in range(1, 60)} == {1.0}
        assert {model.foreign(10.0 * tick) for tick in range(300)} == {dm.Foreign()}
        assert {device.bandwidth(float(now)) for now in range(3)} == {virtual_fleets.LOOPBACK}
        device.work(0.0)
        assert device.heat_at(1e6) == 0.0 and device.heat_after(0.0, 1e6) == 0.0
        assert device.load(2e6).throttled == 0.0


@pytest.mark.parametrize("batch", [2, 16, 32])
def test_a_step_takes_what_was_recorded_under_its_quota(batch: int) -> None:
    work = dm.StepWork(16, batch, 0, 8 * STEPS.factor_params)
    for device in virtual_fleets.fleet("emulated-light", 4, 0):
        took = device.step_s(TABLE, work, SHAPE, round=30, heat=0.0, noise=1.0, foreign=0.0)
        assert took == pytest.approx(TABLE.seconds(work, SHAPE, device.kind.quota))


def test_memory_decides_what_fits() -> None:
    roomy, *_, tight = _devices("emulated-light", 4)
    work = Work(ranks=dict.fromkeys(LINEARS, 8), batch=16, bits=32, steps=1)
    assert roomy.would_fit(work, 16, 0.0) and not tight.would_fit(work, 16, 0.0)


def test_the_commands_name_all_profiles() -> None:
    hint = inspect.signature(simulate.simulate).parameters["profile"].annotation
    assert all(re.search(rf"\b{name}\b(?!-)", str(hint)) for name in virtual_fleets.names())
    hint = inspect.signature(emulate.emulate).parameters["profile"].annotation
    assert all(re.search(rf"\b{name}\b", str(hint)) for name in profiles.PROFILES)
