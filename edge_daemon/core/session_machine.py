"""The daemon's decisions: `step(state, event) -> (state, commands)`.

The runtime saves a changed `state.journal` before it performs the commands. The rules of phases stand in
`transitions`; what a phase needs done is worked out by `_advance` from the state alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import msgspec

from edge_daemon import protocol
from edge_daemon.core import agents, outbox, policy, presence, releasing
from edge_daemon.core import commands as cmd
from edge_daemon.core import events as ev
from edge_daemon.core.presence import Result
from edge_daemon.core.state import Agent, Capability, Finished, Journal, State, finished, identity_of, offered
from edge_daemon.core.transitions import TABLE
from edge_daemon.settings import EdgeSettings
from shared.machines import check
from shared.messages import Assign, Assignment

FETCH_AGAIN_S = 60.0
"""How often what is being fetched is asked for again: a transfer that gets on notices nothing of it, one that was given
up for its silence is taken up again."""


def initial(settings: EdgeSettings, journal: Journal, *, version: str = "", now: float = 0.0) -> State:
    """The state of a process that begins with `journal`; `Started` must be its first event."""
    return State(settings=settings, journal=journal, version=version, now=now, started_at=now)


def step(state: State, event: ev.AnyEvent) -> Result:
    """The state after `event`, and what to do. Raises `InvalidTransition` for a move that the table does not have."""
    before, rollout = state.phase, state.journal.rollout
    state = replace(state, now=max(state.now, event.now))
    commands: list[cmd.Command] = []
    if before != "stopped":
        state, commands = _HANDLERS[type(event)](state, event)
        state, more = _advance(state)
        state, words = presence.say(state)
        commands = [*commands, *more, *words]
        if state.phase == "stopped":
            commands.append(cmd.Leave())
    check(TABLE, before, type(event).__name__, state.phase)
    releasing.check(rollout, type(event).__name__, state.journal.rollout)
    return state, commands


# ---- what the state needs


def _advance(state: State) -> Result:
    """Move on as far as the state allows. Idempotent: called again at once, it does nothing."""
    if state.phase in ("draining", "stopped"):
        return state, []
    state, commands = _advance_work(state)
    state, more = releasing.advance(state)
    return state, commands + more


def _advance_work(state: State) -> Result:
    state, commands = agents.ensure(state)
    if state.capability is None:
        return replace(state, phase="probing"), commands
    work = state.work
    if work is not None and not state.accepted:
        state, more = _decide(state, state.capability, work)
        commands += more
        work = state.work
    if work is None:
        return replace(state, phase="offering" if state.journal.outbox else "idle", paused=""), commands
    if state.adapter_there and state.agent.status == "ready":
        state, more = agents.train(state, work)
        return state, commands + more
    if state.phase not in ("training", "paused"):
        state = replace(state, phase="fetching")
    elif state.agent.status != "busy":
        state = replace(state, phase="training", paused="")
    return state, commands


def _decide(state: State, capability: Capability, work: Assignment) -> Result:
    reason = policy.refusal(
        state.settings, capability, work, state.load, minute=state.minute, disk_free=state.disk_free,
        unified=state.machine is not None and state.machine.unified,
    )  # fmt: skip
    identity = identity_of(work)
    if reason:
        state, commands = outbox.finish(state, Finished(**identity._asdict(), verdict="rejected", reason=reason))
        return state, [cmd.Note("warning", f"{identity} rejected: {reason}"), *commands]
    state = replace(state, accepted=True, fetch_since=state.now)
    return state, [*presence.ack_accept(state, identity), cmd.Fetch(work.adapter, work.chunk)]


# ---- time, machine, owner


def _started(state: State, event: ev.Started) -> Result:
    journal = state.journal
    state = replace(state, boot_id=event.boot_id, minute=event.minute, wall=event.wall, started_at=event.now)
    if journal.boot_id == event.boot_id:
        received_at = min(journal.received_at, event.now)
    else:
        # Another boot: the clock that counted is gone, so the wall clock must do.
        received_at = event.now - max(0.0, event.wall - journal.received_wall)
    kept = [offer.identity for offer in journal.outbox]
    shas = [offer.sha for offer in journal.outbox]
    if journal.assignment is not None:
        kept.append(identity_of(journal.assignment))
        shas.append(journal.assignment.adapter.sha)
    tidy = [cmd.Adopt(offer.identity, offer.sha) for offer in journal.outbox]
    resumed = journal.assignment is not None
    state, more = releasing.started(replace(state, received_at=received_at, resumed=resumed), event)
    return state, [*tidy, cmd.Tidy(tuple(kept), (*shas, *releasing.blobs(state))), *more]


def _tick(state: State, event: ev.Tick) -> Result:
    state = replace(state, minute=event.minute, wall=event.wall, disk_free=event.disk_free)
    if state.phase == "draining" and state.now >= state.drain_until:
        return _leave(state, [cmd.Note("warning", "the agent did not end its work in time; its checkpoint stays")])
    commands: list[cmd.Command] = []
    if state.connected and state.coordinator_online and state.now - state.fetch_asked_at >= FETCH_AGAIN_S:
        state, commands = _fetch_again(state)
    state, more = agents.watch(state, behind=event.behind)
    return state, commands + more


def _drain(state: State, _event: ev.Drain) -> Result:
    if state.phase == "draining":
        return state, []
    if state.agent.status != "busy":
        state, word = presence.say(replace(state, phase="draining"))
        return _leave(state, word)
    state = replace(state, phase="draining", paused="", drain_until=state.now + state.settings.agent.drain_s)
    return state, [cmd.Tell(protocol.Stop())]


def _leave(state: State, commands: list[cmd.Command]) -> Result:
    kill: list[cmd.Command] = [] if state.agent.status == "absent" else [cmd.KillAgent("the daemon leaves")]
    return replace(state, phase="stopped"), [*commands, *kill]


def _reconfigured(state: State, event: ev.Reconfigured) -> Result:
    """New limits hold at once; what only a new agent can know waits until the present one has no work.

    A data set that could not be read is looked at again: a reload may well mean that its file was mended.
    """
    before = agents.probe_of(state)
    state = replace(state, settings=event.settings)
    lacking = state.capability is not None and state.settings.data.keys() - state.capability.datasets.keys()
    if state.agent.status != "absent" and (lacking or agents.probe_of(state) != before):
        state = replace(state, agent_outdated=True)
    state, commands = agents.rest(releasing.reconfigured(state))
    state, more = releasing.rest(state)
    return state, commands + more


def _machine_read(state: State, event: ev.MachineRead) -> Result:
    return replace(state, machine=event.machine), []


def _load_read(state: State, event: ev.LoadRead) -> Result:
    state = replace(state, load=event.reading)
    state, commands = agents.rest(state)
    state, more = releasing.rest(state)
    state, load = presence.say_load(state)
    return state, [*commands, *more, *load]


# ---- broker and coordinator


def _linked(state: State, event: ev.Linked) -> Result:
    state = replace(
        state, connected=True, epoch=event.epoch, max_chunk=event.max_chunk, word="", info_sent=None, load_sent=None,
        announcing={}, no_broker="", release_sent=None,
    )  # fmt: skip
    # What was asked for in the former session was dropped with it.
    return _fetch_again(state)


def _fetch_again(state: State) -> Result:
    """Ask once more for what is being fetched: where that is under way still, it changes nothing."""
    return replace(state, fetch_asked_at=state.now), outbox.fetch_again(state) + releasing.fetch_again(state)


def _unlinked(state: State, event: ev.Unlinked) -> Result:
    known = {name: msgspec.structs.replace(seen, online=False) for name, seen in state.coordinators.items()}
    # Said once per reason: it comes again with every attempt to connect.
    note = [cmd.Note("warning", f"no broker: {event.reason}")] if event.reason != state.no_broker else []
    return replace(state, connected=False, coordinators=known, no_broker=event.reason), [*note]


def _own_state_seen(state: State, event: ev.OwnStateSeen) -> Result:
    """A will of a former connection may arrive after our birth: say again that we live."""
    seen = event.state
    if seen.epoch > state.epoch and state.connected:
        # Our counter was lost with the disk; what we say under a lower number would count as stale.
        return replace(state, epoch=seen.epoch + 1, word="", info_sent=None), [cmd.RaiseEpoch(seen.epoch + 1)]
    stale = seen.epoch < state.epoch or (seen.s == "lost" and seen.epoch == state.epoch)
    return (replace(state, word="") if stale and state.connected else state), []


def _coordinator_seen(state: State, event: ev.CoordinatorSeen) -> Result:
    known = state.coordinators.get(event.coordinator)
    if known is not None and event.state.term < known.term:
        return state, []
    came = event.state.online and (known is None or not known.online or known.term < event.state.term)
    state = replace(state, coordinators={**state.coordinators, event.coordinator: event.state})
    if not came:
        return state, []
    # It may have begun anew and forgotten what it was asked for, or we may have given it up.
    return _fetch_again(replace(state, announcing={}, release_sent=None))


def _assign_received(state: State, event: ev.AssignReceived) -> Result:
    assign = event.assign
    if assign.term < state.journal.term:
        reason = f"an assignment of term {assign.term} ignored: term {state.journal.term} was seen"
        return state, [cmd.Note("warning", reason)]
    if state.phase == "draining":
        return state, []
    wanted, current = assign.assignment, state.journal.assignment
    if wanted is not None and current is not None and _superseded(assign, wanted, current, state.journal.term):
        return state, [cmd.Note("info", f"{identity_of(wanted)} ignored: {identity_of(current)} is newer")]
    if assign.term != state.journal.term:
        state = replace(state, journal=msgspec.structs.replace(state.journal, term=assign.term))
    if wanted is not None and current is not None and identity_of(wanted) == identity_of(current):
        return _again(state, wanted)
    if wanted is None and current is None:
        return state, []
    why = assign.reason or ("newer work" if wanted else "the coordinator withdrew it")
    state, commands = agents.discard(state, why)
    state, more = _take(state, wanted)
    return state, commands + more


def _superseded(assign: Assign, wanted: Assignment, current: Assignment, term: int) -> bool:
    """Messages may overtake each other; within a term and a job a lower (round, attempt) is old."""
    return (
        assign.term == term
        and wanted.job == current.job
        and (wanted.round, wanted.attempt) < (current.round, current.attempt)
    )


def _again(state: State, wanted: Assignment) -> Result:
    """The desired state is what it was: say again what became of it."""
    identity = identity_of(wanted)
    offer, done = offered(state.journal, identity), finished(state.journal, identity)
    if done is not None:
        return state, presence.ack_finished(state, done)
    if offer is not None:
        rest = {sha: when for sha, when in state.announcing.items() if sha != offer.sha}
        return replace(state, announcing=rest), presence.ack_accept(state, identity)
    return state, presence.ack_accept(state, identity) if state.accepted else []


def _take(state: State, wanted: Assignment | None) -> Result:
    old = state.journal.assignment
    journal = msgspec.structs.replace(
        state.journal, assignment=wanted, boot_id=state.boot_id, received_at=state.now, received_wall=state.wall,
        deaths=0, batch_limit=0, given_up="", given_up_memory=False, checkpointed=False, fetch_s=0.0,
    )  # fmt: skip
    state = replace(state, journal=journal, received_at=state.now, accepted=False, adapter_there=False, paused="")
    state = replace(state, phase="idle", resumed=False)
    commands: list[cmd.Command] = []
    if old is not None and (wanted is None or wanted.adapter.sha != old.adapter.sha):
        commands += outbox.drop_blob(state, old.adapter.sha)
    if wanted is not None and state.work is None:
        state, more = _again(state, wanted)
        commands += more
    return state, commands


def _command_received(state: State, event: ev.CommandReceived) -> Result:
    if event.command.kind == "deliver":
        return agents.deliver(state, event.command)
    return replace(state, word="", info_sent=None, load_sent=None, announcing={}, release_sent=None), []


def _adapter_stored(state: State, event: ev.AdapterStored) -> Result:
    state, commands = releasing.stored(state, event)
    work = state.work
    if work is None or work.adapter.sha != event.sha or not state.accepted or state.adapter_there:
        return state, commands
    state = replace(state, adapter_there=True)
    if state.resumed:
        # Part of it came to a process that is gone; the rest alone would make the link look faster than it is.
        return state, commands
    journal = msgspec.structs.replace(state.journal, fetch_s=state.journal.fetch_s + state.now - state.fetch_since)
    return replace(state, journal=journal), commands


def _adapter_lost(state: State, event: ev.AdapterLost) -> Result:
    work = state.work
    if work is None or work.adapter.sha != event.sha or state.phase != "fetching":
        return releasing.lost(state, event)
    return outbox.fail(state, identity_of(work), f"the global adapter can't be had: {event.reason}")


def _wanted(state: State, event: ev.Wanted) -> Result:
    return presence.postpone(state, event.sha), []


def _agent_trained(state: State, event: ev.AgentTrained) -> Result:
    draining = state.phase == "draining"
    state, commands = agents.trained(state, event.trained)
    return _leave(state, commands) if draining else (state, commands)


def _agent_failed(state: State, event: ev.AgentFailed) -> Result:
    if state.phase == "draining":
        return _leave(state, [])
    return agents.failed(state, event.failed)


def _agent_gone(state: State, event: ev.AgentGone) -> Result:
    if state.phase == "draining":
        return _leave(replace(state, agent=Agent()), [])
    return agents.gone(state, event)


_HANDLERS: dict[type[ev.AnyEvent], Callable[[State, Any], Result]] = {
    ev.Started: _started,
    ev.Tick: _tick,
    ev.Drain: _drain,
    ev.Reconfigured: _reconfigured,
    ev.MachineRead: _machine_read,
    ev.LoadRead: _load_read,
    ev.Linked: _linked,
    ev.Unlinked: _unlinked,
    ev.OwnStateSeen: _own_state_seen,
    ev.CoordinatorSeen: _coordinator_seen,
    ev.AssignReceived: _assign_received,
    ev.CommandReceived: _command_received,
    ev.Wanted: _wanted,
    ev.WantUnfit: outbox.asked_amiss,
    ev.Settled: outbox.settled,
    ev.AdapterStored: _adapter_stored,
    ev.AdapterLost: _adapter_lost,
    ev.OfferLost: outbox.lost,
    ev.AgentProbed: agents.probed,
    ev.AgentBeat: agents.beat,
    ev.AgentTrained: _agent_trained,
    ev.AgentFailed: _agent_failed,
    ev.AgentGone: _agent_gone,
    ev.ReleaseReceived: releasing.received,
    ev.ReleaseChecked: releasing.checked,
    ev.ReleaseStaged: releasing.staged,
    ev.ReleaseActivated: releasing.activated,
    ev.ReleaseProblem: releasing.problem,
    ev.AgentEvaluated: releasing.evaluated,
    ev.AgentUnfit: releasing.unfit,
}
