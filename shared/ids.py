"""Identifiers: what they are and which texts are allowed as one."""

from __future__ import annotations

import hashlib
import re
from typing import NewType

from shared.errors import UserError

FleetId = NewType("FleetId", str)
DeviceId = NewType("DeviceId", str)
JobId = NewType("JobId", str)
Digest = NewType("Digest", str)
"""sha256 of a content, 64 lower-case hex digits."""

_NAME = re.compile(r"[a-z0-9][a-z0-9-]{1,62}")
LONGEST_COORDINATOR = 59
"""Characters of a coordinator's name: its top worker's is `<name>-top`."""
_DIGEST = re.compile(r"[0-9a-f]{64}")


def is_name(text: str) -> bool:
    """Whether `text` may name a fleet, a device, a coordinator or a job (and be a certificate's CN)."""
    return _NAME.fullmatch(text) is not None


def check_name(text: str, what: str) -> str:
    """`text`, if it is a legal name; else `UserError` naming `what`."""
    if not is_name(text):
        raise UserError(f"{what} {text!r}: use 2 to 63 of a-z, 0-9 and '-', not beginning with '-'")
    return text


def is_digest(text: str) -> bool:
    """Whether `text` is a sha256 in lower-case hex."""
    return _DIGEST.fullmatch(text) is not None


def digest_of(data: bytes | memoryview) -> Digest:
    """sha256 of `data`."""
    return Digest(hashlib.sha256(data).hexdigest())
