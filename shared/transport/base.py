"""What a transport is: messages out, events in. Two implementations: `mqtt` and `memory`.

A transport never blocks its owner and never calls it back with work to do: it hands events to a sink (a queue's `put`
in a service, a scheduler in a simulation), and the owner calls the transport only from its own thread.
Delivery is at least once for QoS 1, in no order, and only to the broker: what must arrive is acknowledged by the
application (`Ack`, `Done`) or held as retained desired state.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from shared.errors import MusterError
from shared.topics import Topic


class BackPressure(MusterError):
    """The transport's queue is full; publish again after `Published` or `Connected`."""


class Oversize(MusterError):
    """The message is larger than the broker takes; sent anyway, it would cut the connection again and again."""


@dataclass(frozen=True)
class Outgoing:
    """One message to publish. QoS, retain and expiry come from its topic's declaration."""

    topic: Topic
    name: str
    """The full topic name, from `topic.name(...)`."""
    payload: bytes
    token: object = None
    """Comes back in `Published`; None: the owner does not care."""


def packet_size(message: Outgoing) -> int:
    """Bytes of the largest PUBLISH packet that carries `message`: fixed header, name, identifier, expiry, payload."""
    return 5 + 2 + len(message.name.encode()) + 2 + 6 + len(message.payload)


@dataclass(frozen=True)
class Connected:
    """The session stands. `max_packet`: bytes of the largest packet the broker takes; `epoch`: of this connection."""

    max_packet: int
    epoch: int
    session_present: bool


@dataclass(frozen=True)
class Disconnected:
    """The session is down; the transport reconnects by itself with full jitter."""

    reason: str


@dataclass(frozen=True)
class Received:
    """A message arrived. Call `transport.ack(received)` once it is handled (QoS 1)."""

    name: str
    payload: bytes
    retained: bool = False
    duplicate: bool = False
    handle: object = field(default=None, compare=False)
    """The transport's own, for `ack`."""


@dataclass(frozen=True)
class Published:
    """The broker took (or refused) a QoS 1 message; it is never sent again. `reason` is empty on success, else names
    the denial (or why it was dropped here)."""

    token: object
    reason: str = ""
    note: str = ""
    """What the broker said beside success, such as "No matching subscribers"."""


@dataclass(frozen=True)
class TransportFailed:
    """It can't go on without an operator (refused login, denial); it keeps trying at the longest wait."""

    reason: str


@dataclass
class TransportStats:
    """Counters of one transport since it was made; payload bytes, without the protocol's."""

    bytes_sent: int = 0
    """Handed to the connection, what had to be sent again included."""
    bytes_received: int = 0
    messages_sent: int = 0
    messages_received: int = 0
    reconnects: int = 0
    """Sessions that stood, after the first."""
    denials: int = 0
    """QoS 1 messages the broker refused."""
    dropped: int = 0
    """QoS 0 messages not sent: offline, or too many waiting."""
    faults: int = 0
    """Exceptions in the transport's own loop (a sink that raised); each costs the connection, not the loop."""


TransportEvent = Connected | Disconnected | Received | Published | TransportFailed
Sink = Callable[[TransportEvent], None]


class Transport(Protocol):
    """A connection of one device or coordinator.

    Constructors take `next_epoch`, called for every attempt to connect, and `will`, called with that epoch: the message
    the broker publishes for us when we vanish.
    """

    stats: TransportStats

    @property
    def alive(self) -> bool:
        """Whether its loop still turns, connected or not; False calls for a restart of the process."""

    @property
    def late_s(self) -> float:
        """Seconds by which its loop is behind the time it meant to turn again; 0: on time."""

    def start(self, sink: Sink) -> None:
        """Begin to connect; events go to `sink` from any thread. Returns at once."""

    def subscribe(self, filters: list[tuple[str, int]]) -> None:
        """(topic filter, QoS) to hold in every session. Call before `start`. `Connected` comes after the broker took
        them, and before the first `Received` of that session."""

    def publish(self, message: Outgoing) -> None:
        """Queue `message`. Raises `Oversize` or `BackPressure`; then nothing was queued.

        QoS 0 messages pass the queue by, and are dropped while there is no session.
        """

    def ack(self, received: Received) -> None:
        """The message is handled (and what must survive is on disk)."""

    def room(self) -> int:
        """How many QoS 1 messages `publish` takes now without `BackPressure`."""

    def pump(self) -> None:
        """Move queued messages into the free in-flight window. The owner calls it after every event and tick."""

    def stop(self, *, graceful: bool = True) -> None:
        """Disconnect; graceful: after the queue is sent (2 s at most), and the will does not fire. No event follows."""
