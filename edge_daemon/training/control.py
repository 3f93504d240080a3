"""What the daemon says while the agent works, heeded between micro-batches; and the agent's signs of life."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from edge_daemon.protocol import Beat, Pause, Progressed, Resume, Shutdown, StepIn, StepOut, Stop, ToAgent, Train
from shared.errors import DecodeError
from shared.frames import FrameReader, FrameWriter

log = logging.getLogger(__name__)
PROGRESS_S = 0.5
KEPT_PACKETS = 4096
"""Of steps, while nothing takes them; the oldest go first, and are asked for again."""
_PAUSE_POLL_S = 0.5


class Stopped(Exception):
    """The work ends now. `discard`: forget it; else what is done counts. `ended`: as in `UpdateFacts`."""

    def __init__(self, ended: str, *, discard: bool = False) -> None:
        super().__init__(ended)
        self.ended = ended
        self.discard = discard


class PipeClosed(Exception):
    """The daemon is gone."""


class Control:
    """The agent's side of the pipe. One thread reads; everything else happens in the working thread."""

    heeds_time = True
    """Whether the deadline ends the work. Where a step is to be done in any case: not before progress is told."""

    def __init__(
        self, reader: FrameReader[ToAgent], writer: FrameWriter, on_closed: Callable[[], None] = lambda: None
    ) -> None:
        """`on_closed` runs in the reading thread once the daemon is gone, after the working thread was told."""
        self._on_closed = on_closed
        self.beat_s = 5.0
        self.deadline: float | None = None
        self.paused_s = 0.0
        self._writer = writer
        self._reader = reader
        self._inbox: queue.Queue[ToAgent | None] = queue.Queue()
        self._waiting: list[ToAgent | None] = []
        self._steps: deque[bytes] = deque(maxlen=KEPT_PACKETS)
        self._said = self.now()
        self._progressed = 0.0
        threading.Thread(target=self._read, name="pipe-reader", daemon=True).start()

    def now(self) -> float:
        """Seconds of the clock that all times here are of."""
        return time.monotonic()

    def stamp(self) -> int:
        """A number larger than any that an earlier process of this device had."""
        return int(time.time()) % 2**31

    def next(self) -> ToAgent | None:
        """The next request; waits for it. None: the daemon is gone."""
        if self._waiting:
            return self._waiting.pop(0)
        return self._inbox.get()

    def send(self, message: Any) -> None:
        """Send one message to the daemon. Raises `PipeClosed` where it is gone."""
        # Packets are no sign of life: the daemon passes them on unread.
        if not isinstance(message, StepOut):
            self._said = self.now()
        try:
            self._writer.write(message)
        except BrokenPipeError:
            raise PipeClosed from None

    def beat(self, what: str) -> None:
        """Say that work goes on, if nothing was said for half of `beat_s`."""
        if self.now() - self._said >= self.beat_s / 2:
            self.send(Beat(what=what))

    def progress(self, make: Callable[[], Progressed]) -> None:
        """A step is done: send the progress that `make` gives, at most twice a second."""
        self.heeds_time = True
        now = self.now()
        if now - self._progressed >= PROGRESS_S:
            self._progressed = now
            self.send(make())

    def poll(self, what: str) -> None:
        """Heed what came in since the last call; returns once work may go on.

        Raises `Stopped` on `Stop`, on newer work and when the time is up, `PipeClosed` when the daemon is gone.
        """
        self.beat(what)
        while not self._inbox.empty():
            self._heed(self._inbox.get())
        self._check_time()

    def packet(self, what: str, until: float) -> bytes | None:
        """The next packet from the top worker; waits for it to `until` (`now`). None: there was none.

        Raises what `poll` does.
        """
        while True:
            self.poll(what)
            if self._steps:
                return self._steps.popleft()
            left = min(until - self.now(), _PAUSE_POLL_S)
            if left <= 0:
                return None
            try:
                self._heed(self._heard(left))
            except queue.Empty:
                continue

    def _heard(self, seconds: float) -> ToAgent | None:
        """The next message; waits for it. Raises `queue.Empty` where none came within `seconds`."""
        return self._inbox.get(timeout=seconds)

    def forget_packets(self) -> None:
        """Those that came were for other work."""
        self._steps.clear()

    def _heed(self, message: ToAgent | None) -> None:
        match message:
            case StepIn():
                self._steps.append(message.packet)
            case Pause():
                self._pause(message)
            case Stop(after_step=True):
                self.deadline = self.now()
            case Stop():
                raise Stopped("drain", discard=message.discard)
            case None:
                raise PipeClosed
            case Resume():
                pass
            case Shutdown() | Train():
                self._waiting.append(message)
                raise Stopped("drain", discard=True)
            case _:
                self._waiting.append(message)

    def _pause(self, pause: Pause) -> None:
        log.info("paused: %s", pause.reason)
        started = self.now()
        self.send(Beat(what="paused"))
        try:
            while True:
                try:
                    message = self._heard(_PAUSE_POLL_S)
                except queue.Empty:
                    self.beat("paused")
                    self._check_time()
                    continue
                if isinstance(message, Resume):
                    return
                if not isinstance(message, Pause):
                    self._heed(message)
        finally:
            self.paused_s += self.now() - started

    def _check_time(self) -> None:
        if self.deadline is not None and self.heeds_time and self.now() >= self.deadline:
            raise Stopped("time")

    def _read(self) -> None:
        while True:
            try:
                message = self._reader.read()
            except (DecodeError, OSError) as error:
                log.error("pipe from the daemon is broken: %s", error)
                message = None
            self._inbox.put(message)
            if message is None:
                self._on_closed()
            if message is None or isinstance(message, Shutdown):
                return
