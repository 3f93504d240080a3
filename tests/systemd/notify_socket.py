"""systemd's end of the notification protocol: a datagram socket, and what came in."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from pathlib import Path


class NotifySocket:
    """Listens in `folder`. `environment`: what systemd sets for a service that it watches."""

    def __init__(self, folder: Path, watchdog_s: float = 0.0) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(folder / "notify"))
        self.lines: list[tuple[float, str]] = []
        """Seconds of the monotonic clock, line."""
        self.environment = {**os.environ, "NOTIFY_SOCKET": str(folder / "notify")}
        self.environment.pop("WATCHDOG_PID", None)
        if watchdog_s:
            self.environment["WATCHDOG_USEC"] = str(int(watchdog_s * 1e6))

    def close(self) -> None:
        """Listen no more."""
        self._socket.close()

    def texts(self) -> list[str]:
        """All lines so far."""
        return [text for _, text in self.lines]

    def until(self, met: Callable[[list[str]], bool], seconds: float = 60.0) -> list[str]:
        """The lines that came since the last call, once `met` by them."""
        end, first = time.monotonic() + seconds, len(self.lines)
        while not met(self.texts()[first:]):
            left = end - time.monotonic()
            assert left > 0, f"not within {seconds} s, only {self.texts()[first:]}"
            self._receive(left)
        return self.texts()[first:]

    def quiet(self, seconds: float) -> list[str]:
        """What comes within so many seconds."""
        end, first = time.monotonic() + seconds, len(self.lines)
        while (left := end - time.monotonic()) > 0:
            self._receive(left)
        return self.texts()[first:]

    def _receive(self, seconds: float) -> None:
        self._socket.settimeout(seconds)
        try:
            data = self._socket.recv(4096).decode()
        except TimeoutError:
            return
        self.lines += [(time.monotonic(), line) for line in data.splitlines()]
