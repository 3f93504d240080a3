"""Disk, network and pressure stall of the machine: for people and dashboards, not for plans."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from edge_daemon.adapters.telemetry.sysfs import line
from shared.messages import HostLoad

_SHORTEST_S = 0.5


class _Traffic(NamedTuple):
    """Bytes since the boot, over all cards."""

    at: float
    received: int
    sent: int


class ResourceReader:
    """`disk`: a path on the disk that counts. `root`: where `/proc` and `/sys` lie. Rates are over the time since a
    reading at least half a second before; None until there is one."""

    def __init__(self, disk: Path, *, root: Path = Path("/"), clock: Callable[[], float] = time.monotonic) -> None:
        self._disk = disk
        self._root = root
        self._clock = clock
        self._before: _Traffic | None = None
        self._rates: tuple[float | None, float | None] = (None, None)

    def read(self) -> HostLoad:
        """The state now."""
        received, sent = self._rated()
        return HostLoad(
            disk_free=self._disk_free(), received_per_s=received, sent_per_s=sent,
            cpu_stalled=self._stalled("cpu"), memory_stalled=self._stalled("memory"), disk_stalled=self._stalled("io"),
        )  # fmt: skip

    def _disk_free(self) -> int | None:
        try:
            return shutil.disk_usage(self._disk).free
        except OSError:
            return None

    def _rated(self) -> tuple[float | None, float | None]:
        now, before = self._traffic(), self._before
        if now is None:
            return None, None
        if before is None or now.received < before.received or now.sent < before.sent:
            self._before = now  # the first one, or a card went away with its counters
        elif now.at - before.at >= _SHORTEST_S:
            seconds = now.at - before.at
            self._rates = (now.received - before.received) / seconds, (now.sent - before.sent) / seconds
            self._before = now
        return self._rates

    def _traffic(self) -> _Traffic | None:
        """Of the cards: what bridges, tunnels and containers move goes through them, too. In a container, whose
        interface is no card, of everything but the loopback."""
        counters: dict[str, tuple[int, int]] = {}
        for row in line(self._root / "proc/net/dev").splitlines():
            name, _, values = row.partition(":")
            numbers = values.split()
            if len(numbers) >= 9 and numbers[0].isdecimal() and numbers[8].isdecimal():
                counters[name.strip()] = int(numbers[0]), int(numbers[8])
        cards = {name for name in counters if (self._root / "sys/class/net" / name / "device").exists()}
        found = [both for name, both in counters.items() if (name in cards if cards else name != "lo")]
        if not found:
            return None
        return _Traffic(self._clock(), sum(received for received, _ in found), sum(sent for _, sent in found))

    def _stalled(self, what: str) -> float | None:
        """The kernel's `some avg10`, as a share; None before Linux 4.20, or where it is switched off."""
        for row in line(self._root / "proc/pressure" / what).splitlines():
            words = row.split()
            if words and words[0] == "some":
                for word in words[1:]:
                    name, _, value = word.partition("=")
                    if name == "avg10":
                        return _share(value)
        return None


def _share(percent: str) -> float | None:
    try:
        return min(1.0, max(0.0, float(percent) / 100.0))
    except ValueError:
        return None
