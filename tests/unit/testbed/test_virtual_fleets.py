"""Virtual devices that stand for emulated ones have their names, quotas and memory, and nothing happens to them."""

from __future__ import annotations

import inspect
import re
from dataclasses import replace
from pathlib import Path

import pytest
from msgspec.structs import replace as replace_reading

from muster.cli import emulate, simulate
from muster.testbed import device_model as dm
from muster.testbed import profiles, virtual_fleets
from muster.testbed.replay import Reading, lines
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


CPU = Reading(
    device="edge-01", at=0.0, cores=4.0, memory_limit=3 * 2**30, foreign_memory=2**30, flops=1.4e10, bits=[4, 16]
)
CARD = Reading(device="server", at=0.0, cores=1.0, memory_limit=24 * 2**30, flops=5e12, bits=[4, 8, 16], card=True)


def _recording(folder: Path, *readings: Reading) -> Path:
    path = folder / "day.jsonl"
    path.write_bytes(lines(readings))
    return path


def test_the_recorded_fleet_is_virtual(tmp_path: Path) -> None:
    recording = _recording(tmp_path, CARD, CPU)
    assert [virtual_fleets.device_count("recorded", asked, recording) for asked in (0, 1)] == [2, 1]
    models, told, left_out = virtual_fleets.replayed("recorded", 2, recording, STEPS.agent_bytes, 0)
    assert left_out == []
    one, card = (VirtualDevice(model, replace(CLOCK, replay=told)) for model in models)
    assert [device.model.name for device in (one, card)] == ["edge-01", "server"]
    machines = [device.machine() for device in (one, card)]
    assert [machine.cores for machine in machines] == [4.0, 1.0]
    assert machines[0].memory_bytes == 3 * 2**30, "its limit, agent and all"
    assert machines[1].memory_bytes == STEPS.agent_bytes + 24 * 2**30, "the agent itself is in the machine's memory"
    assert (one.bits, card.bits) == ((4, 16), (4, 8, 16))
    assert one.kernel_kills and not card.kernel_kills
    for device, flops in ((one, 1.4e10), (card, 5e12)):
        assert device.flops == pytest.approx(flops, rel=0.5), "a probe is off by chance"
    work = dm.StepWork(16, 8, 0, 8 * STEPS.factor_params)
    one_s, card_s = (TABLE.seconds(work, SHAPE, device.model.kind.quota) for device in (one, card))
    assert one_s == pytest.approx(TABLE.seconds(work, SHAPE, 0.8)), "4 cores at a fifth of the recording machine's"
    assert TABLE.seconds(work, SHAPE, 1.0) / card_s == pytest.approx(5e12 / dm.CORE_FLOPS), "beyond it by its cores"
    held = one.load(0.0).memory_limit - one.load(0.0).memory_available
    assert held == pytest.approx(2**30 + 40 * 2**20, rel=0.01), "what others held, and the daemon"
    assert list(dm.happenings(one.model)) == [(0.0, "join")] and one.heat_after(0.0, 1e6) == 0.0


@pytest.mark.parametrize("profile", ["jetson", "pair", "emulated-light"])
def test_of_memory_made_for_small_bases_others_hold_a_share_of_little(tmp_path: Path, profile: str) -> None:
    models, told, _ = virtual_fleets.replayed(profile, 2, _recording(tmp_path, CPU), 0, 0)
    device = VirtualDevice(models[0], replace(CLOCK, replay=told))
    load = device.load(0.0)
    assert load.memory_limit - load.memory_available - load.own_memory == pytest.approx(132 * 2**20 / 3, abs=2)


def test_who_proved_nothing_is_left_out(tmp_path: Path) -> None:
    recording = _recording(tmp_path, replace_reading(CPU, device="broken", bits=[]), CPU, CARD)
    assert virtual_fleets.device_count("recorded", 0, recording) == 2
    models, _, left_out = virtual_fleets.replayed("recorded", 1, recording, 0, 0)
    assert ([model.name for model in models], left_out) == (["edge-01"], ["broken"])


def test_a_fleet_that_was_not_recorded_is_the_operators_fault(tmp_path: Path) -> None:
    recording = _recording(tmp_path, CPU, replace_reading(CARD, flops=0.0))
    (tmp_path / "old").mkdir()
    old = _recording(tmp_path / "old", replace_reading(CPU, flops=0.0, bits=[]))
    assert virtual_fleets.device_count("jetson", 0, None) == virtual_fleets.DEVICES
    for devices, given, why in (
        (0, None, "--replay"), (2, recording, "there are 1"), (0, tmp_path, "can't be read"), (0, old, "older release"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=why):
            virtual_fleets.device_count("recorded", devices, given)


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
