"""This process's own control group, version 1 or 2: quota, throttling, CPU time, memory, out-of-memory kills.

A limit of any ancestor binds too, so each question is asked at every level from our group up to the mount point.
Fields: the kernel's `Documentation/admin-guide/cgroup-v1/{memory,cpuacct}.rst` and `cgroup-v2.rst`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

_UNLIMITED = 2**62
"""Version 1 writes "no limit" as the largest multiple of the page size below 2**63."""


@dataclass(frozen=True)
class CpuTimes:
    """Counters since the group was made: seconds of CPU, scheduler periods, periods in which the quota stopped us."""

    usage_s: float
    periods: int
    throttled: int


@dataclass(frozen=True)
class Memory:
    """The tightest level: its limit, and the bytes still free there (page cache that can be dropped counts as free)."""

    limit: int
    available: int


@dataclass(frozen=True)
class Cgroup:
    """Where our group's files are: per controller the folders from our group up to the mount point, ours first."""

    version: int
    cpu: tuple[Path, ...] = ()
    cpuacct: tuple[Path, ...] = ()
    memory: tuple[Path, ...] = ()

    def quota(self) -> float | None:
        """CPU cores the scheduler grants, by the tightest quota; None without one."""
        found = self._tightest()
        return None if found is None else found[0]

    def cpu_times(self) -> CpuTimes | None:
        """Counters of the level that sets the quota (everything in it competes with us); None without a quota."""
        found = self._tightest()
        if found is None:
            return None
        stat = _table(self.cpu[found[1]] / "cpu.stat")
        if self.version == 2:
            usage = stat.get("usage_usec", 0) / 1e6
        else:
            level = min(found[1], len(self.cpuacct) - 1)
            usage = (_number(self.cpuacct[level] / "cpuacct.usage") or 0) / 1e9 if self.cpuacct else 0.0
        return CpuTimes(usage, stat.get("nr_periods", 0), stat.get("nr_throttled", 0))

    def memory_left(self) -> Memory | None:
        """The tightest memory limit and what is left below every limit; None without one."""
        limit_file, usage_file, stat_key = (
            ("memory.max", "memory.current", "inactive_file")
            if self.version == 2
            else ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        )
        limits: list[int] = []
        left: list[int] = []
        for level in self.memory:
            limit, usage = _number(level / limit_file), _number(level / usage_file)
            if limit is None or limit >= _UNLIMITED or usage is None:
                continue
            droppable = _table(level / "memory.stat").get(stat_key, 0)
            limits.append(limit)
            left.append(max(0, limit - max(0, usage - droppable)))
        return Memory(min(limits), min(left)) if limits else None

    def oom_kills(self) -> int:
        """Processes of our group the kernel killed for memory, since the group was made."""
        if not self.memory:
            return 0
        file = "memory.events" if self.version == 2 else "memory.oom_control"
        return _table(self.memory[0] / file).get("oom_kill", 0)

    def _tightest(self) -> tuple[float, int] | None:
        """(cores, index of the level) of the smallest quota."""
        quotas = [(cores, index) for index, level in enumerate(self.cpu) if (cores := self._quota_at(level))]
        return min(quotas, default=None)

    def _quota_at(self, level: Path) -> float | None:
        if self.version == 2:
            quota, _, period = (_text(level / "cpu.max") or "max").partition(" ")
            return int(quota) / int(period) if quota.isdecimal() and period.isdecimal() else None
        micros, period_us = _number(level / "cpu.cfs_quota_us"), _number(level / "cpu.cfs_period_us")
        return micros / period_us if micros and micros > 0 and period_us else None


def find(root: Path = Path("/"), process: str = "self") -> Cgroup:
    """The group of `process` (a pid or "self") by `/proc`; `root`: where `/proc` and `/sys` lie.

    Where version 1 and 2 are both mounted, each controller is read where it is bound. No groups at all: version 2 with
    no folders, for which every question answers None or 0.
    """
    mounts = _mounts(root, process)
    ours = _memberships(root, process)
    folders: dict[str, tuple[Path, ...]] = {}
    for controller in ("cpu", "cpuacct", "memory"):
        if controller in mounts and controller in ours:
            folders[controller] = _levels(root, *mounts[controller], ours[controller])
    if "cpu" in folders or "memory" in folders:
        return Cgroup(1, folders.get("cpu", ()), folders.get("cpuacct", ()), folders.get("memory", ()))
    if "" in mounts and "" in ours:
        levels = _levels(root, *mounts[""], ours[""])
        return Cgroup(2, levels, levels, levels)
    return Cgroup(2)


def _mounts(root: Path, process: str) -> dict[str, tuple[str, str]]:
    """Controller ("" for version 2) -> (mount point, path inside the hierarchy that is mounted there)."""
    found: dict[str, tuple[str, str]] = {}
    for line in (_text(root / "proc" / process / "mountinfo") or "").splitlines():
        left, _, right = line.partition(" - ")
        fields, kind = left.split(), right.split()
        if len(fields) < 5 or not kind:
            continue
        if kind[0] == "cgroup2":
            found.setdefault("", (fields[4], fields[3]))
        elif kind[0] == "cgroup":
            for controller in kind[-1].split(","):
                found.setdefault(controller, (fields[4], fields[3]))
    return found


def _memberships(root: Path, process: str) -> dict[str, str]:
    """Controller ("" for version 2) -> path of our group in its hierarchy."""
    found: dict[str, str] = {}
    for line in (_text(root / "proc" / process / "cgroup") or "").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        for controller in controllers.split(","):
            found[controller] = path
    return found


def _levels(root: Path, mount_point: str, mounted: str, path: str) -> tuple[Path, ...]:
    """Folders from our group up to the mount point. A path we can't see (a container's) means the mount point."""
    top = root / mount_point.lstrip("/")
    inside = path if mounted == "/" else path.removeprefix(mounted)
    own = top / inside.lstrip("/")
    if ".." in own.parts or not own.is_dir():
        own = top
    levels = [own]
    while levels[-1] != top:
        levels.append(levels[-1].parent)
    return tuple(levels)


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return None


def _number(path: Path) -> int | None:
    text = _text(path)
    try:
        return None if text is None else int(text)
    except ValueError:
        return None


def _table(path: Path) -> dict[str, int]:
    """A file of `key number` lines."""
    found: dict[str, int] = {}
    for line in (_text(path) or "").splitlines():
        key, _, value = line.partition(" ")
        if value.strip().isdecimal():
            found[key] = int(value)
    return found
