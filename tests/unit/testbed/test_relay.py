"""The relay of the testbed: it counts, holds, loses and goes on."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from muster.testbed.broker import free_port
from muster.testbed.relay import BadLink, Relay

PATIENCE_S = 20.0


class Ends:
    """A relay in front of a listening socket."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack
        self.server = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        self.server.settimeout(PATIENCE_S)
        self.relay = Relay(self.server.getsockname()[1])
        stack.callback(self.relay.close)

    def connect(self) -> tuple[socket.socket, socket.socket]:
        """Both ends of a connection through the relay."""
        near = self._stack.enter_context(socket.create_connection(("127.0.0.1", self.relay.port), PATIENCE_S))
        far, _ = self.server.accept()
        far.settimeout(PATIENCE_S)
        return near, self._stack.enter_context(far)


@pytest.fixture
def ends() -> Iterator[Ends]:
    with ExitStack() as stack:
        yield Ends(stack)


def _until(met: Callable[[], bool]) -> None:
    until = time.monotonic() + PATIENCE_S
    while not met():
        assert time.monotonic() < until
        time.sleep(0.01)


def _exactly(source: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        piece = source.recv(count - len(data))
        assert piece, "the connection ended"
        data += piece
    return data


def _ended(sock: socket.socket) -> bool:
    """Whether the other side is gone, with nothing said."""
    try:
        return sock.recv(16) == b""
    except ConnectionResetError:
        return True


def test_it_relays_both_ways_and_counts(ends: Ends) -> None:
    near, far = ends.connect()
    near.sendall(b"up")
    assert _exactly(far, 2) == b"up"
    far.sendall(b"down")
    assert _exactly(near, 4) == b"down"
    _until(lambda: (ends.relay.bytes_up, ends.relay.bytes_down) == (2, 4))
    assert (ends.relay.connections, ends.relay.bytes_lost) == (1, 0)


def test_what_a_stall_holds_goes_on_in_order(ends: Ends) -> None:
    near, far = ends.connect()
    ends.relay.stall()
    near.sendall(b"one ")
    near.sendall(b"two")
    far.settimeout(0.2)
    with pytest.raises(TimeoutError):
        far.recv(1)
    far.settimeout(PATIENCE_S)
    ends.relay.heal()
    assert _exactly(far, 7) == b"one two"


def test_a_cut_in_a_stall_loses_what_was_under_way(ends: Ends) -> None:
    near, far = ends.connect()
    near.sendall(b"a")
    assert _exactly(far, 1) == b"a"
    ends.relay.stall()
    near.sendall(b"lost")
    time.sleep(0.2)  # the relay takes it; where it does not yet, it is lost on its way there
    ends.relay.cut()
    assert _ended(far) and _ended(near)
    ends.relay.heal()
    again, beyond = ends.connect()
    again.sendall(b"b")
    assert _exactly(beyond, 1) == b"b"
    _until(lambda: (ends.relay.bytes_up, ends.relay.connections) == (2, 2))


def test_it_outlives_a_target_that_is_away() -> None:
    port = free_port()
    relay = Relay(port)
    with socket.create_connection(("127.0.0.1", relay.port), PATIENCE_S) as refused:
        assert refused.recv(1) == b""
    with socket.create_server(("127.0.0.1", port)) as server:
        server.settimeout(PATIENCE_S)
        with socket.create_connection(("127.0.0.1", relay.port), PATIENCE_S) as near:
            far, _ = server.accept()
            with far:
                near.sendall(b"x")
                assert far.recv(1) == b"x"
    relay.close()


def test_a_bad_link_is_bad_in_every_way_and_then_good_again(ends: Ends) -> None:
    ends.connect()
    link = BadLink(ends.relay, "seed", calm_s=(0.0, 0.01), bad_s=(0.0, 0.01))
    seen = link.weather
    _until(lambda: min(seen.cuts, seen.losses, seen.stalls, seen.delays) >= 2)
    link.stop()
    near, far = ends.connect()
    near.sendall(b"x")
    assert _exactly(far, 1) == b"x"
    assert ends.relay.delay_s == 0.0
