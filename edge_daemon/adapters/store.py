"""What the daemon keeps on disk: journal, counter of connections, blobs, work. A crash leaves the old or the new."""

from __future__ import annotations

import errno
import logging
import os
import shutil
import threading
import time
from contextlib import suppress
from pathlib import Path

import msgspec

from edge_daemon.adapters.releases import ReleaseFolder
from edge_daemon.core.state import Identity, Journal
from shared import bases
from shared.blob_folder import BlobFolder
from shared.errors import UserError
from shared.files import write_whole
from shared.processes import lock_folder

log = logging.getLogger(__name__)
UPDATE_FILE = "update.adapter"


class Store:
    """The state folder of one daemon; a second process is refused. Raises `UserError` for a folder it can't use."""

    def __init__(self, root: Path, *, fsync: bool = True) -> None:
        self.root = root
        self._fsync = fsync
        try:
            (root / "work").mkdir(parents=True, exist_ok=True)
            self._lock = lock_folder(root, "muster-edge")
            self.blobs = BlobFolder(root / "blobs", fsync=fsync)
            self.releases = ReleaseFolder(root, fsync=fsync)
        except OSError as error:
            raise UserError(f"state_dir {root}: {error.strerror}") from error
        self._epoch_guard = threading.Lock()
        self._given = 0
        """The last epoch, also where it could not be written."""
        self._epoch_kept = True

    def close(self) -> None:
        """Let another process have the folder."""
        self.blobs.close()
        os.close(self._lock)

    def check_writable(self) -> None:
        """Raises `UserError` where nothing can ever be written here. A full disk is no such case: it may get room."""
        path = self.root / "writable"
        try:
            self._replace(path, b"")
            path.unlink()
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise UserError(f"state_dir {self.root}: can't be written: {error.strerror}") from error

    def load(self) -> Journal:
        """The journal; a damaged one is moved aside and an empty one taken: the retained assignment tells the rest."""
        path = self.root / "journal"
        try:
            return msgspec.msgpack.decode(path.read_bytes(), type=Journal)
        except FileNotFoundError:
            return Journal()
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            aside = path.with_name(f"journal.damaged-{int(time.time())}")
            path.replace(aside)
            log.error("the journal is damaged (%s); moved to %s", error, aside)
            return Journal()

    def save(self, journal: Journal) -> None:
        """Write the journal durably. Raises `OSError` (disk full) with the old one intact."""
        self._replace(self.root / "journal", msgspec.msgpack.encode(journal))

    def next_epoch(self) -> int:
        """A number above any it gave before; safe from any thread. Where it can't be written it counts all the same."""
        with self._epoch_guard:
            self._given = max(self._epoch(), self._given) + 1
            self._keep_epoch()
            return self._given

    def raise_epoch(self, at_least: int) -> None:
        """Go on from `at_least` where the counter was lost."""
        with self._epoch_guard:
            if max(self._epoch(), self._given) < at_least:
                self._given = at_least
                self._keep_epoch()

    @property
    def bases(self) -> Path:
        """Where agents keep the base models they fetched."""
        return self.root / bases.FOLDER

    @property
    def digests(self) -> Path:
        """Where agents remember the digests of base models."""
        return self.root / "digests.json"

    def work_folder(self, identity: Identity) -> Path:
        """The folder of one piece of work: checkpoints and its update until that is adopted."""
        return self.root / "work" / f"{identity.job}.{identity.round}.{identity.attempt}"

    def drop_work(self, identity: Identity) -> None:
        """Remove a work folder."""
        shutil.rmtree(self.work_folder(identity), ignore_errors=True)

    def tidy(self, identities: tuple[Identity, ...], shas: tuple[str, ...]) -> None:
        """Remove every work folder and blob but these."""
        kept = {self.work_folder(identity) for identity in identities}
        for folder in (self.root / "work").iterdir():
            if folder not in kept:
                shutil.rmtree(folder, ignore_errors=True)
        for sha in (self.blobs.digests() | self.blobs.parts()) - set(shas):
            self.blobs.remove(sha)

    def disk_free(self) -> int:
        """Bytes free where the state lies."""
        return shutil.disk_usage(self.root).free

    def _epoch(self) -> int:
        try:
            return int((self.root / "epoch").read_text(encoding="ascii"))
        except FileNotFoundError:
            return 0
        except ValueError:
            # Wall-clock seconds are above any count of connections there can have been.
            return int(time.time())

    def _keep_epoch(self) -> None:
        """Write the last epoch; where that fails, empty the file: the next process then counts on from the clock.

        A number that lags would be given again after a kill, and an empty file has room on a full disk.
        """
        path = self.root / "epoch"
        try:
            self._replace(path, str(self._given).encode())
            self._epoch_kept = True
        except OSError as error:
            with suppress(OSError):
                path.write_bytes(b"")
            if self._epoch_kept:
                log.warning("the counter of connections can't be written, counting on in memory: %s", error)
            self._epoch_kept = False

    def _replace(self, path: Path, data: bytes) -> None:
        write_whole(path, data, fsync=self._fsync)
