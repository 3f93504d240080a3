"""A worker's signs of life while it works."""

from __future__ import annotations

import time
from typing import Protocol

from coordinator.workers.protocol import WorkerBeat

BEAT_S = 2.0


class Writer(Protocol):
    """Where a worker's messages go, as `shared.frames.FrameWriter`."""

    def write(self, message: object) -> None:
        """Send one message."""


class Pulse:
    """Says over `writer` that work goes on, at most every `BEAT_S` seconds."""

    def __init__(self, writer: Writer) -> None:
        self._writer = writer
        self._said = 0.0

    def __call__(self, what: str) -> None:
        now = time.monotonic()
        if now - self._said >= BEAT_S:
            self._said = now
            self._writer.write(WorkerBeat(what=what))
