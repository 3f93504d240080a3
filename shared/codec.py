"""Control messages on the wire: msgpack with hard limits, then a typed conversion.

The limits make a decompression-style bomb fail at once: 10 MB of empty maps would otherwise take 723 MB.
"""

from __future__ import annotations

from typing import Any, TypeVar

import msgpack
import msgspec

from shared.errors import DecodeError

SCHEMA = 1
"""Major version of every message. A minor change only adds fields, which older readers ignore."""
MAX_MESSAGE_BYTES = 256 * 1024
LIMITS: dict[str, Any] = {
    "raw": False,
    "strict_map_key": True,
    "max_array_len": 4096,
    "max_map_len": 4096,
    "max_str_len": 4096,
    "max_bin_len": 4096,
    "max_ext_len": 0,
}

T = TypeVar("T")


def pack(message: Any) -> bytes:
    """`message` (a msgspec Struct or plain data) as msgpack; equal messages give equal bytes, whatever the order
    of their maps (a float field must hold a float: 1 and 1.0 are equal and packed differently)."""
    plain = msgspec.to_builtins(message, builtin_types=(bytes,), order="deterministic")
    packed = msgpack.packb(plain, use_bin_type=True)
    assert isinstance(packed, bytes)
    return packed


def unpack(
    data: bytes | memoryview, wanted: type[T], *, limit: int = MAX_MESSAGE_BYTES, longest: int = LIMITS["max_bin_len"]
) -> T:
    """Read one message of type `wanted`, of at most `limit` bytes and with none of its byte strings over `longest`.

    Raises `DecodeError` with a reason for anything else: too large, truncated, extra bytes, a foreign type, an
    unknown major schema. Unknown fields of a known schema are ignored, so that a newer minor version can add some.
    """
    if len(data) > limit:
        raise DecodeError(f"message of {len(data)} bytes, the limit is {limit}")
    try:
        plain = msgpack.unpackb(data, **{**LIMITS, "max_bin_len": longest})
    except (ValueError, msgpack.UnpackException, RecursionError) as error:
        raise DecodeError(f"not msgpack within the limits: {type(error).__name__} {error}"[:200]) from error
    if isinstance(plain, dict):
        schema = plain.get("schema", SCHEMA)
        if type(schema) is not int or schema != SCHEMA:
            # What else stands there may be nested as deep as msgpack allows: too deep to be printed.
            told = str(schema)[:20] if isinstance(schema, int | float | str) else f"of type {type(schema).__name__}"
            raise DecodeError(f"schema {told}, this side speaks {SCHEMA}")
    try:
        return msgspec.convert(plain, wanted)
    except (msgspec.ValidationError, RecursionError) as error:
        raise DecodeError(f"{getattr(wanted, '__name__', wanted)}: {error}"[:200]) from error
