"""Files written whole."""

from __future__ import annotations

from pathlib import Path

import pytest

from shared.files import write_whole


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
