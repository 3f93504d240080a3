"""A TCP relay that reads along: counts what is unacknowledged on the wire, delays, stalls, cuts, refuses."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType

_CONNACK, _SUBACK, _PUBLISH, _PUBACK, _DISCONNECT = 0x20, 0x90, 0x30, 0x40, 0xE0


def take_packet(buffer: bytearray) -> bytes | None:
    """Cut the first whole MQTT packet off `buffer`."""
    length, shift = 0, 0
    for at in range(1, min(5, len(buffer))):
        length |= (buffer[at] & 0x7F) << shift
        shift += 7
        if not buffer[at] & 0x80:
            end = at + 1 + length
            if len(buffer) < end:
                return None
            packet = bytes(buffer[:end])
            del buffer[:end]
            return packet
    return None


def body(packet: bytes) -> bytes:
    """The packet without its fixed header."""
    at = 1
    while packet[at] & 0x80:
        at += 1
    return packet[at + 1 :]


class Proxy:
    """Relays 127.0.0.1:`port` to `target`. A context manager."""

    def __init__(
        self, target: int, *, delay_s: float = 0.0, refuse_subscriptions: bool = False, hide_limit: bool = False
    ) -> None:
        self.most_unacked = 0
        self.largest = 0
        self.connections = 0
        self.disconnects = 0
        self._delay_s = delay_s
        self._refuse = refuse_subscriptions
        self._hide = hide_limit
        self._target = target
        self._flowing = threading.Event()
        self._flowing.set()
        self._sockets: list[socket.socket] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]

    def __enter__(self) -> Proxy:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._listener.close()
        self._flowing.set()
        self.cut()

    def cut(self) -> None:
        """Close every connection that stands."""
        sockets, self._sockets = self._sockets, []
        for sock in sockets:
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()

    def stall(self) -> None:
        """Relay nothing more, and close nothing."""
        self._flowing.clear()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
                far = socket.create_connection(("127.0.0.1", self._target))
            except OSError:
                return
            self.connections += 1
            self._sockets += [near, far]
            unacked: set[bytes] = set()
            for pair in ((near, far, self._up), (far, near, self._down)):
                threading.Thread(target=self._relay, args=(*pair, unacked), daemon=True).start()

    def _relay(
        self,
        source: socket.socket,
        sink: socket.socket,
        see: Callable[[bytes, set[bytes]], bytes],
        unacked: set[bytes],
    ) -> None:
        buffer = bytearray()
        with suppress(OSError):
            while data := source.recv(65536):
                buffer += data
                while (packet := take_packet(buffer)) is not None:
                    self._flowing.wait()
                    sink.sendall(see(packet, unacked))
        with suppress(OSError):
            sink.shutdown(socket.SHUT_RDWR)

    def _up(self, packet: bytes, unacked: set[bytes]) -> bytes:
        self.largest = max(self.largest, len(packet))
        if packet[0] & 0xF0 == _PUBLISH and packet[0] & 0x06 == 0x02:
            rest = body(packet)
            size = int.from_bytes(rest[:2], "big")
            unacked.add(rest[2 + size : 4 + size])
            self.most_unacked = max(self.most_unacked, len(unacked))
        self.disconnects += packet[0] & 0xF0 == _DISCONNECT
        return packet

    def _down(self, packet: bytes, unacked: set[bytes]) -> bytes:
        if packet[0] & 0xF0 == _PUBACK:
            time.sleep(self._delay_s)
            unacked.discard(body(packet)[:2])
        if packet[0] & 0xF0 == _SUBACK and self._refuse:
            return packet[:-1] + b"\x87"
        if packet[0] & 0xF0 == _CONNACK and self._hide:
            at = packet.index(b"\x27")  # Maximum Packet Size
            return packet[: at + 1] + b"\x0f\xff\xff\xff" + packet[at + 5 :]
        return packet
