"""`uniform`: one rank for all, bits by memory, batch by speed and live load. What others are measured against.

The rivals that are ways to aggregate (`fedlora`, `hetlora`, `flora`, ...) are planned by it as well, under their names;
with unequal ranks where their papers have them (`ranks`), and all else equal, so that aggregators are compared and not
planners.

The device of median speed gets `strategy.batch`; the time it needs for the local steps with nothing else running, plus
`SLACK`, is the round target. Every other device gets the largest batch that meets the target at what is free on it now.
"""

from __future__ import annotations

import statistics
from typing import NamedTuple

import msgspec
from msgspec.structs import replace

from coordinator.core.aggregation import registry as aggregation
from coordinator.core.planning import ranks as by_rank
from coordinator.core.planning.base import FleetView, Plan, RoundReport
from coordinator.core.planning.cost_model import CostModel
from coordinator.core.planning.demand import Demand, demand, traffic, tuned_modules
from coordinator.core.planning.ranks import Ranked, RankPolicy, Timed
from coordinator.core.planning.reasons import plural, seconds, word
from coordinator.core.planning.sizing import (
    SLACK,
    Seat,
    Target,
    agents_reason,
    batch_sizes,
    choose_batch,
    choose_bits,
    seat,
)
from shared.errors import UserError
from shared.jobs import Bits, JobSpec
from shared.messages import Work
from shared.starts import averages_factors

DEADLINE_SHARE = 0.9
"""Of the deadline, what training may fill; the rest is for fetching, loading and delivering."""


class _Draft(NamedTuple):
    """A participant before its batch is chosen."""

    place: Seat
    bits: Bits
    bits_reason: str
    least: int
    ranked: Ranked
    rank_reason: str

    @property
    def need(self) -> Demand:
        """The costs of its work."""
        return self.ranked.need


class UniformPlanner(msgspec.Struct, frozen=True, kw_only=True):
    """See the module. The only state is the cost model."""

    name: str = "uniform"
    ranks: RankPolicy = "equal"
    model: CostModel = CostModel()

    def learn(self, report: RoundReport) -> UniformPlanner:
        """The planner that also knows this round."""
        return replace(self, model=self.model.learn(report))

    def plan(self, view: FleetView, job: JobSpec) -> Plan:
        """The next round. Raises `UserError` where no candidate can take part, with the reason per device."""
        drafts, left_out = self._drafts(view, job)
        if not drafts:
            raise UserError(_nobody(job, left_out))
        sizes = batch_sizes(job.strategy, job.training.accumulation)
        target, reason = self._target(drafts, job)
        moved = self._moved(drafts, view, job)
        usual = statistics.median(took for took, _ in moved)
        works: dict[str, Work] = {}
        predicted: dict[str, float] = {}
        for draft, (took, link) in zip(drafts, moved, strict=True):
            device = draft.place.device
            # What a slow link takes beyond the usual is not there for training.
            left = Target(max(target.seconds - max(0.0, took - usual), 0.0), target.steps)
            batch, step_s, why = choose_batch(draft.place, draft.need, draft.bits, self.model, sizes, left)
            predicted[device], steps_reason = _steps(job, step_s, f"transfer {seconds(took)} ({link})")
            reasons = {"rank": draft.rank_reason, "batch": why, "bits": draft.bits_reason, "steps": steps_reason}
            if draft.place.info.agents > 1:
                reasons["agents"] = agents_reason(draft.place)
            works[device] = Work(
                ranks=draft.ranked.ranks, batch=batch, bits=draft.bits, steps=job.rounds.local_steps,
                agents=draft.place.agents, train_for_s=job.rounds.train_for_s, reasons=reasons,
            )  # fmt: skip
        reason = f"{reason}; {len(works)} of {plural(len(view.candidates), 'candidate')} take part"
        return Plan(
            participants=works, deadline_s=job.rounds.deadline_s, reason=reason, predicted_s=predicted,
            left_out=left_out,
        )  # fmt: skip

    def _drafts(self, view: FleetView, job: JobSpec) -> tuple[list[_Draft], dict[str, str]]:
        """Who takes part, by id, and why others don't."""
        choices = _choices(view, job, self.ranks)
        drafts: list[_Draft] = []
        left_out: dict[str, str] = {}
        for candidate in sorted(view.candidates, key=lambda candidate: candidate.device):
            place = seat(candidate, job, view.fresh_s, self.model)
            drafted = place if isinstance(place, str) else self._draft(place, choices[0], view, job)
            if isinstance(drafted, str):
                left_out[candidate.device] = drafted
            else:
                drafts.append(drafted)
        if self.ranks == "capability" and drafts:
            timed = [self._timed(draft, job) for draft in drafts]
            fastest = min(timed, key=lambda one: (one.step_s, one.device))
            drafts = [self._ranked(*pair, fastest, choices, job) for pair in zip(drafts, timed, strict=True)]
        return drafts, left_out

    def _draft(self, place: Seat, ranked: Ranked, view: FleetView, job: JobSpec) -> _Draft | str:
        least = min(batch_sizes(job.strategy, job.training.accumulation)[0], place.rows)
        chosen = choose_bits(place, ranked.need, job, self.model, least)
        reason = by_rank.equal_reason(tuned_modules(view.facts, job.base), ranked.rank)
        return chosen if isinstance(chosen, str) else _Draft(place, *chosen, least, ranked, reason)

    def _ranked(self, draft: _Draft, own: Timed, fastest: Timed, choices: list[Ranked], job: JobSpec) -> _Draft:
        """`draft`, made for the least rank, at the rank that speed and memory allow."""
        sizes = tuple(ranked.rank for ranked in choices)
        wanted = by_rank.in_time(sizes, own, fastest)
        full = ""
        for ranked in choices[1 : sizes.index(wanted) + 1]:
            chosen = choose_bits(draft.place, ranked.need, job, self.model, draft.least)
            if isinstance(chosen, str) or chosen[0] != draft.bits:
                refused = chosen if isinstance(chosen, str) else chosen[0]
                full = by_rank.memory_note(draft.ranked.rank, draft.bits, ranked.rank, refused)
                break
            draft = draft._replace(bits_reason=chosen[1], ranked=ranked)
        notes = (draft.ranked.note, full, by_rank.unmeasured_note(own.source))
        reason = by_rank.capability_reason(draft.ranked.rank, sizes, own, fastest, _batch(job), notes)
        return draft._replace(rank_reason=reason)

    def _timed(self, draft: _Draft, job: JobSpec) -> Timed:
        pace = self.model.pace(draft.place.device, draft.need, draft.bits, draft.place.free.undisturbed())
        return Timed(draft.place.device, pace.step_s(_batch(job)), pace.source)

    def _moved(self, drafts: list[_Draft], view: FleetView, job: JobSpec) -> list[tuple[float, str]]:
        """Seconds of each device's transfers, with the reading."""
        sizes = {
            (draft.ranked.rank, draft.place.agents): _moved_bytes(view, job, draft.ranked.ranks, draft.place.agents)
            for draft in drafts
        }
        return [self.model.transfer(d.place.device, sizes[d.ranked.rank, d.place.agents]) for d in drafts]

    def _target(self, drafts: list[_Draft], job: JobSpec) -> tuple[Target, str]:
        """Seconds of all local steps at the job's batch on the median device, which live load does not move."""
        steps, batch = job.rounds.local_steps, _batch(job)
        times = [steps * self._timed(draft, job).step_s for draft in drafts]
        median = statistics.median(times)
        wanted = SLACK * median
        reason = (
            f"round target {seconds(wanted)}: {plural(steps, 'step')} at batch {batch} take the median of "
            f"{plural(len(drafts), 'device')} {seconds(median)} undisturbed, + {SLACK - 1:.0%}"
        )
        bound = DEADLINE_SHARE * job.rounds.deadline_s
        # Assumed speeds are good for ratios between devices only: they must not meet a bound in seconds.
        if self.model.devices and wanted > bound:
            reason += f"; lowered to {seconds(bound)}, {DEADLINE_SHARE:.0%} of the deadline"
            wanted = bound
        return Target(wanted, steps), reason


def _batch(job: JobSpec) -> int:
    """The job's batch, inside its bounds."""
    strategy = job.strategy
    return min(max(strategy.batch, strategy.batch_min), max(strategy.batch_min, strategy.batch_max))


def _choices(view: FleetView, job: JobSpec, policy: RankPolicy) -> list[Ranked]:
    """What each rank to choose from would ask, by rank."""
    modules, most = tuned_modules(view.facts, job.base), _global_rank(view, job)
    found = []
    for rank in by_rank.rank_sizes(job.strategy.rank, policy):
        ranks, note = by_rank.of_modules(modules, rank)
        found.append(Ranked(rank, ranks, demand(view.facts, job, ranks, most), note))
    return found


def _global_rank(view: FleetView, job: JobSpec) -> int:
    """An upper bound of the global adapter's rank: what the rounds so far can have added, up to its cap."""
    agents = sum(candidate.info.agents for candidate in view.candidates)
    added = (view.round - 1) * agents * job.strategy.rank
    return min(aggregation.create(job.strategy).global_rank, added)


def _moved_bytes(view: FleetView, job: JobSpec, ranks: dict[str, int], agents: int) -> int:
    """Bytes over a device's link in the round: the global adapter down, the update of its agents up."""
    # Factors that are averaged are so on the device already; products are stacked.
    start = aggregation.create(job.strategy).start
    sends_a = start != "frozen_a" or view.round == 1
    stacked = 1 if averages_factors(start) else agents
    down, up, _ = traffic(view.facts, ranks, _global_rank(view, job), job.training.codec, stacked, sends_a=sends_a)
    return (view.adapter_bytes or down) + up


def _steps(job: JobSpec, step_s: float, transfer: str) -> tuple[float, str]:
    """(seconds of training expected, reason of the number of steps)."""
    steps, limit = job.rounds.local_steps, job.rounds.train_for_s
    expected = steps * step_s
    bound, name = (limit, "training time") if limit else (job.rounds.deadline_s, "deadline")
    met = expected <= bound
    note = "" if met else ("partial work counts" if limit else "an update after the deadline is lost")
    reading = f"{steps} asked x {seconds(step_s)} = {seconds(expected)}"
    reason = word(
        "steps", steps, reading, f"{seconds(bound)} {name}", note, transfer, verb="meets" if met else "exceeds"
    )
    return (min(expected, limit) if limit else expected), reason


def _nobody(job: JobSpec, left_out: dict[str, str]) -> str:
    if not left_out:
        return f"no device can do job {job.name}: there are no candidates"
    told = "; ".join(f"{device}: {why}" for device, why in list(left_out.items())[:10])
    more = f"; and {len(left_out) - 10} more" if len(left_out) > 10 else ""
    return f"no device can do job {job.name}: {told}{more}"
