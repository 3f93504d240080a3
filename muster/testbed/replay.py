"""Telemetry recorded on a fleet, given back to virtual devices as their foreign load and bandwidth.

A recording is JSONL, a reading a line (`Reading`): `muster emulate` writes one of its run, `muster devices --record` of
a real fleet. Virtual device i takes the recorded device i, in turn by id. The devices themselves are those of a profile
of the device model, or the recorded ones (`virtual_fleets.RECORDED`). Of a device that went away a recording tells its
last load.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path

import msgspec
from msgspec.structs import replace

from coordinator.core.fleet import GONE
from coordinator.core.planning import readings as planned
from coordinator.core.planning.cost_model import measures_link
from coordinator.web.views import DeviceView, JobView
from muster.testbed.device_model import Foreign
from shared.errors import UserError
from shared.jobs import Bits
from shared.messages import Load

FILE = "telemetry.jsonl"


class Reading(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What one device told at one time: of its processors, or where it trains on a GPU of that."""

    device: str
    at: float
    """Seconds since the recording began."""
    cores: float = 0.0
    """1 for a GPU."""
    foreign_cores: float = 0.0
    memory_limit: int = 0
    foreign_memory: int = 0
    flops: float = 0.0
    """FLOP per second of one of the cores, or of the GPU, in its probe; 0: not told."""
    bits: list[Bits] = []
    """Proven precisions of the base."""
    card: bool = False
    """Whether the memory is a GPU's own."""
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

    def machine(self, device: str) -> Reading:
        """What `device` is like, by the last that it told of it."""
        found = self._of[device]
        return next((one for one in reversed(found) if one.flops > 0 and one.bits), found[-1])

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


def device_ids(path: Path) -> list[str]:
    """Of a recording, sorted. Raises `UserError` as `read`."""
    return sorted({reading.device for reading in _readings(path)})


def read(path: Path, devices: Sequence[str]) -> Replay:
    """Load a recording. Raises `UserError` where it can't be read or holds nothing."""
    return Replay(_readings(path), devices)


def _readings(path: Path) -> list[Reading]:
    """Of a file that may be of days, asked for several times: read once."""
    try:
        stat = path.stat()
    except OSError as error:
        raise UserError(f"--replay {path}: can't be read: {error.strerror}") from error
    return _read(path, (stat.st_ino, stat.st_mtime_ns, stat.st_size))


@lru_cache(maxsize=1)
def _read(path: Path, _stamp: tuple[int, int, int]) -> list[Reading]:
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
    return found


class Recorder:
    """Makes readings of what a coordinator tells of its fleet, look by look. `at`: seconds since the first one."""

    def __init__(self) -> None:
        self._last: dict[str, tuple[tuple[int, int], Reading]] = {}
        self._links: set[tuple[str, int, int, str]] = set()

    def note(self, devices: Iterable[DeviceView], at: float) -> list[Reading]:
        """What devices that are there told since the last look."""
        found: list[Reading] = []
        for view in devices:
            load = view.load
            if load is None or view.state in GONE:
                continue
            number, last = (load.epoch, load.seq), self._last.get(view.device)
            if last is not None and last[0] == number:
                continue
            reading = _reading(view, load, round(at, 3))
            self._last[view.device] = number, reading
            found.append(reading)
        return found

    def links(self, job: JobView, at: float) -> list[Reading]:
        """What downloads in a job's rounds, told since the last look, say of links, each at its device's last load."""
        found: list[Reading] = []
        for view in job.rounds:
            for part in view.participants:
                facts, one = part.facts, (job.id, view.round, part.attempt, part.device)
                if facts is None or one in self._links:
                    continue
                self._links.add(one)
                last = self._last.get(part.device)
                if last is not None and measures_link(part.adapter_bytes, facts.fetch_s):
                    rate = round(part.adapter_bytes / facts.fetch_s, 1)
                    found.append(replace(last[1], at=round(at, 3), bandwidth=rate))
        return found


def _reading(view: DeviceView, load: Load, at: float) -> Reading:
    """As planners read it: of several GPUs the least memory and the most that others take of one."""
    info, foreign_cores = view.info, load.foreign_cores
    cores = load.cores or (info.cores if info is not None else 0.0)
    if info is None:
        limit = load.memory_limit
        foreign = limit - load.memory_available - load.own_memory if load.own_memory else 0
    elif planned.has_gpu_memory(info):
        limit, foreign = planned.gpu_memory(info, load)
    else:
        limit, foreign = planned.host_memory(info, load, load.own_memory)
    if info is not None and info.gpus:
        cores, foreign_cores = 1.0, planned.foreign_gpu(load)
    return Reading(
        device=view.device, at=at, cores=cores, foreign_cores=foreign_cores, memory_limit=limit,
        foreign_memory=max(0, foreign), flops=planned.probed_flops(info),
        bits=list(info.bits) if info is not None else [], card=info is not None and planned.has_gpu_memory(info),
    )  # fmt: skip


def lines(readings: Iterable[Reading]) -> bytes:
    """Readings as they stand in a recording."""
    return b"".join(msgspec.json.encode(one) + b"\n" for one in readings)
