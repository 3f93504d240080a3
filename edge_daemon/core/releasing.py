"""What the device does with the release that it is to have: fetch, check, stage, try, put in place, or leave it.

Two rules:
1. What a stage needs done follows from the journal alone (`advance`); a restart takes the same path.
2. `current` changes only to what has passed its trial here or had come to stay here before, and only by one rename.

A trial takes the agent, so it waits for the end of the work under way and for the owner's hours; training that comes in
meanwhile waits for the trial, whose rows are bounded.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import msgspec

from edge_daemon import protocol
from edge_daemon.core import commands as cmd
from edge_daemon.core import events as ev
from edge_daemon.core import policy
from edge_daemon.core.presence import Result
from edge_daemon.core.release_transitions import allowed
from edge_daemon.core.release_waits import waits
from edge_daemon.core.rollout import OVER, Installed, Rollout, due, found, installed, kept, verdict, withdrawn
from edge_daemon.core.state import Capability, State
from shared.jobs import Bits
from shared.machines import InvalidTransition
from shared.release_messages import ReleaseSpec, Stage

RETRY_S = 60.0
"""After a full disk."""


def check(before: Rollout, event: str, after: Rollout) -> None:
    """Raises `InvalidTransition` for a move of the stage that the table does not have."""
    if not allowed(before.stage, event, after.stage):
        raise InvalidTransition(f"release: {before.stage} --{event}--> {after.stage} is not in the table")


# ---- what a stage needs


def advance(state: State) -> Result:
    """Go on with the wanted release as far as the state allows. Called again at once, it does nothing."""
    rollout = state.journal.rollout
    if state.now < state.release_retry_at:
        return state, []
    target, wanted = due(rollout), rollout.wanted
    # It may point there already, and the process have died before it was written down.
    unsaid = wanted is not None and target == wanted.id and rollout.stage in ("wanted", "staged")
    if target != rollout.active or unsaid:
        return _once(state, f"activate {target}", cmd.ActivateRelease(target))
    if wanted is None or rollout.stage in OVER or rollout.stage == "active":
        return state, []
    reason = _unable(state, wanted)
    if reason:
        return _end(state, "skipped", reason)
    if waits(state):
        return state, []
    match rollout.stage:
        case "wanted":
            return _once(state, "fetch", cmd.Fetch(wanted.blob, wanted.chunk))
        case "received":
            return _once(state, "check", cmd.CheckRelease(wanted.id, wanted.blob.sha))
        case "verified":
            return _once(state, "unpack", cmd.StageRelease(wanted.id, wanted.blob.sha))
        case _:
            return _try(state, wanted)


def _unable(state: State, wanted: ReleaseSpec) -> str:
    """Why this device can't have the release at all, or ""."""
    settings, capability = state.settings, state.capability
    if not settings.release.accept:
        return "its owner takes no releases (release.accept)"
    if wanted.kind != "model" and wanted.task.kind != "least_squares":
        fault = policy.base_fault(settings, wanted.base.model, wanted.source)
        if fault:
            return fault
    if capability is None:
        return ""
    return capability.problem or ("" if capability.bits else "no precision is proven here")


def _once(state: State, task: str, command: cmd.Command) -> Result:
    """Ask for something, unless it is under way."""
    return (state, []) if state.release_task == task else (replace(state, release_task=task), [command])


def _try(state: State, wanted: ReleaseSpec) -> Result:
    """Give the ready agent the release to measure."""
    capability, settings = state.capability, state.settings
    if capability is None or state.agent.status != "ready":
        return state, []
    name, model = wanted.task.dataset, wanted.base.model
    held_out = settings.release.data.get(name, "")
    if policy.base_fault(settings, model, wanted.source):
        # A whole model needs no base; there is none to compare it with then.
        source, path = None, ""
    else:
        source, path = wanted.source, policy.base_path(settings, model, wanted.source)
    order = cmd.Evaluate(
        release=wanted,
        previous=state.journal.rollout.active,
        bits=_bits(state.journal.rollout, wanted, capability),
        base_path=path,
        source=source,
        data_path=held_out or settings.data.get(name, ""),
        hold_out=0.0 if held_out else settings.release.hold_out,
        share=1.0 if held_out else settings.release.share,
        trained_on=not held_out,
        rows=settings.release.rows,
    )
    agent = replace(state.agent, status="evaluating", heard_at=state.now, identity=None)
    note = cmd.Note("info", f"release {wanted.id} is tried at {order.bits} bits")
    return replace(_with(state, bits=order.bits), agent=agent, release_paused=""), [order, note]


def _bits(rollout: Rollout, wanted: ReleaseSpec, capability: Capability) -> Bits:
    """The largest proven precision that is not above the one asked for; else the smallest."""
    most = rollout.bits or wanted.bits
    return max((bits for bits in capability.bits if bits <= most), default=min(capability.bits))


# ---- the coordinator


def received(state: State, event: ev.ReleaseReceived) -> Result:
    """The desired state arrives, perhaps again, perhaps an old one."""
    message, rollout = event.message, state.journal.rollout
    if (message.term, message.seq) < (rollout.term, rollout.seq) or state.phase == "draining":
        return state, []
    wanted = message.release
    state = replace(_with(state, term=message.term, seq=message.seq), release_sent=None)
    if (wanted.id if wanted else "") == (rollout.wanted.id if rollout.wanted else "") and rollout.stage != "none":
        if not message.commit or rollout.commit:
            return state, []
        state = _with(state, commit=True)
        return _commit(state) if rollout.stage == "active" else (state, [])
    if wanted is None and rollout.wanted is None:
        return state, []
    commands = _let_go(state)
    state = _with(
        state, wanted=wanted, commit=message.commit, stage="wanted" if wanted else "none", reason="", tried=False,
        before=None, after=None, bits=0, deaths=0,
    )  # fmt: skip
    state = replace(state, release_task="", release_retry_at=0.0)
    said = f"release {wanted.id} is wanted" if wanted else "no release is wanted"
    return state, [*commands, cmd.Note("info", f"{said}: {message.reason}")]


def _let_go(state: State) -> list[cmd.Command]:
    """What is there of a wanted release that is wanted no more."""
    rollout = state.journal.rollout
    old = rollout.wanted
    if old is None or rollout.stage in OVER:
        return []
    commands: list[cmd.Command] = []
    if rollout.stage in ("wanted", "received", "verified"):
        commands.append(cmd.DropBlob(old.blob.sha))
    if rollout.stage in ("verified", "staged") and installed(rollout, old.id) is None:
        commands.append(cmd.DropRelease(old.id))
    return commands


def fetch_again(state: State) -> list[cmd.Command]:
    """Ask once more for the release under way, if there is one. What has come of it holds its room on the disk: that
    is not waited for again."""
    wanted = state.journal.rollout.wanted
    return [cmd.Fetch(wanted.blob, wanted.chunk)] if wanted is not None and state.release_task == "fetch" else []


# ---- what the disk says


def started(state: State, event: ev.Started) -> Result:
    """Another process: what was under way is not; the disk tells what is really there."""
    rollout = state.journal.rollout
    if event.releases is None:
        return state, []
    there = event.releases
    active = event.active if event.active in there else ""
    whole = tuple(one for one in rollout.installed if one.id in there) + found(rollout, active)
    state = _with(state, installed=whole, active=active)
    wanted = rollout.wanted
    unpacked = rollout.stage in ("staged", "active", "committed")
    lost = wanted is not None and wanted.id not in there and unpacked
    if lost or rollout.stage == "skipped":
        # What kept the device from it, such as a setting, may be another now.
        state = _with(state, stage="wanted", reason="", tried=False, before=None, after=None, bits=0, deaths=0)
    names = (
        {one.id for one in whole} | {active} | ({wanted.id} if wanted is not None and unpacked and not lost else set())
    )
    return state, [cmd.TidyReleases(tuple(sorted(names - {""})))]


def reconfigured(state: State) -> State:
    """The owner's settings are others now: what was skipped is looked at once more."""
    skipped = state.journal.rollout.stage == "skipped"
    return _with(state, stage="wanted", reason="", bits=0, deaths=0) if skipped else state


def blobs(state: State) -> tuple[str, ...]:
    """Contents that the wanted release still needs."""
    rollout = state.journal.rollout
    needed = rollout.wanted is not None and rollout.stage in ("wanted", "received", "verified")
    return (rollout.wanted.blob.sha,) if rollout.wanted is not None and needed else ()


def stored(state: State, event: ev.AdapterStored) -> Result:
    """The content is complete."""
    return (_with(state, stage="received"), []) if _is_fetched(state, event.sha) else (state, [])


def lost(state: State, event: ev.AdapterLost) -> Result:
    """The content can't be had."""
    if not _is_fetched(state, event.sha):
        return state, []
    if event.room:
        return _later(state, event.reason)
    return _end(state, "failed", f"it can't be fetched: {event.reason}")


def checked(state: State, event: ev.ReleaseChecked) -> Result:
    """Every file in it is what its list says."""
    return (_with(state, stage="verified"), []) if _is_at(state, event.release, "received") else (state, [])


def staged(state: State, event: ev.ReleaseStaged) -> Result:
    """The files are in their folder; the content they came in is not needed any more."""
    wanted = state.journal.rollout.wanted
    if wanted is None or not _is_at(state, event.release, "verified"):
        gone = installed(state.journal.rollout, event.release) is None and not _is_at(state, event.release, "staged")
        return state, [cmd.DropRelease(event.release)] if gone else []
    return _with(state, stage="staged"), [cmd.DropBlob(wanted.blob.sha)]


def problem(state: State, event: ev.ReleaseProblem) -> Result:
    """What was asked for can't be done."""
    rollout = state.journal.rollout
    wanted = rollout.wanted
    mine = wanted is not None and event.release == wanted.id
    if event.fault == "gone":
        # A folder that is to come back was removed by other hands: the next best takes its place, and it is fetched.
        rest = tuple(one for one in rollout.installed if one.id != event.release)
        again = {"stage": "wanted", "tried": False} if mine and rollout.stage not in OVER - {"committed"} else {}
        return replace(_with(state, installed=rest, **again), release_task=""), []
    if event.fault == "disk":
        # About a release that is not wanted any more there is nothing to wait for.
        return _later(state, event.reason) if mine or event.release == due(rollout) else (state, [])
    if not mine or rollout.stage not in ("received", "verified"):
        return state, []
    return _end(state, "failed", event.reason)


def activated(state: State, event: ev.ReleaseActivated) -> Result:
    """`current` points to it: of the releases that were withdrawn nothing stays."""
    state = replace(_with(state, active=event.release), release_task="")
    rollout = state.journal.rollout
    wanted = rollout.wanted
    commands: list[cmd.Command] = []
    if wanted is not None and event.release == wanted.id and rollout.stage in ("wanted", "staged"):
        known = installed(rollout, wanted.id) or Installed(id=wanted.id, number=wanted.number, bits=rollout.bits)
        rest = tuple(one for one in rollout.installed if one.id != wanted.id)
        state = _with(state, stage="active", installed=(*rest, known))
        if rollout.commit:
            state, commands = _commit(state)
    gone = withdrawn(state.journal.rollout)
    state = _with(state, installed=tuple(one for one in state.journal.rollout.installed if one not in gone))
    note = cmd.Note("info", f"release in use: {event.release or 'none'}")
    return state, [*commands, *(cmd.DropRelease(one.id) for one in gone), note]


def _commit(state: State) -> Result:
    """It stays; older ones than those to keep go."""
    rollout = state.journal.rollout
    done = tuple(
        msgspec.structs.replace(one, committed=True) if one.id == rollout.active else one for one in rollout.installed
    )
    state = _with(state, stage="committed", installed=done)
    rest = kept(state.journal.rollout, state.settings.release.keep)
    state = _with(state, installed=rest)
    return state, [cmd.DropRelease(one.id) for one in done if one not in rest]


# ---- the agent


def evaluated(state: State, event: ev.AgentEvaluated) -> Result:
    """The release was measured: judge it."""
    done = event.evaluated
    state = _free(state)
    wanted = state.journal.rollout.wanted
    if wanted is None or not _is_at(state, done.release, "staged"):
        return state, []
    state = _with(state, before=done.before, after=done.after)
    reason = verdict(done.before, done.after, wanted.worse_by)
    if reason:
        return _end(state, "failed", reason)
    return _with(state, tried=True), []


def unfit(state: State, event: ev.AgentUnfit) -> Result:
    """The release could not be measured: for a fault of its own, or since this device can't."""
    answer = event.unfit
    state = _free(state)
    if not _is_at(state, answer.release, "staged") or answer.kind == "stopped":
        return state, []
    if answer.kind in ("memory", "bits"):
        return _fewer_bits(state, answer.reason)
    return _end(state, "failed" if answer.kind in ("load", "score") else "skipped", answer.reason)


def agent_gone(state: State, event: ev.AgentGone) -> Result:
    """The agent died over the trial; called where it was evaluating."""
    state = replace(state, release_paused="")
    rollout = state.journal.rollout
    if rollout.stage != "staged" or rollout.tried:
        return state, []
    if event.out_of_memory:
        return _fewer_bits(state, "memory ran out")
    state = _with(state, deaths=rollout.deaths + 1)
    if rollout.deaths + 1 < state.settings.agent.tries:
        return state, []
    return _end(state, "failed", f"the agent died {rollout.deaths + 1} times over it, last: {event.reason}")


def rest(state: State) -> Result:
    """Pause a trial or go on, by the latest reading and the hour."""
    if state.agent.status != "evaluating":
        return state, []
    paused = state.release_paused
    reason = policy.pause(state.settings, state.load, minute=state.minute, paused=bool(paused))
    state = replace(state, release_paused=reason)
    if bool(reason) == bool(paused):
        return state, []
    return state, [cmd.Tell(protocol.Pause(reason=reason) if reason else protocol.Resume())]


def _fewer_bits(state: State, reason: str) -> Result:
    """Try again at the next precision below; a device that can't hold the model at all is no sign of a fault."""
    rollout, capability = state.journal.rollout, state.capability
    wanted = rollout.wanted
    if wanted is None or capability is None or not capability.bits:
        return state, []
    now = _bits(rollout, wanted, capability)
    lower = [bits for bits in capability.bits if bits < now]
    if not lower:
        return _end(state, "skipped", f"{reason}, at {now} bits, and no fewer are proven here")
    note = cmd.Note("warning", f"release {wanted.id}: {reason} at {now} bits: again at {max(lower)}")
    return _with(state, bits=max(lower)), [note]


# ---- pieces


def _end(state: State, stage: Stage, reason: str) -> Result:
    """The wanted release is not taken; what is in use stays."""
    wanted = state.journal.rollout.wanted
    assert wanted is not None
    commands = _let_go(state)
    state = replace(_with(state, stage=stage, reason=reason[:1000]), release_task="")
    note = cmd.Note("error" if stage == "failed" else "warning", f"release {wanted.id} {stage}: {reason}")
    return state, [*commands, note]


def _later(state: State, reason: str) -> Result:
    state = replace(state, release_task="", release_retry_at=state.now + RETRY_S)
    return state, [cmd.Note("error", f"release: {reason}; again in {RETRY_S:.0f} s")]


def _free(state: State) -> State:
    if state.agent.status != "evaluating":
        return state
    return replace(state, agent=replace(state.agent, status="ready", heard_at=state.now), release_paused="")


def _is_fetched(state: State, sha: str) -> bool:
    rollout = state.journal.rollout
    return rollout.stage == "wanted" and rollout.wanted is not None and rollout.wanted.blob.sha == sha


def _is_at(state: State, release: str, stage: Stage) -> bool:
    rollout = state.journal.rollout
    return rollout.stage == stage and rollout.wanted is not None and rollout.wanted.id == release


def _with(state: State, **changes: Any) -> State:
    """`state` with changes of its rollout."""
    rollout = msgspec.structs.replace(state.journal.rollout, **changes)
    return replace(state, journal=msgspec.structs.replace(state.journal, rollout=rollout))
