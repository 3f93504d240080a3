"""Length-prefixed msgpack over a pair of pipes, between a service and its subprocess (agent or worker).

Frame: 4 bytes little-endian length, then one message as packed by `shared.codec`. Standard output stays free for
libraries that print: the pipes are inherited file descriptors named in the subprocess's arguments.
"""

from __future__ import annotations

import contextlib
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
        head = self._exactly(4)
        if head is None:
            return None
        size = int.from_bytes(head, "little")
        if size > MAX_MESSAGE_BYTES:
            raise DecodeError(f"frame of {size} bytes, the limit is {MAX_MESSAGE_BYTES}")
        body = self._exactly(size)
        # Packets of steps go through whole; the other end is a process of ours.
        return None if body is None else unpack(body, self._wanted, longest=MAX_MESSAGE_BYTES)

    def _exactly(self, size: int) -> bytes | None:
        """So many bytes, or None where the pipe ends before; an unbuffered pipe gives them in pieces."""
        data = b""
        while len(data) < size:
            piece = self._pipe.read(size - len(data))
            if not piece:
                return None
            data += piece
        return data


def frame(message: object) -> bytes:
    """One message as it goes over the pipe. Raises `ValueError` for one that the other side would refuse as too
    large."""
    body = pack(message)
    if len(body) > MAX_MESSAGE_BYTES:
        raise ValueError(f"{type(message).__name__} of {len(body)} bytes, the limit is {MAX_MESSAGE_BYTES}")
    return len(body).to_bytes(4, "little") + body


class FrameWriter:
    """Writes messages to a pipe; safe from several threads. Blocks where the pipe is full and nobody reads it."""

    def __init__(self, pipe: BinaryIO) -> None:
        self._pipe = pipe
        self._lock = threading.Lock()

    def write(self, message: object) -> None:
        """Send one message. Raises `BrokenPipeError` (an `OSError`) when the other side is gone, and what `frame`
        does; then nothing was sent."""
        self.write_frame(frame(message))

    def write_frame(self, made: bytes) -> None:
        """Send what `frame` made. Raises `BrokenPipeError` (an `OSError`) when the other side is gone."""
        with self._lock:
            self._pipe.write(made)
            self._pipe.flush()

    def close(self) -> None:
        """Close our end; what could not be sent is lost."""
        # A pipe that broke still holds the rest in its buffer and fails once more; its descriptor is closed even so.
        with self._lock, contextlib.suppress(OSError):
            self._pipe.close()
