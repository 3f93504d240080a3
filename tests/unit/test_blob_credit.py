"""Transfer among many: credit and turns, what the slow, the silent and the dead may hold, what a sender takes on."""

from __future__ import annotations

import random
from pathlib import Path

from shared.blob_folder import BlobFolder
from shared.blobs import BlobSender
from shared.messages import Missing, Want
from tests.unit.blob_fleet import RETRY_S, Fleet, content
from tests.unit.blob_fleet import root as root  # a fixture


def test_200_peers_and_a_slow_receiver(root: Path) -> None:
    """Acceptance case 51 without a network: never more under way than the credit, nothing sent twice."""
    contents = {f"dev-{n:03}": content(2500, n) for n in range(200)}
    fleet = Fleet(root, contents, chunk=100, credit=2000, per_peer=800)
    shuffled = random.Random(7)
    most = 0
    while len(fleet.arrived) < 200:
        most = max(most, sum(len(chunk.data) for chunk in fleet.wire))
        fleet.now += 0.003
        fleet.deliver(fleet.wire.pop(shuffled.randrange(min(3, len(fleet.wire)))))
    assert fleet.arrived == contents
    assert most <= 2000
    assert (fleet.receiver.stats.chunks, fleet.receiver.stats.duplicates) == (200 * 25, 0)


def test_peers_take_turns(root: Path) -> None:
    """While others wait, no one gets a second window before each had a first."""
    contents = {f"dev-{n}": content(20_000, n) for n in range(10)}
    fleet = Fleet(root, contents, chunk=100, credit=800, per_peer=400)
    while len(fleet.wants) < 40:
        fleet.deliver(fleet.wire.pop(0))
    first_turns = [device for device, _ in fleet.wants]
    for turn in range(0, 40, 10):
        assert len(set(first_turns[turn : turn + 10])) >= 9


def test_a_slow_link_is_not_flooded(root: Path) -> None:
    """120 KiB a chunk at 100 kbit/s: each chunk takes two retries, and still few are sent twice."""
    fleet = Fleet(root, {"dev-0": content(6000)}, chunk=100, credit=1000, per_peer=1000)
    while len(fleet.arrived) < 1:
        chunk = fleet.wire.pop(0)
        until = fleet.now + 10.0
        while fleet.now < until:
            fleet.wait(1.0)
        fleet.deliver(chunk)
    assert fleet.receiver.stats.duplicates + len(fleet.wire) <= 12


def test_a_silent_peer_keeps_one_chunk_of_the_credit(root: Path) -> None:
    contents = {"dead": content(2000, 1), "live": content(20_000, 2)}
    fleet = Fleet(root, contents, chunk=100, credit=900, per_peer=800)
    for _ in range(200):
        dead = [chunk for chunk in fleet.wire if chunk.peer == "dead"]
        fleet.wire = [chunk for chunk in fleet.wire if chunk.peer == "live"]
        assert not dead or fleet.receiver.outstanding_of("dead") <= 200
        fleet.now += 0.5
        if fleet.wire:
            fleet.deliver(fleet.wire.pop(0))
        else:
            fleet.step()
    assert fleet.arrived == {"live": contents["live"]}
    assert fleet.receiver.outstanding_of("dead") <= 100


def test_many_dead_do_not_stop_the_living(root: Path) -> None:
    """A site goes down in the middle: its devices hold no more than half of the credit until they are given up."""
    contents = {f"dead-{n}": content(5000, n) for n in range(40)}
    fleet = Fleet(root, contents, chunk=100, credit=1000, per_peer=400)
    for _ in range(20):
        fleet.wire.clear()
        fleet.wait(RETRY_S)
    held = sum(fleet.receiver.outstanding_of(device) for device in contents)
    assert 0 < held <= 500
    fleet.refs["live"] = BlobFolder(root / "outbox", fsync=False).put(content(5000, 99))
    fleet.contents["live"] = content(5000, 99)
    fleet.senders["live"] = BlobSender(BlobFolder(root / "outbox", fsync=False))
    fleet.announce()
    while "live" not in fleet.arrived:
        fleet.now += 0.01
        fleet.wire = [chunk for chunk in fleet.wire if chunk.peer == "live"]
        assert fleet.wire, "the living are asked without a wait"
        fleet.deliver(fleet.wire.pop(0))
    while (due := fleet.receiver.next_due()) is not None:
        fleet.wire.clear()
        fleet.wait(max(0.0, due - fleet.now))
    assert (fleet.receiver.outstanding, fleet.receiver.stats.expired) == (0, 40)


def test_idle_pulls_and_parts_are_given_up(root: Path) -> None:
    fleet = Fleet(root, {"dev-0": content(3000)}, chunk=100, credit=1000, per_peer=500)
    fleet.deliver(fleet.wire.pop(0))
    while (due := fleet.receiver.next_due()) is not None:
        fleet.wire.clear()
        fleet.wait(max(0.0, due - fleet.now))
    assert 900.0 <= fleet.now - 100.0 <= 1000.0
    assert fleet.receiver.stats.expired == 1
    assert not fleet.folder.parts()


def test_sender_answers_only_what_it_can(root: Path) -> None:
    folder = BlobFolder(root, fsync=False)
    ref = folder.put(content(1000))
    sender = BlobSender(folder, 200)
    absent = sender.on_want("a", Want(sha="0" * 64, chunk=100, ranges=[(0, 1)]))
    large = sender.on_want("a", Want(sha=ref.sha, chunk=300, ranges=[(0, 1)]))
    beyond = sender.on_want("a", Want(sha=ref.sha, chunk=100, ranges=[(5, 2**53)]))
    assert all(isinstance(answer, Missing) and answer.reason for answer in (absent, large, beyond))
    assert sender.pending() == 0
    assert sender.take(10) == []


def test_sender_takes_turns_and_merges(root: Path) -> None:
    folder = BlobFolder(root, fsync=False)
    data = content(1000)
    ref = folder.put(data)
    sender = BlobSender(folder, 200)
    for peer in ("a", "b", "a"):
        assert sender.on_want(peer, Want(sha=ref.sha, chunk=100, ranges=[(0, 3), (1, 2)])) is None
    assert sender.pending() == 6
    taken = sender.take(4)
    assert [(chunk.peer, chunk.index) for chunk in taken] == [("a", 0), ("b", 0), ("a", 1), ("b", 1)]
    assert all(chunk.data == data[chunk.index * 100 :][:100] for chunk in taken)
    sender.cancel_peer("a")
    assert [(chunk.peer, chunk.index) for chunk in sender.take(9)] == [("b", 2)]


def test_sender_is_bounded(root: Path) -> None:
    folder = BlobFolder(root, fsync=False)
    ref = folder.put(bytes(100_000))
    sender = BlobSender(folder)
    assert sender.on_want("a", Want(sha=ref.sha, chunk=1, ranges=[(0, 100_000)])) is None
    assert sender.pending() == 4096


def test_sender_skips_what_is_gone(root: Path) -> None:
    folder = BlobFolder(root, fsync=False)
    gone, here = folder.put(b"gone"), folder.put(b"here")
    sender = BlobSender(folder)
    for ref in (gone, here):
        sender.on_want("a", Want(sha=ref.sha, chunk=4, ranges=[(0, 1)]))
    folder.remove(gone.sha)
    assert [chunk.data for chunk in sender.take(5)] == [b"here"]
