"""What the device says about itself: lifecycle, capability, load, acknowledgements, offers."""

from __future__ import annotations

from dataclasses import replace

import msgspec

from edge_daemon.core import commands as cmd
from edge_daemon.core import policy
from edge_daemon.core.state import WORKING, Announcing, Finished, Identity, Offer, State
from shared.messages import Ack, DeviceInfo, DeviceState, Lifecycle, Load, Manifest

LONGEST_ANNOUNCE_S = 60.0
REPEAT_S = 60.0
"""Lifecycle and capability are said again so often: a broker may drop what it acknowledged."""
SAMPLE_S = 1.0
"""Between readings while training, so that a pause comes within two seconds."""

Result = tuple[State, list[cmd.Command]]


def lifecycle(state: State) -> Lifecycle:
    """The word for the phase. A device is ready before its probe: `info.bits` says what it has proven."""
    if state.phase == "stopped":
        return "disconnected"
    if state.phase == "draining":
        return "draining"
    return "training" if state.phase in WORKING else "ready"


def device_state(state: State, word: Lifecycle) -> DeviceState:
    """The retained state with this connection's epoch."""
    return DeviceState(s=word, epoch=state.epoch, boot_id=state.boot_id, version=state.version, ts=state.wall)


def device_info(state: State) -> DeviceInfo:
    """The retained capability, as far as it is known."""
    machine, capability = state.machine, state.capability
    info = DeviceInfo(epoch=state.epoch, version=state.version, max_chunk=state.max_chunk)
    if machine is not None:
        info = msgspec.structs.replace(
            info, hardware=machine.hardware, cores=machine.cores, memory_bytes=machine.memory_bytes,
            gpus=list(machine.gpus), driver=machine.driver, jetpack=machine.jetpack, sandbox=machine.sandbox,
        )  # fmt: skip
    problem = policy.ailing(state.settings.policy, state.load)
    if capability is None:
        return msgspec.structs.replace(info, problem=problem)
    return msgspec.structs.replace(
        info, bits=list(capability.bits), agents=capability.agents, agent_bytes=capability.agent_bytes,
        datasets=capability.datasets, faulty=_faulty(state), hardware=info.hardware or capability.hardware,
        flops=capability.flops,
        problem=(capability.problem or problem)[:1000],
    )  # fmt: skip


def _faulty(state: State) -> dict[str, str]:
    notes = state.capability.notes if state.capability is not None else {}
    told = {name: notes[name][:1000] for name in sorted(state.settings.data) if name in notes}
    return dict(list(told.items())[:64])


def say(state: State) -> Result:
    """Publish what changed: lifecycle word, capability, offers that are due. Ask for the sampling this phase needs."""
    commands: list[cmd.Command] = []
    period = _sampling(state)
    if period != state.sampling_s:
        state = replace(state, sampling_s=period)
        commands.append(cmd.Sample(period))
    if not state.connected:
        return state, commands
    if state.now - state.said_at >= REPEAT_S:
        state = replace(state, said_at=state.now, word="", info_sent=None)
    word, info = lifecycle(state), device_info(state)
    if word != state.word:
        state = replace(state, word=word)
        commands.append(cmd.Publish(device_state(state, word)))
    if info != state.info_sent:
        state = replace(state, info_sent=info)
        commands.append(cmd.Publish(info))
    if state.load_sent is None:
        # In a new session nobody knows it yet, and the next reading may be far off.
        state, load = say_load(state)
        commands += load
    state, offers = _announce(state)
    return state, commands + offers


def say_load(state: State) -> Result:
    """Publish the latest reading if its time has come or it differs enough from the last one sent."""
    if state.load is None or not state.connected:
        return state, []
    load = _labelled(state, state.load)
    period = state.settings.telemetry.busy_s if state.assigned else state.settings.telemetry.idle_s
    due = state.now - state.load_sent_at >= 0.9 * period  # readings come a little early or late
    if state.load_sent is not None and not due and not _differs(state.load_sent, load, state.settings.telemetry.change):
        return state, []
    state = replace(state, load_sent=load, load_sent_at=state.now, load_seq=state.load_seq + 1)
    return state, [cmd.Publish(load)]


def ack_accept(state: State, identity: Identity) -> list[cmd.Command]:
    """Tell the coordinator that the work is taken."""
    ack = Ack(
        epoch=state.epoch, job=identity.job, round=identity.round, attempt=identity.attempt, verdict="accept",
        batch_limit=state.journal.batch_limit,
    )  # fmt: skip
    return [cmd.Publish(ack)] if state.connected else []


def ack_finished(state: State, done: Finished) -> list[cmd.Command]:
    """Tell the coordinator that the work was rejected or failed; nothing for work that it settled itself."""
    if done.verdict not in ("rejected", "failed") or not state.connected:
        return []
    ack = Ack(
        epoch=state.epoch, job=done.job, round=done.round, attempt=done.attempt, reason=done.reason[:1000],
        verdict="reject" if done.verdict == "rejected" else "failed",
        out_of_memory=done.out_of_memory, batch_limit=done.batch_limit,
    )  # fmt: skip
    return [cmd.Publish(ack)]


def postpone(state: State, sha: str) -> State:
    """`state` with the offer's next announcement put off: the coordinator is pulling it."""
    known = state.announcing.get(sha)
    if known is None:
        return state
    later = Announcing(next_at=state.now + known.wait_s, wait_s=known.wait_s)
    return replace(state, announcing={**state.announcing, sha: later})


def _announce(state: State) -> Result:
    """Announce the offers whose time has come, each time after a longer wait."""
    if not state.coordinator_online or state.phase in ("draining", "stopped"):
        return state, []
    first = state.settings.reannounce_s
    announcing, commands = dict(state.announcing), list[cmd.Command]()
    for offer in state.journal.outbox:
        known = announcing.get(offer.sha)
        if known is not None and state.now < known.next_at:
            continue
        wait = first if known is None else min(max(LONGEST_ANNOUNCE_S, first), known.wait_s * 2)
        announcing[offer.sha] = Announcing(next_at=state.now + wait, wait_s=wait)
        commands.append(cmd.Publish(_manifest(state, offer)))
    return (replace(state, announcing=announcing), commands) if commands else (state, [])


def _manifest(state: State, offer: Offer) -> Manifest:
    return Manifest(
        sha=offer.sha, size=offer.size, chunk=min(offer.chunk, state.max_chunk), kind="update", job=offer.job,
        round=offer.round, attempt=offer.attempt, facts=offer.facts,
    )  # fmt: skip


def _sampling(state: State) -> float:
    settings = state.settings.telemetry
    if state.phase in ("training", "paused"):
        return min(SAMPLE_S, settings.busy_s)
    return settings.busy_s if state.assigned else settings.idle_s


def _labelled(state: State, reading: Load) -> Load:
    wanted = state.journal.assignment if state.assigned else None
    if state.machine is not None and state.machine.unified:
        # What it holds through the GPU is in no process's resident memory, and yet missing for the others.
        reading = msgspec.structs.replace(reading, own_memory=reading.own_memory + state.agent.held_bytes)
    return msgspec.structs.replace(
        reading, epoch=state.epoch, seq=state.load_seq + 1, phase=state.phase, paused=state.paused,
        job=wanted.job if wanted else "", round=wanted.round if wanted else 0,
        attempt=wanted.attempt if wanted else 0,
    )  # fmt: skip


def _differs(old: Load, new: Load, share: float) -> bool:
    """Whether a reading moved by more than `share` of its range, or a word changed."""
    if (old.phase, old.job, old.round, old.attempt, old.paused) != (
        new.phase, new.job, new.round, new.attempt, new.paused
    ):  # fmt: skip
        return True
    if old.on_battery != new.on_battery or old.hung.keys() != new.hung.keys():
        return True
    if [(gpu.uuid, gpu.xids, gpu.fault) for gpu in old.gpus] != [(gpu.uuid, gpu.xids, gpu.fault) for gpu in new.gpus]:
        return True
    cores = max(old.cores, new.cores, 1e-9)
    memory = max(old.memory_limit, new.memory_limit, 1)
    moves = [
        abs(old.cores - new.cores) / cores,
        abs(old.foreign_cores - new.foreign_cores) / cores,
        abs(old.memory_available - new.memory_available) / memory,
        _move(old.temperature_c, new.temperature_c, 100.0),
    ]
    for before, after in zip(old.gpus, new.gpus, strict=True):
        total = float(before.memory_total or after.memory_total or 1)
        moves.append(_move(before.memory_free, after.memory_free, total))
        moves.append(_move(before.temperature_c, after.temperature_c, 100.0))
        moves.append(_move(before.foreign_utilization, after.foreign_utilization, 1.0))
    return max(moves) > share


def _move(old: float | None, new: float | None, scale: float) -> float:
    if old is None or new is None:
        return 0.0 if old is new else 1.0
    return abs(old - new) / scale
