"""Our own processes: the daemon and its descendants, by files of theirs alone.

A search through every process of the machine for its parent costs many times as much, on a busy machine ever more.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

import psutil

from edge_daemon.adapters.telemetry.sysfs import line

_TICK_S = 1.0 / os.sysconf("SC_CLK_TCK")
_PAGE = os.sysconf("SC_PAGE_SIZE")


class Used(NamedTuple):
    """Of some processes together."""

    cpu_s: float
    """A reaped child's time stays in its parent's, so the sum only rises."""
    memory: int
    """Resident bytes that they share with nobody: libraries count for none of them."""


def tree(root: Path, pid: int) -> set[int]:
    """Process ids of `pid` and all its descendants."""
    if not (root / "proc" / str(pid) / "task" / str(pid) / "children").exists():
        return _by_search(pid)  # a kernel without CONFIG_PROC_CHILDREN
    found, waiting = {pid}, [pid]
    while waiting:
        for child in _children(root, waiting.pop()):
            if child not in found:
                found.add(child)
                waiting.append(child)
    return found


def used(root: Path, pids: set[int]) -> Used:
    """What these processes use; one that is gone uses nothing."""
    seconds, memory = 0.0, 0
    for pid in pids:
        # The name in brackets may hold blanks and brackets.
        fields = line(root / "proc" / str(pid) / "stat").rpartition(")")[2].split()
        if len(fields) > 14:
            seconds += _TICK_S * sum(int(field) for field in fields[11:15])
        pages = line(root / "proc" / str(pid) / "statm").split()
        if len(pages) > 2:
            memory += _PAGE * max(0, int(pages[1]) - int(pages[2]))
    return Used(seconds, memory)


def _children(root: Path, pid: int) -> list[int]:
    """The children of all its threads: each knows those that it started."""
    try:
        threads = os.listdir(root / "proc" / str(pid) / "task")  # noqa: PTH208 - names are enough, and it is cheaper
    except OSError:
        return []
    return [
        int(child)
        for thread in threads
        for child in line(root / "proc" / str(pid) / "task" / thread / "children").split()
    ]


def _by_search(pid: int) -> set[int]:
    try:
        return {pid, *(child.pid for child in psutil.Process(pid).children(recursive=True))}
    except psutil.Error:
        return {pid}
