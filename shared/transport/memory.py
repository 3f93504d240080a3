"""The in-memory transport: a full second implementation of `Transport`, over a `MemoryNetwork`."""

from __future__ import annotations

from collections.abc import Callable

from shared.settings import BrokerSettings
from shared.transport.base import (
    Connected,
    Disconnected,
    Outgoing,
    Oversize,
    Published,
    Received,
    Sink,
    TransportEvent,
    TransportFailed,
    TransportStats,
    packet_size,
)
from shared.transport.memory_network import TAKEN_OVER, MemoryNetwork
from shared.transport.retry import Retry
from shared.transport.window import Acked, Window


class MemoryTransport:
    """A `Transport` on a `MemoryNetwork`. Events reach the sink from `MemoryNetwork.run_until`."""

    def __init__(
        self,
        network: MemoryNetwork,
        client_id: str,
        next_epoch: Callable[[], int],
        *,
        will: Callable[[int], Outgoing] | None = None,
        clean_start: bool = False,
        settings: BrokerSettings | None = None,
    ) -> None:
        self.stats = TransportStats()
        self.client_id = client_id
        self.settings = settings or BrokerSettings()
        self.filters: list[tuple[str, int]] = []
        self.clean = clean_start
        self._network = network
        self._next_epoch = next_epoch
        self._will = will
        self._retry = Retry(self.settings, network.rng)
        self._window = Window(self.settings.window, self.settings.queue)
        self._sink: Sink | None = None
        self._number = 0
        self._connected = False
        self._stood = False
        self._stood_at = 0.0
        self._mids = 0
        self._max_packet = network.max_packet
        self._stopped = False

    @property
    def alive(self) -> bool:
        return not self._stopped

    @property
    def late_s(self) -> float:
        return 0.0

    def subscribe(self, filters: list[tuple[str, int]]) -> None:
        self.filters = list(filters)

    def start(self, sink: Sink) -> None:
        self._sink = sink
        self._network.schedule(self._network.now, self._try)

    def publish(self, message: Outgoing) -> None:
        if packet_size(message) > self._max_packet:
            raise Oversize(self._oversize(message))
        if message.topic.qos:
            self._window.put(message)
            self.pump()
        elif self._connected:
            self._hand_over(0, message)
        else:
            self.stats.dropped += 1

    def room(self) -> int:
        return self._window.room()

    def pump(self) -> None:
        while self._connected and (message := self._window.take(self._number)) is not None:
            self._mids += 1
            self._window.sent(self._number, self._mids, message)
            self._hand_over(self._mids, message)

    def ack(self, received: Received) -> None:
        if isinstance(received.handle, tuple) and received.handle[0] == self._number and self._connected:
            self._network.carry_ack(self._number, self, received.handle[1])

    def stop(self, *, graceful: bool = True) -> None:
        """Graceful: everything queued is handed to the broker first, in no virtual time."""
        if graceful and self._connected:
            self._network.flush(self, self._window.take_all())
        self._stopped = True
        self._connected = False
        self._network.close(self, graceful=graceful)

    def _hand_over(self, mid: int, message: Outgoing) -> None:
        self.stats.messages_sent += 1
        self.stats.bytes_sent += len(message.payload)
        self._network.carry_up(self._number, self, mid, message)

    def _oversize(self, message: Outgoing) -> str:
        return f"{message.name}: a packet of {packet_size(message)} bytes, the broker takes {self._max_packet}"

    def _try(self) -> None:
        if self._stopped or self._connected:
            return
        reason = self._network.reach(self)
        if reason:
            self._again(reason, None)

    def _again(self, reason: str, lived_s: float | None) -> None:
        taken = reason == TAKEN_OVER
        self._network.schedule(self._network.now + self._retry.after(lived_s, refused=taken), self._try)
        self._emit(Disconnected(reason))
        if taken:
            self._emit(TransportFailed(f"{reason}: another process uses the client id {self.client_id!r}"))

    def _emit(self, event: TransportEvent) -> None:
        if self._sink is not None and not self._stopped:
            self._sink(event)

    # ---- called by the network -----------------------------------------------------------------------------------

    def introduce(self) -> tuple[int, Outgoing | None]:
        epoch = self._next_epoch()
        return epoch, self._will(epoch) if self._will else None

    def stands(self, number: int, event: Connected) -> None:
        self.clean = False
        self._max_packet = event.max_packet
        for message in self._window.drop(lambda waiting: packet_size(waiting) > event.max_packet):
            self._emit(Published(message.token, self._oversize(message)))
        self.stats.reconnects += self._stood
        self._stood = self._connected = True
        self._stood_at = self._network.now
        self._number = number
        self._window.open(number)
        self._emit(event)

    def lost(self, reason: str) -> None:
        self._connected = False
        self._window.close()
        self._again(reason, self._network.now - self._stood_at)

    def acked(self, number: int, mid: int, answer: Acked) -> None:
        message = self._window.acked(number, mid, answer)
        if message is not None:
            self.stats.denials += bool(answer.reason)
            self._emit(Published(message.token, answer.reason, answer.note))

    def received(self, received: Received) -> None:
        self.stats.messages_received += 1
        self.stats.bytes_received += len(received.payload)
        self._emit(received)
