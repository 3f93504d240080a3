"""Virtual fleets by name: those of the device model, one for each emulated profile, and the one of a recording.

`emulated-mixed` has the devices that `muster emulate --profile mixed` makes: their names (so the same shares of the
rows), CPU quotas, memory beyond the agent's own size, and precisions. Nothing else happens to them: they join at once
and stay, nobody else uses them, they do not get hot, and their link is this machine's loopback. A step takes what was
recorded from the real agent under quotas, without the saturation that the device model adds for a Jetson.

`recorded` has the devices of a recording (`replay`): their names, precisions and memory; of a device that trains on a
GPU the GPU's, which to planners here is a machine of one fast core. Their speed is that of their probe, which tells of
products alone. They do not get hot, and stay. Who had proven nothing can't train and is left out.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

from muster.testbed import device_model as dm
from muster.testbed import profiles
from muster.testbed.replay import Reading, Replay, device_ids, read
from shared.errors import UserError

PREFIX = "emulated-"
RECORDED = "recorded"
DEVICES = 80
"""Where nobody says how many."""
LOOPBACK = 47e6
"""Bytes per second through the testbed's broker, which saves every change (measured: docs/lab-log.md, 2026-11-21)."""


def names() -> list[str]:
    """The profiles there are."""
    return [*sorted(dm.PROFILES), *(f"{PREFIX}{name}" for name in sorted(profiles.PROFILES)), RECORDED]


def fleet(profile: str, count: int, seed: int) -> list[dm.Device]:
    """`count` devices of a profile of `names()` but `RECORDED`; `seed` is that of their draws, for an emulated one of
    the noise alone.

    Raises `KeyError` or `UserError` for an unknown one.
    """
    if not profile.startswith(PREFIX):
        return dm.fleet(profile, count, seed)
    # With an agent of no size a device's memory is what it has beyond one.
    shapes = profiles.shapes(profile.removeprefix(PREFIX), count, 0)
    return [dm.Device(shape.name, _kind(shape), seed, restless=False) for shape in shapes]


def _kind(shape: profiles.Shape) -> dm.Kind:
    return dm.Kind(
        f"{shape.cores:g} cores", 0.0, shape.cores, shape.cores, math.inf, 32, 0, bits=(4, 8, 16, 32),
        spare=shape.memory_bytes, link=LOOPBACK, heats=False,
    )  # fmt: skip


class Replayed(NamedTuple):
    """A fleet with what a recording tells of it, if there is one, and who was recorded but could not train."""

    devices: list[dm.Device]
    replay: Replay | None
    left_out: list[str]


def device_count(profile: str, devices: int, recording: Path | None) -> int:
    """As many as are asked for, or where that is 0, `DEVICES` or all of the recording that can train.

    Raises `UserError` where a recording is needed that is not there, can't be read or has fewer.
    """
    if profile != RECORDED:
        return devices or DEVICES
    if recording is None:
        raise UserError(f"--profile {RECORDED}: name the recording with --replay")
    told, every = _read(recording)
    there = sum(map(_can_train, map(told.machine, every)))
    if not there:
        raise UserError(
            f"--profile {RECORDED}: {recording} tells of no device its speed, memory and proven precisions: it was "
            "made before they had proven any, or by an older release"
        )
    if devices > there:
        raise UserError(f"--devices {devices}: in {recording} there are {there} that can train")
    return devices or there


def replayed(profile: str, count: int, recording: Path | None, agent_bytes: int, seed: int) -> Replayed:
    """`count` devices of a profile under a recording's load. `agent_bytes`: of an agent without a base, as the device
    model has it.

    Raises `UserError` for a recording that can't be read.
    """
    if profile != RECORDED or recording is None:
        devices = fleet(profile, count, seed)
        names = [device.name for device in devices]
        return Replayed(devices, read(recording, names) if recording is not None else None, [])
    told, every = _read(recording)
    kinds = {name: _kind_of(told.machine(name), agent_bytes) for name in every if _can_train(told.machine(name))}
    able = [dm.Device(name, kind, seed, restless=False) for name, kind in kinds.items()][:count]
    return Replayed(able, told, [name for name in every if name not in kinds])


def _read(recording: Path) -> tuple[Replay, list[str]]:
    names = device_ids(recording)
    return read(recording, names), names


def _can_train(told: Reading) -> bool:
    return bool(told.flops and told.bits and told.cores and told.memory_limit)


def _kind_of(told: Reading, agent_bytes: int) -> dm.Kind:
    # What an agent takes of the machine's memory it does not take of a GPU's own.
    spare = told.memory_limit if told.card else max(1, told.memory_limit - agent_bytes)
    return dm.Kind(
        "gpu" if told.card else f"{told.cores:g} cores", 0.0, told.flops * told.cores / dm.CORE_FLOPS, told.cores,
        math.inf, 32, 0, bits=tuple(told.bits), spare=spare, heats=False, real=True, card=told.card,
    )  # fmt: skip
