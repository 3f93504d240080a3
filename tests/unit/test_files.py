"""Files written whole; what can be read of a file of rows."""

from __future__ import annotations

import gzip
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from shared.files import model_fault, rows_fault, write_whole


@pytest.mark.parametrize("fsync", [True, False])
def test_a_file_is_replaced_and_nothing_is_left_beside_it(tmp_path: Path, fsync: bool) -> None:
    path = tmp_path / "deep" / "file"
    write_whole(path, b"old", fsync=fsync)
    write_whole(path, b"new", fsync=fsync)
    assert path.read_bytes() == b"new"
    assert [one.name for one in path.parent.iterdir()] == ["file"]


def test_what_can_not_be_written_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_whole(path, b"old")
    (tmp_path / ".file.tmp").mkdir()  # nothing can be written there, as on a full disk
    with pytest.raises(OSError, match="file"):
        write_whole(path, b"new")
    assert path.read_bytes() == b"old"


def damaged() -> bytes:
    """A gzip file with a byte turned over behind its header, which zlib notices and not gzip."""
    data = bytearray(gzip.compress(b'{"text": "a", "label": 0}\n' * 500, mtime=0))
    data[20] ^= 0xFF
    return bytes(data)


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("good.jsonl", b"\n" * 200_000 + b"{}\n", ""),
        ("good.jsonl.gz", gzip.compress(b"{}\n", mtime=0), ""),
        ("empty.jsonl", b"", "no rows"),
        ("empty.jsonl.gz", gzip.compress(b"", mtime=0), "no rows"),
        ("blank.jsonl", b" \n\n", "no rows"),
        ("cut.jsonl.gz", gzip.compress(b"{}\n" * 99, mtime=0)[:12], "can't be read: Compressed file ended"),
        ("damaged.jsonl.gz", damaged(), "can't be read: Error -3 while decompressing"),
    ],
)
def test_a_file_without_rows_is_named_with_the_reason(tmp_path: Path, name: str, content: bytes, told: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    found = rows_fault(path)
    assert found.startswith(f"{path}: {told}") if told else found == ""


def test_what_is_no_file_or_can_not_be_read_is_named(tmp_path: Path) -> None:
    assert rows_fault(tmp_path / "none") == f"{tmp_path}/none: no such file"
    assert rows_fault(tmp_path) == f"{tmp_path}: not a file"
    # Its first page is never mapped: a reading error that root meets too.
    assert rows_fault(Path("/proc/self/mem")) == "/proc/self/mem: can't be read: Input/output error"


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b'{"a": 1}\n\n{"b": 2}', ""),
        (b'{"a": 1}\n\nnothing\n', "row 3 is no JSON object"),
        (b'{"a": 1}\n[1]\n', "row 2 is no JSON object"),
        (b"\n \n", "no rows"),
    ],
)
def test_looked_at_whole_the_damaged_row_is_named(tmp_path: Path, content: bytes, told: str) -> None:
    for name, data in (("rows.jsonl", content), ("rows.jsonl.gz", gzip.compress(content, mtime=0))):
        path = tmp_path / name
        path.write_bytes(data)
        found = rows_fault(path, whole=True)
        assert found.startswith(f"{path}: {told}") if told else found == ""


@pytest.fixture
def hidden(tmp_path: Path) -> Iterator[Path]:
    """A folder that this process may not look into; as root it is somebody else for that."""
    folder = tmp_path / "hidden"
    folder.mkdir()
    (folder / "rows.jsonl").write_text('{"text": "a"}\n', encoding="utf-8")
    (folder / "model").mkdir()
    for above in (tmp_path, *tmp_path.parents):
        if above.stat().st_uid == os.getuid() and above.is_relative_to("/tmp"):
            above.chmod(above.stat().st_mode | 0o055)
    folder.chmod(0)
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield folder
    finally:
        if root:
            os.seteuid(0)
        folder.chmod(0o700)


def test_what_may_not_be_looked_at_is_told_in_one_line(hidden: Path) -> None:
    """A daemon must not end for one of its data sets, nor a coordinator for one of its models."""
    rows, model = hidden / "rows.jsonl", hidden / "model"
    assert rows_fault(rows) == f"{rows}: can't be read: Permission denied"
    assert model_fault(model) == f"{model}: can't be read: Permission denied"
