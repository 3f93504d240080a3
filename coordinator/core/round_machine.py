"""The coordinator's decisions: `step(state, event) -> Step(state, records, commands)`.

Two rules:
1. Durable state changes only through records, applied by `coordinator.core.job.apply`; the runtime writes them to disk
   before it performs the commands.
2. What a phase needs done is a function of the state alone (`entry`). Entering a phase and coming back to it after a
   crash are the same call, so recovery has no code of its own.
"""

from __future__ import annotations

from typing_extensions import assert_never

from coordinator.core import collecting, fleet, planning_turn, release_machine, release_transitions, splitting
from coordinator.core import commands as cmd
from coordinator.core import events as ev
from coordinator.core import records as rec
from coordinator.core.close import Status, closing
from coordinator.core.gate import judge, reached
from coordinator.core.job import IDLE, TERMINAL, Job
from coordinator.core.transitions import TABLE
from coordinator.core.turn import State, Step, Turn
from shared import machines
from shared.messages import (
    Ack,
    Assign,
    Assignment,
    DeviceInfo,
    DeviceState,
    Load,
    Manifest,
    Progress,
    RoundInfo,
)
from shared.release_messages import ReleaseState

REBIRTH_EVERY_S = 10.0
ATTEMPTS = 8
"""Times a round is tried before the job pauses for an operator."""


def step(state: State, event: ev.AnyEvent) -> Step:
    """What follows from `event`. Raises `shared.machines.InvalidTransition` if the machine would leave its table."""
    before = {job.id: job.phase for job in state.jobs.values()}
    phases = {release.id: release.phase for release in state.releases.values()}
    turn = Turn(state)
    match event:
        case ev.Started():
            _on_started(turn, event)
        case ev.Tick():
            _on_tick(turn, event)
        case ev.Reconfigured():
            turn.update(waits=event.waits)
        case ev.BrokerFound():
            # The broker may have lost what it kept for us.
            turn.update(cut_off=False, restarted_at=event.now, chunk=event.chunk, release_told={})
        case ev.BrokerLost():
            turn.update(cut_off=True)
        case ev.FromDevice() | ev.Heard() | ev.Decommissioned():
            _on_device(turn, event)
        case ev.UpdateStored() | ev.UpdateLost() | ev.UpdateChecked():
            collecting.on_update(turn, event)
        case ev.ReleaseRequested() | ev.RollbackRequested() | ev.Packed() | ev.PackingFailed():
            release_machine.on_event(turn, event)
        case ev.TopDone() | ev.TopFailed():
            _on_top(turn, event)
        case _:
            _on_job(turn, event)
    for release in turn.state.releases.values():
        if phases.get(release.id, release.phase) != release.phase:
            machines.check(release_transitions.TABLE, phases[release.id], type(event).__name__, release.phase)
    for job in turn.state.jobs.values():
        if job.id in before and before[job.id] != job.phase:
            machines.check(TABLE, before[job.id], type(event).__name__, job.phase)
            turn.update(notices={name: text for name, text in turn.state.notices.items() if name != job.id})
            if before[job.id] in IDLE and job.phase in IDLE:
                continue  # it never held the fleet: another job may
            # What was not admitted in time does not count any more.
            turn.do(*(cmd.StopPull(device, one.sha) for device, one in turn.state.announced.items()))
            turn.update(since=event.now, accepted=frozenset(), announced={}, checking={}, reminded={}, hurried={})
            turn.update(top_told=frozenset(), top_asked_at=None)
            turn.do(*entry(turn.state, job))
    return turn.step()


def entry(state: State, job: Job) -> list[cmd.Command]:
    """What `job` needs done in its phase; the same after a transition and after a restart."""
    match job.phase:
        case "preparing":
            return [cmd.PrepareBase(job)]
        case "baseline":
            assert job.adapter is not None
            return [cmd.EvaluateAdapter(job, 0, job.adapter)]
        case "open":
            return [cmd.PublishRound(_info(job)), *splitting.entry(job), *_assignments(state, job)]
        case "folding":
            return [cmd.PublishRound(_info(job)), cmd.FoldRound(job)]
        case "evaluating":
            assert job.round is not None and job.round.folded is not None
            if not job.spec.evaluation.data:
                return []
            return [cmd.EvaluateAdapter(job, job.round.number, job.round.folded)]
        case "exporting":
            return [cmd.ExportJob(job)]
        case "paused" | "finished" | "cancelled" | "failed":
            stop = Assign(term=state.term, reason=f"job {job.id} is {job.phase}")
            return [
                cmd.PublishRound(_info(job)),
                *splitting.stopped(job),
                *(cmd.PublishAssign(d, stop) for d in sorted(state.assigned)),
            ]
        case "queued" | "waiting":
            return []
        case _:
            assert_never(job.phase)


def _on_started(turn: Turn, event: ev.Started) -> None:
    job = turn.state.active
    since = event.now
    if job is not None and job.round is not None:
        # A clock that jumped must neither end the round at once nor prolong it.
        spent = min(max(event.ts - job.round.planned_ts, 0.0), job.round.plan.deadline_s)
        since = event.now - spent if job.phase == "open" else event.now
    taking_part = {d for known in turn.state.jobs.values() if known.round for d in known.round.participants}
    turn.update(since=since, settled_at=event.now, restarted_at=event.now, assigned=frozenset(taking_part))
    if job is not None:
        turn.do(*entry(turn.state, job))
    release_machine.on_started(turn, event)


def _on_device(turn: Turn, event: ev.FromDevice | ev.Heard | ev.Decommissioned) -> None:
    before = turn.state.fleet
    able = event.device in before and before[event.device].able
    match event:
        case ev.Heard():
            turn.update(fleet=fleet.hear(before, event.device, event.now))
        case ev.Decommissioned():
            turn.update(fleet={d: p for d, p in before.items() if d != event.device})
            collecting.on_left(turn, event.device)
            release_machine.forget(turn, event.device)
        case ev.FromDevice():
            _on_message(turn, event)
        case _:
            assert_never(event)
    known = turn.state.fleet.get(event.device)
    if (known.able if known else False) != able:
        turn.update(settled_at=event.now)
    if known is not None and fleet.unborn(known) and event.now - known.asked_at > REBIRTH_EVERY_S:
        turn.update(fleet=fleet.asked(turn.state.fleet, event.device, event.now))
        turn.do(cmd.AskRebirth(event.device, f"epoch {known.epoch} has sent no birth"))


def _on_message(turn: Turn, event: ev.FromDevice) -> None:
    match event.message:
        case Ack():
            turn.update(fleet=fleet.hear(turn.state.fleet, event.device, event.now))
            collecting.on_ack(turn, event.device, event.message)
        case Manifest():
            turn.update(fleet=fleet.hear(turn.state.fleet, event.device, event.now))
            collecting.on_manifest(turn, event.device, event.message)
        case DeviceState() | DeviceInfo() | Load() | Progress():
            turn.update(fleet=fleet.told(turn.state.fleet, event.device, event.message, event.now))
            if isinstance(event.message, DeviceState) and event.device not in turn.state.told:
                _first_words(turn, event.device)
            if isinstance(event.message, DeviceState | DeviceInfo):
                release_machine.sync(turn, event.device, event.now)
        case ReleaseState():
            turn.update(fleet=fleet.hear(turn.state.fleet, event.device, event.now))
            release_machine.on_report(turn, event.device, event.message, event)
        case _:
            assert_never(event.message)


def _first_words(turn: Turn, device: str) -> None:
    """A device this process has told nothing yet may hold on to work of a job that has ended meanwhile."""
    job = turn.state.active
    if job is not None and job.round is not None and device in job.round.participants:
        return  # the entry of the phase has spoken
    turn.do(cmd.PublishAssign(device, Assign(term=turn.state.term, reason="no work for now")))


def _on_job(turn: Turn, event: ev.JobEvent) -> None:
    if isinstance(event, ev.JobRequested):
        turn.record(rec.JobSubmitted(job=event.job, spec=event.spec, ts=event.ts))
        return
    job = turn.state.jobs.get(event.job)
    if job is None or job.phase in TERMINAL or not machines.allows(TABLE, job.phase, type(event).__name__):
        turn.count("answers out of phase")
        return
    if isinstance(event, ev.ResumeRequested) and turn.state.active is not None:
        turn.count("resumes while another job runs")
        return
    match event:
        case ev.CancelRequested():
            _end(turn, job, "cancelled", "cancelled by an operator", event)
        case ev.ResumeRequested():
            turn.record(rec.JobResumed(job=job.id))
        case ev.BasePrepared():
            turn.record(rec.JobPrepared(job=job.id, facts=event.facts, adapter=event.adapter, lower=event.lower))
        case ev.Evaluated(round=0):
            turn.record(rec.BaselineEvaluated(job=job.id, metrics=event.metrics))
        case ev.Evaluated():
            if job.round is not None and job.round.number == event.round:
                _commit(turn, job, event, event)
        case ev.Folded():
            if job.round is not None and job.round.number == event.round:
                turn.record(
                    rec.RoundFolded(
                        job=job.id,
                        round=event.round,
                        adapter=event.adapter,
                        lower=event.lower,
                        residual=event.residual,
                        ranks=event.ranks,
                        lost_energy=event.lost_energy,
                        norm=event.norm,
                    )  # fmt: skip
                )
        case ev.Exported():
            turn.record(rec.JobExported(job=job.id, path=event.path))
            _end(turn, job, "finished", f"exported to {event.path}", event)
        case ev.WorkFailed():
            state: rec.Ending = "failed" if job.phase in ("preparing", "baseline") else "paused"
            _end(turn, job, state, f"{event.what} failed: {event.reason}", event)
        case _:
            assert_never(event)


def _on_top(turn: Turn, event: ev.TopEvent) -> None:
    if isinstance(event, ev.TopDone):
        splitting.on_done(turn, event)
    elif splitting.is_current(turn.state, event):
        _end(turn, turn.state.jobs[event.job], "paused", f"the top worker failed: {event.reason}", event)


def _on_tick(turn: Turn, event: ev.Tick) -> None:
    release_machine.on_tick(turn, event)
    job = turn.state.active
    if job is None:
        queued = next((j for j in turn.state.jobs.values() if j.phase == "queued"), None)
        if queued is not None:
            turn.record(rec.JobStarted(job=queued.id))
    elif job.phase == "waiting":
        planning_turn.plan_if_ready(turn, job, event)
    elif job.phase == "open":
        _close_if_due(turn, job, event)
    elif job.phase == "evaluating" and not job.spec.evaluation.data:
        _commit(turn, job, None, event)


def _close_if_due(turn: Turn, job: Job, event: ev.Tick) -> None:
    round = job.round
    assert round is not None
    found = collecting.statuses(turn.state, job, event.now)
    if turn.state.cut_off:
        return
    # After a restart or an outage the updates that wait on the devices get a chance first.
    deadline_at = turn.state.since + round.plan.deadline_s
    if turn.state.restarted_at > turn.state.since:
        deadline_at = max(deadline_at, turn.state.restarted_at + turn.state.waits.grace_s)
    verdict, reason = closing(found, job.spec.rounds.quorum, event.now, deadline_at)
    if round.split:
        verdict, reason = splitting.with_top(turn, round, found, (verdict, reason), event.now, deadline_at)
    if verdict == "wait":
        _remind(turn, job, found, event.now)
        collecting.hurry(turn, job, found, event.now)
        return
    quiet = {device: event.now for device, status in found.items() if status == "silent"}
    turn.update(silenced={**turn.state.silenced, **quiet})
    if verdict == "close":
        done = sorted(device for device, status in found.items() if status == "done")
        turn.record(rec.RoundClosed(job=job.id, round=round.number, devices=done, reason=reason))
    else:
        job = turn.record(rec.RoundRepeated(job=job.id, round=round.number, attempt=round.attempt, reason=reason))
        if round.attempt % ATTEMPTS == 0:
            _end(turn, job, "paused", f"round {round.number} failed {ATTEMPTS} times, last: {reason}", event)


def _remind(turn: Turn, job: Job, found: dict[str, Status], now: float) -> None:
    state = turn.state
    due = [
        device
        for device, status in found.items()
        if now - max(state.reminded.get(device, state.since), state.restarted_at) >= state.waits.remind_s
        and collecting.idle(state, job, device, status)
    ]
    if due:
        turn.update(reminded={**state.reminded, **dict.fromkeys(due, now)})
        turn.do(*(cmd.PublishAssign(device, _assign(turn.state, job, device)) for device in due))


def _commit(turn: Turn, job: Job, evaluated: ev.Evaluated | None, event: ev.AnyEvent) -> None:
    assert job.round is not None
    metrics = evaluated.metrics if evaluated else None
    verdict = judge(job.judged, metrics, job.spec.evaluation.worse_by, job.refusals)
    number = job.round.number
    end = reached(metrics, job.spec.rounds.target) if verdict.accepted else ""
    reason = f"{verdict.reason}; {end}: the last round" if end else verdict.reason
    job = turn.record(
        rec.RoundCommitted(
            job=job.id, round=number, accepted=verdict.accepted, reason=reason, metrics=metrics, ts=event.ts
        )
    )
    if verdict.pause:
        _end(turn, job, "paused", verdict.reason, event)


def _end(turn: Turn, job: Job, state: rec.Ending, reason: str, event: ev.AnyEvent) -> None:
    turn.record(rec.JobEnded(job=job.id, state=state, reason=reason, ts=event.ts))


def _info(job: Job) -> RoundInfo:
    return RoundInfo(
        job=job.id,
        round=job.round.number if job.round else job.committed,
        phase=job.phase,
        base_digest=job.facts.base_digest if job.facts else "",
        adapter=job.adapter.sha if job.adapter else "",
    )


def _assignments(state: State, job: Job) -> list[cmd.Command]:
    """The desired states of the round: work for those who still owe an update, nothing for those left out of it."""
    round = job.round
    assert round is not None
    commands: list[cmd.Command] = []
    for device, part in round.participants.items():
        if part.outcome != "assigned":
            continue
        commands.append(cmd.PublishAssign(device, _assign(state, job, device)))
    for device in sorted(state.assigned - round.participants.keys()):
        reason = round.plan.left_out.get(device, "takes no part in this round")
        commands.append(cmd.PublishAssign(device, Assign(term=state.term, reason=reason)))
    return commands


def _assign(state: State, job: Job, device: str) -> Assign:
    """The desired state of a participant that still owes an update."""
    round = job.round
    assert round is not None and job.facts is not None and job.fetched is not None
    work = round.plan.participants[device]
    assignment = Assignment(
        job=job.id, round=round.number, attempt=round.attempt, work=work, base=job.spec.base,
        base_digest=job.facts.base_digest, source=job.facts.served.get(str(work.bits)), task=job.spec.task,
        training=job.spec.training, rounds=job.spec.rounds.count, seed=job.spec.seed, adapter=job.fetched,
        chunk=state.chunk,
    )  # fmt: skip
    return Assign(term=state.term, assignment=assignment)
