"""Releases on a device's disk: folders that are whole or not there, and `current`, which changes at once."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest

from edge_daemon.adapters.releases import Broken, Full, Gone, ReleaseFolder
from shared import release_pack
from shared.releases import in_use

ABOUT = (
    '{{"release": "{0}", "job": "job-1", "round": 1, "kind": "lora", "base": {{"model": "16x8"}}, "base_digest": "b", '
    '"task": {{"kind": "least_squares", "dataset": "points"}}}}'
)
FIRST, SECOND = "job-1.r1-1", "job-1.r1-2"


def content(folder: Path, release: str, size: int = 100_000) -> Path:
    """A fetched content of `release`."""
    files = folder / "files"
    files.mkdir()
    (files / "adapter_model.safetensors").write_bytes(os.urandom(size))
    (files / release_pack.ABOUT).write_text(ABOUT.format(release))
    release_pack.write(files, folder / "content")
    return folder / "content"


@pytest.fixture
def releases(tmp_path: Path) -> ReleaseFolder:
    return ReleaseFolder(tmp_path / "state", fsync=False)


def staged(releases: ReleaseFolder, release: str) -> None:
    into = Path(tempfile.mkdtemp(dir=releases.root.parent.parent))
    releases.stage(content(into, release, 1000), release)


def test_a_release_is_staged_and_put_in_place(releases: ReleaseFolder) -> None:
    assert (releases.there(), releases.active(), in_use(releases.root)) == (frozenset(), "", None)
    staged(releases, FIRST)
    assert (releases.there(), releases.active()) == ({FIRST}, "")
    releases.activate(FIRST)
    current = releases.root / "current"
    assert (str(current.readlink()), releases.active(), in_use(releases.root)) == (FIRST, FIRST, releases.folder(FIRST))
    assert sorted(path.name for path in current.iterdir()) == ["adapter_model.safetensors", "muster.json"]
    staged(releases, SECOND)
    releases.activate(SECOND)
    releases.drop(SECOND)
    assert releases.there() == {FIRST, SECOND}, "what is in use is never dropped"
    releases.activate("")
    assert (releases.active(), current.is_symlink()) == ("", False)
    releases.drop(FIRST)
    assert releases.there() == {SECOND}


def test_others_may_read_it_whatever_the_umask_of_the_service(releases: ReleaseFolder) -> None:
    former = os.umask(0o077)
    try:
        staged(releases, FIRST)
    finally:
        os.umask(former)
    folder = releases.folder(FIRST)
    assert [oct(path.stat().st_mode & 0o777) for path in (releases.root, folder)] == ["0o755", "0o755"]
    assert {oct(path.stat().st_mode & 0o777) for path in folder.iterdir()} == {"0o644"}


def test_what_is_not_the_release_is_refused(releases: ReleaseFolder, tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    other = content(tmp_path / "one", SECOND)
    with pytest.raises(Broken, match=f"it says to be {SECOND}"):
        releases.stage(other, FIRST)
    assert [path.name for path in releases.root.iterdir()] == []
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "adapter_config.json").write_text("{}")
    release_pack.write(tmp_path / "files", tmp_path / "plain")
    with pytest.raises(Broken, match="there is no muster.json in it"):
        releases.check(tmp_path / "plain")
    with pytest.raises(Gone, match="the folder of job-1.r1-2 is gone"):
        releases.activate(SECOND)


def test_a_disk_that_is_not_ours_to_write_is_no_fault_of_the_release(releases: ReleaseFolder, tmp_path: Path) -> None:
    packed = content(tmp_path, FIRST)
    releases.root.parent.mkdir(parents=True, exist_ok=True)
    releases.root.write_text("a file in its place")
    with pytest.raises(Full, match="File exists"):
        releases.stage(packed, FIRST)


def test_leftovers_of_a_crash_go(releases: ReleaseFolder) -> None:
    for release in (FIRST, SECOND):
        staged(releases, release)
    releases.activate(FIRST)
    (releases.root / ".tmp-of-a-crash").mkdir()
    (releases.root / ".current.new").symlink_to(SECOND)
    releases.tidy(())
    assert sorted(path.name for path in releases.root.iterdir()) == ["current", FIRST]
    (releases.root / ".current.new").symlink_to("nowhere")
    staged(releases, SECOND)
    releases.activate(SECOND)
    assert releases.active() == SECOND


def test_current_that_points_to_nothing_is_no_release(releases: ReleaseFolder) -> None:
    staged(releases, FIRST)
    releases.activate(FIRST)
    shutil.rmtree(releases.folder(FIRST))
    assert (releases.active(), in_use(releases.root)) == ("", None)


def test_a_reader_always_finds_a_whole_release(releases: ReleaseFolder) -> None:
    for release in (FIRST, SECOND):
        staged(releases, release)
    releases.activate(FIRST)
    ended = threading.Event()
    seen: list[str] = []

    def read() -> None:
        while not ended.is_set():
            folder = in_use(releases.root)
            seen.append("nothing" if folder is None else release_pack.about(folder).release)

    readers = [threading.Thread(target=read) for _ in range(2)]
    for reader in readers:
        reader.start()
    for number in range(200):
        releases.activate((FIRST, SECOND)[number % 2])
    ended.set()
    for reader in readers:
        reader.join()
    assert set(seen) == {FIRST, SECOND}


def test_a_full_disk_leaves_what_was_there(tmp_path: Path) -> None:
    """In a process whose files may not grow: the write fails in the middle."""
    (tmp_path / "one").mkdir()
    packed = content(tmp_path / "one", FIRST, 300_000)
    code = (
        "import resource, sys, signal\n"
        "from pathlib import Path\n"
        "from edge_daemon.adapters.releases import ReleaseFolder, Full\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "try:\n"
        f"    ReleaseFolder(Path({str(tmp_path)!r})).stage(Path({str(packed)!r}), {FIRST!r})\n"
        "except Full as error:\n"
        "    print('full:', error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100, check=False)
    assert done.stdout.startswith("full: "), done.stderr
    assert list((tmp_path / "releases").iterdir()) == [], "half a release was left"
    releases = ReleaseFolder(tmp_path)
    releases.stage(packed, FIRST)
    assert releases.there() == {FIRST}
