"""Files written whole or not at all; whether a file of rows can be read at all."""

from __future__ import annotations

import gzip
import os
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

import msgspec

UNREADABLE = (OSError, EOFError, zlib.error)
"""What reading a plain or gzipped file raises where it is missing, cut off or damaged."""
_PIECE = 64 * 1024


def write_whole(path: Path, data: bytes, *, fsync: bool = True) -> None:
    """Write `data` to `path`: a temporary file beside it, fsync, rename, fsync of the folder, which is made if missing.

    One writer per path at a time. Raises `OSError` with what was there before intact.
    """
    write_pieces(path, (data,), fsync=fsync)


def write_pieces(path: Path, pieces: Iterable[bytes | memoryview], *, fsync: bool = True) -> None:
    """`write_whole` for what need not lie in memory as one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    _write_out(temporary.open("wb"), temporary, path, pieces, fsync)


def write_owned(path: Path, data: bytes, *, mode: int) -> None:
    """`write_whole` with a mode from the first byte on; a file that root writes belongs to whom its folder belongs."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o750)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.unlink(missing_ok=True)  # of a write that was killed; its mode may not allow another
    descriptor = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, mode)
    file = os.fdopen(descriptor, "wb")
    os.fchmod(descriptor, mode)  # whatever the umask is
    if os.geteuid() == 0:
        owner = path.parent.stat()
        os.fchown(descriptor, owner.st_uid, owner.st_gid)
    _write_out(file, temporary, path, (data,), fsync=True)


def _write_out(file: BinaryIO, temporary: Path, path: Path, pieces: Iterable[bytes | memoryview], fsync: bool) -> None:
    with file:
        for piece in pieces:
            file.write(piece)
        file.flush()
        if fsync:
            os.fsync(file.fileno())
    temporary.replace(path)
    if fsync:
        sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make the names in `folder` survive a power cut: a rename is on disk only after it."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def rows_fault(path: Path, *, whole: bool = False) -> str:
    """Why no row can be read from a JSONL(.gz) file, or "". Reads up to its first line that is not blank.

    `whole`: reads all of it, and names the first row that is no JSON object.
    """
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        # Who may not look into a folder of its path is not told whether it is there.
        if not path.exists():
            return f"{path}: no such file"
        if not path.is_file():
            return f"{path}: not a file"
        with opener(path, "rb") as file:
            if whole:
                return _row_fault(path, file)
            while piece := file.read(_PIECE):
                if piece.strip():
                    return ""
    except UNREADABLE as error:
        return f"{path}: can't be read: {getattr(error, 'strerror', None) or error}"
    return f"{path}: no rows"


def _row_fault(path: Path, lines: Iterable[bytes]) -> str:
    decoder, found = msgspec.json.Decoder(dict[str, object]), False
    for number, line in enumerate(lines, start=1):
        if line.strip():
            found = True
            try:
                decoder.decode(line)
            except msgspec.MsgspecError as error:
                return f"{path}: row {number} is no JSON object: {error}"
    return "" if found else f"{path}: no rows"


def model_fault(folder: Path) -> str:
    """Why no base model can be loaded from `folder`, or "". Looks at names alone."""
    try:
        if not folder.is_dir():
            return f"{folder}: no such folder"
        if not os.access(folder, os.R_OK | os.X_OK):
            return f"{folder}: can't be read: Permission denied"
        if not (folder / "config.json").is_file():
            return f"{folder}: no config.json there"
        if not any(folder.glob("*.safetensors")):
            return f"{folder}: no *.safetensors there, and no other weights are loaded"
    except OSError as error:
        return f"{folder}: can't be read: {error.strerror}"
    return ""
