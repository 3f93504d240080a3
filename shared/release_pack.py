"""The files of a release as one content: a list of them with their digests, then their bytes, one after another.

    8 bytes   b"musterR1"
    4 bytes   length of the list, little-endian
    list      msgpack of `PackedFiles`
    contents  in the order of the list, nothing between or after

There are names, never paths; nothing is decoded but the list; the same files give the same bytes.
"""

from __future__ import annotations

import hashlib
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, BinaryIO

import msgspec
from msgspec import Meta

from shared.codec import MAX_MESSAGE_BYTES, SCHEMA, pack, unpack
from shared.errors import DecodeError
from shared.fields import MAX_BLOB_BYTES, JobName, Natural, Sha
from shared.files import sync_folder, write_pieces
from shared.jobs import BaseSpec, TaskSpec
from shared.release_messages import ReleaseId, ReleaseKind

MAGIC = b"musterR1"
ABOUT = "muster.json"
"""File of a release that says what it is: `About`."""
MAX_FILES = 64
FileName = Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}\Z")]
_HEAD = struct.Struct("<8sI")
_BLOCK = 1 << 20


class About(msgspec.Struct, frozen=True, kw_only=True):
    """`muster.json` among the files of a release: what they are, for whoever opens the folder without us."""

    release: ReleaseId
    job: JobName
    round: Natural
    kind: ReleaseKind
    base: BaseSpec
    base_digest: str
    task: TaskSpec


class PackedFile(msgspec.Struct, frozen=True, kw_only=True):
    """One file; `size` in bytes."""

    name: FileName
    size: Natural
    sha: Sha


class PackedFiles(msgspec.Struct, frozen=True, kw_only=True):
    """The list."""

    schema: int = SCHEMA
    files: Annotated[list[PackedFile], Meta(min_length=1, max_length=MAX_FILES)]


def about(folder: Path) -> About:
    """What the release in `folder` is. Raises `DecodeError` where there is no readable `muster.json`."""
    try:
        return msgspec.json.decode((folder / ABOUT).read_bytes(), type=About)
    except (OSError, msgspec.MsgspecError) as error:
        raise DecodeError(f"{folder / ABOUT}: {error}") from error


def write(folder: Path, target: Path) -> None:
    """Pack the files of `folder` into `target`, whole or not at all.

    Raises `ValueError` where they are no release: a folder in it, a name that is not allowed, too many or too large.
    """
    paths = sorted(folder.iterdir())
    files = []
    for path in paths:
        if not path.is_file() or path.is_symlink():
            raise ValueError(f"{path.name}: only plain files are released")
        files.append(PackedFile(name=path.name, size=path.stat().st_size, sha=_digest(path)))
    head = pack(PackedFiles(files=files))
    try:
        unpack(head, PackedFiles)
    except DecodeError as error:
        raise ValueError(f"{folder}: no release can be made of it: {error}") from error
    size = _HEAD.size + len(head) + sum(file.size for file in files)
    if size > MAX_BLOB_BYTES:
        raise ValueError(f"{size >> 20} MiB, the largest release has {MAX_BLOB_BYTES >> 20}")

    def pieces() -> Iterator[bytes]:
        yield _HEAD.pack(MAGIC, len(head)) + head
        for path in paths:
            with path.open("rb") as file:
                while block := file.read(_BLOCK):
                    yield block

    write_pieces(target, pieces())


def check(path: Path) -> list[PackedFile]:
    """The files in the pack at `path`, every one with the bytes that its digest says. Raises `DecodeError`."""
    files, start = _list(path)
    with path.open("rb") as pack_file:
        pack_file.seek(start)
        for file in files:
            whole = hashlib.sha256()
            for block in _blocks(pack_file, file.size):
                whole.update(block)
            if whole.hexdigest() != file.sha:
                raise DecodeError(f"{file.name} is not what its digest says")
    return files


def unpack_into(path: Path, folder: Path, *, fsync: bool = True) -> None:
    """Write the files of the pack at `path` into `folder`, which is there and empty. Raises `DecodeError`, `OSError`.

    Digests are checked once more: what is written is what the list says.
    """
    files, start = _list(path)
    with path.open("rb") as pack_file:
        pack_file.seek(start)
        for file in files:
            whole = hashlib.sha256()
            with (folder / file.name).open("xb") as out:
                for block in _blocks(pack_file, file.size):
                    whole.update(block)
                    out.write(block)
                out.flush()
                if fsync:
                    os.fsync(out.fileno())
            if whole.hexdigest() != file.sha:
                raise DecodeError(f"{file.name} is not what its digest says")
    if fsync:
        sync_folder(folder)


def _list(path: Path) -> tuple[list[PackedFile], int]:
    """The list, and where the contents begin."""
    size = path.stat().st_size
    with path.open("rb") as file:
        first = file.read(_HEAD.size)
        if len(first) < _HEAD.size:
            raise DecodeError("not a release: it ends before its list")
        magic, length = _HEAD.unpack(first)
        if magic != MAGIC:
            raise DecodeError("not a release: it begins with something else")
        if length > MAX_MESSAGE_BYTES:
            raise DecodeError(f"a list of {length} bytes, the limit is {MAX_MESSAGE_BYTES}")
        files = unpack(file.read(length), PackedFiles).files
    names = [file.name for file in files]
    if len(set(names)) < len(names):
        raise DecodeError("two files of one name")
    start = _HEAD.size + length
    if start + sum(file.size for file in files) != size:
        raise DecodeError(f"{size} bytes, the list says {start + sum(file.size for file in files)}")
    return files, start


def _blocks(file: BinaryIO, size: int) -> Iterator[bytes]:
    """The next `size` bytes."""
    while size > 0:
        block = file.read(min(size, _BLOCK))
        if not block:
            raise DecodeError("it ends in the middle of a file")
        size -= len(block)
        yield block


def _digest(path: Path) -> str:
    whole = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            whole.update(block)
    return whole.hexdigest()
