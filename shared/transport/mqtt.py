"""MQTT 5 over paho. Nothing but this file and `paho_client`, which makes its clients, knows paho.

A thread of ours makes one fresh paho client per connection and turns its loop, so nothing survives inside paho: its
unlimited resend after a reconnect, its doubling without jitter and its silent death by an exception never come into
play. Callbacks run on that thread, only enqueue, and take no lock that is held while paho is called.
"""

from __future__ import annotations

import logging
import math
import random
import socket
import ssl
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from paho.mqtt import client as paho
from paho.mqtt.subscribeoptions import SubscribeOptions

from shared.errors import UserError
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
from shared.transport.credentials import read_credentials
from shared.transport.paho_client import ClientFactory, close_socket, expiry
from shared.transport.retry import Retry
from shared.transport.window import Acked, Window

_logger = logging.getLogger(__name__)

UNLIMITED = 268_435_455
"""The protocol's own limit of a packet, where a broker announces none."""
_REFUSED = {0x85, 0x86, 0x87, 0x8A, 0x8C}
"""CONNACK: client id, user or password, authorization, banned, method. Trying soon again can't help."""
_TAKEN_OVER = 0x8E
_TOO_LARGE = 0x95
_CONNECTING_S = 150.0
"""As long may it take to look the broker up and to try each of its addresses (`paho_client.CONNECT_TIMEOUT_S` for one):
name servers that do not answer take a minute, and a network that is down is no hung thread."""
_LOOP_S = 1.0
_DRAIN_S = 2.0


@dataclass
class _Link:
    """One attempt to connect, and the session that it may become."""

    session: int
    client: Any = None
    epoch: int = 0
    max_packet: int = UNLIMITED
    present: bool = False
    stood_at: float | None = None
    held: list[Received] | None = field(default_factory=list)
    """Messages that came before the subscriptions were granted; None afterwards."""
    reason: str = ""
    code: int = 0
    refused: bool = False
    loose: deque[Any] = field(default_factory=deque)


class MqttTransport:
    """A `Transport` to a real broker.

    `next_epoch` is called before each attempt to connect, `will` with its result. `clean_start` forgets the broker's
    session at the first connection. `receive_maximum` and `max_packet` bound what the broker may send us at once;
    `loose`: QoS 0 messages that may wait for a slow socket.
    Raises `UserError` for certificates or a password file that can't be read.
    """

    def __init__(
        self,
        settings: BrokerSettings,
        client_id: str,
        next_epoch: Callable[[], int],
        *,
        rng: random.Random,
        will: Callable[[int], Outgoing] | None = None,
        clean_start: bool = False,
        receive_maximum: int = 16,
        max_packet: int = 1024 * 1024,
        loose: int = 64,
    ) -> None:
        self.stats = TransportStats()
        self._settings = settings
        self._client_id = client_id
        self._next_epoch = next_epoch
        self._will = will
        self._loose = loose
        self._clean = clean_start
        self._retry = Retry(settings, rng)
        self._window = Window(settings.window, settings.queue)
        self._filters: list[tuple[str, int]] = []
        self._sink: Sink | None = None
        self._link: _Link | None = None
        self._sessions = 0
        self._stood = False
        self._max_packet = UNLIMITED
        self._due = self._meant = math.inf
        self._end = math.inf
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"mqtt-{client_id}", daemon=True)
        self._clients = ClientFactory(settings, client_id, receive_maximum=receive_maximum, max_packet=max_packet)
        read_credentials(settings)  # fail now, not in the thread

    # ---- the owner's side ----------------------------------------------------------------------------------------

    @property
    def alive(self) -> bool:
        """Whether the network thread turns: it promises when its next sign of life is due."""
        return self._thread.is_alive() and time.monotonic() < self._due

    @property
    def late_s(self) -> float:
        if self._stopping.is_set() or self._meant == math.inf:
            return 0.0
        return max(0.0, time.monotonic() - self._meant) if self._thread.is_alive() else math.inf

    def subscribe(self, filters: list[tuple[str, int]]) -> None:
        self._filters = list(filters)

    def start(self, sink: Sink) -> None:
        self._sink = sink
        self._promise(_CONNECTING_S)
        self._thread.start()

    def publish(self, message: Outgoing) -> None:
        if packet_size(message) > self._max_packet:
            raise Oversize(self._oversize(message))
        if message.topic.qos == 0:
            self._publish_loose(message)
            return
        self._window.put(message)
        self.pump()

    def room(self) -> int:
        return self._window.room()

    def pump(self) -> None:
        link = self._link
        while link is not None and (message := self._window.take(link.session)) is not None:
            info = self._hand_over(link, message)
            if info.rc == paho.MQTT_ERR_QUEUE_SIZE:
                # The identifier is still taken by a message 65,535 ago; the next call uses another one.
                self._window.unsent(message)
                return
            answer = self._window.sent(link.session, info.mid, message)
            if answer is not None:
                self._settle(message, answer)

    def ack(self, received: Received) -> None:
        link = self._link
        if not isinstance(received.handle, tuple) or link is None:
            return
        session, mid = received.handle
        # After a reconnect the broker sends the message again under an identifier of the new session.
        if session == link.session:
            link.client.ack(mid, 1)

    def stop(self, *, graceful: bool = True) -> None:
        link = self._link
        if graceful and link is not None:
            self._drain(link)
        self._end = time.monotonic() + (1.0 if graceful else 0.0)
        self._stopping.set()
        if link is not None:
            if graceful:
                link.client.disconnect()
            elif (sock := link.client.socket()) is not None:
                with suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)
        if self._thread.is_alive():
            self._thread.join(2 * _LOOP_S)

    def _publish_loose(self, message: Outgoing) -> None:
        link = self._link
        if link is not None:
            while link.loose and link.loose[0].is_published():
                link.loose.popleft()
            if len(link.loose) < self._loose:
                info = self._hand_over(link, message)
                if info.rc == paho.MQTT_ERR_SUCCESS:
                    link.loose.append(info)
                    return
        self.stats.dropped += 1

    def _hand_over(self, link: _Link, message: Outgoing) -> Any:
        topic = message.topic
        self.stats.messages_sent += 1
        self.stats.bytes_sent += len(message.payload)
        properties = expiry(topic.expiry_s) if topic.expiry_s else None
        return link.client.publish(message.name, message.payload, topic.qos, topic.retain, properties)

    def _drain(self, link: _Link) -> None:
        until = time.monotonic() + _DRAIN_S
        while not self._window.idle and self._link is link and time.monotonic() < until:
            self.pump()
            time.sleep(0.005)

    # ---- both sides ----------------------------------------------------------------------------------------------

    def _emit(self, event: TransportEvent) -> None:
        if self._sink is not None and not self._stopping.is_set():
            self._sink(event)

    def _settle(self, message: Outgoing, answer: Acked) -> None:
        if answer.reason:
            self.stats.denials += 1
        self._emit(Published(message.token, answer.reason, answer.note))

    def _oversize(self, message: Outgoing) -> str:
        return f"{message.name}: a packet of {packet_size(message)} bytes, the broker takes {self._max_packet}"

    def _promise(self, seconds: float) -> None:
        """The thread is back in `seconds`; what it may be late is bounded, for its owner must know within a minute of a
        connection that hangs."""
        self._meant = time.monotonic() + seconds
        self._due = self._meant + min(max(1.5 * self._settings.keepalive_s, 20.0), 45.0)

    # ---- the network thread --------------------------------------------------------------------------------------

    def _run(self) -> None:
        wait = 0.0
        while not self._stopping.wait(wait):
            self._promise(_CONNECTING_S)
            link = self._connection()
            if self._stopping.is_set():
                break
            lived = None if link.stood_at is None else time.monotonic() - link.stood_at
            wait = self._retry.after(lived, refused=link.refused)
            self._promise(wait)
            self._report(link, wait)

    def _connection(self) -> _Link:
        """One connection from the attempt to its end."""
        self._sessions += 1
        link = _Link(self._sessions)
        try:
            self._turn(link)
        except ssl.SSLCertVerificationError as error:
            link.refused = True
            link.reason = f"the broker's certificate: {error.verify_message}"
        except UserError as error:
            link.refused = True
            link.reason = str(error)
        except OSError as error:
            link.reason = str(error) or type(error).__name__
        # The loop of this service's network: whatever a callback or sink raised costs one connection, not the loop.
        except Exception as error:
            self.stats.faults += 1
            link.reason = f"internal: {type(error).__name__}: {error}"
            _logger.exception("transport %s: the connection is given up", self._client_id)
        self._link = None
        if link.code == _TOO_LARGE and (culprit := self._window.drop_largest()) is not None:
            self._tell(Published(culprit.token, "the broker cut the connection: packet too large"))
        self._window.close()
        if link.client is not None:
            close_socket(link.client)
        return link

    def _turn(self, link: _Link) -> None:
        link.epoch = self._next_epoch()
        will = self._will(link.epoch) if self._will is not None else None
        client = link.client = self._clients.make(will)
        self._listen(link)
        self._clients.connect(client, clean_start=self._clean)
        code = paho.MQTT_ERR_SUCCESS
        while code == paho.MQTT_ERR_SUCCESS and time.monotonic() < self._end:
            self._promise(_LOOP_S)
            code = client.loop(_LOOP_S)

    def _listen(self, link: _Link) -> None:
        client = link.client
        client.on_connect = lambda _c, _u, flags, code, properties: self._on_connect(link, flags, code, properties)
        client.on_disconnect = lambda _c, _u, _flags, code, _p: self._on_disconnect(link, code)
        client.on_subscribe = lambda _c, _u, _mid, codes, _p: self._on_subscribe(link, codes)
        client.on_publish = lambda _c, _u, mid, code, _p: self._on_publish(link, mid, code)
        client.on_message = lambda _c, _u, message: self._on_message(link, message)

    def _report(self, link: _Link, wait: float) -> None:
        reason = link.reason or "connection lost"
        _logger.info("transport %s: %s; next try in %.1f s", self._client_id, reason, wait)
        if link.stood_at is not None or not link.refused:
            self._tell(Disconnected(reason))
        if link.refused:
            self._tell(TransportFailed(reason))
        elif link.stood_at is not None and self._retry.flapping:
            self._tell(TransportFailed(f"{reason}, again and again: is {self._client_id!r} in use by another process?"))

    def _tell(self, event: TransportEvent) -> None:
        """Emit outside paho's loop, where nothing else would catch what the sink raises."""
        try:
            self._emit(event)
        # Whatever the sink raised costs this event, not the thread.
        except Exception:
            self.stats.faults += 1
            _logger.exception("transport %s: the sink raised on %s", self._client_id, type(event).__name__)

    # ---- paho's callbacks, on the network thread: an exception ends the connection, and `_connection` counts it ----

    def _on_connect(self, link: _Link, flags: Any, code: Any, properties: Any) -> None:
        if code.is_failure:
            link.reason = f"the broker refused the login: {code}"
            link.refused = code.value in _REFUSED
            return
        if self._stopping.is_set():
            link.client.disconnect()
            return
        self._clean = False
        self._max_packet = link.max_packet = getattr(properties, "MaximumPacketSize", UNLIMITED)
        for message in self._window.drop(lambda waiting: packet_size(waiting) > link.max_packet):
            self._emit(Published(message.token, self._oversize(message)))
        link.present = flags.session_present
        self._window.open(link.session, getattr(properties, "ReceiveMaximum", 65535))
        if self._filters:
            # Each time, session or not: it brings the retained desired state, whatever the broker's queue lost.
            link.client.subscribe([(name, SubscribeOptions(qos=qos)) for name, qos in self._filters])
        else:
            self._stands(link)
        self._link = link

    def _on_subscribe(self, link: _Link, codes: list[Any]) -> None:
        for (name, _), code in zip(self._filters, codes, strict=False):
            if code.is_failure:
                self._emit(TransportFailed(f"the broker refused the subscription to {name}: {code}"))
        self._stands(link)

    def _stands(self, link: _Link) -> None:
        self.stats.reconnects += self._stood
        self._stood = True
        link.stood_at = time.monotonic()
        held, link.held = link.held or [], None
        self._emit(Connected(link.max_packet, link.epoch, link.present))
        for received in held:
            self._emit(received)

    def _on_disconnect(self, link: _Link, code: Any) -> None:
        if link.reason:
            return
        link.code = code.value
        text = str(code)
        if text == "Unspecified error":
            # A broker that refuses our certificate says so by a TLS alert after the handshake.
            link.refused = link.stood_at is None and "ALERT" in self._clients.last_error.upper()
            text = self._clients.last_error or "connection lost"
        link.reason = text
        if code.value == _TAKEN_OVER:
            link.refused = True
            link.reason = f"session taken over: another process uses the client id {self._client_id!r}"

    def _on_publish(self, link: _Link, mid: int, code: Any) -> None:
        text = "" if code.value == 0 else str(code)
        answer = Acked(reason=text) if code.is_failure else Acked(note=text)
        message = self._window.acked(link.session, mid, answer)
        if message is not None:
            self._settle(message, answer)

    def _on_message(self, link: _Link, message: Any) -> None:
        self.stats.messages_received += 1
        self.stats.bytes_received += len(message.payload)
        handle = (link.session, message.mid) if message.qos else None
        received = Received(message.topic, message.payload, message.retain, message.dup, handle)
        if link.held is not None:
            link.held.append(received)
        else:
            self._emit(received)
