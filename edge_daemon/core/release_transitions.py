"""The stages of a release on a device, as one table; docs are drawn from it, every step is checked against it.

`ReleaseReceived` leads from any stage to `wanted` (another release) or `none` (no release); those rows are not drawn.
"""

from __future__ import annotations

from shared.machines import Transition

FIRST = "wanted"
_BROKEN = ("failed", "skipped")


def _row(source: str, on: str, targets: tuple[str, ...], meaning: str) -> Transition:
    return Transition(source, on, targets, meaning)


MOVES: tuple[Transition, ...] = (
    _row("wanted", "AdapterStored", ("received",), "every byte is here, its digest verified"),
    _row("wanted", "AdapterLost", ("failed",), "the coordinator does not have it (any more)"),
    _row("received", "ReleaseChecked", ("verified",), "every file in it is what its list says"),
    _row("received", "ReleaseProblem", ("failed", "wanted"), "it is not what its list says; or its content is gone"),
    _row("verified", "ReleaseStaged", ("staged",), "the files are in a folder of their own"),
    _row("verified", "ReleaseProblem", ("failed", "wanted"), "it can't be unpacked; a full disk is waited for"),
    _row("staged", "AgentEvaluated", ("staged", "failed"), "measured on the device's own rows: not worse, or worse"),
    _row("staged", "AgentUnfit", ("staged", *_BROKEN), "it does not load, or this device can't try it"),
    _row("staged", "AgentGone", ("staged", *_BROKEN), "the agent died over it: again, at fewer bits if memory ran out"),
    _row("staged", "ReleaseProblem", ("wanted",), "its folder is gone: it is fetched again"),
    _row("staged", "ReleaseActivated", ("active", "committed"), "`current` points to it"),
    _row("wanted", "ReleaseActivated", ("active", "committed"), "it had come to stay here before: no second trial"),
    _row("active", "ReleaseReceived", ("active", "committed"), "it is to stay"),
)
"""Every row that may change the stage; a device that can't take it at all skips it on any event."""

STAGES = ("none", "wanted", "received", "verified", "staged", "active", "committed", "failed", "skipped")


def allowed(source: str, on: str, target: str) -> bool:
    """Whether `on` may lead from stage `source` to `target`."""
    if source == target or target == "skipped":
        return True
    if on == "ReleaseReceived":
        return target in ("none", "wanted", "skipped") or (source, target) == ("active", "committed")
    if on in ("Started", "Reconfigured"):
        return target == "wanted"  # its files are gone from the disk, or it was skipped: once more
    return any(row.source == source and row.on == on and target in row.targets for row in MOVES)
