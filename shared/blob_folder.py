"""Contents on disk under their digest: finished blobs, and the resumable parts of those on their way.

A finished blob is the file `<sha>`: it appears whole (temp, fsync, rename, fsync of the folder) or not at all. A
content under way is `<sha>.part`; its layout stands at `Spool`. One process owns a folder and uses it from one thread;
others may read finished blobs.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import struct
import tempfile
import zlib
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path

from shared.errors import MusterError, RemoteError
from shared.files import sync_folder
from shared.ids import digest_of, is_digest
from shared.messages import BlobRef

SPOOL_BYTES = 16 * 1024**3
MAX_CHUNKS = 2**17
"""Of one content: 512 MiB in 4 KiB chunks. A sender that asks for smaller ones is refused."""
_BLOCK = 1024 * 1024
_OPEN_FILES = 64
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_HEAD = struct.Struct("<8sII")
_SLOT = struct.Struct("<II")
_MAGIC = b"musterP1"


class NoRoom(MusterError):
    """No space for a content, on the disk or under the spool's cap; the text is the one-line reason."""


class Corrupt(RemoteError):
    """A content is not what its digest says."""


@contextlib.contextmanager
def _room(what: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in _NO_ROOM:
            raise
        raise NoRoom(f"{what}: {os.strerror(error.errno or errno.ENOSPC).lower()}") from error


class BlobFolder:
    """The folder at `root`, made if it is missing. Leftovers of writes that a crash cut off are removed at once;
    parts stay, to be resumed. `spool_bytes` caps all parts together."""

    def __init__(self, root: Path, *, fsync: bool = True, spool_bytes: int = SPOOL_BYTES) -> None:
        self.root = root
        self.fsync = fsync
        self.spool_bytes = spool_bytes
        self._fds: OrderedDict[str, int] = OrderedDict()
        self._spools: dict[str, Spool] = {}
        self._parts: dict[str, int] = {}
        root.mkdir(parents=True, exist_ok=True)
        for path in sorted(root.iterdir()):
            if path.suffix == ".tmp" or (path.suffix == ".part" and path.with_suffix("").exists()):
                path.unlink()
            elif path.suffix == ".part" and is_digest(path.stem):
                self._parts[path.stem] = path.stat().st_size

    def path(self, sha: str) -> Path | None:
        """Where the content is, or None if it is not here in full."""
        path = self.root / sha
        return path if is_digest(sha) and path.is_file() else None

    def size(self, sha: str) -> int | None:
        """Bytes of a content, or None if it is not here in full."""
        try:
            return (self.root / sha).stat().st_size if is_digest(sha) else None
        except FileNotFoundError:
            return None

    def digests(self) -> set[str]:
        """All contents that are here in full."""
        return {entry.name for entry in os.scandir(self.root) if is_digest(entry.name)}

    def parts(self) -> set[str]:
        """All contents that are here in part."""
        return set(self._parts)

    def put(self, data: bytes | memoryview) -> BlobRef:
        """Store `data`; on disk when this returns. Raises `NoRoom`."""
        ref = BlobRef(sha=digest_of(data), size=len(data))
        if self.path(ref.sha) is None:
            with self._temporary(ref.sha) as (fd, _):
                _write_all(fd, data, 0)
        return ref

    def adopt(self, path: Path) -> BlobRef:
        """Move the finished file at `path` in, hashing it; copied where it lies on another file system. Raises
        `NoRoom`, and then `path` is still there; after a return it is not."""
        with path.open("rb") as file:
            sha, size = _hash(file.fileno())
            if self.path(sha) is None and not self._renamed(path, file.fileno(), sha):
                with self._temporary(sha) as (fd, _):
                    for at in range(0, size, _BLOCK):
                        _write_all(fd, os.pread(file.fileno(), _BLOCK, at), at)
        path.unlink(missing_ok=True)
        return BlobRef(sha=sha, size=size)

    def read(self, sha: str, offset: int, length: int) -> bytes | None:
        """`length` bytes from `offset`, fewer at the end; None if the content is not here in full."""
        if not is_digest(sha):
            return None
        try:
            return os.pread(self.open_file(sha, os.O_RDONLY), length, offset)
        except FileNotFoundError:
            return None

    def remove(self, sha: str) -> None:
        """Forget a content and its part, if they are here."""
        if not is_digest(sha):
            return
        if sha in self._parts:
            self.discard_part(sha)
        self.close_file(sha)
        (self.root / sha).unlink(missing_ok=True)

    def spool(self, sha: str, size: int, chunk: int) -> Spool:
        """The part of a content of `size` bytes that comes in chunks of `chunk` bytes, resumed where a former process
        left it. Its space is reserved here: raises `NoRoom`. Raises `RemoteError` for sizes that make no sense."""
        if not is_digest(sha) or size < 0 or chunk < 1 or size > chunk * MAX_CHUNKS:
            raise RemoteError(f"a blob of {size} bytes in chunks of {chunk}: at most {MAX_CHUNKS} chunks")
        spool = self._spools.get(sha)
        if spool is not None and spool.size != size:
            raise RemoteError(f"a blob announced with {size} bytes, before with {spool.size}")
        if spool is None:
            self._make_room(sha, size)
            self._parts[sha] = size
            spool = Spool(self, sha, size)
        try:
            with _room(f"reserve {size} bytes in {self.root}"):
                spool.lay_out(chunk)
        except NoRoom:
            self.discard_part(sha)
            raise
        self._spools[sha] = spool
        return spool

    def release(self, sha: str) -> None:
        """Stop using a part but keep it, to be resumed by a later `spool`."""
        self._spools.pop(sha, None)
        self.close_file(f"{sha}.part")

    def discard_part(self, sha: str) -> None:
        """Remove a part."""
        self.release(sha)
        self._parts.pop(sha, None)
        if is_digest(sha):
            (self.root / f"{sha}.part").unlink(missing_ok=True)

    def close(self) -> None:
        """Close all files; the folder may be used again."""
        for name in list(self._fds):
            self.close_file(name)

    def open_file(self, name: str, flags: int) -> int:
        """An open descriptor of a file in the folder; it stays valid until the next call of any method."""
        fd = self._fds.get(name)
        if fd is None:
            fd = os.open(self.root / name, flags | os.O_CLOEXEC, 0o600)
            self._fds[name] = fd
            if len(self._fds) > _OPEN_FILES:
                os.close(self._fds.popitem(last=False)[1])
        else:
            self._fds.move_to_end(name)
        return fd

    def close_file(self, name: str) -> None:
        """Close the descriptor of a file, if it is open."""
        fd = self._fds.pop(name, None)
        if fd is not None:
            os.close(fd)

    def finish_part(self, sha: str, size: int) -> Path:
        """Make a verified part the content: cut what follows `size`, flush, rename."""
        part, path = self.root / f"{sha}.part", self.root / sha
        fd = self.open_file(part.name, os.O_RDWR)
        os.ftruncate(fd, size)
        if self.fsync:
            os.fsync(fd)
        part.replace(path)
        self._sync_folder()
        self.discard_part(sha)
        return path

    def _make_room(self, sha: str, size: int) -> None:
        taken = sum(held for name, held in self._parts.items() if name != sha)
        for name in [name for name in self._parts if name != sha and name not in self._spools]:
            if taken + size <= self.spool_bytes:
                break
            taken -= self._parts[name]
            self.discard_part(name)
        if taken + size > self.spool_bytes:
            raise NoRoom(f"{size} bytes over the spool's cap: {taken} of {self.spool_bytes} taken")

    def _renamed(self, path: Path, fd: int, sha: str) -> bool:
        if self.fsync:
            os.fsync(fd)
        try:
            path.replace(self.root / sha)
        except OSError as error:
            if error.errno != errno.EXDEV:
                raise
            return False
        self._sync_folder()
        return True

    @contextlib.contextmanager
    def _temporary(self, sha: str) -> Iterator[tuple[int, str]]:
        """A temp file to write to, which becomes the content `sha` unless the body raises."""
        with _room(f"write to {self.root}"):
            fd, name = tempfile.mkstemp(dir=self.root, suffix=".tmp")
            try:
                try:
                    yield fd, name
                    if self.fsync:
                        os.fsync(fd)
                finally:
                    os.close(fd)
                Path(name).replace(self.root / sha)
            except BaseException:
                Path(name).unlink(missing_ok=True)
                raise
            self._sync_folder()

    def _sync_folder(self) -> None:
        if self.fsync:
            sync_folder(self.root)


class Spool:
    """A content on its way, written chunk by chunk in any order. Made by `BlobFolder.spool`.

    Layout of the file: `size` bytes of data; a header (magic, chunk, number of chunks); per chunk a slot (index + 1,
    crc32 of the data), written after the data. Nothing is flushed meanwhile: on resuming a chunk counts only if its
    data has the slot's checksum, so neither a kill nor a power cut makes a hole look like data.
    """

    def __init__(self, folder: BlobFolder, sha: str, size: int) -> None:
        self.sha = sha
        self.size = size
        self.chunk = 0
        self._folder = folder
        self._have = bytearray()
        self._left = 0
        self._hash = hashlib.sha256()
        self._hashed = 0

    @property
    def count(self) -> int:
        """Chunks of the whole content; an empty content has none."""
        return len(self._have)

    @property
    def left(self) -> int:
        """Chunks that are not here yet."""
        return self._left

    def has(self, index: int) -> bool:
        """Whether chunk `index` is here."""
        return bool(self._have[index])

    def missing(self) -> list[int]:
        """Indexes of the chunks that are not here yet, ascending."""
        return [index for index, have in enumerate(self._have) if not have]

    def length(self, index: int) -> int:
        """Bytes of chunk `index`."""
        return min(self.chunk, self.size - index * self.chunk)

    def write(self, index: int, data: bytes | memoryview) -> bool:
        """Store chunk `index`, which must have its `length`; False if it was here already. Raises `NoRoom`."""
        if self._have[index]:
            return False
        with _room(f"write to {self._folder.root}"):
            _write_all(self._fd(), data, index * self.chunk)
            _write_all(self._fd(), _SLOT.pack(index + 1, zlib.crc32(data)), self._slot(index))
        self._mark(index, data)
        return True

    def finish(self) -> Path:
        """The content's path, once no chunk is left. Raises `Corrupt` if the whole has another digest; the part is
        then empty again, so that it can be fetched anew."""
        for at in range(self._hashed, self.size, _BLOCK):
            self._hash.update(os.pread(self._fd(), min(_BLOCK, self.size - at), at))
        if self._hash.hexdigest() != self.sha:
            self.reset()
            raise Corrupt(f"the content has another digest than {self.sha}")
        return self._folder.finish_part(self.sha, self.size)

    def reset(self) -> None:
        """Forget all chunks."""
        self._clear(self.chunk)
        self._write_head()

    def lay_out(self, chunk: int) -> None:
        """Count in chunks of `chunk` bytes from now on, keeping what is here and covers whole ones of them."""
        if chunk == self.chunk:
            return
        covered = self._covered() if self.chunk else self._resume()
        self._clear(chunk)
        self._reserve()
        self._write_head()
        for first, end in covered:
            for index in range(-(-first // chunk), self.count):
                start, length = index * chunk, self.length(index)
                if start + length > end:
                    break
                self.write(index, os.pread(self._fd(), length, start))

    def _fd(self) -> int:
        return self._folder.open_file(f"{self.sha}.part", os.O_RDWR | os.O_CREAT)

    def _slot(self, index: int) -> int:
        return self.size + _HEAD.size + index * _SLOT.size

    def _clear(self, chunk: int) -> None:
        self.chunk = chunk
        self._have = bytearray(-(-self.size // chunk))
        self._left = len(self._have)
        self._hash, self._hashed = hashlib.sha256(), 0

    def _mark(self, index: int, data: bytes | memoryview) -> None:
        self._have[index] = 1
        self._left -= 1
        if self._hashed == index * self.chunk:
            self._hash.update(data)
            self._hashed += len(data)

    def _reserve(self) -> None:
        try:
            os.posix_fallocate(self._fd(), 0, self._slot(self.count))
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
                raise

    def _write_head(self) -> None:
        slots = bytes(_SLOT.size * self.count)
        _write_all(self._fd(), _HEAD.pack(_MAGIC, self.chunk, self.count) + slots, self.size)

    def _resume(self) -> list[tuple[int, int]]:
        """Byte ranges of the data that a former process left and that are sound."""
        fd = self._fd()
        if self.size and os.fstat(fd).st_size == self.size:
            return [(0, self.size)]  # all chunks were in: `finish_part` had cut the slots off and was killed
        head = os.pread(fd, _HEAD.size, self.size)
        if len(head) < _HEAD.size:
            return []
        magic, chunk, count = _HEAD.unpack(head)
        if magic != _MAGIC or chunk < 1 or count != -(-self.size // chunk) or count > MAX_CHUNKS:
            return []
        self._clear(chunk)
        slots = os.pread(fd, _SLOT.size * count, self.size + _HEAD.size)
        for index, (mark, check) in enumerate(_SLOT.iter_unpack(slots[: len(slots) // _SLOT.size * _SLOT.size])):
            if mark == index + 1 and zlib.crc32(os.pread(fd, self.length(index), index * chunk)) == check:
                self._have[index] = 1
        return self._covered()

    def _covered(self) -> list[tuple[int, int]]:
        """Byte ranges that are here, as long as they reach."""
        ranges: list[tuple[int, int]] = []
        for index, have in enumerate(self._have):
            start, end = index * self.chunk, index * self.chunk + self.length(index)
            if have and ranges and ranges[-1][1] == start:
                ranges[-1] = (ranges[-1][0], end)
            elif have:
                ranges.append((start, end))
        return ranges


def _write_all(fd: int, data: bytes | memoryview, offset: int) -> None:
    """`data` at `offset`; the kernel may take it in pieces."""
    view = memoryview(data)
    while view:
        done = os.pwrite(fd, view, offset)
        view, offset = view[done:], offset + done


def _hash(fd: int) -> tuple[str, int]:
    """sha256 in hex and size of an open file."""
    found, size = hashlib.sha256(), 0
    while block := os.pread(fd, _BLOCK, size):
        found.update(block)
        size += len(block)
    return found.hexdigest(), size
