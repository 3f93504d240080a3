"""The releases on a device's disk: one folder each, and `current`, which points to the one in use.

    <state_dir>/releases/current -> demo-3f2a1c.r3-1      relative, so that the folder can be mounted elsewhere
    <state_dir>/releases/demo-3f2a1c.r3-1/                an ordinary PEFT or Hugging Face folder

A folder appears whole (written beside, flushed, renamed) or not at all; `current` changes by one rename.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from shared import release_pack
from shared.errors import DecodeError
from shared.files import sync_folder
from shared.releases import CURRENT, FILE_MODE, FOLDER, in_use

_FOLDER_MODE = 0o755


class Broken(Exception):
    """It is not the release it should be; the text is the one-line reason."""


class Gone(Exception):
    """Its folder is not there."""


class Full(Exception):
    """The disk does not take it now: it is full, read-only, broken, or not ours to write."""


class ReleaseFolder:
    """The folder `root/releases`. Its methods may be called from any thread, one at a time."""

    def __init__(self, root: Path, *, fsync: bool = True) -> None:
        self.root = root / FOLDER
        self._fsync = fsync

    def folder(self, release: str) -> Path:
        """Where the files of a release are."""
        return self.root / release

    def there(self) -> frozenset[str]:
        """Ids of the releases whose folders are whole."""
        if not self.root.is_dir():
            return frozenset()
        return frozenset(
            path.name for path in self.root.iterdir() if path.is_dir() and not path.is_symlink() and path.name[0] != "."
        )

    def active(self) -> str:
        """Id of the release that `current` points to; "": none, or it points to nothing."""
        found = in_use(self.root)
        return found.name if found is not None else ""

    def check(self, content: Path) -> None:
        """Look at every file in a fetched content. Raises `Broken`."""
        try:
            files = release_pack.check(content)
        except DecodeError as error:
            raise Broken(str(error)) from error
        if release_pack.ABOUT not in {file.name for file in files}:
            raise Broken(f"there is no {release_pack.ABOUT} in it")

    def stage(self, content: Path, release: str) -> None:
        """Write the files of a content into the folder of `release`. Raises `Broken` and `Full`."""
        if self.folder(release).is_dir():
            return
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            self.root.chmod(_FOLDER_MODE)
            made = Path(tempfile.mkdtemp(prefix=".", dir=self.root))
            try:
                release_pack.unpack_into(content, made, fsync=self._fsync)
                if release_pack.about(made).release != release:
                    raise DecodeError(f"it says to be {release_pack.about(made).release}")
                _open_to_readers(made)
                made.replace(self.folder(release))
            finally:
                shutil.rmtree(made, ignore_errors=True)
            self._sync()
        except DecodeError as error:
            raise Broken(str(error)) from error
        except OSError as error:
            raise _full(error) from error

    def activate(self, release: str) -> None:
        """Have `current` point to `release`; "": to nothing. Raises `Gone` and `Full`."""
        current = self.root / CURRENT
        try:
            if not release:
                current.unlink(missing_ok=True)
            elif not self.folder(release).is_dir():
                raise Gone(f"the folder of {release} is gone")
            else:
                new = self.root / f".{CURRENT}.new"
                new.unlink(missing_ok=True)
                new.symlink_to(release)
                new.replace(current)
            if self.root.is_dir():
                self._sync()
        except OSError as error:
            raise _full(error) from error

    def drop(self, release: str) -> None:
        """Remove the folder of a release; never the one in use."""
        if release != self.active():
            shutil.rmtree(self.folder(release), ignore_errors=True)

    def tidy(self, releases: tuple[str, ...]) -> None:
        """Remove everything but these and `current`."""
        if not self.root.is_dir():
            return
        for path in self.root.iterdir():
            if path.name in (*releases, CURRENT) or path.name == self.active():
                continue
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)

    def _sync(self) -> None:
        if self._fsync:
            sync_folder(self.root)


def _open_to_readers(folder: Path) -> None:
    """Inference servers run as other users, and the service writes under a umask that shuts them out."""
    folder.chmod(_FOLDER_MODE)
    for path in folder.iterdir():
        path.chmod(FILE_MODE)


def _full(error: OSError) -> Full:
    return Full(f"{error.filename or 'the disk'}: {os.strerror(error.errno) if error.errno else error}")
