"""When a round closes: on all, or on the quorum at the deadline. Late updates count until then."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

from typing_extensions import assert_never

Status = Literal["assigned", "accepted", "done", "refused", "failed", "gone", "silent"]
"""Of a participant: asked; at work; its update is admitted; said no; could not; left; not heard of for too long."""
Verdict = Literal["wait", "close", "repeat"]
"""Go on waiting; fold what is there; throw it away and plan the round again."""


def closing(statuses: Mapping[str, Status], quorum: float, now: float, deadline_at: float) -> tuple[Verdict, str]:
    """The verdict over a round's participants, with its reason.

    `quorum`: share of all participants whose updates suffice, and never less than one update. `now` and `deadline_at`:
    seconds of one clock. A participant that left or is silent ends the wait for it, but its update counts if it comes
    before the close. Before a round is thrown away, those that left are given the time until they count as silent: a
    daemon that is restarted keeps its work.
    """
    total = len(statuses)
    if total == 0:
        return "repeat", "no participants"
    need = updates_needed(total, quorum)
    done = sum(status == "done" for status in statuses.values())
    waited_for = [device for device, status in statuses.items() if _is_waited_for(status)]
    tally = f"{done} of {total} updates, {need} needed ({quorum:.0%} of {total})"
    enough = done >= need
    away = sum(status == "gone" for status in statuses.values())
    if not waited_for:
        if not enough and need <= done + away and now < deadline_at:
            return "wait", f"{away} left and may be back: {tally}"
        lost = _lost(statuses)
        why = f"all participants are done: {tally}" if not lost else f"nobody is waited for any more: {tally}; {lost}"
        return ("close" if enough else "repeat"), why
    if now < deadline_at:
        return "wait", f"{len(waited_for)} participants at work, {deadline_at - now:.1f} s to the deadline: {tally}"
    why = f"deadline passed with {len(waited_for)} participants at work: {tally}"
    return ("close" if enough else "repeat"), why


def updates_needed(participants: int, quorum: float) -> int:
    """The number of updates that meets `quorum`, a share of `participants`."""
    # 0.7 * 10 is 7.000000000000001: without the allowance it would need 8.
    return max(1, math.ceil(quorum * participants - 1e-9))


def _is_waited_for(status: Status) -> bool:
    match status:
        case "assigned" | "accepted":
            return True
        case "done" | "refused" | "failed" | "gone" | "silent":
            return False
        case _:
            assert_never(status)


def _lost(statuses: Mapping[str, Status]) -> str:
    """How many ended without an update, by kind."""
    kinds = ("refused", "failed", "gone", "silent")
    counts = {kind: sum(status == kind for status in statuses.values()) for kind in kinds}
    return ", ".join(f"{count} {kind}" for kind, count in counts.items() if count)
