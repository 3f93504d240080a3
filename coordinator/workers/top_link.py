"""The top worker's connection to the broker: steps in, steps out, and what a device may send bounded."""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple, Protocol

import msgspec

from shared import steps, topics
from shared.blob_sender import chunk_limit
from shared.errors import DecodeError
from shared.fields import MAX_CHUNK_BYTES
from shared.settings import BrokerSettings
from shared.transport.base import Connected, Outgoing, Received, Transport
from shared.transport.mqtt import MqttTransport

log = logging.getLogger(__name__)
LOOSE = 4096
"""Packets of gradients that may wait for a slow socket."""
WAITING = 4096
"""Packets that may wait while a step is computed; what comes beyond them is lost, and sent again."""
AHEAD = steps.UNDER_WAY + 1
"""Messages of a device that may wait: those under way, and one that is sent again."""
SMALL = 64 * 1024
"""Bytes of a message from a device that has no features to send."""


class Inbox(Protocol):
    """Where events of the connection go, as `queue.SimpleQueue`."""

    def put(self, event: object, /) -> None:
        """Called on the connection's thread."""

    def qsize(self) -> int:
        """How many wait."""


class Waiting(NamedTuple):
    """What waits of a topic."""

    packets: int = 0
    size: int = 0
    """Bytes."""

    def plus(self, packets: int, size: int) -> Waiting:
        """So much more, or less."""
        return Waiting(max(0, self.packets + packets), max(0, self.size + size))


Connect = Callable[[BrokerSettings, str], Transport]
"""(broker, client's name) -> its transport, not yet started."""


def _over_mqtt(broker: BrokerSettings, name: str) -> Transport:
    epochs = iter(range(1, 2**31))
    return MqttTransport(broker, name, lambda: next(epochs), rng=random.Random(), clean_start=True, loose=LOOSE)


class Link:
    """The worker's connection; it is kept from round to round."""

    def __init__(self, inbox: Inbox, connect: Connect | None = None, first: int = 0) -> None:
        """`first`: of the numbers of its messages, larger than those of an earlier process; 0: by the wall clock."""
        self._inbox = inbox
        self._connect = connect or _over_mqtt
        self._transport: Transport | None = None
        self._key: tuple[BrokerSettings, str, str] | None = None
        self._assemblers: dict[str, steps.Assembler] = {}
        self._number = first or int(time.time()) % 2**31
        self._packet = MAX_CHUNK_BYTES
        self._fleet = ""
        self._lock = threading.Lock()
        self._room: dict[str, int] = {}
        """Topic -> bytes that may wait of what comes over it."""
        self._waiting: dict[str, Waiting] = {}

    def open(self, broker: BrokerSettings, fleet: str, name: str) -> None:
        """Connect as `name`, unless that connection is there. Raises `UserError` for bad certificates."""
        key = (broker, fleet, name)
        if key == self._key:
            return
        self.close()
        # What the broker kept for a former process is of no use: steps are asked for again.
        transport = self._connect(msgspec.structs.replace(broker, session_expiry_s=0), name)
        transport.subscribe(topics.top_filters(fleet))
        transport.start(self._take_in)
        self._transport, self._key, self._fleet = transport, key, fleet

    def _take_in(self, event: object) -> None:
        """On the network's thread: hand on what came."""
        if isinstance(event, Received):
            with self._lock:
                waiting = self._waiting.get(event.name, Waiting()).plus(1, len(event.payload))
                if not self._fits(event.name, waiting):
                    return
                self._waiting[event.name] = waiting
        self._inbox.put(event)

    def _fits(self, name: str, waiting: Waiting) -> bool:
        """Whether so much may wait of what comes over a topic. Packets are bounded, too, by those that its messages
        have: empty ones of one device would take all places of the others."""
        room = self._room.get(name, AHEAD * SMALL)
        most = AHEAD * (1 + -(-room // AHEAD // self._packet))
        return self._inbox.qsize() < WAITING and waiting.size <= room and waiting.packets <= most

    def expect(self, sizes: Mapping[str, int]) -> None:
        """The largest message of each device from now on; of others none but small ones are taken."""
        self._assemblers = {device: steps.Assembler(down=False, limit=size) for device, size in sizes.items()}
        with self._lock:
            self._room = {topics.UP_STEP.name(self._fleet, device=one): AHEAD * size for one, size in sizes.items()}

    def close(self) -> None:
        """Leave the broker."""
        if self._transport is not None:
            self._transport.stop(graceful=False)
        self._transport = self._key = None

    def connected(self, event: Connected) -> None:
        """A session stands."""
        self._packet = chunk_limit(event.max_packet)

    def send(self, device: str, message: steps.Down) -> None:
        """Hand `message` over to the broker; it may be lost."""
        if self._transport is None:
            return
        self._number += 1
        name = topics.DOWN_STEP.name(self._fleet, device=device)
        for packet in steps.packets(message, self._number, self._packet):
            self._transport.publish(Outgoing(topics.DOWN_STEP, name, packet))

    def read(self, received: Received) -> tuple[str, steps.Up] | None:
        """The message that a packet completes, with its device."""
        with self._lock:
            waiting = self._waiting.get(received.name, Waiting())
            self._waiting[received.name] = waiting.plus(-1, -len(received.payload))
        parsed = topics.parse(received.name)
        if parsed is None or parsed.topic is not topics.UP_STEP:
            return None
        assembler = self._assemblers.setdefault(parsed.device, steps.Assembler(down=False, limit=SMALL))
        try:
            message = assembler.add(received.payload)
        except DecodeError as error:
            log.warning("%s: a step packet is refused: %s", parsed.device, error)
            return None
        return (parsed.device, message) if isinstance(message, steps.Up) else None
