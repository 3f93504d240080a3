"""Split learning in the coordinator's machine: the top worker's part of a round, and what it must be told."""

from __future__ import annotations

from collections.abc import Mapping

from coordinator.core import commands as cmd
from coordinator.core import events as ev
from coordinator.core import records as rec
from coordinator.core.aggregation.registry import SPLIT
from coordinator.core.close import Status, Verdict
from coordinator.core.job import Job, Round
from coordinator.core.turn import State, Turn

LAST_SHARE = 0.1
"""Of the deadline, at whose end steps are no longer begun: what is done must still be delivered."""


def entry(job: Job) -> list[cmd.Command]:
    """What an open round needs of the top worker; the same after a restart. With its part on disk it still answers
    devices that missed the end."""
    return [cmd.RunTop(job)] if job.round is not None and job.round.split else []


def stopped(job: Job) -> list[cmd.Command]:
    """What a job that ends, for now or for good, needs of the top worker."""
    return [cmd.StopTop()] if job.spec.strategy.name in SPLIT else []


def is_current(state: State, event: ev.TopEvent) -> bool:
    """Whether the answer is of the open round and attempt."""
    job = state.jobs.get(event.job)
    round = job.round if job is not None and job.phase == "open" else None
    return round is not None and (round.number, round.attempt) == (event.round, event.attempt) and not round.top


def on_done(turn: Turn, event: ev.TopDone) -> None:
    """The top worker's updates are on disk: write them down."""
    if not is_current(turn.state, event):
        turn.count("stale answers of the top worker")
        return
    updates = [rec.TopUpdate(of=of, blob=blob, samples=samples) for of, blob, samples in event.updates]
    turn.record(
        rec.TopTrained(
            job=event.job, round=event.round, attempt=event.attempt, updates=updates, steps=event.steps,
            loss=event.loss, dropped=event.dropped, waited_s=event.waited_s,
        )
    )  # fmt: skip


def with_top(
    turn: Turn, round: Round, found: Mapping[str, Status], closing: tuple[Verdict, str], now: float, deadline_at: float
) -> tuple[Verdict, str]:
    """The verdict over the participants, where the round also needs the top worker's part.

    Meanwhile it is told who will not come, and to finish in time for the rest to be delivered.
    """
    verdict, reason = closing
    if round.top or (verdict == "repeat" and not any(status == "done" for status in found.values())):
        return closing
    state = turn.state
    gone = frozenset(device for device, status in found.items() if status not in ("assigned", "accepted"))
    if verdict == "wait" and gone - state.top_told:
        turn.update(top_told=state.top_told | gone)
        turn.do(cmd.TellTop(tuple(sorted(gone))))
    due = now >= deadline_at - LAST_SHARE * round.plan.deadline_s
    if state.top_asked_at is None and (verdict != "wait" or due):
        turn.update(top_asked_at=now)
        turn.do(cmd.FinishTop())
    if verdict == "wait":
        return closing
    asked = turn.state.top_asked_at
    if asked is not None and now - asked > state.waits.grace_s:
        return "repeat", f"the top worker did not finish: {reason}"
    return "wait", f"the top worker finishes: {reason}"
