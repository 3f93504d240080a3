"""Dealing with the agent: start, probe, train, rest, restart, give up."""

from __future__ import annotations

from dataclasses import replace

import msgspec

from edge_daemon import protocol
from edge_daemon.core import commands as cmd
from edge_daemon.core import events as ev
from edge_daemon.core import outbox, policy, releasing
from edge_daemon.core.presence import Result
from edge_daemon.core.state import Agent, Capability, Identity, Offer, State, identity_of
from shared.backoff import delay
from shared.messages import Assignment, Command, Progress

BEAT_S = 5.0
MACHINE_WAIT_S = 5.0
"""How long a first agent waits for the machine's facts, which name the GPU, before a driver counts as hung."""
RETRY_BASE_S = 0.25
RETRY_CAP_S = 60.0
PROGRESS_S = 1.0
_SPENT_S = 1e-3
"""`Train.train_for_s` for work whose time is over: 0 would mean no limit."""


def ensure(state: State) -> Result:
    """Start the agent, one a GPU, where it is absent and its time has come; end it where it knows old settings."""
    agent, settings = state.agent, state.settings
    gpus = tuple(settings.agent.gpus or [gpu.uuid for gpu in (state.machine.gpus if state.machine else ())])
    if agent.status == "ready" and state.agent_outdated:
        # Its end is no failure; it comes back at once, with the new ones.
        agent = replace(agent, status="stopping", heard_at=state.now, identity=None)
        note = cmd.Note("info", "the agent is started anew, for the new settings")
        return replace(state, agent=agent), [cmd.Tell(protocol.Shutdown()), note]
    if agent.status == "ready" and agent.gpus != gpus:
        # A driver that answers late: until then there were no GPUs.
        again = cmd.KillAgent(f"it is to be started for {', '.join(gpus) or 'the CPU'}")
        return replace(state, agent=replace(agent, status="starting", heard_at=state.now, gpus=gpus)), [again]
    if agent.status != "absent" or state.now < agent.start_at:
        return state, []
    if state.machine is None and state.now - state.started_at < MACHINE_WAIT_S:
        return state, []
    agent = replace(agent, status="starting", heard_at=state.now, gpus=gpus)
    return replace(state, agent=agent, agent_outdated=False), [cmd.StartAgent(probe_of(state), gpus)]


def probe_of(state: State) -> protocol.Probe:
    """What an agent is told first, as the settings are now."""
    settings = state.settings
    cores = state.machine.cores if state.machine else 1.0
    return protocol.Probe(
        datasets=settings.data, share_labels=settings.policy.share_labels,
        hub=settings.policy.hub, hold_out=settings.release.hold_out,
        threads=settings.agent.threads or max(1, int(cores)), beat_s=min(BEAT_S, settings.agent.silence_s / 4),
    )  # fmt: skip


def watch(state: State, *, behind: bool = False) -> Result:
    """Kill an agent that should speak and does not; again and again, until it is gone. `behind`: what it says may be
    waiting to be heard, so that its silence counts from the end of that."""
    agent, limit = state.agent, state.settings.agent.silence_s
    if behind:
        return replace(state, agent=replace(agent, heard_at=state.now)), []
    since = max(agent.heard_at, agent.killed_at)
    if agent.status == "ready" and agent.failures and state.now - agent.heard_at > RETRY_CAP_S:
        return replace(state, agent=replace(agent, failures=0)), []
    if agent.status not in ("starting", "busy", "stopping", "evaluating") or state.now - since <= limit:
        return state, []
    reason = f"the agent said nothing for {limit:.0f} s"
    return replace(state, agent=replace(agent, killed_at=state.now)), [cmd.KillAgent(reason, hung=True)]


def probed(state: State, event: ev.AgentProbed) -> Result:
    """The agent is ready."""
    found = event.probed
    capability = Capability(
        bits=tuple(found.bits), datasets=found.datasets, notes=found.notes, agent_bytes=found.agent_bytes,
        hardware=found.hardware, agents=found.agents, flops=found.flops,
    )  # fmt: skip
    notes: list[cmd.Command] = [
        cmd.Note("warning" if name in state.settings.data else "info", f"probe: {name}: {note}")
        for name, note in sorted(found.notes.items())
    ]
    notes.append(cmd.Note("info", f"the agent proved {', '.join(map(str, found.bits)) or 'no'} bits"))
    agent = Agent(status="ready", heard_at=state.now, failures=state.agent.failures, gpus=state.agent.gpus)
    return replace(state, capability=capability, agent=agent), notes


def beat(state: State, event: ev.AgentBeat) -> Result:
    """The agent is alive; its progress is passed on at most once a second."""
    state = replace(state, agent=replace(state.agent, heard_at=state.now))
    done, work = event.progressed, state.work
    if done is None or work is None or state.agent.identity != identity_of(work):
        return state, []
    state = replace(state, progressed=done)
    if done.step >= work.training.checkpoint_every and not state.journal.checkpointed:
        state = replace(state, journal=msgspec.structs.replace(state.journal, checkpointed=True))
    if not state.connected or not done.step:
        return state, []
    if state.now - state.progress_at < PROGRESS_S:
        return state, []
    progress = Progress(
        epoch=state.epoch, job=work.job, round=work.round, attempt=work.attempt, step=done.step, steps=done.steps,
        samples=done.samples, loss=done.loss, samples_per_s=done.samples_per_s,
    )  # fmt: skip
    return replace(state, progress_at=state.now), [cmd.Publish(progress)]


def train(state: State, work: Assignment) -> Result:
    """Give the ready agent its work, with what is left of its time."""
    settings, left = state.settings, work.work.train_for_s
    if state.journal.given_up:
        left = protocol.NO_TIME_S
    elif left > 0:
        left = max(_SPENT_S, left - (state.now - state.received_at))
    order = cmd.Train(
        assignment=work,
        base_path=policy.base_path(settings, work.base.model, work.source),
        data_path=settings.data[work.task.dataset],
        train_for_s=left,
        batch_limit=state.journal.batch_limit,
        fetch_s=state.journal.fetch_s,
    )
    agent = replace(state.agent, status="busy", heard_at=state.now, identity=identity_of(work))
    state, pause = rest(replace(state, phase="training", paused="", agent=agent, progressed=None))
    return state, [order, *pause]


def rest(state: State) -> Result:
    """Pause or go on, by the latest reading and the hour."""
    if state.phase not in ("training", "paused") or state.agent.status != "busy":
        return state, []
    reason = policy.pause(state.settings, state.load, minute=state.minute, paused=bool(state.paused))
    if reason and not state.paused:
        state = replace(state, phase="paused", paused=reason)
        return state, [cmd.Tell(protocol.Pause(reason=reason)), cmd.Note("info", f"training rests: {reason}")]
    if not reason and state.paused:
        return replace(state, phase="training", paused=""), [
            cmd.Tell(protocol.Resume()),
            cmd.Note("info", "training goes on"),
        ]
    return replace(state, paused=reason), []


def deliver(state: State, command: Command) -> Result:
    """End the work under way with what it has done, if it is this one and in training; else the coordinator asks again
    or has it already."""
    wanted = Identity(command.job, command.round, command.attempt)
    if state.phase not in ("training", "paused") or state.agent.status != "busy" or state.agent.identity != wanted:
        return state, []
    return state, [cmd.Tell(protocol.Stop(after_step=True)), cmd.Note("info", f"{wanted} ends: {command.reason}")]


def discard(state: State, why: str) -> Result:
    """Forget the work under way, wherever it stands."""
    work = state.work
    if work is None:
        return state, []
    note = cmd.Note("info", f"{identity_of(work)} is given up: {why}")
    if state.agent.status != "busy":
        return state, [note, cmd.DropWork(identity_of(work))]
    # Its folder is dropped once the agent has let go of it.
    agent = replace(state.agent, status="stopping", heard_at=state.now)
    return replace(state, agent=agent, paused=""), [note, cmd.Tell(protocol.Stop(discard=True))]


def trained(state: State, done: protocol.Trained) -> Result:
    """An update is on disk: into the outbox, if it is still wanted."""
    identity = Identity(done.job, done.round, done.attempt)
    stopping, work = state.agent.status == "stopping", state.work
    state = replace(state, agent=_free(state, done.held_bytes), paused="")
    if work is None or identity != identity_of(work) or stopping:
        return state, [cmd.DropWork(identity)]
    journal = state.journal
    limits = [limit for limit in (journal.batch_limit, done.facts.batch_limit) if limit]
    facts = msgspec.structs.replace(done.facts, fetch_s=journal.fetch_s, batch_limit=min(limits, default=0))
    if journal.given_up:
        # The last agent only loaded: what it measured is not what this work takes.
        facts = msgspec.structs.replace(facts, peak_bytes=0, base_bytes=0, step_s=0.0)
    return outbox.offer(
        state,
        Offer(
            job=done.job, round=done.round, attempt=done.attempt, sha=done.sha, size=done.size, facts=facts,
            chunk=work.chunk,
        ),
    )  # fmt: skip


def failed(state: State, failure: protocol.Failed) -> Result:
    """The agent could not do the work, or forgot it as told."""
    identity = Identity(failure.job, failure.round, failure.attempt)
    stopping, work = state.agent.status == "stopping", state.work
    state = replace(state, agent=_free(state, failure.held_bytes), paused="")
    if work is None or identity != identity_of(work) or stopping:
        return state, [cmd.DropWork(identity)]
    if state.journal.given_up:
        return _end_given_up(state, identity)
    reason, memory = f"{failure.kind}: {failure.reason}", failure.kind == "memory"
    return outbox.fail(state, identity, reason, out_of_memory=memory, batch_limit=failure.batch_limit)


def gone(state: State, event: ev.AgentGone) -> Result:
    """The agent's process ended: start it again after a while, and give its work up after too many times."""
    agent, work = state.agent, state.work
    status, tries = agent.status, state.settings.agent.tries
    if status == "absent":
        return state, []  # said once more
    failures = agent.failures + (status in ("starting", "ready"))
    deaths = state.journal.deaths + (status == "busy" and not event.out_of_memory)
    wait = delay(failures + deaths + state.journal.rollout.deaths, 1.0, base_s=RETRY_BASE_S, cap_s=RETRY_CAP_S)
    exhausted = status == "starting" and failures >= tries
    state = replace(
        state,
        agent=Agent(start_at=state.now + (RETRY_CAP_S if exhausted else wait), failures=0 if exhausted else failures),
        paused="",
    )
    asked = status == "stopping" and agent.identity is None
    commands: list[cmd.Command] = [] if asked else [cmd.Note("warning", f"the agent is gone: {event.reason}")]
    if status == "stopping" and agent.identity is not None:
        commands.append(cmd.DropWork(agent.identity))
    if exhausted:
        problem = f"the agent does not start: {event.reason}"
        state = replace(state, capability=replace(state.capability or Capability(), bits=(), problem=problem))
        if work is not None and state.accepted:
            state, more = outbox.fail(state, identity_of(work), problem)
            commands += more
    elif status == "busy" and work is not None:
        state, more = _died(state, work, event, deaths)
        commands += more
    elif status == "evaluating":
        state, more = releasing.agent_gone(state, event)
        commands += more
    return state, commands


def _died(state: State, work: Assignment, event: ev.AgentGone, deaths: int) -> Result:
    if state.journal.given_up:
        return _end_given_up(state, identity_of(work))
    if not event.out_of_memory:
        state = replace(state, journal=msgspec.structs.replace(state.journal, deaths=deaths))
        if deaths < state.settings.agent.tries:
            return state, []
        return _give_up(state, work, f"the agent died {deaths} times, last: {event.reason}", out_of_memory=False)
    tried = (state.progressed.batch if state.progressed is not None else 0) or work.work.batch
    batch = min(tried, state.journal.batch_limit or tried)
    limit = batch // 2
    if limit < 1:
        return _give_up(state, work, "memory: not even a batch of one fits", out_of_memory=True)
    state = replace(state, journal=msgspec.structs.replace(state.journal, batch_limit=limit))
    return state, [cmd.Note("warning", f"out of memory with a batch of {batch}: again with {limit}")]


def _give_up(state: State, work: Assignment, reason: str, *, out_of_memory: bool) -> Result:
    """Try no more. What a checkpoint holds still counts: a last agent is asked for that alone."""
    if not state.journal.checkpointed:
        return outbox.fail(state, identity_of(work), reason, out_of_memory=out_of_memory)
    # That it ran for a while is told by its update; that it then did not fit, by the smallest limit there is.
    limit = 1 if out_of_memory else state.journal.batch_limit
    journal = msgspec.structs.replace(
        state.journal, given_up=reason, given_up_memory=out_of_memory, batch_limit=limit
    )  # fmt: skip
    state = replace(state, journal=journal)
    return state, [cmd.Note("warning", f"{identity_of(work)} is given up: {reason}; what its checkpoint holds counts")]


def _end_given_up(state: State, identity: Identity) -> Result:
    """Not even the checkpoint could be had."""
    journal = state.journal
    return outbox.fail(state, identity, journal.given_up, out_of_memory=journal.given_up_memory)


def _free(state: State, held_bytes: int) -> Agent:
    return Agent(status="ready", heard_at=state.now, gpus=state.agent.gpus, held_bytes=held_bytes)
