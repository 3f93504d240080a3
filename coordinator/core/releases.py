"""The durable state of a release, as the fold of its records; and the release that each device is to have."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence
from typing import Literal

import msgspec
from msgspec.structs import replace
from typing_extensions import assert_never

from coordinator.core import release_records as rec
from coordinator.core.job import BrokenLog, Job
from coordinator.core.release_records import Canaries, PartState
from shared.jobs import Bits
from shared.messages import BlobRef
from shared.release_messages import ReleaseKind, ReleaseSpec, ReleaseState, Score, number_of

Phase = Literal["packing", "canary", "rest", "finished", "rolling_back", "rolled_back", "failed"]
ENDED: frozenset[str] = frozenset({"finished", "rolled_back", "failed"})
"""Nothing is waited for any more; an operator may still roll a finished one back."""
STANDS: frozenset[str] = frozenset({"canary", "rest", "finished"})
"""Some devices are to have it."""
SETTLED: frozenset[str] = frozenset({"committed", "failed", "skipped", "silent"})
"""A device is not waited for any more."""


class Part(msgspec.Struct, frozen=True, kw_only=True):
    """What came of a release on one device, as far as it is written down."""

    state: PartState = "told"
    reason: str = ""
    before: Score | None = None
    after: Score | None = None


class Release(msgspec.Struct, frozen=True, kw_only=True):
    """One release."""

    id: str
    number: int
    job: str
    round: int
    adapter: BlobRef
    canaries: Canaries
    worse_by: float
    deadline_s: float
    bits: dict[str, Bits]
    started_ts: float
    phase: Phase = "packing"
    phase_ts: float = 0.0
    """When it entered its phase, wall clock; a restart takes what is left of the deadline from it."""
    blob: BlobRef | None = None
    kind: ReleaseKind = "lora"
    parts: dict[str, Part] = {}
    """Of every device that was told."""
    chosen: tuple[str, ...] = ()
    """The canaries."""
    awaited: tuple[str, ...] = ()
    """The devices that the phase waits for."""
    widened: bool = False
    """It was to be on every device."""
    left_out: dict[str, str] = {}
    reason: str = ""


FORGOTTEN = 10_000
"""As many releases may a coordinator have forgotten that was restored from an older copy."""
Releases = dict[str, Release]
"""By id, in the order of their numbers."""


def apply(release: Release | None, record: rec.AnyReleaseRecord) -> Release:
    """`release` after `record`. Raises `BrokenLog` for a record that does not fit the state it meets."""
    if isinstance(record, rec.ReleaseStarted):
        if release is not None:
            raise BrokenLog(f"release {record.release} started twice")
        return Release(
            id=record.release, number=record.number, job=record.job, round=record.round, adapter=record.adapter,
            canaries=record.canaries, worse_by=record.worse_by, deadline_s=record.deadline_s, bits=record.bits,
            started_ts=record.ts, phase_ts=record.ts,
        )  # fmt: skip
    if release is None:
        raise BrokenLog(f"{type(record).__name__} of the unknown release {record.release}")
    match record:
        case rec.ReleasePacked():
            return replace(release, blob=record.blob, kind=record.kind)
        case rec.CanariesChosen():
            return replace(
                _entered(release, "canary", record.devices, record.ts), chosen=tuple(record.devices),
                left_out=record.left_out, reason=record.reason,
            )  # fmt: skip
        case rec.DeviceReleased():
            part = Part(state=record.state, reason=record.reason, before=record.before, after=record.after)
            return replace(release, parts={**release.parts, record.device: part})
        case rec.ReleaseWidened():
            return replace(_entered(release, "rest", record.devices, record.ts), widened=True, reason=record.reason)
        case rec.ReleaseWithdrawn():
            awaited = tuple(record.devices)
            return replace(release, phase="rolling_back", phase_ts=record.ts, awaited=awaited, reason=record.reason)
        case rec.ReleaseEnded():
            return replace(release, phase=record.state, phase_ts=record.ts, awaited=(), reason=record.reason)
        case _:
            assert_never(record)


def _entered(release: Release, phase: Phase, devices: Sequence[str], ts: float) -> Release:
    parts = {**release.parts, **{device: Part() for device in devices if device not in release.parts}}
    return replace(release, phase=phase, phase_ts=ts, awaited=tuple(devices), parts=parts)


def wanted(releases: Releases, device: str) -> tuple[Release, bool] | None:
    """The release that `device` is to have, and whether it is to stay; None: none.

    The newest that stands, where one still being tried counts for its canaries alone. So a rollback needs no memory of
    who had what: what was withdrawn is passed over.
    """
    for release in reversed(releases.values()):
        if release.phase in ("rest", "finished"):
            return release, True
        if release.phase == "canary" and device in release.chosen:
            return release, False
    return None


def under_way(releases: Releases) -> Release | None:
    """The one that has not ended; there is never more than one."""
    return next((release for release in reversed(releases.values()) if release.phase not in ENDED), None)


def standing(releases: Releases) -> Release | None:
    """The newest that some device is to have: the one that a rollback is of."""
    return next((release for release in reversed(releases.values()) if release.phase in STANDS), None)


def last(releases: Releases) -> Release | None:
    """The only one that may be rolled back now: the one under way, else the newest that stands."""
    return under_way(releases) or standing(releases)


def next_number(releases: Releases, reports: Iterable[ReleaseState]) -> int:
    """The number of the next release: above every one here and every one a device speaks of.

    A coordinator restored from an older copy has forgotten releases; were a number given twice, a device would take
    the new release for the old one that it has. Numbers that are too far above to have been forgotten don't count: one
    device could use up all that there are.
    """
    here = max((release.number for release in releases.values()), default=0)
    there = (number_of(name) for report in reports for name in (report.release, report.active))
    return 1 + max((here, *(number for number in there if number <= here + FORGOTTEN)))


def kept_blobs(releases: Releases, keep: int) -> set[str]:
    """Digests that devices may still ask for: the last `keep` releases that stand, and one being packed or tried."""
    stand = [release for release in releases.values() if release.phase in STANDS][-keep:]
    current = under_way(releases)
    packed = {release.blob.sha for release in stand if release.blob is not None}
    if current is not None:
        packed |= {current.adapter.sha} | ({current.blob.sha} if current.blob else set())
    return packed


def spec_of(release: Release, job: Job, device: str, chunk: int) -> ReleaseSpec:
    """What `device` is told of `release`."""
    assert release.blob is not None and job.facts is not None
    fewest: Bits = min(release.bits.values(), default=32)
    bits: Bits = release.bits.get(device, fewest)
    return ReleaseSpec(
        id=release.id, number=release.number, job=release.job, round=release.round, kind=release.kind,
        blob=release.blob, chunk=chunk, base=job.spec.base, base_digest=job.facts.base_digest,
        source=job.facts.served.get(str(bits)), bits=bits, task=job.spec.task, seed=job.spec.seed,
        worse_by=release.worse_by,
    )  # fmt: skip


def choose(able: Sequence[str], with_data: Sequence[str], ask: Canaries) -> list[str]:
    """The canaries among `able` devices, by id. Those `with_data` of the task come first: others can only load it.

    Who is drawn depends on the seed and on who is able, nothing else. Named devices that are not able are left out.
    """
    if ask.devices:
        return sorted(set(ask.devices) & set(able))
    count = ask.count or math.ceil(ask.share * len(able) - 1e-9)
    lacking = set(able) - set(with_data)

    def rank(device: str) -> tuple[bool, bytes]:
        return device in lacking, hashlib.sha256(f"canary/{ask.seed}/{device}".encode()).digest()

    return sorted(sorted(able, key=rank)[: max(1, count)])
