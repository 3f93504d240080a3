"""What may wait at the top worker is bounded for each device, so that one that floods pushes nobody out."""

from __future__ import annotations

import queue

from coordinator.workers.top_link import AHEAD, Link
from shared import topics
from shared.fields import MAX_CHUNK_BYTES
from shared.transport.base import Received


def packet(device: str, size: int) -> Received:
    return Received(name=topics.UP_STEP.name("", device=device), payload=bytes(size))


def test_a_device_that_floods_has_its_own_room_only() -> None:
    inbox: queue.SimpleQueue[object] = queue.SimpleQueue()
    link = Link(inbox)
    link.expect({"edge-1": 1000, "edge-2": 1000})
    for _ in range(20):
        link._take_in(packet("edge-1", 600))
    assert inbox.qsize() == AHEAD * 1000 // 600
    link._take_in(packet("edge-2", 600))
    assert inbox.qsize() == AHEAD * 1000 // 600 + 1, "the others are heard"
    first = inbox.get()
    assert isinstance(first, Received) and link.read(first) is None
    before = inbox.qsize()
    for _ in range(3):
        link._take_in(packet("edge-1", 600))
    assert inbox.qsize() == before + 1, "what was read makes room for as much"


def test_an_unknown_device_may_say_hello_and_little_more() -> None:
    inbox: queue.SimpleQueue[object] = queue.SimpleQueue()
    link = Link(inbox)
    for _ in range(100):
        link._take_in(packet("edge-9", 64 * 1024))
    assert inbox.qsize() == AHEAD


def test_empty_packets_take_the_places_of_nobody_else() -> None:
    """A device that is in the round, and one that is not."""
    inbox: queue.SimpleQueue[object] = queue.SimpleQueue()
    link = Link(inbox)
    link.expect({"edge-1": 4_000_000, "edge-2": 4_000_000})
    for device in ("edge-1", "edge-9"):
        for size in (0, 1) * 5000:
            link._take_in(packet(device, size))
    assert inbox.qsize() <= AHEAD * (1 + -(-4_000_000 // MAX_CHUNK_BYTES)) + AHEAD * 2
    before = inbox.qsize()
    link._take_in(packet("edge-2", MAX_CHUNK_BYTES))
    assert inbox.qsize() == before + 1
    while inbox.qsize():
        first = inbox.get()
        assert isinstance(first, Received) and link.read(first) is None
    link._take_in(packet("edge-9", 1))
    assert inbox.qsize() == 1, "what was read makes room"


def test_all_that_a_device_may_have_under_way_fits() -> None:
    inbox: queue.SimpleQueue[object] = queue.SimpleQueue()
    link = Link(inbox)
    link.expect({"edge-1": 4_000_000})
    for _ in range(AHEAD):
        for part in range(0, 4_000_000, MAX_CHUNK_BYTES):
            link._take_in(packet("edge-1", min(MAX_CHUNK_BYTES, 4_000_000 - part)))
    assert inbox.qsize() == AHEAD * -(-4_000_000 // MAX_CHUNK_BYTES)
