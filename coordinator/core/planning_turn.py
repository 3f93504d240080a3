"""When a round is planned, and over which devices."""

from __future__ import annotations

from collections.abc import Sequence

from coordinator.core import events as ev
from coordinator.core import records as rec
from coordinator.core.aggregation.registry import SPLIT
from coordinator.core.draw import Draw, plan_over
from coordinator.core.fleet import Presence
from coordinator.core.job import Job
from coordinator.core.planning.base import Candidate, FleetView, Plan
from coordinator.core.planning.digest import plan_digest
from coordinator.core.turn import State, Turn
from shared.errors import UserError

REPEAT_CAP_S = 60.0
"""Longest pause before a round is planned once more."""


def plan_if_ready(turn: Turn, job: Job, event: ev.Tick) -> None:
    """Record the next round's plan once enough devices are able and the fleet has settled; else say what is missing."""
    state = turn.state
    able = candidates(state, event.now)
    need = job.spec.rounds.min_devices
    if len(able) < need:
        _notice(turn, job, f"waiting for {need} able devices, {len(able)} are")
        return
    gather = state.waits.gather_s
    if job.attempt > 0 and event.now - state.since < min(REPEAT_CAP_S, state.waits.repeat_s * 2.0 ** (job.attempt - 1)):
        return
    if event.now - state.settled_at < gather and event.now - state.since < state.waits.patience * gather:
        return
    rounds = job.spec.rounds
    # Of a sample one able device is enough: more were ready to be drawn from.
    need = 1 if rounds.sample else need
    draw = Draw(job.spec.seed, job.committed + 1, job.attempt + 1)
    seen: list[FleetView] = []

    def plan_of(taken: Sequence[str]) -> Plan:
        wanted = set(taken)
        seen.append(_view(state, job, [known for known in able if known.device in wanted], event.now))
        return job.planner.plan(seen[-1], job.spec)

    try:
        # Planners of split learning choose who takes part themselves.
        sample = 0 if job.spec.strategy.name in SPLIT else rounds.sample
        plan = plan_over([known.device for known in able], sample, draw, plan_of)
    except UserError as error:
        _notice(turn, job, str(error))
        return
    if len(plan.participants) < need:
        left = "; ".join(f"{device}: {why}" for device, why in sorted(plan.left_out.items())[:5])
        _notice(turn, job, f"{len(plan.participants)} of {need} devices can take part ({left})")
        return
    # The plan is that of the last draw.
    turn.record(_planned(job, plan, seen[-1], event.ts))


def _planned(job: Job, plan: Plan, view: FleetView, ts: float) -> rec.RoundPlanned:
    """The record of `plan`, with all of `view` that the log does not hold already."""
    loads = {candidate.device: candidate.load for candidate in view.candidates if candidate.load}
    return rec.RoundPlanned(
        job=job.id, round=view.round, attempt=job.attempt + 1, plan=plan, digest=plan_digest(plan),
        loads=loads, load_ages={one.device: one.load_age_s for one in view.candidates if one.device in loads},
        infos={one.device: one.info for one in view.candidates if job.told.get(one.device) != one.info},
        fresh_s=view.fresh_s, ts=ts,
    )  # fmt: skip


def _view(state: State, job: Job, able: list[Presence], now: float) -> FleetView:
    assert job.facts is not None
    return FleetView(
        round=job.committed + 1,
        candidates=tuple(_candidate(known, now) for known in able),
        facts=job.facts,
        adapter_bytes=job.fetched.size if job.fetched else 0,
        fresh_s=state.waits.fresh_s,
    )


def candidates(state: State, now: float) -> list[Presence]:
    """Devices that may get work, by id: able, heard of lately, and not silent since they let a round down."""
    return [
        known
        for _, known in sorted(state.fleet.items())
        if known.able
        and now - known.heard_at <= state.waits.absent_s
        and known.heard_at > state.silenced.get(known.device, float("-inf"))
    ]


def _candidate(known: Presence, now: float) -> Candidate:
    assert known.info is not None
    age = now - known.load_at if known.load else 0.0
    return Candidate(device=known.device, info=known.info, load=known.load, load_age_s=age)


def _notice(turn: Turn, job: Job, text: str) -> None:
    if turn.state.notices.get(job.id) != text:
        turn.update(notices={**turn.state.notices, job.id: text})
