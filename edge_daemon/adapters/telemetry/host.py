"""The host's load: CPU and memory by the own cgroup where it has limits, else by the whole machine."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil

from edge_daemon.adapters.telemetry import cgroup
from edge_daemon.adapters.telemetry import own as own_processes
from edge_daemon.adapters.telemetry.resources import ResourceReader
from edge_daemon.adapters.telemetry.sysfs import degrees, field, line, zones
from shared.messages import HostLoad

_ZONES = ("tj", "x86-pkg-temp", "cpu", "soc")
"""Names of the thermal zone that stands for the chip (`sysfs.zones`), in order of preference."""
_NO_SENSOR = "pmic"
"""A Jetson's power chip says 100 degrees, always."""
_CHIPS = ("coretemp", "k10temp", "zenpower", "cpu_thermal")
_SHORTEST_S = 0.5


@dataclass(frozen=True)
class HostReading:
    """One reading. Rates are over the time since a reading at least half a second before; 0 until there is one."""

    cores: float
    own_cores: float
    foreign_cores: float
    throttled: float
    memory_available: int
    memory_limit: int
    own_memory: int
    """Resident bytes of the daemon and its descendants, what they share left out."""
    oom_kills: int
    """Of our cgroup since it was made; a rise after an agent died of SIGKILL means: out of memory."""
    temperature_c: float | None = None
    on_battery: bool | None = None
    host: HostLoad = HostLoad()
    own_pids: frozenset[int] = frozenset()
    """The daemon and its descendants."""


@dataclass(frozen=True)
class _Counters:
    at: float
    own_s: float
    all_s: float
    periods: int
    throttled: int
    cpus: frozenset[int] = frozenset()
    """Whose time `all_s` is; empty: not by processor."""


class HostReader:
    """Reads the load of the machine as far as process `pid` and its descendants may use it.

    `root`: where `/proc` and `/sys` lie (a recorded tree in tests). `clock`: seconds, monotonic. `disk`: a path on the
    disk whose room is told.
    Not safe from several threads: rates are differences to the reading before.
    """

    def __init__(
        self,
        *,
        root: Path = Path("/"),
        pid: int | None = None,
        clock: Callable[[], float] = time.monotonic,
        disk: Path = Path("/"),
    ) -> None:
        self._root = root
        self._pid = os.getpid() if pid is None else pid
        self._clock = clock
        if root != Path("/"):
            psutil.PROCFS_PATH = str(root / "proc")
        self._group = cgroup.find(root, str(self._pid))
        self._resources = ResourceReader(disk, root=root, clock=clock)
        self._before: _Counters | None = None
        self._rates = (0.0, 0.0, 0.0)
        """Own cores, foreign cores, share throttled."""

    def read(self) -> HostReading:
        """The load now."""
        cores = self.cores()
        pids = own_processes.tree(self._root, self._pid)
        used = own_processes.used(self._root, pids)
        own, foreign, throttled = self._rated(self._counters(used.cpu_s), cores)
        limit, available = self.memory()
        return HostReading(
            cores=cores, own_cores=own, foreign_cores=foreign, throttled=throttled,
            memory_available=available, memory_limit=limit, own_memory=used.memory,
            oom_kills=self.oom_kills(), temperature_c=self._temperature(), on_battery=self._battery(),
            host=self._resources.read(), own_pids=frozenset(pids),
        )  # fmt: skip

    def _rated(self, now: _Counters, cores: float) -> tuple[float, float, float]:
        """The rates up to `now`. The kernel counts in ticks of 10 ms: over less than half a second they say nothing,
        and the rates before still hold."""
        before = self._before
        if before is None:
            self._before = now
            return self._rates
        seconds = now.at - before.at
        if seconds < _SHORTEST_S:
            return self._rates
        if now.cpus != before.cpus:
            self._before = now  # of others than before: processors went off or on, or were given to us or taken
            return self._rates
        own = max(0.0, now.own_s - before.own_s) / seconds
        foreign = min(cores, max(0.0, (now.all_s - before.all_s) / seconds - own))
        throttled = 0.0
        if now.periods > before.periods:
            throttled = min(1.0, max(0, now.throttled - before.throttled) / (now.periods - before.periods))
        self._before, self._rates = now, (own, foreign, throttled)
        return self._rates

    def cores(self) -> float:
        """CPU cores usable: the processors we may run on, or less by quota."""
        processors = float(self._processors())
        quota = self._group.quota()
        return processors if quota is None else min(processors, quota)

    def memory(self) -> tuple[int, int]:
        """(limit, available) in bytes: the machine's, or less by cgroup."""
        machine = psutil.virtual_memory()
        limit, available = int(machine.total), int(machine.available)
        group = self._group.memory_left()
        if group is not None:
            limit, available = min(limit, group.limit), min(available, group.available)
        return limit, available

    def oom_kills(self) -> int:
        """Processes of our cgroup the kernel killed for memory so far."""
        return self._group.oom_kills()

    def _counters(self, own: float) -> _Counters:
        group = self._group.cpu_times()
        if group is None:
            cpus = self._cpus()
            return _Counters(self._clock(), own, self._busy_seconds(cpus), 0, 0, cpus)
        return _Counters(self._clock(), own, group.usage_s, group.periods, group.throttled)

    def _busy_seconds(self, cpus: frozenset[int]) -> float:
        """Of the processors that we may run on: what others are busy with is none of ours."""
        ticks = []
        for row in line(self._root / "proc/stat").splitlines():
            name, *counts = row.split()
            if name.startswith("cpu") and name[3:].isdecimal() and int(name[3:]) in cpus:
                # User time already contains the guests'.
                user, nice, system, _idle, _iowait, irq, softirq = map(int, counts[:7])
                ticks.append(user + nice + system + irq + softirq)
        if ticks:
            return sum(ticks) / os.sysconf("SC_CLK_TCK")
        times = psutil.cpu_times()
        return float(times.user + times.nice + times.system + times.irq + times.softirq)

    def _processors(self) -> int:
        return len(self._cpus()) or psutil.cpu_count() or 1

    def _cpus(self) -> frozenset[int]:
        """The processors that we may run on and that are there: the first list keeps those which are switched off."""
        allowed = _listed(field(self._root / "proc" / str(self._pid) / "status", "Cpus_allowed_list"))
        online = _listed(line(self._root / "sys/devices/system/cpu/online"))
        return allowed & online or allowed

    def _temperature(self) -> float | None:
        """Degrees Celsius of the chip: the preferred thermal zone, a CPU sensor, else the hottest zone."""
        found = zones(self._root)
        for name in _ZONES:
            if name in found:
                return found[name]
        for chip in sorted((self._root / "sys/class/hwmon").glob("hwmon*")):
            if line(chip / "name") in _CHIPS:
                readings = [d for f in sorted(chip.glob("temp*_input")) if (d := degrees(f)) is not None]
                if readings:
                    return max(readings)
        return max((heat for name, heat in found.items() if not name.startswith(_NO_SENSOR)), default=None)

    def _battery(self) -> bool | None:
        """Whether the machine runs on its battery; None where nothing tells."""
        answer: bool | None = None
        for supply in sorted((self._root / "sys/class/power_supply").glob("*")):
            # A device's own battery (a mouse's) has scope "Device".
            if line(supply / "scope") == "Device":
                continue
            kind = line(supply / "type")
            if kind in ("Mains", "USB") and line(supply / "online") == "1":
                return False
            if kind == "Battery" and (status := line(supply / "status")):
                answer = status == "Discharging" or (answer or False)
        return answer


def _listed(text: str) -> frozenset[int]:
    """The numbers of a list such as `0-3,6`."""
    found: set[int] = set()
    for part in filter(None, text.strip().split(",")):
        first, _, last = part.partition("-")
        found.update(range(int(first), int(last or first) + 1))
    return frozenset(found)
