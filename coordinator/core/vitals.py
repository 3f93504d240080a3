"""What the coordinator tells systemd of itself in one line."""

from __future__ import annotations

from coordinator.core.job import Job
from coordinator.core.turn import State

_PHASES = {
    "preparing": "the base is inspected",
    "baseline": "the base is evaluated",
    "folding": "updates are folded",
    "evaluating": "the aggregate is evaluated",
    "exporting": "the adapter is exported",
}


def status(state: State, *, connected: bool, problem: str) -> str:
    """What the coordinator does, for `systemctl status`. `problem`: why it is not connected, or can't write."""
    job = state.active
    able = sum(known.able for known in state.fleet.values())
    words = f"{able} device(s) able, " + (_work(state, job) if job else _waiting(state))
    if connected:
        return f"{words}; {problem}" if problem else words
    return f"offline, retrying{f' ({problem})' if problem else ''}; {words}"


def _work(state: State, job: Job) -> str:
    number = job.round.number if job.round else job.committed + 1
    head = f"job {job.id} round {number}/{job.spec.rounds.count}"
    if job.phase == "open" and job.round:
        done = sum(one.outcome == "done" for one in job.round.participants.values())
        return f"{head}: {done}/{len(job.round.participants)} updates"
    notice = state.notices.get(job.id, "waits for devices") if job.phase == "waiting" else _PHASES.get(job.phase, "")
    return f"{head}: {notice}"


def _waiting(state: State) -> str:
    paused = [job.id for job in state.jobs.values() if job.phase == "paused"]
    return f"no job under way; paused: {', '.join(paused)}" if paused else "no job"
