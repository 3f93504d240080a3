"""Telemetry recorded on a fleet, given back to virtual devices as their foreign load and bandwidth.

A recording is JSONL, a reading a line (`Reading`); virtual device i takes the recorded device i, in turn by id.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import msgspec
from msgspec.structs import replace

from coordinator.core.planning.cost_model import measures_link
from coordinator.web.views import DeviceView, JobView
from muster.testbed.device_model import Foreign
from shared.errors import UserError
from shared.files import write_whole

FILE = "telemetry.jsonl"


class Reading(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What one device told at one time."""

    device: str
    at: float
    """Seconds since the recording began."""
    cores: float = 0.0
    foreign_cores: float = 0.0
    memory_limit: int = 0
    foreign_memory: int = 0
    bandwidth: float = 0.0
    """Bytes per second of its downloads; 0: not told."""


class Replay:
    """The readings of a recording, dealt out to `devices` by id; past its end it begins anew."""

    def __init__(self, readings: Sequence[Reading], devices: Sequence[str]) -> None:
        if not readings:
            raise UserError("the recording holds no readings")
        by_device: dict[str, list[Reading]] = {}
        for reading in sorted(readings, key=lambda one: (one.device, one.at)):
            by_device.setdefault(reading.device, []).append(reading)
        recorded = sorted(by_device)
        self._of = {device: by_device[recorded[i % len(recorded)]] for i, device in enumerate(sorted(devices))}
        self._links = {
            device: [reading for reading in found if reading.bandwidth > 0] for device, found in self._of.items()
        }
        self._lasts = max(reading.at for reading in readings) + 1.0

    def foreign(self, device: str, now: float) -> Foreign:
        """What other programs used on `device` at `now`."""
        reading = self._at(self._of[device], now)
        share = reading.foreign_cores / reading.cores if reading.cores > 0 else 0.0
        memory = reading.foreign_memory / reading.memory_limit if reading.memory_limit else 0.0
        return Foreign(min(max(share, 0.0), 0.95), min(max(memory, 0.0), 1.0))

    def bandwidth(self, device: str, now: float) -> float | None:
        """Bytes per second of its link; None: the recording does not tell."""
        found = self._links[device]
        return self._at(found, now).bandwidth if found else None

    def _at(self, found: Sequence[Reading], now: float) -> Reading:
        place = bisect.bisect([one.at for one in found], now % self._lasts)
        return found[max(0, place - 1)]


def read(path: Path, devices: Sequence[str]) -> Replay:
    """Load a recording. Raises `UserError` where it can't be read or holds nothing."""
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise UserError(f"--replay {path}: can't be read: {error.strerror}") from error
    found: list[Reading] = []
    for number, line in enumerate(lines, 1):
        try:
            found.append(msgspec.json.decode(line, type=Reading))
        except msgspec.MsgspecError as error:
            raise UserError(f"--replay {path}: line {number}: {error}") from error
    if not found:
        raise UserError(f"--replay {path}: no readings there")
    return Replay(found, devices)


class Recorder:
    """Collects the readings of a run."""

    def __init__(self) -> None:
        self._found: list[Reading] = []
        self._last: dict[str, tuple[int, int]] = {}

    def note(self, devices: Iterable[DeviceView], at: float) -> None:
        """Take what the devices told since the last call; `at`: seconds since the recording began."""
        for view in devices:
            load = view.load
            if load is None or self._last.get(view.device) == (load.epoch, load.seq):
                continue
            self._last[view.device] = load.epoch, load.seq
            foreign = load.memory_limit - load.memory_available - load.own_memory if load.own_memory else 0
            self._found.append(
                Reading(
                    device=view.device, at=round(at, 3), cores=load.cores, foreign_cores=load.foreign_cores,
                    memory_limit=load.memory_limit, foreign_memory=max(0, foreign),
                )
            )  # fmt: skip

    def links(self, job: JobView, committed_s: Mapping[int, float]) -> None:
        """Add what the downloads of a job's rounds tell of the devices' links, at the load read last before."""
        for view in job.rounds:
            at = committed_s.get(view.round, 0.0)
            for part in view.participants:
                facts = part.facts
                if facts is None or not measures_link(part.adapter_bytes, facts.fetch_s):
                    continue
                known = [one for one in self._found if one.device == part.device and one.at <= at]
                if known:
                    rate = round(part.adapter_bytes / facts.fetch_s, 1)
                    self._found.append(replace(max(known, key=lambda one: one.at), at=round(at, 3), bandwidth=rate))

    def write(self, path: Path) -> None:
        """Write the recording, in the order of time."""
        ordered = sorted(self._found, key=lambda one: (one.at, one.device))
        write_whole(path, b"".join(msgspec.json.encode(one) + b"\n" for one in ordered))
