"""An owner of a transport, as the services are ones."""

from __future__ import annotations

import itertools
import queue
import random
import time
from collections.abc import Callable
from typing import Any, TypeVar

from shared.settings import BrokerSettings
from shared.transport.base import Outgoing, Received, TransportEvent
from shared.transport.mqtt import MqttTransport

E = TypeVar("E")
PATIENCE_S = 20.0


class Owner:
    """Owns a transport as a service does: one thread takes events from a queue, acknowledges and pumps."""

    def __init__(
        self,
        settings: BrokerSettings,
        name: str,
        filters: list[tuple[str, int]] | None = None,
        *,
        sink: Callable[[queue.Queue[TransportEvent]], Callable[[TransportEvent], None]] | None = None,
        will: Callable[[int], Outgoing] | None = None,
        **options: Any,
    ) -> None:
        self.events: list[TransportEvent] = []
        self.queue: queue.Queue[TransportEvent] = queue.Queue()
        epochs = itertools.count(1)
        self.transport = MqttTransport(
            settings, name, lambda: next(epochs), rng=random.Random(name), will=will, **options
        )
        self.transport.subscribe(filters or [])
        self.transport.start(sink(self.queue) if sink else self.queue.put)

    def of(self, kind: type[E]) -> list[E]:
        return [event for event in self.events if isinstance(event, kind)]

    def turn(self, timeout: float = 0.05) -> None:
        """Handle one event, if one comes in time."""
        try:
            event = self.queue.get(timeout=timeout)
        except queue.Empty:
            return
        self.events.append(event)
        if isinstance(event, Received):
            self.transport.ack(event)
        self.transport.pump()

    def wait(self, kind: type[E], count: int = 1) -> list[E]:
        """Turn until there are `count` events of `kind`, those of earlier calls included."""
        until = time.monotonic() + PATIENCE_S
        while len(self.of(kind)) < count:
            assert time.monotonic() < until, f"{len(self.of(kind))} of {count} {kind.__name__}; got {self.events[-5:]}"
            self.turn()
        return self.of(kind)

    def wait_for(self, payloads: set[bytes]) -> None:
        """Turn until all of `payloads` were received."""
        until = time.monotonic() + PATIENCE_S
        while missing := payloads - set(self.payloads()):
            assert time.monotonic() < until, f"missing: {sorted(missing)[:5]} and {len(missing)} in all"
            self.turn()

    def rest(self, seconds: float) -> None:
        """Turn for so long."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            self.turn()

    def payloads(self) -> list[bytes]:
        return [event.payload for event in self.of(Received)]
