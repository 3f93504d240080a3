"""Virtual fleets by name: those of the device model, and one for each emulated profile.

`emulated-mixed` has the devices that `muster emulate --profile mixed` makes: their names (so the same shares of the
rows), CPU quotas, memory beyond the agent's own size, and precisions. Nothing else happens to them: they join at once
and stay, nobody else uses them, they do not get hot, and their link is this machine's loopback. A step takes what was
recorded from the real agent under quotas, without the saturation that the device model adds for a Jetson.
"""

from __future__ import annotations

import math

from muster.testbed import device_model as dm
from muster.testbed import profiles

PREFIX = "emulated-"
LOOPBACK = 47e6
"""Bytes per second through the testbed's broker, which saves every change (measured: docs/lab-log.md, 2026-11-21)."""


def names() -> list[str]:
    """The profiles there are."""
    return [*sorted(dm.PROFILES), *(f"{PREFIX}{name}" for name in sorted(profiles.PROFILES))]


def fleet(profile: str, count: int, seed: int) -> list[dm.Device]:
    """`count` devices of a profile of `names()`; `seed` is that of their draws, for an emulated one of the noise alone.

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
