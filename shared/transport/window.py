"""The queue and in-flight window of QoS 1 messages, the same for every transport.

paho's own window does not hold after a reconnect (300 queued messages, 300 at once on the wire), so ours decides: a
message is handed over only while fewer than `size` are unacknowledged, and a lost session returns those to the front.

Two threads use a window: the owner (`put`, `take`, `sent`) and the network (`open`, `acked`, `close`). The lock is
never held while anything else is called.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from shared.transport.base import BackPressure, Outgoing


@dataclass(frozen=True)
class Acked:
    """The broker's answer to a message; `reason` and `note` as in `Published`."""

    reason: str = ""
    note: str = ""


class Window:
    """At most `size` messages unacknowledged, at most `queue` waiting."""

    def __init__(self, size: int, queue: int) -> None:
        self._wanted = size
        self._size = 0
        self._capacity = queue
        self._session: int | None = None
        self._queue: deque[Outgoing] = deque()
        self._flying: dict[int, Outgoing] = {}
        self._handing = False
        self._early: dict[int, Acked] = {}
        self._lock = threading.Lock()

    @property
    def idle(self) -> bool:
        """Nothing waits and nothing is unacknowledged."""
        with self._lock:
            return not (self._queue or self._flying or self._handing)

    @property
    def flying(self) -> int:
        """Messages unacknowledged now."""
        return len(self._flying)

    def room(self) -> int:
        """How many messages `put` takes now."""
        with self._lock:
            return max(0, self._capacity - len(self._queue))

    def put(self, message: Outgoing) -> None:
        """Queue `message`. Raises `BackPressure` where the queue is full."""
        with self._lock:
            if len(self._queue) >= self._capacity:
                raise BackPressure(f"{self._capacity} messages wait already")
            self._queue.append(message)

    def open(self, session: int, receive_maximum: int = 65535) -> None:
        """A session stands; the broker takes `receive_maximum` unacknowledged messages of it."""
        with self._lock:
            self._session = session
            self._size = min(self._wanted, receive_maximum)

    def close(self) -> None:
        """The session is lost: what it left unacknowledged goes to the front of the queue, oldest first."""
        with self._lock:
            self._session = None
            self._queue.extendleft(reversed(self._flying.values()))
            self._flying.clear()
            self._early.clear()

    def take(self, session: int) -> Outgoing | None:
        """The next message to hand to `session`, if the window has room; `sent` or `unsent` must follow."""
        with self._lock:
            if session != self._session or not self._queue or len(self._flying) >= self._size:
                return None
            self._handing = True
            return self._queue.popleft()

    def sent(self, session: int, mid: int, message: Outgoing) -> Acked | None:
        """`message` was handed over as `mid`. Returns the broker's answer where that was faster than this call."""
        with self._lock:
            self._handing = False
            early = self._early.pop(mid, None)
            self._early.clear()
            if early is not None:
                return early
            if session == self._session:
                self._flying[mid] = message
            else:
                self._queue.appendleft(message)
            return None

    def unsent(self, message: Outgoing) -> None:
        """`message` could not be handed over; it is the next again."""
        with self._lock:
            self._handing = False
            self._early.clear()
            self._queue.appendleft(message)

    def acked(self, session: int, mid: int, answer: Acked) -> Outgoing | None:
        """The broker answered. Returns the message, or None where `sent` will return the answer (or nothing flew)."""
        with self._lock:
            if session != self._session:
                return None
            message = self._flying.pop(mid, None)
            if message is None and self._handing:
                self._early[mid] = answer
            return message

    def take_all(self) -> list[Outgoing]:
        """Empty the window and the queue; the oldest message first."""
        with self._lock:
            messages = [*self._flying.values(), *self._queue]
            self._flying.clear()
            self._queue.clear()
            return messages

    def drop(self, unfit: Callable[[Outgoing], bool]) -> list[Outgoing]:
        """Take every waiting message out that is `unfit`. `unfit` must be a pure function."""
        with self._lock:
            dropped = [message for message in self._queue if unfit(message)]
            if dropped:
                self._queue = deque(message for message in self._queue if not unfit(message))
            return dropped

    def drop_largest(self) -> Outgoing | None:
        """Take out the largest unacknowledged message: the one a broker cut the connection for."""
        with self._lock:
            if not self._flying:
                return None
            mid = max(self._flying, key=lambda key: len(self._flying[key].payload))
            return self._flying.pop(mid)
