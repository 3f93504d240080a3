"""Messages over a pipe between a service and its subprocess."""

from __future__ import annotations

import io
import os
import threading
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.codec import MAX_MESSAGE_BYTES, pack
from shared.errors import DecodeError
from shared.frames import FrameReader, FrameWriter
from shared.messages import Command, Done

MESSAGE = Done(sha="0" * 64, verdict="late", reason="after the round closed")


def frame(body: bytes) -> bytes:
    return len(body).to_bytes(4, "little") + body


class Drops(io.RawIOBase):
    """A pipe that gives its bytes a few at a time."""

    def __init__(self, data: bytes, sizes: list[int]) -> None:
        self._data = data
        self._sizes = sizes

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        step = min(size, self._sizes.pop(0) if self._sizes else size)
        taken, self._data = self._data[:step], self._data[step:]
        return taken


def reader(data: bytes, sizes: list[int] | None = None) -> FrameReader[Any]:
    return FrameReader(cast(Any, Drops(data, sizes or [])), Done)


@settings(max_examples=60, deadline=None)
@given(reasons=st.lists(st.text(max_size=90), max_size=5), sizes=st.lists(st.integers(1, 40), max_size=60))
def test_messages_come_as_sent_in_any_pieces(reasons: list[str], sizes: list[int]) -> None:
    pipe = io.BytesIO()
    writer = FrameWriter(pipe)
    messages = [Done(sha="1" * 64, verdict="stored", reason=reason) for reason in reasons]
    for message in messages:
        writer.write(message)
    frames = reader(pipe.getvalue(), sizes)
    assert [frames.read() for _ in messages] == messages
    assert frames.read() is None


@settings(max_examples=60, deadline=None)
@given(cut=st.integers(0, len(frame(pack(MESSAGE))) - 1))
def test_a_pipe_that_ends_in_a_message_has_ended(cut: int) -> None:
    """The other side was killed while it wrote."""
    assert reader(frame(pack(MESSAGE))[:cut]).read() is None


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (frame(bytes(1000)), "Done|msgpack"),
        ((MAX_MESSAGE_BYTES + 1).to_bytes(4, "little"), "limit"),
        (b"\xff\xff\xff\xff" + bytes(100), "limit"),
        (b"a library prints here\n", "limit"),
        (frame(pack(Command(kind="rebirth"))), "Done"),
        (frame(b""), "msgpack"),
    ],
)
def test_a_broken_frame_is_named(data: bytes, reason: str) -> None:
    with pytest.raises(DecodeError, match=reason):
        reader(data).read()


def test_the_reader_goes_on_after_a_refused_message() -> None:
    frames = reader(frame(b"\xc1") + frame(pack(MESSAGE)))
    with pytest.raises(DecodeError):
        frames.read()
    assert frames.read() == MESSAGE


def test_too_large_a_message_is_not_sent() -> None:
    pipe = io.BytesIO()
    with pytest.raises(ValueError, match="limit"):
        FrameWriter(pipe).write({"text": "x" * MAX_MESSAGE_BYTES})
    assert pipe.getvalue() == b""


def test_threads_do_not_mix_their_frames() -> None:
    read_end, write_end = os.pipe()
    with os.fdopen(read_end, "rb") as source, os.fdopen(write_end, "wb") as sink:
        writer, frames = FrameWriter(sink), FrameReader(source, Done)

        def send(name: str) -> None:
            for _ in range(50):
                writer.write(Done(sha=name * 64, verdict="stored", reason=name * 900))

        threads = [threading.Thread(target=send, args=(name,)) for name in "abcd"]
        for thread in threads:
            thread.start()
        seen = [frames.read() for _ in range(200)]
        for thread in threads:
            thread.join()
    assert all(done is not None and done.reason == done.sha[0] * 900 for done in seen)


def test_the_other_side_is_gone() -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    sink = os.fdopen(write_end, "wb", buffering=0)
    with sink, pytest.raises(BrokenPipeError):
        FrameWriter(cast(Any, sink)).write(MESSAGE)


def test_a_pipe_that_broke_is_closed_even_so() -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    writer = FrameWriter(os.fdopen(write_end, "wb"))
    with pytest.raises(BrokenPipeError):
        writer.write(MESSAGE)
    writer.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(write_end)
