"""What keeps a device from going on with the release that it is to have: the disk, its work, its owner."""

from __future__ import annotations

from edge_daemon.core import policy
from edge_daemon.core.rollout import room_needed
from edge_daemon.core.state import WORKING, State


def waits(state: State) -> str:
    """The reason in words; "": it goes on by itself, or has nothing left to do."""
    rollout, settings = state.journal.rollout, state.settings
    if rollout.stage in ("wanted", "verified") and rollout.wanted is not None:
        needed = settings.policy.disk_reserve_bytes + room_needed(rollout.wanted)
        return "" if state.disk_free >= needed else f"disk: {state.disk_free >> 20} MiB free, {needed >> 20} needed"
    if rollout.stage != "staged" or rollout.tried:
        return ""
    if state.agent.status == "evaluating":
        return state.release_paused
    if state.phase in WORKING:
        return "work of a round is under way"
    if state.agent.status != "ready":
        return "the agent is not ready"
    unified = state.machine is not None and state.machine.unified
    return policy.hold(settings, state.load, minute=state.minute, unified=unified)
