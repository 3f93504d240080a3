"""The clock of `bench/mergesfl_fleet.py`: what its devices take for a sample, and a round of them for its steps."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from muster.testbed import device_model as dm
from shared.jobs import JobSpec
from shared.modeling.data import TokenData

FORWARD = 1 / 3
"""Of a step's compute."""
CLASSES = (
    dataclasses.replace(dm.KINDS[0], share=0.375), dataclasses.replace(dm.KINDS[1], share=0.5),
    dataclasses.replace(dm.KINDS[2], share=0.125),
)  # fmt: skip


@dataclass
class World:
    """What all methods meet alike. `sample_s`: seconds of a sample, whole model, on the slowest class at full power."""

    folder: Path
    job: JobSpec
    model: Path
    shares: dict[str, TokenData]
    labels: dict[str, dict[str, int]]
    held_out: TokenData
    seed: int
    sample_s: float
    lower_share: float
    """Of a sample's compute, what the blocks below the cut take."""
    devices: dict[str, dm.Device] = field(default_factory=dict)

    def __post_init__(self) -> None:
        drawn_devices = dm.drawn(CLASSES, len(self.shares), self.seed)
        self.devices = dict(zip(sorted(self.shares), drawn_devices, strict=True))

    def speed(self, device: str, round: int) -> float:
        """Of the slowest class at full power: 1."""
        one = self.devices[device]
        return one.kind.quota / CLASSES[0].quota * one.power(round)

    def noise(self, device: str, round: int, step: int) -> float:
        """On one step's time."""
        return self.devices[device].noise(round, step)

    def link(self, device: str, round: int) -> float:
        """Bytes per second."""
        return self.devices[device].bandwidth(round)


class Timing(NamedTuple):
    """Seconds of a sample on a device in a round."""

    compute: float
    transmit: float


def merged_seconds(parts: Mapping[str, Sequence[tuple[float, float]]], depth: int) -> float:
    """Seconds of a round of merged steps. `parts`: of each device and step the seconds to compute and to transmit;
    `depth`: batches that a device has under way."""
    steps = len(next(iter(parts.values())))
    sent: dict[str, list[float]] = {name: [] for name in parts}
    free = dict.fromkeys(parts, 0.0)

    def send(name: str, step: int) -> None:
        if step < steps:
            compute, transmit = parts[name][step]
            free[name] += FORWARD * compute + transmit / 2
            sent[name].append(free[name])

    for name in parts:
        for step in range(depth):
            send(name, step)
    for step in range(steps):
        merged = max(sent[name][step] for name in parts)
        for name in parts:
            compute, transmit = parts[name][step]
            free[name] = max(free[name], merged) + transmit / 2 + (1.0 - FORWARD) * compute
            send(name, step + depth)
    return max(free.values())
