"""The types of single values in messages, with the bounds that keep what uses them sound."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

Natural = Annotated[int, Meta(ge=0, le=2**53)]
MAX_TEXT = 1000
Text = Annotated[str, Meta(max_length=MAX_TEXT)]
JobName = Annotated[str, Meta(pattern=r"^[a-z0-9][a-z0-9-]{0,62}\Z")]
"""Becomes part of a path on devices, so nothing else is let in."""
Finite = Annotated[float, Meta(ge=-1e15, le=1e15)]
"""No NaN and no infinity: one would spread through every mean it enters."""
Amount = Annotated[float, Meta(ge=0.0, le=1e15)]
LEAST_AMOUNT = 1e-9
"""Of what planners divide by, less counts as not told: no clock measures it, and its inverse would overflow."""
Share = Annotated[float, Meta(ge=0.0, le=1.0)]
Sha = Annotated[str, Meta(pattern=r"^[0-9a-f]{64}\Z")]
MAX_BLOB_BYTES = 512 * 1024 * 1024
MAX_CHUNK_BYTES = 122_880
"""120 KiB, which also fits AWS IoT's 128 KB; the broker's announced maximum can only lower it."""


def untell(message: msgspec.Struct, *names: str) -> None:
    """Have the amounts of these names be 0 where they are below `LEAST_AMOUNT`."""
    for name in names:
        if 0 < getattr(message, name) < LEAST_AMOUNT:
            msgspec.structs.force_setattr(message, name, 0.0)
