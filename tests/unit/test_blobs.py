"""Transfer of contents: whatever the wire does to chunks, the receiver ends with the content and within its credit."""

from __future__ import annotations

import random
import resource
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shared import topics
from shared.blob_folder import BlobFolder, Corrupt
from shared.blobs import Arrival, BlobReceiver, BlobSender, Chunk, chunk_limit
from shared.codec import pack
from shared.errors import RemoteError
from shared.ids import digest_of
from shared.messages import MAX_CHUNK_BYTES, BlobRef, Missing, Want

RETRY_S = 5.0


def content(size: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(size)


class Fleet:
    """Devices that send to one receiver, over a wire that the test owns. Checks the credit after each step."""

    def __init__(self, root: Path, contents: dict[str, bytes], *, chunk: int, credit: int, per_peer: int) -> None:
        self.root, self.chunk, self.credit, self.per_peer = root, chunk, credit, per_peer
        self.now = 100.0
        self.contents = contents
        self.refs: dict[str, BlobRef] = {}
        self.senders: dict[str, BlobSender] = {}
        shared = BlobFolder(root / "outbox", fsync=False)
        for device, data in contents.items():
            self.refs[device] = shared.put(data)
            self.senders[device] = BlobSender(shared)
        self.wire: list[Chunk] = []
        self.wants: list[tuple[str, Want]] = []
        self.arrived: dict[str, bytes] = {}
        self.corrupt = 0
        self.folder = BlobFolder(root / "inbox", fsync=False)
        self.receiver = self._receiver()
        self.announce()

    def _receiver(self) -> BlobReceiver:
        return BlobReceiver(self.folder, credit_bytes=self.credit, per_peer_bytes=self.per_peer, retry_s=RETRY_S)

    def announce(self) -> None:
        for device, ref in self.refs.items():
            if self.receiver.want(device, ref, self.chunk, self.now):
                self._keep(device)
        self.step()

    def restart(self) -> None:
        """The receiver is killed; what it had asked for is still on its way."""
        self.folder.close()
        self.folder = BlobFolder(self.root / "inbox", fsync=False)
        self.receiver = self._receiver()
        self.announce()

    def step(self) -> None:
        """Publish what is due and let the senders answer."""
        for device, want in self.receiver.due(self.now):
            self.wants.append((device, want))
            assert self.senders[device].on_want("coord", want) is None
        for device, sender in self.senders.items():
            self.wire += [Chunk(device, c.sha, c.index, c.data) for c in sender.take(1000)]
        self.check()

    def check(self) -> None:
        """The credit, over all and each, and of it the part of the silent ones."""
        each = {device: self.receiver.outstanding_of(device) for device in self.senders}
        assert self.receiver.outstanding == sum(each.values()) <= self.credit
        assert all(0 <= held <= self.per_peer for held in each.values())
        silent = sum(source.outstanding for source in self.receiver._peers.values() if source.silent)
        assert self.receiver._doubtful == silent

    def deliver(self, chunk: Chunk) -> Arrival:
        arrival = self.receiver.on_chunk(chunk.peer, chunk.sha, chunk.index, chunk.data, self.now)
        if arrival.kind == "complete":
            assert arrival.path is not None
            for device in arrival.peers:
                self._keep(device)
        elif arrival.kind == "corrupt":
            self.corrupt += 1
            self.announce()
        self.step()
        return arrival

    def _keep(self, device: str) -> None:
        path = self.folder.path(self.refs[device].sha)
        assert path is not None
        self.arrived[device] = path.read_bytes()

    def wait(self, seconds: float) -> None:
        self.now += seconds
        self.step()

    def finish(self, *, steps: int = 20_000) -> None:
        """Deliver in order without faults until all is there."""
        for _ in range(steps):
            if len(self.arrived) == len(self.contents):
                return
            if self.wire:
                self.deliver(self.wire.pop(0))
            else:
                due = self.receiver.next_due()
                assert due is not None, "nothing under way and nothing to wait for"
                self.wait(max(0.0, due - self.now))
        raise AssertionError(f"{len(self.arrived)} of {len(self.contents)} contents after {steps} steps")


@pytest.fixture
def root() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


FAULTS = ["deliver", "deliver", "deliver", "lose", "copy", "flip", "cut", "wait", "restart", "announce", "late"]


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    sizes=st.lists(st.integers(0, 5000), min_size=1, max_size=4),
    chunk=st.integers(50, 700),
    credit=st.integers(100, 4000),
    script=st.lists(st.tuples(st.sampled_from(FAULTS), st.integers(0, 2**20)), max_size=80),
)
def test_any_faults(sizes: list[int], chunk: int, credit: int, script: list[tuple[str, int]]) -> None:
    """Loss, copies, reordering, flipped and cut chunks, restarts between chunks: the contents arrive exactly."""
    with tempfile.TemporaryDirectory() as name:
        contents = {f"dev-{n}": content(size, n) for n, size in enumerate(sizes)}
        fleet = Fleet(Path(name), contents, chunk=chunk, credit=credit, per_peer=credit // 2 + 1)
        for fault, draw in script:
            play(fleet, fault, draw)
        fleet.finish()
        assert fleet.arrived == contents
        assert not fleet.folder.parts()
        assert fleet.receiver.outstanding == 0


def play(fleet: Fleet, fault: str, draw: int) -> None:
    if fault == "wait":
        fleet.wait(draw % 20)
    elif fault == "restart":
        fleet.restart()
    elif fault == "announce":
        fleet.announce()
    elif fleet.wire:
        at = draw % len(fleet.wire)
        chunk = fleet.wire[at]
        if fault != "copy":
            del fleet.wire[at]
        if fault == "late":
            fleet.wire.append(chunk)
        elif fault == "flip":
            damaged = bytes([chunk.data[0] ^ 1]) + chunk.data[1:]
            fleet.deliver(Chunk(chunk.peer, chunk.sha, chunk.index, damaged))
        elif fault == "cut":
            fleet.deliver(Chunk(chunk.peer, chunk.sha, chunk.index, chunk.data[:-1]))
        elif fault != "lose":
            fleet.deliver(chunk)


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


def overhead(fleet: Fleet, size: int) -> float:
    """Bytes of topics and `Want`s per byte of content."""
    extra = sum(len(pack(want)) + len(topics.DOWN_BLOB.name("fleet-1", device=device)) for device, want in fleet.wants)
    count = fleet.receiver.stats.chunks + fleet.receiver.stats.duplicates
    longest = topics.UP_CHUNK.name("fleet-1", device="d" * 63, sha="0" * 64, index=99)
    return (extra + count * len(longest)) / size


def test_overhead_of_3_mb(root: Path) -> None:
    fleet = Fleet(root, {"dev-0": content(3_000_000)}, chunk=MAX_CHUNK_BYTES, credit=2**24, per_peer=2**20)
    fleet.finish()
    assert overhead(fleet, 3_000_000) < 0.005
    assert len(fleet.wants) <= 10


def test_nothing_is_fetched_twice_after_a_kill(root: Path) -> None:
    data = content(100_000)
    fleet = Fleet(root, {"dev-0": data}, chunk=1000, credit=20_000, per_peer=20_000)
    for _ in range(50):
        fleet.deliver(fleet.wire.pop(0))
    taken = fleet.receiver.stats.chunks
    fleet.wire.clear()
    fleet.restart()
    fleet.finish()
    assert taken == 50
    assert fleet.receiver.stats.chunks == 50
    assert fleet.receiver.stats.duplicates == 0


def test_only_the_missing_is_wanted_again(root: Path) -> None:
    fleet = Fleet(root, {"dev-0": content(2000)}, chunk=100, credit=4000, per_peer=4000)
    while fleet.receiver.stats.chunks < 10:
        fleet.deliver(fleet.wire.pop(0))
    lost = [fleet.wire.pop(0).index for _ in range(3)]
    fleet.wants.clear()
    while fleet.wire:
        fleet.deliver(fleet.wire.pop(0))
    assert not fleet.wants
    fleet.wait(RETRY_S)
    asked = [index for _, want in fleet.wants for first, count in want.ranges for index in range(first, first + count)]
    assert asked == lost[:1]
    fleet.finish()
    assert fleet.receiver.stats.duplicates == 0
    assert fleet.receiver.stats.rewanted == 3


def test_a_late_chunk_after_a_question_is_a_counted_copy(root: Path) -> None:
    fleet = Fleet(root, {"dev-0": content(150)}, chunk=100, credit=4000, per_peer=4000)
    late = list(fleet.wire)
    fleet.wait(RETRY_S)
    assert len(fleet.wire) > len(late)
    fleet.finish()
    copies = len(fleet.wire)
    while fleet.wire:
        assert fleet.deliver(fleet.wire.pop(0)).kind == "unexpected"
    assert fleet.receiver.stats.duplicates == copies > 0
    assert fleet.arrived == fleet.contents


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


def test_two_devices_send_the_same(root: Path) -> None:
    data = content(3000)
    fleet = Fleet(root, {"dev-0": data, "dev-1": data}, chunk=100, credit=1000, per_peer=500)
    fleet.finish()
    assert fleet.arrived == {"dev-0": data, "dev-1": data}
    assert fleet.receiver.stats.chunks == 30
    assert fleet.receiver.stats.duplicates == 0


def test_one_of_two_lies_about_the_content(root: Path) -> None:
    """Both announce the same digest, one sends rubbish: it is found out, the other one's content arrives."""
    data = content(3000)
    fleet = Fleet(root, {"dev-0": data, "liar": data}, chunk=100, credit=1000, per_peer=500)
    blamed: set[str] = set()
    for _ in range(2000):
        if len(fleet.arrived) == 2:
            break
        if not fleet.wire:
            fleet.wait(1.0)
            continue
        chunk = fleet.wire.pop(0)
        bad = bytes(len(chunk.data)) if chunk.peer == "liar" else chunk.data
        arrival = fleet.receiver.on_chunk(chunk.peer, chunk.sha, chunk.index, bad, fleet.now)
        if arrival.kind == "corrupt":
            blamed.update(arrival.peers)
        elif arrival.kind == "complete":
            assert arrival.path is not None
            assert arrival.path.read_bytes() == data
            assert "dev-0" in arrival.peers
            break
        fleet.step()
    assert fleet.folder.path(fleet.refs["dev-0"].sha) is not None
    assert blamed <= {"liar"}


def test_a_wrong_content_is_fetched_once_more_then_reported(root: Path) -> None:
    fleet = Fleet(root, {"dev-0": content(300)}, chunk=100, credit=1000, per_peer=1000)
    kinds = []
    while not kinds or kinds[-1] != "corrupt":
        chunk = fleet.wire.pop(0)
        arrival = fleet.receiver.on_chunk(chunk.peer, chunk.sha, chunk.index, bytes(len(chunk.data)), fleet.now)
        kinds.append(arrival.kind)
        fleet.step()
    assert kinds == ["more"] * 5 + ["corrupt"]
    assert not fleet.receiver.wanted("dev-0", fleet.refs["dev-0"].sha)
    assert fleet.receiver.outstanding == 0
    assert not fleet.folder.parts()


def test_foreign_chunks_are_ignored(root: Path) -> None:
    fleet = Fleet(root, {"dev-0": content(300)}, chunk=100, credit=1000, per_peer=1000)
    sha = fleet.refs["dev-0"].sha
    for peer, name, index, data in [
        ("nobody", sha, 0, b"x" * 100),
        ("dev-0", "0" * 64, 0, b"x" * 100),
        ("dev-0", "../../etc/passwd", 0, b"x"),
        ("dev-0", sha, 3, b"x" * 100),
    ]:
        assert fleet.receiver.on_chunk(peer, name, index, data, fleet.now).kind == "unexpected"
    fleet.finish()
    assert fleet.arrived == fleet.contents


def test_a_smaller_packet_in_the_middle(root: Path) -> None:
    """The broker comes back with half the packet size: what is here counts, the rest comes in smaller chunks."""
    data = content(50_000)
    fleet = Fleet(root, {"dev-0": data}, chunk=10_000, credit=30_000, per_peer=30_000)
    for _ in range(3):
        fleet.deliver(fleet.wire.pop(0))
    fleet.receiver.limit_packet(4096 + 4000)
    fleet.senders["dev-0"].limit_packet(4096 + 4000)
    fleet.step()
    fleet.finish()
    assert fleet.arrived["dev-0"] == data
    assert {want.chunk for _, want in fleet.wants} == {10_000, 4000}
    assert fleet.receiver.stats.chunks <= 3 + 6


def test_cancel(root: Path) -> None:
    fleet = Fleet(root, {"dev-0": content(3000, 1), "dev-1": content(3000, 2)}, chunk=100, credit=1000, per_peer=500)
    for _ in range(4):
        fleet.deliver(fleet.wire.pop(0))
    fleet.receiver.cancel_peer("dev-0")
    fleet.receiver.cancel("dev-1", fleet.refs["dev-1"].sha)
    assert fleet.receiver.outstanding == 0
    assert fleet.receiver.due(fleet.now) == []
    assert fleet.folder.parts() == {fleet.refs["dev-0"].sha}
    due = fleet.receiver.next_due()
    assert due is not None
    assert fleet.receiver.due(due + 900.0) == []
    assert fleet.folder.parts() == set()
    fleet.announce()
    fleet.finish()
    assert fleet.arrived == fleet.contents


def test_idle_pulls_and_parts_are_given_up(root: Path) -> None:
    fleet = Fleet(root, {"dev-0": content(3000)}, chunk=100, credit=1000, per_peer=500)
    fleet.deliver(fleet.wire.pop(0))
    while (due := fleet.receiver.next_due()) is not None:
        fleet.wire.clear()
        fleet.wait(max(0.0, due - fleet.now))
    assert 900.0 <= fleet.now - 100.0 <= 1000.0
    assert fleet.receiver.stats.expired == 1
    assert not fleet.folder.parts()


def test_on_missing_ends_the_pull(root: Path) -> None:
    fleet = Fleet(root, {"dev-0": content(3000)}, chunk=100, credit=1000, per_peer=500)
    sha = fleet.refs["dev-0"].sha
    assert fleet.receiver.on_missing("dev-0", sha)
    assert not fleet.receiver.on_missing("dev-0", sha)
    assert fleet.receiver.due(fleet.now) == []
    assert fleet.receiver.outstanding == 0


def test_a_full_disk_ends_the_pull(root: Path) -> None:
    """A limit of the file size stands for the full disk; announced again after it, the content arrives."""
    fleet = Fleet(root, {"dev-0": content(9000, 1), "dev-1": content(9000, 2)}, chunk=100, credit=1000, per_peer=500)
    fleet.deliver(fleet.wire.pop(0))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        arrival = fleet.deliver(fleet.wire.pop(0))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert arrival.kind == "no_room"
    assert arrival.reason
    assert len(arrival.peers) == 1
    assert fleet.folder.parts() == {ref.sha for device, ref in fleet.refs.items() if device not in arrival.peers}
    fleet.announce()
    fleet.finish()
    assert fleet.arrived == fleet.contents


def test_sizes_that_make_no_sense(root: Path) -> None:
    receiver = BlobReceiver(BlobFolder(root, fsync=False), credit_bytes=1000, retry_s=1.0)
    with pytest.raises(RemoteError):
        receiver.want("dev-0", BlobRef(sha="0" * 64, size=512 * 2**20), 1, 0.0)
    with pytest.raises(Corrupt):
        receiver.want("dev-0", BlobRef(sha="0" * 64, size=0), 100, 0.0)
    assert receiver.want("dev-0", BlobRef(sha=digest_of(b""), size=0), 100, 0.0)
    assert receiver.next_due() is None


def test_chunk_limit() -> None:
    assert chunk_limit(268_435_455) == MAX_CHUNK_BYTES
    assert chunk_limit(65_536) == 61_440


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
