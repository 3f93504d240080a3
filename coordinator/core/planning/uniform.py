"""`uniform`: one rank for all, bits by memory, batch by speed and live load. What others are measured against.

The device of median speed gets `strategy.batch`; the time it needs for the local steps with nothing else running, plus
`SLACK`, is the round target. Every other device gets the largest batch that meets the target at what is free on it now.
"""

from __future__ import annotations

import statistics
from typing import NamedTuple

import msgspec
from msgspec.structs import replace

from coordinator.core.facts import ModelFacts
from coordinator.core.planning.base import FleetView, Plan, RoundReport
from coordinator.core.planning.common import DEADLINE_SHARE, global_rank, moved, nobody, steps_reason
from coordinator.core.planning.cost_model import CostModel
from coordinator.core.planning.demand import Demand, demand, tuned_modules
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


class _Draft(NamedTuple):
    """A participant before its batch is chosen."""

    place: Seat
    bits: Bits
    bits_reason: str
    least: int


class UniformPlanner(msgspec.Struct, frozen=True, kw_only=True):
    """See the module. The only state is the cost model."""

    name: str = "uniform"
    model: CostModel = CostModel()

    def learn(self, report: RoundReport) -> UniformPlanner:
        """The planner that also knows this round."""
        return replace(self, model=self.model.learn(report))

    def plan(self, view: FleetView, job: JobSpec) -> Plan:
        """The next round. Raises `UserError` where no candidate can take part, with the reason per device."""
        ranks, rank_reason = _ranks(view.facts, job)
        bound = global_rank(view, job, job.strategy.rank)
        need = demand(view.facts, job, ranks, bound)
        sizes = batch_sizes(job.strategy, job.training.accumulation)
        drafts: list[_Draft] = []
        left_out: dict[str, str] = {}
        for candidate in sorted(view.candidates, key=lambda candidate: candidate.device):
            place = seat(candidate, job, view.fresh_s, self.model)
            drafted = place if isinstance(place, str) else self._draft(place, need, job, sizes)
            if isinstance(drafted, str):
                left_out[candidate.device] = drafted
            else:
                drafts.append(drafted)
        if not drafts:
            raise UserError(nobody(job, left_out))
        target, reason = self._target(drafts, need, job)
        traffic_of = {n: moved(view, job, ranks, bound, n) for n in {draft.place.agents for draft in drafts}}
        transfers = [self.model.transfer(draft.place.device, traffic_of[draft.place.agents]) for draft in drafts]
        usual = statistics.median(took for took, _ in transfers)
        works: dict[str, Work] = {}
        predicted: dict[str, float] = {}
        for draft, (took, link) in zip(drafts, transfers, strict=True):
            device = draft.place.device
            # What a slow link takes beyond the usual is not there for training.
            left = Target(max(target.seconds - max(0.0, took - usual), 0.0), target.steps)
            batch, step_s, why = choose_batch(draft.place, need, draft.bits, self.model, sizes, left)
            predicted[device], steps_why = steps_reason(job, step_s, f"transfer {seconds(took)} ({link})")
            reasons = {"rank": rank_reason, "batch": why, "bits": draft.bits_reason, "steps": steps_why}
            if draft.place.info.agents > 1:
                reasons["agents"] = agents_reason(draft.place)
            works[device] = Work(
                ranks=ranks, batch=batch, bits=draft.bits, steps=job.rounds.local_steps, agents=draft.place.agents,
                train_for_s=job.rounds.train_for_s, reasons=reasons,
            )  # fmt: skip
        reason = f"{reason}; {len(works)} of {plural(len(view.candidates), 'candidate')} take part"
        return Plan(
            participants=works, deadline_s=job.rounds.deadline_s, reason=reason, predicted_s=predicted,
            left_out=left_out,
        )  # fmt: skip

    def _draft(self, place: Seat, need: Demand, job: JobSpec, sizes: tuple[int, ...]) -> _Draft | str:
        least = min(sizes[0], place.rows)
        chosen = choose_bits(place, need, job, self.model, least)
        return chosen if isinstance(chosen, str) else _Draft(place, *chosen, least)

    def _target(self, drafts: list[_Draft], need: Demand, job: JobSpec) -> tuple[Target, str]:
        """Seconds of all local steps at the job's batch on the median device, which live load does not move."""
        steps, strategy = job.rounds.local_steps, job.strategy
        batch = min(max(strategy.batch, strategy.batch_min), max(strategy.batch_min, strategy.batch_max))
        times = [
            steps * self.model.pace(d.place.device, need, d.bits, d.place.free.undisturbed()).step_s(batch)
            for d in drafts
        ]
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


def _ranks(facts: ModelFacts, job: JobSpec) -> tuple[dict[str, int], str]:
    """The job's rank on every tuned module, no larger than the module, and the reason."""
    modules = tuned_modules(facts, job.base)
    rank = job.strategy.rank
    ranks = {module.name: min(rank, module.out, module.inp) for module in modules}
    smallest = min(min(module.out, module.inp) for module in modules)
    clipped = sum(given < rank for given in ranks.values())
    note = f"{plural(clipped, 'module')} smaller than that get their size" if clipped else ""
    reading = f"{rank} asked on {plural(len(modules), 'module')}"
    bound = f"the smallest side {smallest}"
    return ranks, word("rank", rank, reading, bound, note, verb="exceeds" if clipped else "meets")
