"""What the daemon says to one agent process, written by a thread of its own.

An agent that hangs reads nothing, and its pipe holds 64 KiB: a loop that wrote there itself would hang with it, and
could no longer see the silence for which the agent is to be killed.
"""

from __future__ import annotations

import logging
import threading
from collections import deque

from edge_daemon import protocol
from shared.frames import FrameWriter, frame

log = logging.getLogger(__name__)
KEPT_STEP_BYTES = 64 * 1024 * 1024
"""Of packets of steps that wait for the agent. An agent that reads takes them faster than any network brings them."""
KEPT_ORDERS = 256
"""Other messages that wait. No agent that will ever read has missed so many: they are pauses of hours."""


class AgentPipe:
    """The messages to one process, in the order they were told. The thread ends with `close` or a broken pipe."""

    def __init__(self, writer: FrameWriter) -> None:
        self._writer = writer
        self._changed = threading.Condition()
        self._waiting: deque[tuple[bytes, bool]] = deque()
        """Frames, and whether each is a packet of steps."""
        self._step_bytes = 0
        self._orders = 0
        self._dropping = False
        self._closed = False
        threading.Thread(target=self._write_all, name="agent-writer", daemon=True).start()

    def tell(self, message: protocol.ToAgent) -> bool:
        """Have it written; never waits for the agent. False: so many wait that this agent reads no more.

        A packet of steps for which there is no room is dropped: it is asked for again. Raises what `frame` does.
        """
        made, is_step = frame(message), isinstance(message, protocol.StepIn)
        with self._changed:
            if self._closed:
                return True
            if is_step and self._step_bytes + len(made) > KEPT_STEP_BYTES:
                self._drop()
                return True
            if not is_step and self._orders >= KEPT_ORDERS:
                return False
            self._count(made, is_step, 1)
            self._waiting.append((made, is_step))
            self._changed.notify()
        return True

    def close(self) -> None:
        """Write no more and forget what waits. A write under way ends with the process that does not read it."""
        with self._changed:
            self._closed = True
            self._waiting.clear()
            self._changed.notify()

    def _drop(self) -> None:
        if not self._dropping:
            log.warning("the agent does not read: packets of steps are dropped")
        self._dropping = True

    def _count(self, made: bytes, is_step: bool, sign: int) -> None:
        if is_step:
            self._step_bytes += sign * len(made)
        else:
            self._orders += sign

    def _write_all(self) -> None:
        try:
            while (made := self._next()) is not None:
                self._writer.write_frame(made)
        except OSError as error:
            # Its reader reports the agent's end.
            log.warning("the agent can't be reached: %s", error)
            self.close()
        finally:
            self._writer.close()

    def _next(self) -> bytes | None:
        """The next frame; waits for it. None: closed."""
        with self._changed:
            while not self._waiting and not self._closed:
                self._dropping = False
                self._changed.wait()
            if self._closed:
                return None
            made, is_step = self._waiting.popleft()
            self._count(made, is_step, -1)
            return made
