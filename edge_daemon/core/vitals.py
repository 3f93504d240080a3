"""The daemon's signs of life, and what it tells systemd of itself in one line."""

from __future__ import annotations

from edge_daemon.core.state import State
from shared.vitals import Sign, of_service


def signs(state: State, *, now: float, turned_at: float, network_late_s: float) -> list[Sign]:
    """Network thread, main loop (last turned at `turned_at`), and the agent where it should speak.

    An agent that is silent for `agent.silence_s` is killed and reported gone: what lives on beyond that is a daemon
    that does not see it, or a process that the kernel can't end, for which a driver that hangs is the usual cause.
    """
    health, agent = state.settings.health, state.agent
    found = of_service(
        now=now, turned_at=turned_at, network_late_s=network_late_s, network_s=health.network_s, tick_s=health.tick_s
    )
    if agent.status in ("starting", "busy", "stopping", "evaluating"):
        bound = state.settings.agent.silence_s + health.agent_s
        found.append(Sign("the agent is silent and not gone", now - agent.heard_at, bound))
    return found


def status(state: State) -> str:
    """What the daemon does, for `systemctl status`."""
    words = _phase(state)
    if state.connected or state.phase in ("draining", "stopped"):
        return words
    return f"offline, retrying{f' ({state.no_broker})' if state.no_broker else ''}; {words}"


def _phase(state: State) -> str:
    work = state.work
    if state.phase == "draining":
        return "leaving: the agent saves its work"
    if state.phase == "probing":
        return "finding out what this device can do"
    wanted = state.journal.rollout.wanted
    if state.agent.status == "evaluating" and wanted is not None:
        return f"tries release {wanted.id}"
    if state.phase == "offering":
        return f"{len(state.journal.outbox)} update(s) to be taken"
    if work is None:
        problem = state.capability.problem if state.capability else ""
        return f"no work possible: {problem}" if problem else state.phase
    if state.phase == "fetching":
        waits = "waits for the agent" if state.adapter_there else "fetches the global adapter"
        return f"round {work.round} {waits}"
    done = state.progressed
    how = f"step {done.step}/{done.steps} loss {done.loss:.2f}" if done else "begins"
    rests = f", rests: {state.paused}" if state.paused else ""
    return f"round {work.round} {how} bits={work.work.bits}{rests}"
