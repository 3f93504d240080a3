"""JSONL(.gz) files of an emulation: read whole, written whole, equal rows give equal bytes."""

from __future__ import annotations

import gzip
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgspec

from shared.errors import UserError
from shared.files import UNREADABLE, write_whole

Row = dict[str, Any]


def read_rows(path: Path) -> list[Row]:
    """All rows. Raises `UserError` where the file is missing, unreadable, empty, or a line is no JSON object."""
    try:
        data = path.read_bytes()
        text = gzip.decompress(data) if path.suffix == ".gz" else data
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except UNREADABLE as error:
        raise UserError(f"{path}: can't be read: {error}") from error
    decoder = msgspec.json.Decoder(Row)
    rows: list[Row] = []
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            try:
                rows.append(decoder.decode(line))
            except msgspec.MsgspecError as error:
                raise UserError(f"{path}: line {number} is not a JSON object: {error}") from error
    if not rows:
        raise UserError(f"{path}: no rows")
    return rows


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """Write rows to a `.jsonl.gz` file, whole or not at all."""
    text = b"".join(msgspec.json.encode(row) + b"\n" for row in rows)
    write_whole(path, gzip.compress(text, compresslevel=6, mtime=0))
