"""Contents on disk: whole or not there, resumed after a kill, a full disk named."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shared.blob_folder import BlobFolder, Corrupt, NoRoom
from shared.errors import RemoteError
from shared.ids import digest_of

DATA = bytes(range(256)) * 40
SHA = digest_of(DATA)


@pytest.fixture
def folder(tmp_path: Path) -> BlobFolder:
    return BlobFolder(tmp_path / "blobs")


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def fill(folder: BlobFolder, data: bytes, chunk: int, indexes: list[int]) -> None:
    spool = folder.spool(digest_of(data), len(data), chunk)
    for index in indexes:
        spool.write(index, data[index * chunk :][:chunk])


def again(folder: BlobFolder) -> BlobFolder:
    """The folder as the next process sees it."""
    folder.close()
    return BlobFolder(folder.root)


def test_put_read_remove(folder: BlobFolder) -> None:
    ref = folder.put(DATA)
    assert (ref.sha, ref.size) == (SHA, len(DATA))
    assert folder.put(DATA) == ref
    assert folder.path(SHA) == folder.root / SHA
    assert folder.read(SHA, 100, 50) == DATA[100:150]
    assert folder.read(SHA, len(DATA) - 5, 50) == DATA[-5:]
    assert folder.digests() == {SHA}
    folder.remove(SHA)
    folder.remove(SHA)
    assert folder.read(SHA, 0, 1) is None
    assert folder.path(SHA) is None
    assert folder.size(SHA) is None
    assert names(folder.root) == []


def test_adopt_moves(folder: BlobFolder, tmp_path: Path) -> None:
    for _ in range(2):
        (tmp_path / "update").write_bytes(DATA)
        ref = folder.adopt(tmp_path / "update")
        assert (ref.sha, ref.size) == (SHA, len(DATA))
        assert not (tmp_path / "update").exists()
        assert folder.read(SHA, 0, len(DATA)) == DATA


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="no second file system here")
def test_adopt_from_another_file_system(folder: BlobFolder) -> None:
    source = Path("/dev/shm") / f"muster-test-{os.getpid()}"
    source.write_bytes(DATA)
    try:
        assert folder.adopt(source).sha == SHA
        assert not source.exists()
        assert folder.read(SHA, 0, len(DATA)) == DATA
    finally:
        source.unlink(missing_ok=True)


def test_names_from_outside_lead_nowhere(folder: BlobFolder) -> None:
    (folder.root.parent / "secret").write_text("x")
    for name in ("../secret", "..", "", SHA + "\n", SHA.upper(), "x"):
        assert folder.path(name) is None
        assert folder.size(name) is None
        assert folder.read(name, 0, 1) is None
        folder.remove(name)
        with pytest.raises(RemoteError):
            folder.spool(name, 10, 10)
    assert (folder.root.parent / "secret").exists()


def test_more_files_than_stay_open(folder: BlobFolder) -> None:
    refs = [folder.put(b"%d" % n) for n in range(200)]
    before = len(names(Path("/proc/self/fd")))
    for n, ref in enumerate(refs):
        assert folder.read(ref.sha, 0, 10) == b"%d" % n
    assert len(names(Path("/proc/self/fd"))) - before <= 64
    folder.close()
    assert len(names(Path("/proc/self/fd"))) == before


def test_leftovers_of_a_crash_go_and_parts_stay(folder: BlobFolder) -> None:
    fill(folder, DATA, 1000, [0])
    (folder.root / "half.tmp").write_bytes(b"half")
    done = folder.put(b"done")
    (folder.root / f"{done.sha}.part").write_bytes(b"old")
    later = again(folder)
    assert later.parts() == {SHA}
    assert names(later.root) == sorted([f"{SHA}.part", done.sha])
    assert later.path(SHA) is None


@settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    size=st.integers(0, 3000),
    chunk=st.integers(1, 700),
    other=st.integers(1, 700),
    order=st.randoms(use_true_random=False),
    share=st.floats(0, 1),
)
def test_a_spool_is_resumed(
    tmp_path_factory: pytest.TempPathFactory, size: int, chunk: int, other: int, order: random.Random, share: float
) -> None:
    """Whatever came before the kill counts afterwards, also in chunks of another size as far as it covers them."""
    data = random.Random(size).randbytes(size)
    folder = BlobFolder(tmp_path_factory.mktemp("blobs"), fsync=False)
    spool = folder.spool(digest_of(data), size, chunk)
    came = [index for index in range(spool.count) if order.random() < share]
    order.shuffle(came)
    fill(folder, data, chunk, came)
    bytes_here = {at for index in came for at in range(index * chunk, min(size, (index + 1) * chunk))}

    same = again(folder).spool(digest_of(data), size, chunk)
    assert same.missing() == [index for index in range(same.count) if index not in came]

    resized = again(folder).spool(digest_of(data), size, other)
    covered = [
        all(at in bytes_here for at in range(i * other, min(size, (i + 1) * other))) for i in range(resized.count)
    ]
    assert [resized.has(index) for index in range(resized.count)] == covered
    for index in resized.missing():
        assert resized.write(index, data[index * other :][:other])
        assert not resized.write(index, data[index * other :][:other])
    assert resized.left == 0
    assert resized.finish().read_bytes() == data


def test_data_that_never_reached_the_disk_does_not_count(folder: BlobFolder) -> None:
    """A power cut may keep a slot and lose its data."""
    fill(folder, DATA, 1000, [0, 1, 2, 5])
    folder.close()
    with (folder.root / f"{SHA}.part").open("r+b") as file:
        file.seek(1000)
        file.write(bytes(1000))
    spool = BlobFolder(folder.root).spool(SHA, len(DATA), 1000)
    assert [spool.has(index) for index in range(6)] == [True, False, True, False, False, True]


def test_a_foreign_or_cut_part_begins_anew(folder: BlobFolder) -> None:
    for rubbish in (b"", b"x", b"x" * 5000, b"x" * 50_000):
        (folder.root / f"{SHA}.part").write_bytes(rubbish)
        spool = BlobFolder(folder.root).spool(SHA, len(DATA), 1000)
        assert spool.left == spool.count == 11


def test_killed_between_cutting_and_renaming(folder: BlobFolder) -> None:
    (folder.root / f"{SHA}.part").write_bytes(DATA)
    spool = BlobFolder(folder.root).spool(SHA, len(DATA), 1000)
    assert spool.left == 0
    assert spool.finish().read_bytes() == DATA


def test_a_wrong_digest_is_refused_and_the_part_emptied(folder: BlobFolder) -> None:
    fill(folder, DATA, 5120, [0])
    spool = folder.spool(SHA, len(DATA), 5120)
    spool.write(1, bytes(5120))
    with pytest.raises(Corrupt):
        spool.finish()
    assert spool.missing() == [0, 1]
    assert folder.digests() == set()
    fill(folder, DATA, 5120, [0, 1])
    assert spool.finish().read_bytes() == DATA
    assert folder.parts() == set()
    assert names(folder.root) == [SHA]


def test_two_sizes_of_one_digest(folder: BlobFolder) -> None:
    folder.spool(SHA, len(DATA), 1000)
    with pytest.raises(RemoteError):
        folder.spool(SHA, len(DATA) + 1, 1000)
    assert folder.spool(SHA, len(DATA), 1000).left == 11


def test_the_spool_has_a_cap(tmp_path: Path) -> None:
    folder = BlobFolder(tmp_path, spool_bytes=3000)
    first, second, third = (digest_of(name) for name in (b"1", b"2", b"3"))
    folder.spool(first, 2000, 100)
    with pytest.raises(NoRoom, match="cap"):
        folder.spool(second, 2000, 100)
    assert folder.parts() == {first}
    folder.release(first)
    folder.spool(second, 2000, 100)
    assert folder.parts() == {second}
    folder.discard_part(second)
    folder.spool(third, 3000, 100)


FULL = """
import resource, sys
from pathlib import Path
from shared.blob_folder import BlobFolder, NoRoom
root = Path(sys.argv[1])
folder = BlobFolder(root)
kept = folder.put(b"kept")
outside = root.parent / "update"
outside.write_bytes(bytes(50_000))
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, resource.RLIM_INFINITY))
for attempt in (lambda: folder.put(bytes(20_000)), lambda: folder.spool("0" * 64, 20_000, 1000)):
    try:
        attempt()
    except NoRoom as error:
        print(str(error).count("\\n"), len(str(error)) > 10)
    else:
        print("not refused")
print(sorted(path.name for path in root.iterdir()) == [kept.sha], folder.parts())
small = folder.put(bytes(1000))
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
folder.put(bytes(20_000))
print(len(folder.digests()))
"""


def test_a_full_disk_is_named_and_leaves_nothing(tmp_path: Path) -> None:
    """A limit of the file size stands for the full disk; afterwards the folder works on."""
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(tmp_path / "blobs")], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.split("\n") == ["0 True", "0 True", "True set()", "3", ""]


KILLED = """
import sys
from pathlib import Path
from shared.blob_folder import BlobFolder
folder = BlobFolder(Path(sys.argv[1]))
data = bytes(range(256)) * 40
spool = folder.spool(sys.argv[2], len(data), 1000)
for index in range(spool.count):
    spool.write(index, data[index * 1000 :][:1000])
    print(index, flush=True)
    if index == 6:
        sys.stdin.read()
"""


def test_kill_9_in_the_middle(tmp_path: Path) -> None:
    command = [sys.executable, "-c", KILLED, str(tmp_path), SHA]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for index in range(7):
            assert process.stdout.readline() == f"{index}\n"
        process.send_signal(signal.SIGKILL)
    spool = BlobFolder(tmp_path).spool(SHA, len(DATA), 1000)
    assert spool.missing() == [7, 8, 9, 10]
    fill(spool._folder, DATA, 1000, spool.missing())
    assert spool.finish().read_bytes() == DATA
