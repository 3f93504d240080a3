"""Telling systemd the truth: READY, STATUS, WATCHDOG, RELOADING, STOPPING. Without systemd nothing happens."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping

from shared.errors import UserError

_SYSTEMD = {"NOTIFY_SOCKET", "WATCHDOG_PID", "WATCHDOG_USEC"}
Notify = Callable[[str], None]
"""Takes lines such as "READY=1"."""


def notifier(environment: Mapping[str, str] = os.environ) -> Notify:
    """A function that tells systemd, or one that does nothing where systemd does not ask to be told.

    Raises `UserError` where it asks and its library is missing: it would wait in vain, and end the service.
    """
    if not environment.get("NOTIFY_SOCKET"):
        return lambda _: None
    try:
        from systemd.daemon import notify
    except ImportError:
        raise UserError(
            "systemd wants to be told (Type=notify), but systemd-python is missing: pip install 'muster[systemd]'"
        ) from None
    return lambda text: notify(text)


def unwatched(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The environment for a subprocess: systemd is told by the service alone."""
    return {name: value for name, value in environment.items() if name not in _SYSTEMD}


def watchdog_s(environment: Mapping[str, str] = os.environ) -> float | None:
    """Seconds within which systemd must hear of us; None: it does not ask this process for it."""
    if environment.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return None
    try:
        return int(environment["WATCHDOG_USEC"]) / 1e6 or None
    except (KeyError, ValueError):
        return None


def reloading(now_monotonic_s: float) -> str:
    """The lines that announce a reload; READY=1 ends it."""
    return f"RELOADING=1\nMONOTONIC_USEC={now_monotonic_s * 1e6:.0f}"
