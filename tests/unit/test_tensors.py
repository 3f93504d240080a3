"""Tensors on the wire: exact, rounded as torch rounds, or within the bound of int8; wrong sizes refused."""

from __future__ import annotations

import tracemalloc

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from shared.errors import DecodeError
from shared.jobs import Codec
from shared.tensors import Array, WireTensor, decode, encode

arrays = hnp.arrays(
    np.float32,
    hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=6),
    elements=st.floats(width=32, allow_nan=True, allow_infinity=True),
)
finite = hnp.arrays(
    np.float32,
    hnp.array_shapes(min_dims=1, max_dims=3, max_side=9),
    elements=st.floats(-(2.0**127), 2.0**127, width=32),
)
"""Below float32's end, where 127 times a rounded scale may be infinite."""
SPECIAL = np.array(
    [0x00000000, 0x80000000, 0x00000001, 0x807FFFFF, 0x00800000, 0x3F808000, 0x3F818000, 0x3F808001, 0x3F807FFF,
     0x7F7FFFFF, 0xFF7FFFFF, 0x7F7F8000, 0x7F7F7FFF, 0x7F800000, 0xFF800000],
    dtype="<u4",
).view("<f4")  # fmt: skip
NANS = np.array([0x7FC00000, 0xFFC00000, 0x7FFFFFFF, 0xFFFFFFFF, 0x7F800001, 0xFF800001], dtype="<u4").view("<f4")


def travel(array: Array, codec: Codec) -> Array:
    """Through the bytes of the wire and back."""
    data = msgspec.msgpack.encode(encode(array, codec))
    return decode(msgspec.msgpack.decode(data, type=WireTensor))


@settings(max_examples=150, deadline=None)
@given(array=arrays)
def test_fp32_is_exact(array: Array) -> None:
    back = travel(array, "fp32")
    assert back.shape == array.shape
    assert back.tobytes() == array.tobytes()


@settings(max_examples=150, deadline=None)
@given(array=arrays)
def test_bf16_rounds_as_torch(array: Array) -> None:
    back = travel(array, "bf16")
    wanted = torch.from_numpy(array.copy()).to(torch.bfloat16).float().numpy()
    np.testing.assert_array_equal(back, wanted)
    assert (np.signbit(back) == np.signbit(wanted))[~np.isnan(wanted)].all()


@pytest.mark.parametrize("array", [SPECIAL, NANS, np.random.default_rng(0).integers(0, 2**32, 200_000, np.uint32)])
def test_bf16_of_special_and_random_bits(array: Array) -> None:
    values = array.view("<f4")
    wanted = torch.from_numpy(values.copy()).to(torch.bfloat16).float().numpy()
    np.testing.assert_array_equal(travel(values, "bf16"), wanted)


@settings(max_examples=200, deadline=None)
@given(array=finite)
def test_int8_is_within_half_a_step(array: Array) -> None:
    """Half of a row's scale, plus float32's own rounding and the smallest denormal."""
    back = travel(array, "int8").astype(np.float64)
    assert back.shape == array.shape
    largest = np.abs(array.astype(np.float64)).max(axis=-1, keepdims=True)
    assert (np.abs(back - array) <= largest / 254 * (1 + 1e-5) + 127 * 2.0**-149).all()


@pytest.mark.parametrize("codec", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_stays_so(codec: Codec, bad: float) -> None:
    """Else a diverged update would look sound."""
    array = np.ones((3, 4), dtype=np.float32)
    array[1, 2] = bad
    finite_rows = np.isfinite(travel(array, codec)).all(axis=1)
    assert finite_rows.tolist() == [True, False, True]


@pytest.mark.parametrize("codec", ["fp32", "bf16", "int8"])
def test_layout_does_not_matter(codec: Codec) -> None:
    array = np.random.default_rng(1).standard_normal((6, 5)).astype(np.float32)
    other = np.asfortranarray(array).astype(">f4")
    assert msgspec.msgpack.encode(encode(array, codec)) == msgspec.msgpack.encode(encode(other, codec))


def test_fp32_is_a_view() -> None:
    data = msgspec.msgpack.encode(encode(np.zeros(1_000_000, dtype=np.float32)))
    tracemalloc.start()
    array = decode(msgspec.msgpack.decode(data, type=WireTensor))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100_000
    assert not array.flags.writeable


def wire(dtype: str, shape: list[object], data: bytes, scales: bytes = b"") -> bytes:
    return msgspec.msgpack.encode([dtype, shape, data, scales])


BROKEN = {
    "too few bytes": wire("f4", [2, 2], bytes(12)),
    "too many bytes": wire("f4", [2, 2], bytes(20)),
    "bf16 with fp32's bytes": wire("bf16", [2, 2], bytes(16)),
    "a huge shape": wire("f4", [2**31 - 1, 2**31 - 1], bytes(16)),
    "a huge side": wire("f4", [2**63], bytes(16)),
    "a huge empty shape": wire("f4", [0, 2**31 - 1, 2**31 - 1, 2**31 - 1], b""),
    "a huge empty side": wire("f4", [0, 2**64 - 1], b""),
    "a negative side": wire("f4", [-1, -4], bytes(16)),
    "five dimensions": wire("f4", [1, 1, 1, 1, 1], bytes(4)),
    "a thousand dimensions": wire("f4", [1] * 1000, bytes(4)),
    "a side of 1.5": wire("f4", [1.5], bytes(4)),
    "a true side": wire("f4", [True], bytes(4)),
    "float64": wire("f8", [1], bytes(8)),
    "an object": wire("O", [1], bytes(8)),
    "int8 without scales": wire("i8r", [2, 2], bytes(4)),
    "int8 with few scales": wire("i8r", [2, 2], bytes(4), bytes(4)),
    "int8 with many scales": wire("i8r", [2, 2], bytes(4), bytes(12)),
    "int8 of no dimension": wire("i8r", [], bytes(1), bytes(4)),
    "int8 of nothing": wire("i8r", [0, 3], b""),
    "scales where none belong": wire("f4", [1], bytes(4), bytes(4)),
    "text for data": msgspec.msgpack.encode(["f4", [1], "abcd"]),
    "a map": msgspec.msgpack.encode({"dtype": "f4"}),
}


@pytest.mark.parametrize("name", BROKEN)
def test_refused_without_a_large_allocation(name: str) -> None:
    tracemalloc.start()
    try:
        with pytest.raises((DecodeError, msgspec.ValidationError)):
            decode(msgspec.msgpack.decode(BROKEN[name], type=WireTensor))
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()
