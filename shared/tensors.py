"""Tensors on the wire: raw little-endian bytes, a dtype of the allow-list, a shape. Compression is a dtype.

Read back as views of the mapped file, not copies. Needs numpy, so the daemon does not import it.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

import msgspec
import numpy as np
import numpy.typing as npt
from msgspec import Meta

from shared.errors import DecodeError
from shared.jobs import Codec

Array = npt.NDArray[np.float32]
DType = Literal["f4", "bf16", "i8r"]
"""float32; bfloat16; int8 with one float32 scale per row of the last axis."""
_ITEM = {"f4": 4, "bf16": 2, "i8r": 1}
_BF16_NAN = 0x7FC0
MAX_DIMENSIONS = 4
MAX_SIDE = 2**31 - 1


class WireTensor(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """A tensor as written. `scales`: float32 per row for i8r, else empty."""

    dtype: DType
    shape: Annotated[list[int], Meta(max_length=MAX_DIMENSIONS)]
    data: memoryview
    scales: memoryview = memoryview(b"")


def encode(array: Array, codec: Codec = "fp32") -> WireTensor:
    """`array` in the precision of `codec`; round to nearest even for bf16, symmetric per row for int8."""
    shape = list(np.shape(array))
    array = np.ascontiguousarray(array, dtype="<f4")
    if codec == "bf16":
        bits = array.view("<u4")
        rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")
        rounded[np.isnan(array)] = _BF16_NAN  # rounding may carry a NaN's bits over into a number
        return WireTensor(dtype="bf16", shape=shape, data=_raw(rounded))
    if codec == "int8" and shape and array.size:
        rows = array.reshape(-1, shape[-1])
        scales = (np.abs(rows).max(axis=1) / 127.0).astype("<f4")
        safe = np.where(scales > 0, scales, np.float32(1.0))
        with np.errstate(invalid="ignore"):  # a row that is not finite is marked by its scale
            # Where the scale is a denormal its rounding may lead beyond 127.
            codes = np.clip(np.rint(rows / safe[:, None]), -127, 127).astype("i1")
        return WireTensor(dtype="i8r", shape=shape, data=_raw(codes), scales=_raw(scales))
    return WireTensor(dtype="f4", shape=shape, data=_raw(array))


def decode(tensor: WireTensor) -> Array:
    """The tensor as float32; for f4 a read-only view of the wire bytes. Raises `DecodeError` where sizes differ."""
    if not all(0 <= side <= MAX_SIDE for side in tensor.shape) or len(tensor.shape) > MAX_DIMENSIONS:
        raise DecodeError(f"tensor shape {tensor.shape!r:.60}")
    count = math.prod(tensor.shape)
    if len(tensor.data) != count * _ITEM[tensor.dtype]:
        raise DecodeError(f"tensor of shape {tensor.shape} with {len(tensor.data)} bytes of {tensor.dtype}")
    rows = count // tensor.shape[-1] if tensor.dtype == "i8r" and tensor.shape and count else 0
    if len(tensor.scales) != 4 * rows or (tensor.dtype == "i8r" and not rows):
        raise DecodeError(
            f"tensor of shape {tensor.shape} with {len(tensor.scales)} bytes of scales for {tensor.dtype}"
        )
    if not count:
        return _empty(tensor.shape)
    if tensor.dtype == "bf16":
        wide = np.frombuffer(tensor.data, dtype="<u2").astype("<u4") << 16
        wide_floats: Array = wide.view("<f4").reshape(tensor.shape)
        return wide_floats
    if tensor.dtype == "i8r":
        scales = np.frombuffer(tensor.scales, dtype="<f4")
        codes = np.frombuffer(tensor.data, dtype="i1").reshape(rows, -1)
        with np.errstate(over="ignore", invalid="ignore"):  # foreign scales; admission asks for finite values
            dequantized: Array = (codes.astype("<f4") * scales[:, None]).reshape(tensor.shape)
        return dequantized
    return np.frombuffer(tensor.data, dtype="<f4").reshape(tensor.shape)


def rounded(array: Array, codec: Codec) -> Array:
    """`array` as it is after travelling in the precision of `codec`."""
    return decode(encode(array, codec))


def _empty(shape: list[int]) -> Array:
    try:
        return np.empty(shape, dtype="<f4")
    except ValueError as error:
        raise DecodeError(f"tensor shape {shape!r:.60}: {error}") from error


def _raw(array: npt.NDArray[Any]) -> memoryview:
    """The bytes of a contiguous array, without a copy."""
    return array.reshape(-1).view("u1").data
