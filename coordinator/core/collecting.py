"""While a round is open: answers and updates of its participants."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

from coordinator.core import commands as cmd
from coordinator.core import events as ev
from coordinator.core import fleet
from coordinator.core import records as rec
from coordinator.core.close import Status
from coordinator.core.job import UPDATE_REFUSED, Job, Round
from coordinator.core.planning import regulation
from coordinator.core.turn import State, Turn
from shared.messages import Ack, BlobRef, Manifest, UpdateFacts, Work

UPDATE_SLACK = 256 * 1024


def on_ack(turn: Turn, device: str, ack: Ack) -> None:
    """Take a device's answer to its assignment; answers to anything but the current attempt are counted and dropped."""
    round = _open_round(turn.state, ack.job, ack.round, ack.attempt)
    if round is None or device not in round.participants:
        turn.count("stale acks")
        return
    if ack.verdict == "accept":
        turn.update(accepted=turn.state.accepted | {device})
    elif round.participants[device].outcome == "assigned":
        verdict: Literal["refused", "failed"] = "refused" if ack.verdict == "reject" else "failed"
        turn.record(
            rec.DeviceAnswered(
                job=ack.job,
                round=ack.round,
                attempt=ack.attempt,
                device=device,
                verdict=verdict,
                reason=ack.reason,
                out_of_memory=ack.out_of_memory,
                batch_limit=ack.batch_limit,
            )  # fmt: skip
        )


def on_manifest(turn: Turn, device: str, manifest: Manifest) -> None:
    """Pull an announced update, or settle it at once where it can't count (any more)."""
    verdict, reason = _verdict(turn.state, device, manifest)
    before = turn.state.announced.get(device)
    if verdict == "pull" and turn.state.checking.get(device) == manifest.sha:
        return  # what it told of it when the check began is what counts
    if verdict in ("pull", "refused") and before is not None and _replaces(manifest, before):
        # The room that the first takes is other devices'.
        turn.do(cmd.StopPull(device, before.sha))
    if verdict == "pull":
        ref = BlobRef(sha=manifest.sha, size=manifest.size)
        turn.update(announced={**turn.state.announced, device: manifest})
        turn.do(cmd.Pull(device, ref, manifest.chunk))
        return
    if verdict == "refused" and _waits_for(turn.state, device, manifest):
        _refuse(turn, device, manifest, reason)
    elif verdict != "stored":
        turn.count(f"{verdict} updates")
    turn.do(cmd.Settle(device, manifest.sha, verdict, reason))


def _replaces(manifest: Manifest, before: Manifest) -> bool:
    """Whether it is another update of the same attempt."""
    same = (before.job, before.round, before.attempt) == (manifest.job, manifest.round, manifest.attempt)
    return same and before.sha != manifest.sha


def _verdict(state: State, device: str, manifest: Manifest) -> tuple[str, str]:
    job = state.jobs.get(manifest.job)
    round = job.round if job else None
    if job is not None and (manifest.round, device, manifest.sha) in job.settled:
        return "stored", ""
    if job is None or round is None or (round.number, round.attempt) != (manifest.round, manifest.attempt):
        return "late", f"round {manifest.round} attempt {manifest.attempt} of {manifest.job} is not open"
    if device not in round.participants:
        return "refused", "this device takes no part in the round"
    part = round.participants[device]
    if part.outcome == "done" and part.blob is not None:
        same = part.blob.sha == manifest.sha
        return ("stored", "") if same else ("late", "another update of this device is already counted")
    if job.phase != "open":
        return "late", f"round {manifest.round} is closed"
    if part.outcome == "refused" and part.reason.startswith(UPDATE_REFUSED):
        return "refused", part.reason.removeprefix(UPDATE_REFUSED)
    work, facts = round.plan.participants[device], manifest.facts
    reason = impossible(work, facts, regulation.most(round.plan.regulation, device, work.batch))
    if reason:
        return "refused", reason
    most = _largest_update(job, work)
    if manifest.size > most:
        return "refused", f"an update of {manifest.size} bytes, the work allows {most}"
    return "pull", ""


def impossible(work: Work, facts: UpdateFacts, batch: int) -> str:
    """What of `facts` nobody who did `work`, in batches of `batch` at most, can have to tell; "": nothing."""
    if facts.agents > work.agents:
        return f"{facts.agents} agents claimed, the work is for {work.agents}"
    samples = work.most_steps * batch * facts.agents
    for claimed, most, what in (
        (facts.steps, work.most_steps, "steps"), (facts.batch, batch, "samples in a batch"),
        (facts.samples, samples, "samples"),
    ):  # fmt: skip
        if not 0 < claimed <= most:
            return f"{claimed} {what} claimed, the work allows 1 to {most}"
    return ""


def _largest_update(job: Job, work: Work) -> int:
    """Bytes that no sound update of `work` exceeds: twice its tensors in float32, and names."""
    assert job.facts is not None
    sides = {module.name: module.out + module.inp for module in job.facts.modules}
    numbers = work.agents * sum(rank * sides.get(name, 0) for name, rank in work.ranks.items())
    numbers += sum(math.prod(shape) for shape in job.facts.dense.values())
    return 8 * numbers + UPDATE_SLACK


def on_update(turn: Turn, event: ev.UpdateStored | ev.UpdateLost | ev.UpdateChecked) -> None:
    """How far an update has come."""
    match event:
        case ev.UpdateStored():
            on_stored(turn, event)
        case ev.UpdateLost():
            on_lost(turn, event)
        case ev.UpdateChecked():
            on_checked(turn, event)


def on_stored(turn: Turn, event: ev.UpdateStored) -> None:
    """The bytes are here: have them checked."""
    manifest = turn.state.announced.get(event.device)
    if manifest is None or manifest.sha != event.sha or not _waits_for(turn.state, event.device, manifest):
        return
    if event.device in turn.state.checking:
        return  # checks wait for each other, and the fold for them: one of a device; it announces again
    job = turn.state.jobs[manifest.job]
    ref = BlobRef(sha=manifest.sha, size=manifest.size)
    turn.update(checking={**turn.state.checking, event.device: event.sha})
    turn.do(cmd.CheckUpdate(job, event.device, ref, manifest.facts))


def on_lost(turn: Turn, event: ev.UpdateLost) -> None:
    """The bytes can't be had: the device is told, and not waited for."""
    manifest = turn.state.announced.get(event.device)
    if manifest is None or manifest.sha != event.sha or not _waits_for(turn.state, event.device, manifest):
        return
    _refuse(turn, event.device, manifest, event.reason)
    turn.do(cmd.Settle(event.device, event.sha, "refused", event.reason))


def on_checked(turn: Turn, event: ev.UpdateChecked) -> None:
    """Admission is through: write the update down, then tell the device that it may forget it."""
    if turn.state.checking.get(event.device) == event.sha:
        turn.update(checking={d: sha for d, sha in turn.state.checking.items() if d != event.device})
    manifest = turn.state.announced.get(event.device)
    if manifest is None or manifest.sha != event.sha:
        return
    if (manifest.job, manifest.round, manifest.attempt) != (event.job, event.round, event.attempt):
        return
    if not _waits_for(turn.state, event.device, manifest):
        turn.do(cmd.Settle(event.device, event.sha, *_verdict(turn.state, event.device, manifest)))
        return
    if event.reason:
        _refuse(turn, event.device, manifest, event.reason)
        turn.do(cmd.Settle(event.device, event.sha, "refused", event.reason))
        return
    turn.record(
        rec.UpdateAdmitted(
            job=manifest.job,
            round=manifest.round,
            attempt=manifest.attempt,
            device=event.device,
            blob=BlobRef(sha=manifest.sha, size=manifest.size),
            facts=manifest.facts,
        )  # fmt: skip
    )
    _forget(turn, event.device)
    turn.do(cmd.Settle(event.device, event.sha, "stored"))


def on_left(turn: Turn, device: str) -> None:
    """A device was taken out of the fleet: what it has under way to us is not counted, nor what it may still send for
    this attempt. An update that is counted already stays."""
    _forget(turn, device)
    job = turn.state.active
    round = job.round if job is not None and job.phase == "open" else None
    if job is None or round is None or device not in round.participants:
        return
    if round.participants[device].outcome == "assigned":
        turn.record(
            rec.UpdateRefused(
                job=job.id, round=round.number, attempt=round.attempt, device=device, sha="",
                reason="the device left the fleet",
            )
        )  # fmt: skip


def statuses(state: State, job: Job, now: float) -> dict[str, Status]:
    """The status of each participant now (an update of one that left or is silent is still taken)."""
    round = job.round
    if round is None:
        return {}
    found: dict[str, Status] = {}
    hearing_since = state.hearing_since(now)
    for device, part in round.participants.items():
        found[device] = part.outcome
        if part.outcome != "assigned":
            continue
        known = state.fleet.get(device)
        heard = max(known.heard_at if known else 0.0, state.since, hearing_since)
        if now - heard > state.waits.silent_s:
            found[device] = "silent"
        elif known is not None and fleet.gone(known, now, hearing_since, state.waits.silent_s):
            found[device] = "gone"
        elif device in state.accepted:
            found[device] = "accepted"
    return found


def hurry(turn: Turn, job: Job, found: Mapping[str, Status], now: float) -> None:
    """Once as many have delivered as are still at work, have these deliver what they have done, in a round of which
    nothing was known that could end works by their time."""
    round, waits = job.round, turn.state.waits
    done = sum(status == "done" for status in found.values())
    working = [device for device, status in found.items() if status in ("assigned", "accepted")]
    if round is None or not round.plan.together or not 0 < len(working) <= done:
        return
    asked = turn.state.hurried
    due = [device for device in working if device not in asked or now - asked[device] >= waits.remind_s]
    reason = f"{done} of {len(found)} devices have delivered"
    turn.update(hurried={**asked, **dict.fromkeys(due, now)})
    turn.do(*(cmd.AskDelivery(device, job.id, round.number, round.attempt, reason) for device in due))


def idle(state: State, job: Job, device: str, status: Status) -> bool:
    """Whether a participant that is waited for shows no sign of its assignment: no acceptance, or a later reading that
    names other work."""
    known, round = state.fleet.get(device), job.round
    if status not in ("assigned", "accepted") or known is None or round is None:
        return False
    load = known.load
    if status == "assigned" or load is None or known.load_at <= state.since:
        return status == "assigned"
    return (load.job, load.round, load.attempt) != (job.id, round.number, round.attempt)


def _refuse(turn: Turn, device: str, manifest: Manifest, reason: str) -> None:
    """Written down once: a device that has answered is not waited for any more, whatever else it sends."""
    round = turn.state.jobs[manifest.job].round
    if round is not None and round.participants[device].outcome == "assigned":
        turn.record(
            rec.UpdateRefused(
                job=manifest.job,
                round=manifest.round,
                attempt=manifest.attempt,
                device=device,
                sha=manifest.sha,
                reason=reason,
            )  # fmt: skip
        )
    turn.count("refused updates")
    _forget(turn, device)


def _forget(turn: Turn, device: str) -> None:
    turn.update(announced={d: m for d, m in turn.state.announced.items() if d != device})


def _open_round(state: State, job_id: str, number: int, attempt: int) -> Round | None:
    job = state.jobs.get(job_id)
    if job is None or job.phase != "open" or job.round is None:
        return None
    return job.round if (job.round.number, job.round.attempt) == (number, attempt) else None


def _waits_for(state: State, device: str, manifest: Manifest) -> bool:
    round = _open_round(state, manifest.job, manifest.round, manifest.attempt)
    return round is not None and device in round.participants and round.participants[device].outcome != "done"
