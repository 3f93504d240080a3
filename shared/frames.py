"""Length-prefixed msgpack over a pair of pipes, between a service and its subprocess (agent or worker).

Frame: 4 bytes little-endian length, then one message as packed by `shared.codec`. Standard output stays free for
libraries that print: the pipes are inherited file descriptors named in the subprocess's arguments.
"""

from __future__ import annotations

import threading
from typing import BinaryIO, Generic, TypeVar

from shared.codec import MAX_MESSAGE_BYTES, pack, unpack
from shared.errors import DecodeError

T = TypeVar("T")


class FrameReader(Generic[T]):
    """Reads messages of type `wanted` from a pipe; blocks."""

    def __init__(self, pipe: BinaryIO, wanted: type[T]) -> None:
        self._pipe = pipe
        self._wanted = wanted

    def read(self) -> T | None:
        """The next message, or None at the end of the pipe. Raises `DecodeError` on a broken frame."""
        head = self._pipe.read(4)
        if len(head) < 4:
            return None
        size = int.from_bytes(head, "little")
        if size > MAX_MESSAGE_BYTES:
            raise DecodeError(f"frame of {size} bytes, the limit is {MAX_MESSAGE_BYTES}")
        body = self._pipe.read(size)
        if len(body) < size:
            return None
        return unpack(body, self._wanted)


class FrameWriter:
    """Writes messages to a pipe; safe from several threads."""

    def __init__(self, pipe: BinaryIO) -> None:
        self._pipe = pipe
        self._lock = threading.Lock()

    def write(self, message: object) -> None:
        """Send one message. Raises `BrokenPipeError` (an `OSError`) when the other side is gone."""
        body = pack(message)
        with self._lock:
            self._pipe.write(len(body).to_bytes(4, "little") + body)
            self._pipe.flush()
