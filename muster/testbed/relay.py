"""A TCP relay between a device and the broker: it counts the link's bytes, and can be made a bad link.

TCP hides loss, duplication and order from both ends. What a bad link does to them is delay, silence, and connections
that end with bytes under way; a message or its acknowledgement that was among these is lost, and MQTT sends it again.
"""

from __future__ import annotations

import contextlib
import random
import socket
import threading
import time
from dataclasses import dataclass

MAX_PIECE = 256 * 1024
KINDS = ("cut", "loss", "stall", "delay")


@dataclass
class Link:
    """One connection through the relay: both its sockets."""

    near: socket.socket
    far: socket.socket

    def end(self) -> None:
        """Close it for both sides; what is under way is lost."""
        for one in (self.near, self.far):
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)


class Relay:
    """Relays 127.0.0.1:`port` to `target` on the same machine, counting payload bytes both ways."""

    def __init__(self, target: int) -> None:
        self.bytes_up = 0
        """From the connecting side to the target."""
        self.bytes_down = 0
        self.bytes_lost = 0
        """Taken from one side, and never given to the other."""
        self.connections = 0
        self.delay_s = 0.0
        """How long every piece waits before it goes on."""
        self._target = target
        self._flows = threading.Event()
        self._flows.set()
        self._links: list[Link] = []
        self._guard = threading.Lock()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, name="relay", daemon=True).start()

    def close(self) -> None:
        """Take no more connections; those that stand end with either side."""
        self._listener.close()
        self.heal()

    def stall(self) -> None:
        """Let nothing through from now on, and close nothing: to both sides the other one is silent, as behind a
        partition. A new connection is taken, and is as silent."""
        self._flows.clear()

    def heal(self) -> None:
        """End a `stall`: what was held goes on, in order."""
        self._flows.set()

    def cut(self) -> None:
        """End every connection that stands; what is held in the relay is lost. A stall goes on."""
        with self._guard:
            links, self._links = self._links, []
        for link in links:
            link.end()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
                far = socket.create_connection(("127.0.0.1", self._target))
            except ConnectionRefusedError:
                near.close()  # the target is away for a while
                continue
            except OSError:
                return
            for one in (near, far):
                one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            link = Link(near, far)
            with self._guard:
                self._links.append(link)
                self.connections += 1
            threading.Thread(target=self._pump, args=(link, near, far, True), daemon=True).start()
            threading.Thread(target=self._pump, args=(link, far, near, False), daemon=True).start()

    def _pump(self, link: Link, source: socket.socket, sink: socket.socket, up: bool) -> None:
        data = b""
        try:
            while data := source.recv(MAX_PIECE):
                if self.delay_s:
                    time.sleep(self.delay_s)
                self._flows.wait()
                sink.sendall(data)
                with self._guard:
                    if up:
                        self.bytes_up += len(data)
                    else:
                        self.bytes_down += len(data)
        except OSError:
            with self._guard:
                self.bytes_lost += len(data)
        link.end()
        with self._guard, contextlib.suppress(ValueError):
            self._links.remove(link)


@dataclass
class Weather:
    """What has been done to a link so far."""

    cuts: int = 0
    losses: int = 0
    """Cuts after a silence: what was sent in it is gone."""
    stalls: int = 0
    delays: int = 0


class BadLink:
    """Spoils one relay from a thread of its own until `stop`: what, when and for how long is drawn from `seed`.

    `calm_s`, `bad_s`: least and most seconds between two spells, and of one. No kind comes a second time before all
    others came.
    """

    def __init__(self, relay: Relay, seed: str, *, calm_s: tuple[float, float], bad_s: tuple[float, float]) -> None:
        self.weather = Weather()
        self._relay = relay
        self._rng = random.Random(seed)
        self._calm_s = calm_s
        self._bad_s = bad_s
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="bad-link", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Leave the link as a good one."""
        self._stopping.set()
        self._thread.join()

    def _run(self) -> None:
        deck: list[str] = []
        while not self._stopping.wait(self._rng.uniform(*self._calm_s)):
            deck = deck or self._rng.sample(KINDS, len(KINDS))
            self._spoil(deck.pop(), self._rng.uniform(*self._bad_s))

    def _spoil(self, what: str, seconds: float) -> None:
        relay, weather = self._relay, self.weather
        if what == "cut":
            relay.cut()
            weather.cuts += 1
        elif what == "delay":
            # Every piece on its own: a message of several takes several times as long.
            relay.delay_s = seconds / 20
            self._stopping.wait(seconds)
            relay.delay_s = 0.0
            weather.delays += 1
        else:
            relay.stall()
            self._stopping.wait(seconds)
            if what == "loss":
                relay.cut()
                weather.losses += 1
            else:
                weather.stalls += 1
            relay.heal()
