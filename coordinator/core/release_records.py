"""What the coordinator writes down of releases. A release's durable state is the fold of its records
(`coordinator.core.releases.apply`).

Wall-clock seconds (`ts`) are for reports, and for what is left of a deadline after a restart.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from shared.jobs import Bits
from shared.messages import BlobRef
from shared.release_messages import ReleaseKind, Score

PartState = Literal["told", "active", "committed", "failed", "skipped", "silent", "returned"]
"""`returned`: after a rollback the device has what it had before. `silent`: nothing came of it by the deadline."""
Ending = Literal["finished", "rolled_back", "failed"]


class Canaries(msgspec.Struct, frozen=True, kw_only=True):
    """How the first devices are chosen: by name, or so many drawn by a hash of (seed, device)."""

    share: Annotated[float, Meta(ge=0.0, le=1.0)] = 0.1
    """Of the devices that can take the release, rounded up; at least one."""
    count: Annotated[int, Meta(ge=0)] = 0
    """So many instead; 0: by the share."""
    devices: list[str] = []
    """These instead, not drawn."""
    seed: Annotated[int, Meta(ge=0)] = 0


class ReleaseRecord(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """One line of the event log."""

    release: str


class ReleaseStarted(ReleaseRecord, frozen=True, kw_only=True):
    """An operator asked for it. `adapter`: the job's global adapter after `round`."""

    number: int
    job: str
    round: int
    adapter: BlobRef
    canaries: Canaries
    worse_by: float
    deadline_s: float
    """Seconds that the canaries, the rest, and a rollback may each take."""
    bits: dict[str, Bits] = {}
    """Device -> precision that it last trained this job at."""
    ts: float


class ReleasePacked(ReleaseRecord, frozen=True, kw_only=True):
    """Its files are one blob."""

    blob: BlobRef
    kind: ReleaseKind


class CanariesChosen(ReleaseRecord, frozen=True, kw_only=True):
    """These devices try it; from here on it is their desired state."""

    devices: list[str]
    left_out: dict[str, str] = {}
    """Known devices that can't take it now -> why."""
    reason: str
    ts: float


class DeviceReleased(ReleaseRecord, frozen=True, kw_only=True):
    """What came of it on a device."""

    device: str
    state: PartState
    reason: str = ""
    before: Score | None = None
    after: Score | None = None
    ts: float


class ReleaseWidened(ReleaseRecord, frozen=True, kw_only=True):
    """The canaries took it: it is the desired state of every device, of later ones too. `devices`: waited for."""

    devices: list[str]
    reason: str
    ts: float


class ReleaseWithdrawn(ReleaseRecord, frozen=True, kw_only=True):
    """It is nobody's desired state any more. `devices`: those that had it, waited for."""

    devices: list[str]
    reason: str
    ts: float


class ReleaseEnded(ReleaseRecord, frozen=True, kw_only=True):
    """Nothing is waited for any more."""

    state: Ending
    reason: str
    ts: float


AnyReleaseRecord = (
    ReleaseStarted | ReleasePacked | CanariesChosen | DeviceReleased | ReleaseWidened | ReleaseWithdrawn | ReleaseEnded
)
