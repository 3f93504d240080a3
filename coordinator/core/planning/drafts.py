"""The participants of a round before their numbers are chosen, and the time they all should take.

The device of median speed sets the round target: its time for the local steps at the job's batch with nothing else
running; plus `SLACK` where work does not end with its round. Where a round takes a sample, the devices met before count
too, so that the draw of a round does not move its target. What a slow link takes beyond the usual is not there for
training.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from coordinator.core.planning.base import FleetView
from coordinator.core.planning.common import DEADLINE_SHARE, Links, Moved, moved, nobody
from coordinator.core.planning.cost_model import CostModel
from coordinator.core.planning.demand import Demand
from coordinator.core.planning.reasons import plural, seconds
from coordinator.core.planning.sizing import ROUNDING, SLACK, Seat, Target, batch_sizes, choose_bits, seat
from shared.errors import UserError
from shared.jobs import Bits, JobSpec


class Draft(NamedTuple):
    """A participant before its batch is chosen."""

    place: Seat
    bits: Bits
    bits_reason: str
    least: int


class Link(NamedTuple):
    """What a device's transfers of the round take."""

    seconds: float
    reading: str
    left: Target
    """What they leave of the round target."""
    moves: Moved
    """Over it, with the ranks that `links_of` was given."""
    usual: float
    """Seconds that the transfers of the median device take."""


def drafts_of(
    view: FleetView, job: JobSpec, need: Demand, sizes: tuple[int, ...], model: CostModel
) -> tuple[list[Draft], dict[str, str]]:
    """(who can do `need` with one of the batches `sizes`, who can't and why), by device id.

    Bits are the largest that hold the first of them; where none do, the next is tried.

    Raises `UserError` where nobody can, with the reason per device.
    """
    drafts: list[Draft] = []
    left_out: dict[str, str] = {}
    for candidate in sorted(view.candidates, key=lambda candidate: candidate.device):
        place = seat(candidate, job, view.fresh_s, model)
        drafted = place if isinstance(place, str) else _draft(place, need, job, sizes, model)
        if isinstance(drafted, str):
            left_out[candidate.device] = drafted
        else:
            drafts.append(drafted)
    if not drafts:
        raise UserError(nobody(job, left_out))
    return drafts, left_out


def job_batch(job: JobSpec) -> int:
    """The job's batch, inside its bounds."""
    strategy = job.strategy
    return min(max(strategy.batch, strategy.batch_min), max(strategy.batch_min, strategy.batch_max))


def round_target(
    drafts: Sequence[Draft], needs: Sequence[Demand], job: JobSpec, model: CostModel, *, ends: bool = False
) -> tuple[Target, str]:
    """Seconds of all local steps at the job's batch on the median device, which live load does not move.

    `needs`: of each draft's work; `ends`: whether work ends with its round, else there is an allowance (`SLACK`).
    """
    steps, batch = job.rounds.local_steps, job_batch(job)
    paces = [
        model.pace(d.place.device, need, d.bits, d.place.free.undisturbed())
        for d, need in zip(drafts, needs, strict=True)
    ]
    if job.rounds.sample:
        paces += model.met(needs[0], {draft.place.device for draft in drafts})
    times = [steps * pace.step_s(batch) for pace in paces]
    median = statistics.median(times)
    wanted = (median if ends else SLACK * median) * ROUNDING
    reason = (
        f"round target {seconds(wanted)}: {plural(steps, 'step')} at batch {batch} take the median of "
        f"{plural(len(times), 'device')} {seconds(median)} undisturbed"
    )
    if not ends:
        reason += f", + {SLACK - 1:.0%}"
    bound = DEADLINE_SHARE * job.rounds.deadline_s
    # Assumed speeds are good for ratios between devices only: they must not meet a bound in seconds.
    if model.measured and wanted > bound:
        reason += f"; lowered to {seconds(bound)}, {DEADLINE_SHARE:.0%} of the deadline"
        wanted = bound
    return Target(wanted, steps), reason


def batches_to_the_jobs(job: JobSpec) -> tuple[int, ...]:
    """The batches to choose from where none is larger than the job's, rising."""
    sizes = batch_sizes(job.strategy, job.training.accumulation)
    most = job_batch(job)
    return tuple(size for size in sizes if size <= most) or sizes[:1]


def links_of(
    view: FleetView, job: JobSpec, drafts: Sequence[Draft], ranks: Sequence[Mapping[str, int]], bound: int,
    target: Target, model: CostModel,
) -> list[Link]:  # fmt: skip
    """The transfers of each draft with its `ranks`, and what they leave; `bound` as in `common.moved`."""
    every = Links(model)
    known: dict[tuple[int, int], Moved] = {}
    found, moves = [], []
    for draft, own in zip(drafts, ranks, strict=True):
        # Most devices share one mapping.
        key = (id(own), draft.place.agents)
        if key not in known:
            known[key] = moved(view, job, own, bound, draft.place.agents)
        found.append(every.transfer(draft.place.device, known[key].both))
        moves.append(known[key])
    usual = statistics.median(took for took, _ in found)
    return [
        Link(took, reading, Target(max(target.seconds - max(0.0, took - usual), 0.0), target.steps), own, usual)
        for (took, reading), own in zip(found, moves, strict=True)
    ]


def _draft(place: Seat, need: Demand, job: JobSpec, sizes: tuple[int, ...], model: CostModel) -> Draft | str:
    refused = ""
    for size in sizes:
        least = min(size, place.rows)
        chosen = choose_bits(place, need, job, model, least)
        if not isinstance(chosen, str):
            return Draft(place, *chosen, least)
        refused = chosen
    return refused
