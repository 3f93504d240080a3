"""The bases that the coordinator serves: files of a folder, found by the digest of their manifest.

No token is asked for: the digest, which only assignments tell, is what a device must know, and devices have no
operator's token. Nothing outside the manifests' names is ever read.
"""

from __future__ import annotations

from pathlib import Path

from shared import bases
from shared.errors import DecodeError, UserError
from shared.ids import digest_of


class NotOnShelf(UserError):
    """No base of this digest, or no such file in it."""


class Shelf:
    """The packed bases beneath `root`."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._known: dict[str, tuple[Path, frozenset[str]]] = {}
        self._looked = -1

    def file(self, sha: str, name: str = bases.MANIFEST) -> Path:
        """A file of the base whose manifest has digest `sha`. Raises `NotOnShelf`."""
        # Anyone may ask for anything: the folder is read again only after it changed.
        if sha not in self._known and (changed := self._changed()) != self._looked:
            self._look()
            self._looked = changed
        folder, names = self._known.get(sha, (self._root, frozenset()))
        if name not in names or not (folder / name).is_file():
            raise NotOnShelf(f"no file {name!r:.80} of a base {sha!r:.70} is served here")
        return folder / name

    def _changed(self) -> int:
        try:
            return self._root.stat().st_mtime_ns
        except OSError:
            return -1

    def _look(self) -> None:
        for path in self._root.glob(f"[!.]*/{bases.MANIFEST}"):
            try:
                data = path.read_bytes()
                manifest = bases.decode(data, digest_of(data))
            except (OSError, DecodeError):
                continue
            names = {bases.MANIFEST, *(file.name for file in manifest.files)}
            self._known[digest_of(data)] = (path.parent, frozenset(names))
