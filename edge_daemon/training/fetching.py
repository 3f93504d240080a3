"""Fetching a base that this device does not have: by HTTP from where the assignment says, checked by digest, resumable.

The owner's policy has allowed the host before (`edge_daemon.core.policy`); a redirect could lead elsewhere and is an
error. A cut connection goes on where it ended; what was fetched counts only once every file has its digest.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import http.client
import os
import random
import shutil
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from shared import backoff, bases, releases
from shared.errors import DecodeError
from shared.files import sync_folder, write_whole
from shared.messages import BaseSource
from shared.modeling import released
from shared.modeling.data import Beat, silent
from shared.modeling.faults import ModelFault, one_line

KEEP = 6
"""Bases kept on the device beside those of its releases, the last used ones; fewer where a new one needs the room."""
PART_DAYS = 7
"""An unfinished base that nothing was added to for so long is removed."""
TRIES = 6
"""Tries in a row that bring nothing new."""
TIMEOUT_S = 30.0
_PIECE = 1 << 18
_PART = ".part"


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: object) -> None:
        """Refuse every redirect: it then counts as an error."""


def fetch(source: BaseSource, root: Path, reserve: int = 0, beat: Beat = silent, base_s: float = 1.0) -> Path:
    """The folder of the base beneath `root`, fetched now if it is not there. `reserve`: bytes of disk to leave free.

    `base_s`: first pause between tries. Raises `ModelFault` with a one-line reason; a part stays, to be resumed.
    """
    try:
        root.mkdir(parents=True, exist_ok=True)
        with _alone(root, beat):
            return _fetched(source, root, reserve, beat, base_s)
    except (DecodeError, OSError) as error:
        raise ModelFault(f"base from {source.url}: {one_line(error, 160)}") from error


def _fetched(source: BaseSource, root: Path, reserve: int, beat: Beat, base_s: float) -> Path:
    folder = root / source.sha
    if (folder / bases.MANIFEST).is_file():
        os.utime(folder)
        return folder
    shutil.rmtree(folder, ignore_errors=True)  # what a removal that was cut off left
    data = b"".join(_pieces(source.url, 0, bases.MAX_MANIFEST_BYTES, beat, base_s))
    manifest = bases.decode(data, source.sha)
    part = root / f".{source.sha}{_PART}"
    _make_room(root, part, manifest.size - _held(part), reserve)
    part.mkdir(exist_ok=True)
    for file in manifest.files:
        _pull(f"{source.url}/{file.name}", part / file.name, file, beat, base_s)
    write_whole(part / bases.MANIFEST, data)
    part.replace(folder)
    sync_folder(root)
    _forget_old(root, folder)
    return folder


@contextlib.contextmanager
def _alone(root: Path, beat: Beat) -> Iterator[None]:
    """One agent of the device fetches, the others wait and find what it brought."""
    with (root / ".lock").open("w") as lock:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                _rest(0.5, beat)
        yield


def _pull(url: str, path: Path, file: bases.BaseFile, beat: Beat, base_s: float) -> None:
    held = path.stat().st_size if path.exists() else 0
    with path.open("r+b" if path.exists() else "wb") as out:
        out.seek(held)
        for piece in _pieces(url, held, file.size, beat, base_s) if held < file.size else ():
            out.write(piece)
        out.truncate(file.size)
        out.flush()
        os.fsync(out.fileno())
    if _digest(path, beat) != file.sha:
        path.unlink()
        raise DecodeError(f"{file.name} is not what its digest says")


def _pieces(url: str, start: int, end: int, beat: Beat, base_s: float) -> Iterator[bytes]:
    """The bytes from `start` on, at most to `end`, over as many connections as it takes. Raises `OSError`."""
    opener = urllib.request.build_opener(_NoRedirect)
    failed = 0
    while True:
        request = urllib.request.Request(url, headers={"Range": f"bytes={start}-"} if start else {})  # noqa: S310  # the policy admits http and https alone
        try:
            with opener.open(request, timeout=TIMEOUT_S) as answer:
                _skip(answer, start if answer.status != 206 else 0)
                while start < end and (piece := answer.read(min(_PIECE, end - start))):
                    start, failed = start + len(piece), 0
                    beat("fetching the base")
                    yield piece
                if start >= end or answer.length in (0, None):
                    return
            raise OSError("the connection ended early")
        except (OSError, http.client.HTTPException) as error:
            failed += 1
            gone = isinstance(error, urllib.error.HTTPError) and error.code < 500
            if gone or failed >= TRIES:
                raise OSError(one_line(error, 120)) from error
        _rest(backoff.delay(failed, random.random(), base_s=base_s, cap_s=20.0), beat)


def _skip(answer: IO[bytes], count: int) -> None:
    """Pass over what is there already, where the server sends the whole."""
    while count > 0 and (piece := answer.read(min(_PIECE, count))):
        count -= len(piece)


def _rest(seconds: float, beat: Beat) -> None:
    """Wait, but heed the daemon twice a second."""
    until = time.monotonic() + seconds
    while (left := until - time.monotonic()) > 0:
        beat("fetching the base")
        threading.Event().wait(min(left, 0.5))


def _digest(path: Path, beat: Beat) -> str:
    whole = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            whole.update(block)
            beat("fetching the base")
    return whole.hexdigest()


def _held(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir()) if folder.is_dir() else 0


def _make_room(root: Path, wanted: Path, size: int, reserve: int) -> None:
    """Remove bases until the part `wanted` can grow by `size`. Raises `OSError` where that can't be, with all of them
    still there."""
    _forget_parts(root, wanted)
    old, free = _removable(root), shutil.disk_usage(root).free
    if free + sum(map(_held, old)) >= size + reserve:
        while old and shutil.disk_usage(root).free < size + reserve:
            _remove(old.pop(0))
    _check_room(root, size, reserve)


def _check_room(root: Path, size: int, reserve: int) -> None:
    free = shutil.disk_usage(root).free
    if free < size + reserve:
        mib = 1024 * 1024
        raise OSError(
            f"disk: {free // mib} MiB free, {(size + reserve) // mib} MiB needed (base and the owner's reserve)"
        )


def _forget_old(root: Path, latest: Path) -> None:
    for path in _removable(root)[:-KEEP]:
        if path != latest:
            _remove(path)


def _forget_parts(root: Path, wanted: Path) -> None:
    """Remove parts of bases that nobody asked for again since."""
    for path in root.glob(f".*{_PART}"):
        if path != wanted and path.stat().st_mtime < time.time() - PART_DAYS * 86400:
            shutil.rmtree(path, ignore_errors=True)


def _removable(root: Path) -> list[Path]:
    """The bases that may go, in that order: what a removal that was cut off left, then the least recently used."""
    named = _named(root)
    found = [path for path in root.iterdir() if path.is_dir() and path.name[0] != "." and path.name not in named]
    return sorted(found, key=lambda path: ((path / bases.MANIFEST).is_file(), path.stat().st_mtime))


def _named(root: Path) -> set[str]:
    """The bases that the releases on this device name: other programs of its owner read them here."""
    named = set()
    for folder in (root.parent / releases.FOLDER).glob("*"):
        # One that can't be read is nobody's to use either.
        with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
            base = released.base_of(folder)
            named |= {base.name} if base is not None else set()
    return named


def _remove(folder: Path) -> None:
    """What is left if this is cut off counts as no base."""
    with contextlib.suppress(OSError):
        (folder / bases.MANIFEST).unlink()
    shutil.rmtree(folder, ignore_errors=True)
