"""`uniform`: one rank for all, bits by memory, batch by speed and live load. What others are measured against.

The device of median speed gets `strategy.batch`; the time it needs for the local steps with nothing else running, plus
`SLACK`, is the round target (`drafts`). Every other device gets the largest batch that meets the target at what is free
on it now.
"""

from __future__ import annotations

import msgspec
from msgspec.structs import replace

from coordinator.core.facts import ModelFacts
from coordinator.core.planning.base import FleetView, Plan, RoundReport
from coordinator.core.planning.common import global_rank, steps_reason
from coordinator.core.planning.cost_model import CostModel
from coordinator.core.planning.demand import demand, tuned_modules
from coordinator.core.planning.drafts import drafts_of, links_of, round_target
from coordinator.core.planning.reasons import plural, seconds, word
from coordinator.core.planning.sizing import agents_reason, batch_sizes, choose_batch
from shared.jobs import JobSpec
from shared.messages import Work


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
        drafts, left_out = drafts_of(view, job, need, sizes, self.model)
        target, reason = round_target(drafts, need, job, self.model)
        works: dict[str, Work] = {}
        predicted: dict[str, float] = {}
        links = links_of(view, job, drafts, ranks, bound, target, self.model)
        for draft, link in zip(drafts, links, strict=True):
            device = draft.place.device
            batch, step_s, why = choose_batch(draft.place, need, draft.bits, self.model, sizes, link.left)
            transfer = f"transfer {seconds(link.seconds)} ({link.reading})"
            predicted[device], steps_why = steps_reason(job, step_s, transfer)
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
