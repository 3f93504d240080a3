"""Whether a service is well: its signs of life against their bounds. Pure; the services say what their signs are."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Sign:
    """A sign of life of `what`: `age_s` old, or late by so much; beyond `bound_s` it counts as dead."""

    what: str
    age_s: float
    bound_s: float


def of_service(*, now: float, turned_at: float, network_late_s: float, network_s: float, tick_s: float) -> list[Sign]:
    """What both services show: network thread and main loop (last turned at `turned_at`), and their bounds."""
    return [
        Sign("the network thread is late", network_late_s, network_s),
        Sign("the main loop does not turn", now - turned_at, tick_s),
    ]


def complaint(signs: Iterable[Sign]) -> str:
    """Why systemd must not be told that the service is well, or ""."""
    late = [f"{sign.what} for {sign.age_s:.0f} s, the bound is {sign.bound_s:.0f} s" for sign in signs if _dead(sign)]
    return "; ".join(late)


def ready(connected: bool, waited_s: float, ready_s: float) -> bool:
    """Whether the service counts as started: a device must start without its network, too."""
    return connected or waited_s >= ready_s


def _dead(sign: Sign) -> bool:
    # Not a number is no sign of life.
    return not sign.age_s <= sign.bound_s
