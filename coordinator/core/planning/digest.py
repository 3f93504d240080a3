"""The identity of a plan: equal plans have equal digests, whichever way their dicts were built."""

from __future__ import annotations

import msgspec

from coordinator.core.planning.base import Plan
from shared.ids import Digest, digest_of


def plan_digest(plan: Plan) -> Digest:
    """sha256 over `plan` as msgpack with sorted keys; the same after a way through the event log."""
    # The round trip turns an int in a float's place into the float that a replay will read.
    settled = msgspec.msgpack.decode(msgspec.msgpack.encode(plan), type=Plan)
    return digest_of(msgspec.msgpack.encode(settled, order="sorted"))
