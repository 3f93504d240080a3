"""Control groups for emulated devices: CPU quota and memory limit, version 1 and 2.

A run's groups lie under one folder `muster-emulate-<pid>` per hierarchy. They are made at the hierarchy's top, or
inside our own group where that has a limit itself, so that an emulation never escapes its operator's limits.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from edge_daemon.adapters.telemetry import cgroup
from muster.testbed import launch
from shared.errors import MusterError

PREFIX = "muster-emulate-"
_PERIOD_US = 50_000
"""Half the usual period: shorter stalls, so that a heartbeat is not late for the quota's sake."""


class GroupsFailed(MusterError):
    """A control group can't be made here; the text says why."""


@dataclass(frozen=True)
class Available:
    """What can be limited here; `reason`: why not everything."""

    cpu: bool
    memory: bool
    reason: str = ""


@dataclass(frozen=True)
class DeviceGroup:
    """The groups of one device; no folders: not limited."""

    name: str
    folders: tuple[Path, ...] = ()
    nice: int = 0

    def command(self, command: list[str]) -> list[str]:
        """`command` so that it starts inside this group and dies with this process.

        Start it from a thread that lives as long as the run: the kernel takes that thread for the parent.
        """
        options = ["--parent", str(os.getpid())]
        if self.nice:
            options += ["--nice", str(self.nice)]
        for folder in self.folders:
            options += ["--group", str(folder)]
        return [sys.executable, "-S", str(Path(launch.__file__)), *options, "--", *command]

    def pids(self) -> set[int]:
        """Processes in the group now."""
        found: set[int] = set()
        for folder in self.folders:
            found |= _pids(folder)
        return found

    def set_cores(self, cores: float) -> None:
        """Change the CPU quota. Raises `GroupsFailed`."""
        for folder in self.folders:
            if (folder / "cpu.cfs_quota_us").exists() or (folder / "cpu.max").exists():
                _limit_cpu(folder, cores)

    def set_memory(self, memory_bytes: int) -> None:
        """Change the memory limit. Raises `GroupsFailed`."""
        for folder in self.folders:
            if (folder / "memory.limit_in_bytes").exists() or (folder / "memory.max").exists():
                _limit_memory(folder, memory_bytes)


class Groups:
    """The groups of one run. Use as a context manager: leaving it kills what is left in them and removes them."""

    def __init__(self, *, root: Path = Path("/")) -> None:
        own = cgroup.find(root)
        self._version = own.version
        self._run = f"{PREFIX}{os.getpid()}"
        self._cpu: list[Path] = []
        self._memory: list[Path] = []
        self._reasons: list[str] = []
        self._devices: list[DeviceGroup] = []
        cpu_top = _top(own.cpu, limited=own.quota() is not None)
        memory_top = _top(own.memory, limited=own.memory_left() is not None)
        try:
            self._cpu = self._make("cpu", cpu_top, _top(own.cpuacct, limited=own.quota() is not None))
            self._memory = self._make("memory", memory_top)
        except BaseException:
            self.close()
            raise

    @property
    def available(self) -> Available:
        """What the devices of this run are limited in."""
        return Available(bool(self._cpu), bool(self._memory), "; ".join(self._reasons))

    def create(
        self, name: str, *, cores: float | None = None, memory_bytes: int | None = None, nice: int = 0
    ) -> DeviceGroup:
        """A group for a device. What can't be limited here is left unlimited; without a quota `nice` stands in."""
        folders: dict[Path, None] = {}
        for run in [*self._cpu, *self._memory]:
            (run / name).mkdir(exist_ok=True)
            folders[run / name] = None
        if cores is not None and self._cpu:
            _limit_cpu(self._cpu[0] / name, cores)
        if memory_bytes is not None and self._memory:
            _limit_memory(self._memory[0] / name, memory_bytes)
        group = DeviceGroup(name, tuple(folders), 0 if self._cpu else nice)
        self._devices.append(group)
        return group

    def close(self) -> None:
        """Kill what is left in the groups and remove them."""
        for run in {*self._cpu, *self._memory}:
            _remove(run)
        self._cpu, self._memory, self._devices = [], [], []

    def __enter__(self) -> Groups:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _make(self, controller: str, *tops: Path | None) -> list[Path]:
        """The run's folders in the hierarchies of `controller`; [] and a reason where they can't be made."""
        if tops[0] is None:
            self._reasons.append(f"{controller}: no control groups are mounted")
            return []
        made: list[Path] = []
        try:
            for top in dict.fromkeys(top for top in tops if top is not None):
                if self._version == 2:
                    _delegate(top, controller)
                run = top / self._run
                run.mkdir(exist_ok=True)
                made.append(run)
                if self._version == 2:
                    _delegate(run, controller)
        except OSError as error:
            self._reasons.append(f"{controller}: {error.filename or tops[0]}: {error.strerror or error}")
            for run in made:
                _remove(run)
            return []
        return made


def available(*, root: Path = Path("/")) -> Available:
    """What can be limited here, found out by doing it."""
    with Groups(root=root) as groups:
        try:
            groups.create("probe", cores=1.0, memory_bytes=64 * 1024 * 1024)
        except GroupsFailed as error:
            return Available(False, False, str(error))
        return groups.available


def clean_leftovers(*, root: Path = Path("/")) -> list[str]:
    """Remove the groups of runs whose process is gone, killing what is left in them. The names removed."""
    own = cgroup.find(root)
    removed: list[str] = []
    for level in dict.fromkeys([*own.cpu, *own.cpuacct, *own.memory]):
        for folder in level.glob(f"{PREFIX}*"):
            pid = folder.name.removeprefix(PREFIX)
            if pid.isdecimal() and not (root / "proc" / pid).exists():
                _remove(folder)
                removed.append(folder.name)
    return sorted(set(removed))


def _top(levels: tuple[Path, ...], *, limited: bool) -> Path | None:
    if not levels:
        return None
    return levels[0] if limited else levels[-1]


def _delegate(folder: Path, controller: str) -> None:
    """Version 2: let the children of `folder` be limited by `controller`."""
    control = folder / "cgroup.subtree_control"
    if controller not in control.read_text(encoding="ascii").split():
        control.write_text(f"+{controller}", encoding="ascii")


def _limit_cpu(folder: Path, cores: float) -> None:
    quota = max(1000, round(cores * _PERIOD_US))
    if (folder / "cpu.max").exists():
        _write(folder / "cpu.max", f"{quota} {_PERIOD_US}")
    else:
        _write(folder / "cpu.cfs_period_us", str(_PERIOD_US))
        _write(folder / "cpu.cfs_quota_us", str(quota))


def _limit_memory(folder: Path, limit: int) -> None:
    if (folder / "memory.max").exists():
        _write(folder / "memory.max", str(limit))
        if (folder / "memory.swap.max").exists():
            _write(folder / "memory.swap.max", "0")
        return
    _write(folder / "memory.limit_in_bytes", str(limit))
    # Memory and swap together: a device of limited memory must not grow into the host's swap.
    if (folder / "memory.memsw.limit_in_bytes").exists():
        _write(folder / "memory.memsw.limit_in_bytes", str(limit))


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="ascii")
    except OSError as error:
        raise GroupsFailed(f"{path}: {text!r} refused: {error.strerror}") from error


def _pids(folder: Path) -> set[int]:
    try:
        return {int(line) for line in (folder / "cgroup.procs").read_text(encoding="ascii").split()}
    except OSError:
        return set()


def _remove(folder: Path, patience_s: float = 5.0) -> None:
    """Kill every process below `folder` and remove its groups, children first. What resists stays for the next run."""
    deadline = time.monotonic() + patience_s
    while folder.exists():
        for place in sorted([folder, *(p for p in folder.rglob("*") if p.is_dir())], reverse=True):
            for pid in _pids(place):
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, signal.SIGKILL)
            with contextlib.suppress(OSError):
                place.rmdir()
        if time.monotonic() > deadline:
            return
        if folder.exists():
            time.sleep(0.02)
