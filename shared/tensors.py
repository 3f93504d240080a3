"""Tensors on the wire: raw little-endian bytes, a dtype of the allow-list, a shape. Compression is a dtype.

Read back as views of the mapped file, not copies. Needs numpy, so the daemon does not import it.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import msgspec
import numpy as np
import numpy.typing as npt

from shared.errors import DecodeError
from shared.jobs import Codec

Array = npt.NDArray[np.float32]
DType = Literal["f4", "bf16", "i8r"]
"""float32; bfloat16; int8 with one float32 scale per row of the last axis."""
_ITEM = {"f4": 4, "bf16": 2, "i8r": 1}


class WireTensor(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """A tensor as written. `scales`: float32 per row for i8r, else empty."""

    dtype: DType
    shape: list[int]
    data: memoryview
    scales: memoryview = memoryview(b"")


def encode(array: Array, codec: Codec = "fp32") -> WireTensor:
    """`array` in the precision of `codec`; round to nearest even for bf16, symmetric per row for int8."""
    array = np.ascontiguousarray(array, dtype="<f4")
    shape = list(array.shape)
    if codec == "bf16":
        bits = array.view("<u4")
        rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")
        return WireTensor(dtype="bf16", shape=shape, data=_raw(rounded))
    if codec == "int8" and array.ndim >= 1 and array.size:
        rows = array.reshape(-1, shape[-1])
        scales = (np.abs(rows).max(axis=1) / 127.0).astype("<f4")
        safe = np.where(scales > 0, scales, np.float32(1.0))
        codes = np.rint(rows / safe[:, None]).astype("i1")
        return WireTensor(dtype="i8r", shape=shape, data=_raw(codes), scales=_raw(scales))
    return WireTensor(dtype="f4", shape=shape, data=_raw(array))


def decode(tensor: WireTensor) -> Array:
    """The tensor as float32; for f4 a read-only view of the wire bytes. Raises `DecodeError` where sizes differ."""
    if any(not isinstance(n, int) or n < 0 for n in tensor.shape) or len(tensor.shape) > 4:
        raise DecodeError(f"tensor shape {tensor.shape!r:.60}")
    count = math.prod(tensor.shape)
    if len(tensor.data) != count * _ITEM[tensor.dtype]:
        raise DecodeError(f"tensor of shape {tensor.shape} with {len(tensor.data)} bytes of {tensor.dtype}")
    if tensor.dtype == "bf16":
        wide = np.frombuffer(tensor.data, dtype="<u2").astype("<u4") << 16
        wide_floats: Array = wide.view("<f4").reshape(tensor.shape)
        return wide_floats
    if tensor.dtype == "i8r":
        rows = count // tensor.shape[-1] if count else 0
        if len(tensor.scales) != 4 * rows:
            raise DecodeError(f"int8 tensor of {rows} rows with {len(tensor.scales)} bytes of scales")
        scales = np.frombuffer(tensor.scales, dtype="<f4")
        codes = np.frombuffer(tensor.data, dtype="i1").reshape(rows, -1)
        dequantized: Array = (codes.astype("<f4") * scales[:, None]).reshape(tensor.shape)
        return dequantized
    return np.frombuffer(tensor.data, dtype="<f4").reshape(tensor.shape)


def _raw(array: npt.NDArray[Any]) -> memoryview:
    """The bytes of a contiguous array, without a copy."""
    return array.reshape(-1).view("u1").data
