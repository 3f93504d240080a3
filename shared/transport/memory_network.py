"""A network in memory with a virtual clock and seeded faults: the broker and the links to it.

Nothing here sleeps or uses a thread. Time passes only in `run_until`; every fault is drawn from one seeded generator,
so the same seed and the same calls give the same run, event for event.

What is modelled: a session is ordered TCP, so a loss of QoS 1 is a late second delivery (`Faults.loss`) or what really
loses them, a full queue in the broker (`Faults.drop`, `max_queued`); QoS 0 is lost for good. A cut holds packets back;
after 1.5 keepalives both sides give the connection up.
"""

from __future__ import annotations

import heapq
import math
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

from shared.settings import BrokerSettings
from shared.transport.base import Connected, Outgoing, Received
from shared.transport.memory_broker import Broker, Copy, Session
from shared.transport.window import Acked

TAKEN_OVER = "session taken over"


@dataclass(frozen=True)
class Faults:
    """Chances per message and hop, and delays in seconds."""

    loss: float = 0.0
    """QoS 0: lost. QoS 1: delivered `redelivery_s` later, marked as a duplicate."""
    drop: float = 0.0
    """A QoS 1 message that the broker acknowledged, then dropped before one of its subscribers."""
    duplicate: float = 0.0
    reorder: float = 0.0
    """Held back by up to `reorder_s`, so that later ones pass it."""
    delay_s: tuple[float, float] = (0.001, 0.005)
    """One way, uniform."""
    reorder_s: float = 1.0
    redelivery_s: float = 5.0


class Client(Protocol):
    """What the network needs of a transport: `shared.transport.memory.MemoryTransport`."""

    client_id: str
    settings: BrokerSettings
    filters: list[tuple[str, int]]
    clean: bool

    def stop(self, *, graceful: bool = True) -> None:
        """End it; without grace its process died."""

    def introduce(self) -> tuple[int, Outgoing | None]:
        """Epoch and will of the connection that begins."""

    def stands(self, number: int, event: Connected) -> None:
        """The session stands."""

    def lost(self, reason: str) -> None:
        """The session is lost."""

    def acked(self, number: int, mid: int, answer: Acked) -> None:
        """The broker answered a message."""

    def received(self, received: Received) -> None:
        """A message arrived."""


@dataclass
class _Wire:
    """One connection between a transport and the broker."""

    transport: Client
    session: Session
    number: int
    epoch: int
    will: Outgoing | None
    open: bool = True
    front: dict[str, float] = field(default_factory=dict)
    """Direction -> when its latest packet arrives: a connection keeps its order."""
    sent: dict[str, float] = field(default_factory=dict)
    """Direction -> when the last byte of its latest packet has left."""


@dataclass(order=True)
class _Due:
    at: float
    order: int
    call: Callable[[], None] = field(compare=False)


class MemoryNetwork:
    """A broker, its links, and the clock.

    `deny(client_id, name)` may be set to refuse publishes as an ACL would. `max_packet` is announced to the clients.
    `rate(client_id, "up" | "down")` may be set to the bytes per second of a client's link: packets queue for it.
    """

    def __init__(
        self,
        seed: int,
        faults: Faults | None = None,
        *,
        max_packet: int = 1024 * 1024,
        max_inflight: int = 16,
        max_queued: int = 2000,
        max_queued_bytes: int = 64 * 1024 * 1024,
    ) -> None:
        self.now = 0.0
        self.faults = faults or Faults()
        self.max_packet = max_packet
        self.deny: Callable[[str, str], bool] = lambda _client, _name: False
        self.rate: Callable[[str, str], float] = lambda _client, _way: math.inf
        self.carried: dict[tuple[str, str], int] = {}
        """(client id, "up" or "down") -> bytes of topics and payloads that went over its link."""
        self.rng = random.Random(seed)
        self.broker = Broker(max_inflight=max_inflight, max_queued=max_queued, max_queued_bytes=max_queued_bytes)
        self._due: list[_Due] = []
        self._order = 0
        self._numbers = 0
        self._wires: dict[str, _Wire] = {}
        self._cuts: dict[str, float] = {}
        self._down_until = 0.0

    # ---- the clock -----------------------------------------------------------------------------------------------

    def schedule(self, at: float, call: Callable[[], None]) -> None:
        """Run `call` at virtual time `at` (now, where that has passed). Calls of one time run in order of schedule."""
        self._order += 1
        heapq.heappush(self._due, _Due(max(at, self.now), self._order, call))

    def run_until(self, until: float, *, when: Callable[[], bool] | None = None) -> bool:
        """Let time pass to `until`, or to the event after which `when()` holds. Returns whether `when` was met."""
        while self._due and self._due[0].at <= until:
            due = heapq.heappop(self._due)
            self.now = due.at
            due.call()
            if when is not None and when():
                return True
        self.now = max(self.now, until)
        return False

    # ---- faults --------------------------------------------------------------------------------------------------

    def partition(self, client_ids: Iterable[str], start: float, seconds: float) -> None:
        """Cut the links of these clients in [start, start + seconds)."""
        names = list(client_ids)
        self.schedule(start, lambda: self._cut(names, seconds))

    def kill(self, client_id: str) -> None:
        """The client's process dies: its socket closes, its transport never calls its sink again."""
        wire = self._wires.get(client_id)
        if wire is not None:
            wire.transport.stop(graceful=False)

    def crash_broker(self, down_s: float, *, keep: bool = True) -> None:
        """Kill the broker now and start it after `down_s`; `keep`: its persistence survives."""
        self._down_until = self.now + down_s
        for wire in list(self._wires.values()):
            self._lose(wire, "connection lost", will=False)
        if not keep:
            self.broker.wipe()

    def connected(self, client_id: str) -> bool:
        """Whether the broker holds a connection of this client."""
        return client_id in self._wires

    def _cut(self, names: list[str], seconds: float) -> None:
        for name in names:
            self._cuts[name] = max(self._cuts.get(name, 0.0), self.now + seconds)
            wire = self._wires.get(name)
            if wire is not None:
                noticed = self.now + 1.5 * wire.transport.settings.keepalive_s
                self.schedule(noticed, partial(self._give_up, wire))

    def _give_up(self, wire: _Wire) -> None:
        if wire.open and self._is_cut(wire.session.client_id):
            self._lose(wire, "Keep alive timeout", will=True)

    def _is_cut(self, client_id: str) -> bool:
        return self.now < self._cuts.get(client_id, 0.0)

    # ---- connections ---------------------------------------------------------------------------------------------

    def reach(self, transport: Client) -> str:
        """Try to connect `transport`. Returns why not, or "": then `Client.stands` was called."""
        if self.now < self._down_until:
            return "can't reach the broker: Connection refused"
        if self._is_cut(transport.client_id):
            return "can't reach the broker: timed out"
        before = self._wires.get(transport.client_id)
        if before is not None:
            self._lose(before, TAKEN_OVER, will=False)
        epoch, will = transport.introduce()
        session, present = self.broker.attach(transport.client_id, self.now, clean=transport.clean)
        self._numbers += 1
        wire = self._wires[transport.client_id] = _Wire(transport, session, self._numbers, epoch, will)
        transport.stands(wire.number, Connected(self.max_packet, epoch, present))
        self._feed(wire)  # what waited goes first, which makes room for the retained
        self.broker.subscribe(session, transport.filters, self.now)
        self._feed(wire)
        return ""

    def close(self, transport: Client, *, graceful: bool) -> None:
        """`transport` closes its connection; without a DISCONNECT the will fires after its delay."""
        wire = self._wires.get(transport.client_id)
        if wire is not None and wire.transport is transport:
            self._lose(wire, "", will=not graceful or self._is_cut(transport.client_id))

    def flush(self, transport: Client, messages: list[Outgoing]) -> None:
        """Take the last messages of a transport that stops gracefully, unless its link is cut."""
        if not self._is_cut(transport.client_id):
            for message in messages:
                self._route(message)

    def _lose(self, wire: _Wire, reason: str, *, will: bool) -> None:
        wire.open = False
        client_id = wire.session.client_id
        del self._wires[client_id]
        settings = wire.transport.settings
        self.broker.detach(wire.session, self.now, self.now + settings.session_expiry_s)
        if will and wire.will is not None:
            message = wire.will
            self.schedule(self.now + settings.will_delay_s, lambda: self._fire(client_id, message))
        if reason:
            wire.transport.lost(reason)

    def _fire(self, client_id: str, will: Outgoing) -> None:
        if client_id not in self._wires:
            self._route(will)

    # ---- messages ------------------------------------------------------------------------------------------------

    def carry_up(self, number: int, transport: Client, mid: int, message: Outgoing) -> None:
        """Take a message of `transport` to the broker, which answers with `Client.acked` (QoS 1)."""
        wire = self._wires.get(transport.client_id)
        if wire is None or wire.number != number:
            return
        qos = message.topic.qos
        size = len(message.name) + len(message.payload)
        for late in self._fates(qos):
            self._over(wire, "up", late, lambda: self._arrive(wire, mid, message), size)

    def _arrive(self, wire: _Wire, mid: int, message: Outgoing) -> None:
        if self.deny(wire.session.client_id, message.name):
            answer = Acked(reason="Not authorized")
        else:
            answer = Acked(note="" if self._route(message) else "No matching subscribers")
        if message.topic.qos:
            self._over(wire, "down", self._delay(), lambda: wire.transport.acked(wire.number, mid, answer))

    def carry_ack(self, number: int, transport: Client, copy_id: int) -> None:
        """Take the acknowledgement of a received message to the broker."""
        wire = self._wires.get(transport.client_id)
        if wire is not None and wire.number == number:
            self._over(wire, "up", self._delay(), lambda: self._release(wire, copy_id))

    def _release(self, wire: _Wire, copy_id: int) -> None:
        wire.session.unacked.pop(copy_id, None)
        self._feed(wire)

    def _route(self, message: Outgoing) -> bool:
        """Give `message` to its subscribers, and keep it if it is retained. Whether there was any subscriber."""
        sessions = self.broker.route(message, self.now)
        for session, qos in sessions:
            if qos and self.faults.drop and self.rng.random() < self.faults.drop:
                self.broker.dropped += 1
                continue
            wire = self._wires.get(session.client_id)
            copy = Copy.of(message, qos, self.now)
            if qos:
                self.broker.queue(session, copy)
                if wire is not None:
                    self._feed(wire)
            elif wire is not None:
                self._deliver(wire, copy)
        return bool(sessions)

    def _feed(self, wire: _Wire) -> None:
        for copy in self.broker.sendable(wire.session, self.now):
            self._deliver(wire, copy)

    def _deliver(self, wire: _Wire, copy: Copy) -> None:
        handle = (wire.number, copy.number) if copy.qos else None
        for nth, late in enumerate(self._fates(copy.qos)):
            again = copy.duplicate or nth > 0 or late >= self.faults.redelivery_s
            received = Received(copy.name, copy.payload, copy.retained, bool(copy.qos) and again, handle)
            size = len(copy.name) + len(copy.payload)
            self._over(wire, "down", late, partial(wire.transport.received, received), size)

    def _fates(self, qos: int) -> list[float]:
        """Seconds after which copies of a message arrive: none, one, or two."""
        faults, draw = self.faults, self.rng.random
        late = self._delay()
        if faults.reorder and draw() < faults.reorder:
            late += draw() * faults.reorder_s
        if faults.loss and draw() < faults.loss:
            if qos == 0:
                return []
            late += faults.redelivery_s
        if qos and faults.duplicate and draw() < faults.duplicate:
            return [late, late + self._delay()]
        return [late]

    def _delay(self) -> float:
        low, high = self.faults.delay_s
        return low + (high - low) * self.rng.random()

    def _transmit(self, wire: _Wire, way: str, size: int) -> float:
        """When the last byte of a packet of `size` has left: packets of a direction leave one after the other."""
        key = (wire.session.client_id, way)
        self.carried[key] = self.carried.get(key, 0) + size
        wire.sent[way] = max(self.now, wire.sent.get(way, 0.0)) + size / self.rate(*key)
        return wire.sent[way]

    def _over(self, wire: _Wire, way: str, late: float, arrive: Callable[[], None], size: int = 0) -> None:
        """Let `arrive` happen `late` seconds after `size` bytes have left, if the connection lives; a cut holds it
        back until its end."""

        def due() -> None:
            if not wire.open:
                return
            until = self._cuts.get(wire.session.client_id, 0.0)
            if self.now < until:
                self.schedule(until, due)
            else:
                arrive()

        at = self._transmit(wire, way, size) + late
        if late <= self.faults.delay_s[1]:
            at = wire.front[way] = max(at, wire.front.get(way, 0.0))
        self.schedule(at, due)
