"""What a broker keeps, in memory: subscriptions, sessions with their bounded queues, retained messages.

Pure data, no clock and no faults of its own: `MemoryNetwork` carries the copies. As mosquitto does, it delivers one
copy per overlapping subscription, and drops the newest message of a full queue without a word.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from shared.transport.base import Outgoing


@dataclass
class Copy:
    """A message on its way to one subscriber."""

    name: str
    payload: bytes
    qos: int
    until: float
    """Virtual time after which it is not delivered any more."""
    retained: bool = False
    duplicate: bool = False
    number: int = 0

    @staticmethod
    def of(message: Outgoing, qos: int, now: float, *, retained: bool = False) -> Copy:
        """A copy of `message` for a subscriber of `qos`."""
        expiry = message.topic.expiry_s
        return Copy(message.name, message.payload, qos, now + expiry if expiry else math.inf, retained)


@dataclass(eq=False)
class Session:
    """What the broker holds of one client, connected or not."""

    client_id: str
    filters: dict[str, int] = field(default_factory=dict)
    queue: deque[Copy] = field(default_factory=deque)
    queued_bytes: int = 0
    unacked: dict[int, Copy] = field(default_factory=dict)
    expires: float = math.inf
    copies: int = 0


class _Node:
    __slots__ = ("children", "subscribers")

    def __init__(self) -> None:
        self.children: dict[str, _Node] = {}
        self.subscribers: dict[Session, int] = {}

    def matches(self, parts: list[str], at: int = 0) -> Iterator[tuple[Session, int]]:
        rest = self.children.get("#")
        if rest is not None:
            yield from rest.subscribers.items()
        if at == len(parts):
            yield from self.subscribers.items()
            return
        for key in (parts[at], "+"):
            child = self.children.get(key)
            if child is not None:
                yield from child.matches(parts, at + 1)


def matches(topic_filter: str, name: str) -> bool:
    """Whether `topic_filter` (with `+` and `#`) takes the topic `name`."""
    wanted, parts = topic_filter.split("/"), name.split("/")
    for index, part in enumerate(wanted):
        if part == "#":
            return True
        if index >= len(parts) or part not in ("+", parts[index]):
            return False
    return len(wanted) == len(parts)


class Broker:
    """Sessions, subscriptions and retained messages."""

    def __init__(self, *, max_inflight: int, max_queued: int, max_queued_bytes: int) -> None:
        self.dropped = 0
        """QoS 1 messages that were acknowledged to their publisher and lost before a subscriber."""
        self._max_inflight = max_inflight
        self._max_queued = max_queued
        self._max_queued_bytes = max_queued_bytes
        self._sessions: dict[str, Session] = {}
        self._root = _Node()
        self._retained: dict[str, tuple[Outgoing, float]] = {}

    def wipe(self) -> None:
        """Forget everything, as a broker that lost its persistence."""
        self._sessions.clear()
        self._root = _Node()
        self._retained.clear()

    def retained(self, name: str) -> bytes:
        """The retained payload of a topic; empty: there is none."""
        kept = self._retained.get(name)
        return kept[0].payload if kept else b""

    def attach(self, client_id: str, now: float, *, clean: bool) -> tuple[Session, bool]:
        """The client's session and whether it was there before; what was unacknowledged comes again, first."""
        session = self._sessions.get(client_id)
        if session is not None and (clean or session.expires <= now):
            self._forget(session)
            session = None
        present = session is not None
        if session is None:
            session = self._sessions[client_id] = Session(client_id)
        session.expires = math.inf
        for copy in reversed(session.unacked.values()):
            copy.duplicate = True
            session.queue.appendleft(copy)
            session.queued_bytes += len(copy.payload)
        session.unacked.clear()
        return session, present

    def detach(self, session: Session, now: float, expires: float) -> None:
        """The client is gone; its session stays until `expires`."""
        session.expires = expires
        if expires <= now:
            self._forget(session)

    def subscribe(self, session: Session, filters: list[tuple[str, int]], now: float) -> None:
        """Add subscriptions; each brings its retained messages, also when it was held before."""
        for topic_filter, qos in filters:
            node = self._root
            for part in topic_filter.split("/"):
                node = node.children.setdefault(part, _Node())
            node.subscribers[session] = session.filters[topic_filter] = qos
            for name, (message, until) in self._retained.items():
                if until > now and matches(topic_filter, name):
                    self.queue(session, Copy.of(message, min(qos, message.topic.qos), now, retained=True))

    def route(self, message: Outgoing, now: float) -> list[tuple[Session, int]]:
        """Keep `message` if it is retained; its subscribers, each with the QoS of the delivery."""
        if message.topic.retain:
            if message.payload:
                expiry = message.topic.expiry_s
                self._retained[message.name] = (message, now + expiry if expiry else math.inf)
            else:
                self._retained.pop(message.name, None)
        found = list(self._root.matches(message.name.split("/")))
        return [(session, min(qos, message.topic.qos)) for session, qos in found if session.expires > now]

    def queue(self, session: Session, copy: Copy) -> None:
        """Queue a copy for its subscriber; a full queue drops it."""
        size = len(copy.payload)
        if len(session.queue) >= self._max_queued or session.queued_bytes + size > self._max_queued_bytes:
            self.dropped += 1
            return
        session.copies += 1
        copy.number = session.copies
        session.queue.append(copy)
        session.queued_bytes += size

    def sendable(self, session: Session, now: float) -> list[Copy]:
        """Take the copies that may be sent now: no more than `max_inflight` are unacknowledged at once."""
        found = []
        while session.queue and len(session.unacked) < self._max_inflight:
            copy = session.queue.popleft()
            session.queued_bytes -= len(copy.payload)
            if copy.until <= now:
                continue
            if copy.qos:
                session.unacked[copy.number] = copy
            found.append(copy)
        return found

    def _forget(self, session: Session) -> None:
        for topic_filter in session.filters:
            node = self._root
            for part in topic_filter.split("/"):
                node = node.children[part]
            node.subscribers.pop(session, None)
        self._sessions.pop(session.client_id, None)
