"""What the daemon knows of releases: the one it is to have, how far it is with it, and those in its folder.

`Rollout` is part of the journal. The stages follow Mender's states: received, verified, staged, active, committed; each
is written down once what it says is on disk, so that a restart goes on from there.
"""

from __future__ import annotations

import math

import msgspec

from shared.release_messages import ReleaseSpec, Score, Stage, number_of

OVER: frozenset[Stage] = frozenset({"none", "committed", "failed", "skipped"})
"""Nothing is left to do for the release that is wanted."""


class Installed(msgspec.Struct, frozen=True, kw_only=True):
    """A release in its folder. `committed`: it was to stay here once, so it may come back without a trial."""

    id: str
    number: int
    committed: bool = False
    bits: int = 0
    """Precision that its trial went well at; 0: not known."""


class Rollout(msgspec.Struct, frozen=True, kw_only=True):
    """The desired release and what became of it so far."""

    term: int = 0
    seq: int = 0
    """Of the desired state; a lower (term, seq) is old."""
    wanted: ReleaseSpec | None = None
    commit: bool = False
    stage: Stage = "none"
    reason: str = ""
    tried: bool = False
    """It was evaluated here, and is not worse."""
    before: Score | None = None
    after: Score | None = None
    bits: int = 0
    """Precision that it is tried at, lowered after memory ran out; 0: not yet tried."""
    deaths: int = 0
    """Times an agent died over its evaluation."""
    active: str = ""
    """Id of the release that `current` points to."""
    installed: tuple[Installed, ...] = ()
    """Folders that are whole, in the order of their activation."""


def installed(rollout: Rollout, release: str) -> Installed | None:
    """The folder of a release, if it is whole."""
    return next((one for one in rollout.installed if one.id == release), None)


def found(rollout: Rollout, active: str) -> tuple[Installed, ...]:
    """What `current` points to where the journal knows of no release: it was lost, for this had passed its trial."""
    number = number_of(active)
    if rollout.term or rollout.installed or not number:
        return ()
    return (Installed(id=active, number=number, committed=True),)


def room_needed(wanted: ReleaseSpec) -> int:
    """Bytes of disk that it takes to get a release: as it comes, and its files."""
    return 2 * wanted.blob.size


def due(rollout: Rollout) -> str:
    """Id of the release that is to be in place now, whatever is still to be tried; "": none.

    What is active stays until the wanted one has passed its trial; where the wanted one is older, the active one was
    withdrawn: the newest that had come to stay here takes its place at once.
    """
    wanted, active = rollout.wanted, installed(rollout, rollout.active)
    if wanted is None:
        # Who was never told anything has lost its journal, or is of a version that had none: it hears soon enough.
        return "" if rollout.term else rollout.active
    there = installed(rollout, wanted.id)
    passed = rollout.stage == "staged" and rollout.tried
    if rollout.stage in ("active", "committed") or passed or (there is not None and there.committed):
        return wanted.id
    if active is not None and active.number <= wanted.number:
        return active.id
    older = [one for one in rollout.installed if one.committed and one.number <= wanted.number]
    return max(older, key=lambda one: one.number).id if older else ""


def withdrawn(rollout: Rollout) -> tuple[Installed, ...]:
    """The folders of releases newer than the wanted one: nobody is to have them any more."""
    limit = rollout.wanted.number if rollout.wanted else -1
    return tuple(one for one in rollout.installed if one.number > limit and one.id != rollout.active)


def kept(rollout: Rollout, keep: int) -> tuple[Installed, ...]:
    """The folders worth their room: what is active or wanted, and the last `keep` that were to stay before."""
    names = {rollout.active, rollout.wanted.id if rollout.wanted else ""}
    others = [one for one in rollout.installed if one.committed and one.id not in names]
    names |= {one.id for one in others[-keep:]} if keep else set()
    return tuple(one for one in rollout.installed if one.id in names)


def verdict(before: Score | None, after: Score | None, worse_by: float) -> str:
    """Why the release is worse here than is allowed, or ""; without a score on both sides nothing is."""
    if before is None or after is None:
        return ""
    limit = before.loss * (1.0 + worse_by)
    if after.loss <= limit or math.isclose(after.loss, limit, rel_tol=1e-9, abs_tol=1e-9):
        return ""
    return (
        f"worse here: loss {after.loss:.4g} on {after.rows} rows, before {before.loss:.4g}, "
        f"the limit is {limit:.4g} ({worse_by:.0%} more)"
    )
