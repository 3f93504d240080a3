"""What a Jetson takes, by the power monitors on its module (INA3221) and, on Thor's carrier board, INA238.

INA3221: three rails, `inN_label`, `inN_input` in mV, `currN_input` in mA (kernel: `Documentation/hwmon/ina3221.rst`).
Which rails there are differs: Orin NX and Nano measure their input (VDD_IN), older boards, too (POM_5V_IN); AGX Xavier,
AGX Orin and Thor measure parts, whose sum lies below what a meter at the plug shows.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from edge_daemon.adapters.telemetry.sysfs import line, number

_WHOLE = ("VDD_IN", "POM_5V_IN")
"""Rails through which all of the module is fed."""
_RAILS = (1, 2, 3)
"""Channel 7 of the driver is the sum of the shunts."""


class Power(NamedTuple):
    """Watts taken (None: no monitor), and whether a rail is above its critical current (None: can't be told)."""

    watts: float | None = None
    over_current: bool | None = None


def read(root: Path) -> Power:
    """The power now."""
    board = _board(root)
    rails: dict[str, float] = {}
    alarms: list[bool] = []
    for monitor in _monitors(root, "ina3221"):
        for channel in _RAILS:
            label = line(monitor / f"in{channel}_label")
            if not label or "NC" in label:
                continue
            millivolts = number(monitor / f"in{channel}_input")
            milliamps = number(monitor / f"curr{channel}_input")
            if millivolts is not None and milliamps is not None:
                # An idle rail may read a little below nothing.
                rails[label] = max(0.0, millivolts * milliamps / 1e6)
            if (alarm := number(monitor / f"curr{channel}_crit_alarm")) is not None:
                alarms.append(alarm != 0)
    whole = next((rails[name] for name in _WHOLE if name in rails), sum(rails.values()) if rails else None)
    return Power(board if board is not None else whole, any(alarms) if alarms else None)


def _board(root: Path) -> float | None:
    """Watts of the whole board, where an INA238 measures its input (microwatts)."""
    for monitor in _monitors(root, "ina238"):
        microwatts = number(monitor / "power1_input")
        if microwatts is not None:
            return max(0.0, microwatts / 1e6)
    return None


def _monitors(root: Path, chip: str) -> Iterator[Path]:
    """The hwmon folders of all monitors of this kind."""
    for device in sorted((root / "sys/bus/i2c/devices").glob("*")):
        if chip in line(device / "name"):
            yield from sorted((device / "hwmon").glob("hwmon*"))
