"""Transfer of contents: whatever the wire does to chunks, the receiver ends with the content or says why it can't."""

from __future__ import annotations

import resource
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shared import topics
from shared.blob_folder import BlobFolder, Corrupt
from shared.blobs import BlobReceiver, Chunk, chunk_limit
from shared.codec import pack
from shared.errors import RemoteError
from shared.fields import MAX_CHUNK_BYTES
from shared.ids import digest_of
from shared.messages import BlobRef
from tests.unit.blob_fleet import RETRY_S, Fleet, content
from tests.unit.blob_fleet import root as root  # a fixture

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


def test_cancel_of_what_a_former_session_left(root: Path) -> None:
    """Its part holds room that is reserved for it."""
    fleet = Fleet(root, {"dev-0": content(3000, 1)}, chunk=100, credit=1000, per_peer=500)
    fleet.deliver(fleet.wire.pop(0))
    fleet.receiver.cancel_peer("dev-0")
    assert fleet.folder.parts() == {fleet.refs["dev-0"].sha}
    fleet.receiver.cancel("dev-0", fleet.refs["dev-0"].sha)
    assert fleet.folder.parts() == set()
    fleet.announce()
    fleet.finish()
    assert fleet.arrived == fleet.contents
