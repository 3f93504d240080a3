"""The files of a release as one content: back as they were, the same bytes each time, and anything else refused."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared import release_pack
from shared.codec import pack
from shared.errors import DecodeError
from shared.ids import digest_of
from shared.release_pack import PackedFile, PackedFiles

FILES = {
    "adapter_config.json": b'{"r": 8}',
    "adapter_model.safetensors": bytes(range(256)) * 9000,
    "muster.json": b"{}",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "folder"
    made.mkdir()
    for name, content in FILES.items():
        (made / name).write_bytes(content)
    return made


@pytest.fixture
def packed(folder: Path, tmp_path: Path) -> Path:
    release_pack.write(folder, tmp_path / "release.pack")
    return tmp_path / "release.pack"


def unpacked(path: Path, tmp_path: Path) -> dict[str, bytes]:
    into = tmp_path / "into"
    into.mkdir()
    release_pack.unpack_into(path, into, fsync=False)
    return {file.name: file.read_bytes() for file in into.iterdir()}


def test_the_files_come_back(packed: Path, tmp_path: Path) -> None:
    assert [file.name for file in release_pack.check(packed)] == sorted(FILES)
    assert unpacked(packed, tmp_path) == FILES


def test_the_same_files_give_the_same_bytes(folder: Path, packed: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    for name in reversed(FILES):
        (other / name).write_bytes(FILES[name])
    release_pack.write(other, tmp_path / "again.pack")
    assert (tmp_path / "again.pack").read_bytes() == packed.read_bytes()


@pytest.mark.parametrize("make", ["folder", "link", "name", "many", "none"])
def test_what_is_no_release_is_not_packed(folder: Path, tmp_path: Path, make: str) -> None:
    match make:
        case "folder":
            (folder / "sub").mkdir()
        case "link":
            (folder / "passwd").symlink_to("/etc/passwd")
        case "name":
            (folder / "two words").write_bytes(b"")
        case "many":
            for number in range(release_pack.MAX_FILES):
                (folder / f"f{number}").write_bytes(b"")
        case "none":
            for path in folder.iterdir():
                path.unlink()
    with pytest.raises(ValueError, match="only plain files|no release can be made"):
        release_pack.write(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def forged(path: Path, files: list[tuple[str, bytes]], *, magic: bytes = b"musterR1", rest: bytes = b"") -> Path:
    """A pack that says what its maker likes."""
    listed = [PackedFile(name=name, size=len(content), sha=digest_of(content)) for name, content in files]
    head = pack(PackedFiles(files=listed))
    contents = b"".join(content for _, content in files)
    path.write_bytes(struct.pack("<8sI", magic, len(head)) + head + contents + rest)
    return path


@pytest.mark.parametrize(
    "name", ["../outside", "/etc/passwd", "sub/file", "..", ".hidden", "", "a\nb", "a\x00b", "x" * 129, "ü"]
)
def test_a_name_that_leads_elsewhere_is_refused(tmp_path: Path, name: str) -> None:
    path = forged(tmp_path / "pack", [("good", b"1"), (name, b"2")])
    with pytest.raises(DecodeError, match="Expected `str` matching regex"):
        release_pack.check(path)
    into = tmp_path / "deep" / "into"
    into.mkdir(parents=True)
    with pytest.raises(DecodeError):
        release_pack.unpack_into(path, into, fsync=False)
    assert list(into.iterdir()) == []
    assert sorted(found.name for found in tmp_path.iterdir()) == ["deep", "pack"]


def test_other_contents_are_refused(packed: Path, tmp_path: Path) -> None:
    whole = packed.read_bytes()
    bad = {
        "another beginning": (b"PKmuster" + whole[8:], "begins with something else"),
        "cut before the list": (whole[:10], "ends before its list"),
        "cut in the list": (whole[:60], "not msgpack"),
        "cut in a file": (whole[:-1], "the list says"),
        "more behind": (whole + b"x", "the list says"),
        "a huge list": (struct.pack("<8sI", b"musterR1", 2**31) + whole[12:], "the limit is"),
        "another byte": (whole[:-1] + bytes([whole[-1] ^ 1]), "is not what its digest says"),
    }
    for what, (content, reason) in bad.items():
        path = tmp_path / "bad"
        path.write_bytes(content)
        with pytest.raises(DecodeError, match=reason):
            release_pack.check(path)
            pytest.fail(what)


def test_two_files_of_one_name_are_refused(tmp_path: Path) -> None:
    path = forged(tmp_path / "pack", [("one", b"1"), ("one", b"2")])
    with pytest.raises(DecodeError, match="two files of one name"):
        release_pack.check(path)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_damaged_byte_never_passes(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = forged(tmp_path_factory.mktemp("damaged") / "pack", [("a.json", b"12345"), ("b.json", b"6789")])
    whole = bytearray(path.read_bytes())
    at = data.draw(st.integers(0, len(whole) - 1))
    whole[at] ^= data.draw(st.integers(1, 255))
    path.write_bytes(whole)
    try:
        found = release_pack.check(path)
    except DecodeError:
        return
    # A name may have become another one that is allowed; its content is what it was.
    assert [file.sha for file in found] == [digest_of(b"12345"), digest_of(b"6789")]
