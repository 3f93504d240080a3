"""What is known of the devices right now. Not durable: after a restart the retained messages tell it again."""

from __future__ import annotations

import msgspec
from msgspec.structs import replace

from shared.messages import DeviceInfo, DeviceState, Load, Progress

GONE = frozenset({"lost", "disconnected", "draining"})
"""Lifecycle words under which a device gets no work."""
WILL_S = 2.0
"""Seconds after which a will is believed: a broker that is stopped sends those of all its clients before it is gone."""


class Presence(msgspec.Struct, frozen=True, kw_only=True):
    """One device as last heard."""

    device: str
    epoch: int = 0
    state: DeviceState | None = None
    info: DeviceInfo | None = None
    load: Load | None = None
    load_at: float = 0.0
    heard_at: float = 0.0
    lost_at: float = 0.0
    """When its will came."""
    progress: Progress | None = None
    asked_at: float = -1e9
    """When it was last asked for a rebirth."""

    @property
    def present(self) -> bool:
        """Whether its lifecycle says that it takes work."""
        return self.state is not None and self.state.s not in GONE

    @property
    def able(self) -> bool:
        """Whether it has proven that it can train."""
        return self.present and self.info is not None and bool(self.info.bits) and not self.info.problem


Fleet = dict[str, Presence]


def hear(fleet: Fleet, device: str, now: float) -> Fleet:
    """`fleet` after any sign of life of `device`."""
    known = fleet.get(device) or Presence(device=device)
    return {**fleet, device: replace(known, heard_at=now)}


def told(fleet: Fleet, device: str, message: DeviceState | DeviceInfo | Load | Progress, now: float) -> Fleet:
    """`fleet` after a message of `device`.

    What carries a lower epoch than the highest seen is stale and changes nothing. A will (`lost`) is not a sign of
    life: it comes from the broker.
    """
    known = fleet.get(device) or Presence(device=device, heard_at=now)
    if message.epoch < known.epoch:
        return fleet
    alive = not (isinstance(message, DeviceState) and message.s == "lost")
    known = replace(
        known,
        epoch=message.epoch,
        heard_at=now if alive else known.heard_at,
        lost_at=known.lost_at if alive else now,
    )
    match message:
        case DeviceState():
            known = replace(known, state=message)
        case DeviceInfo():
            known = replace(known, info=message)
        case Load():
            known = replace(known, load=message, load_at=now)
        case Progress():
            known = replace(known, progress=message)
    return {**fleet, device: known}


def gone(known: Presence, now: float, hearing_since: float, wait_s: float) -> bool:
    """Whether we believe that it left, by its own word or by its will.

    A will is no proof where the broker has just gone, or come back: then the devices have to connect anew, as we had
    to at `hearing_since` (monotonic seconds), and have `wait_s` to contradict it. Nor is either of an epoch before
    that of the last message.
    """
    if known.state is None or known.present or known.state.epoch < known.epoch:
        return False
    return known.state.s != "lost" or now - known.lost_at >= WILL_S and now - hearing_since > wait_s


def unborn(known: Presence) -> bool:
    """Whether load comes from a device that has not said `ready` in the same epoch: ask it for a rebirth."""
    return known.state is None or known.info is None or known.state.epoch < known.epoch


def asked(fleet: Fleet, device: str, now: float) -> Fleet:
    """`fleet` after `device` was asked for a rebirth."""
    return {**fleet, device: replace(fleet[device], asked_at=now)}
