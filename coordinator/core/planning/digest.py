"""The identity of a plan: equal plans have equal digests, whichever way their dicts were built."""

from __future__ import annotations

from typing import Any

import msgspec

from coordinator.core.planning.base import Plan
from shared.codec import pack
from shared.ids import Digest, digest_of


def plan_digest(plan: Plan) -> Digest:
    """sha256 over `plan` as msgpack with sorted keys; the same after a way through the event log."""
    # The round trip turns an int in a float's place into the float that a replay will read.
    settled = msgspec.convert(msgspec.to_builtins(plan), Plan)
    return digest_of(pack(_sorted(msgspec.to_builtins(settled))))


def _sorted(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _sorted(value[key]) for key in sorted(value)}
    if isinstance(value, list):
        return [_sorted(item) for item in value]
    return value
