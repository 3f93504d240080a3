"""The steps of split learning as packets."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared import steps, tensors
from shared.errors import DecodeError


def features(rows: int = 3, width: int = 40) -> steps.Features:
    values = np.arange(rows * 2 * width, dtype=np.float32).reshape(rows, 2, width)
    return steps.Features(
        work="job/1/1", run=2, step=7, hidden=tensors.encode(values, "fp32"),
        targets=memoryview(np.arange(rows, dtype="<i4").tobytes()), mask=memoryview(bytes([1] * 2 * rows)),
    )  # fmt: skip


def put_together(assembler: steps.Assembler, packets: list[bytes]) -> list[steps.Up | steps.Down]:
    found = [assembler.add(packet) for packet in packets]
    return [one for one in found if one is not None]


@given(size=st.integers(40, 3000), seed=st.integers(0, 99))
def test_packets_in_any_order_and_twice_are_one_message(size: int, seed: int) -> None:
    packets = list(steps.packets(features(), 5, size))
    assert max(map(len, packets)) <= size
    random.Random(seed).shuffle(packets)
    (made,) = put_together(steps.Assembler(down=False), packets)
    assert isinstance(made, steps.Features) and (made.work, made.run, made.step) == ("job/1/1", 2, 7)
    assert np.array_equal(tensors.decode(made.hidden), tensors.decode(features().hidden))
    assert bytes(made.targets) == bytes(features().targets)
    doubled = [packet for packet in packets[:-1] for _ in range(2)] + packets[-1:]
    assert len(put_together(steps.Assembler(down=False), doubled)) == 1


def test_a_later_message_ends_one_that_lacks_packets() -> None:
    assembler = steps.Assembler(down=False)
    early, late = (list(steps.packets(features(), number, 200)) for number in (1, 2))
    assert put_together(assembler, early[:-1]) == []
    assert len(put_together(assembler, late)) == 1
    assert put_together(assembler, early[-1:]) == []


@pytest.mark.parametrize("message", [
    steps.Query(work="w", run=1), steps.Begin(work="w", run=1, load=2, step=3), steps.Skip(work="w", run=1, step=4),
    steps.End(work="w", run=1),
])  # fmt: skip
def test_what_the_top_says_comes_as_it_was(message: steps.Down) -> None:
    assert put_together(steps.Assembler(down=True), list(steps.packets(message, 1, 4096))) == [message]
    with pytest.raises(DecodeError):
        put_together(steps.Assembler(down=False), list(steps.packets(message, 1, 4096)))


def test_what_is_too_large_is_given_up_at_once() -> None:
    assembler = steps.Assembler(down=False, limit=500)
    packets = list(steps.packets(features(), 1, 200))
    with pytest.raises(DecodeError, match="more than 500 bytes"):
        put_together(assembler, packets)
    hello = steps.Hello(work="w", run=0, held=[0])
    assert put_together(assembler, list(steps.packets(hello, 2, 200))) == [hello], "it goes on with the next"


@pytest.mark.parametrize(
    "payload", [b"", b"mst1", b"xxxx" + bytes(8), b"mst1" + bytes(8), b"mst1" + bytes(5) + b"\1\1\0"]
)
def test_foreign_bytes_are_refused(payload: bytes) -> None:
    with pytest.raises(DecodeError):
        steps.Assembler(down=False).add(payload)


def test_a_message_in_too_many_packets_is_refused() -> None:
    with pytest.raises(ValueError, match="a step of"):
        list(steps.packets(features(200, 4000), 1, 20))
