"""Telling systemd the truth: READY, STATUS, STOPPING. Without systemd, or without its library, nothing happens."""

from __future__ import annotations

import os
from collections.abc import Callable


def notifier() -> Callable[[str], None]:
    """A function that takes lines such as "READY=1"."""
    if not os.environ.get("NOTIFY_SOCKET"):
        return lambda _: None
    try:
        from systemd.daemon import notify
    except ImportError:
        return lambda _: None
    return lambda text: notify(text)
