"""Where a GPU shares the machine's memory (Jetson): running out of it is running out for the whole system."""

from __future__ import annotations

_LEAST = 1024**3


def reserve(total: int) -> int:
    """Bytes of `total` that must stay available: 10 %, at least 1 GiB."""
    return max(_LEAST, total // 10)
