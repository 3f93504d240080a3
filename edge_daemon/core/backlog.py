"""Events whose journal could not be written: what waits for room on the disk, in the order it came.

An event that overtook another would be taken for the later one: withdrawn work would be taken up again, an agent that
died after its answer would be ready. So all wait behind the first that could not be saved, but those of `passes`.
"""

from __future__ import annotations

from dataclasses import replace

from edge_daemon.core import events as ev

Backlog = tuple[ev.AnyEvent, ...]
_CONNECTION = (ev.Linked, ev.Unlinked, ev.OwnStateSeen, ev.CoordinatorSeen)


def passes(waiting: Backlog, event: ev.AnyEvent) -> bool:
    """Whether it has no order with those that wait and holds at once: time, the owner's load, his limits, his leave;
    and the connection, or the fleet would never hear of a device again whose disk is full."""
    for kinds in (ev.Reconfigured, _CONNECTION):
        if isinstance(event, kinds):
            return not any(isinstance(one, kinds) for one in waiting)
    return not waiting or isinstance(event, ev.Tick | ev.LoadRead | ev.Drain)


def behind(waiting: Backlog, event: ev.AnyEvent) -> Backlog:
    """`waiting` with `event` at its end, as far as it is needed: a disk may stay full for days."""
    last = waiting[-1] if waiting else None
    match event:
        case ev.Tick() | ev.LoadRead():
            return waiting  # the next one comes by itself
        case ev.AgentGone() if any(isinstance(one, ev.AgentGone) for one in waiting):
            return waiting  # no agent is started before the first is known
        case ev.AssignReceived() if isinstance(last, ev.AssignReceived) and last.assign == event.assign:
            return waiting  # a reminder
        case ev.AgentBeat() if isinstance(last, ev.AgentBeat):
            return (*waiting[:-1], replace(event, progressed=event.progressed or last.progressed))
        case _:
            return (*waiting, event)
