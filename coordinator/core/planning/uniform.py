"""`uniform`: one rank for all, bits by memory, batch by speed and live load. What others are measured against.

The rivals that are ways to aggregate (`fedlora`, `hetlora`, `flora`, ...) are planned by it as well, under their names;
with unequal ranks where their papers have them (`ranks`). So is `full`, which trains all parameters of an fp32 base: no
ranks, and 32 bits or no part in the round. As in their papers every device gets the same batch (`one_batch`): that of
the job, at the most bits that hold it, less only where no bits do. `uniform` with their aggregator shows what a batch
by speed would give them.

The device of median speed gets `strategy.batch`; the time it needs for the local steps with nothing else running, plus
an allowance (`SLACK`), is the round target. Every other device gets the largest batch that meets the target at what is
free on it now. For a planner whose work ends with its round (`ends`) there is no allowance.
"""

from __future__ import annotations

from typing import NamedTuple

import msgspec
from msgspec.structs import replace

from coordinator.core.planning import ranks as by_rank
from coordinator.core.planning.base import FleetView, Plan, RoundReport
from coordinator.core.planning.common import End, Ends, global_rank, steps_reason
from coordinator.core.planning.cost_model import CostModel
from coordinator.core.planning.demand import demand, tuned_modules
from coordinator.core.planning.drafts import Draft, batches_to_the_jobs, drafts_of, job_batch, links_of, round_target
from coordinator.core.planning.ranks import Ranked, RankPolicy, Timed
from coordinator.core.planning.reasons import plural, seconds
from coordinator.core.planning.sizing import (
    Target,
    agents_reason,
    batch_by_memory,
    batch_sizes,
    choose_batch,
    choose_bits,
)
from shared.jobs import JobSpec
from shared.messages import Work


class Seated(NamedTuple):
    """A participant with its rank."""

    draft: Draft
    ranked: Ranked
    reason: str


class UniformPlanner(msgspec.Struct, frozen=True, kw_only=True):
    """See the module. The only state is the cost model. `ends`: whether work ends with its round, and the target has
    no allowance."""

    name: str = "uniform"
    ranks: RankPolicy = "equal"
    one_batch: bool = False
    ends: bool = False
    model: CostModel = CostModel()

    def learn(self, report: RoundReport) -> UniformPlanner:
        """The planner that also knows this round."""
        return replace(self, model=self.model.learn(report))

    def plan(self, view: FleetView, job: JobSpec) -> Plan:
        """The next round. Raises `UserError` where no candidate can take part, with the reason per device."""
        if self.ranks == "none":
            job = replace(job, strategy=replace(job.strategy, bits=32))
        bound = global_rank(view, job, job.strategy.rank)
        choices = _choices(view, job, self.ranks, bound)
        sizes = batches_to_the_jobs(job)
        sizes = sizes[::-1] if self.one_batch else sizes[:1]
        drafts, left_out = drafts_of(view, job, choices[0].need, sizes, self.model)
        seated = self._seated(drafts, choices, view, job)
        return plan_of(view, job, self.model, seated, left_out, bound, one_batch=self.one_batch, ends=self.ends)

    def _seated(self, drafts: list[Draft], choices: list[Ranked], view: FleetView, job: JobSpec) -> list[Seated]:
        """Each participant with the rank that the policy gives it."""
        if self.ranks == "none":
            return [Seated(draft, choices[0], by_rank.none_reason(view.facts)) for draft in drafts]
        if self.ranks == "equal":
            reason = by_rank.equal_reason(tuned_modules(view.facts, job.base), choices[0].rank)
            return [Seated(draft, choices[0], reason) for draft in drafts]
        timed = [self._timed(draft, choices[0], job) for draft in drafts]
        fastest = min(timed, key=lambda one: (one.step_s, one.device))
        return [self._ranked(*pair, fastest, choices, job) for pair in zip(drafts, timed, strict=True)]

    def _ranked(self, draft: Draft, own: Timed, fastest: Timed, choices: list[Ranked], job: JobSpec) -> Seated:
        """`draft`, made for the least rank, at the rank that speed and memory allow."""
        sizes = tuple(ranked.rank for ranked in choices)
        wanted = by_rank.in_time(sizes, own, fastest)
        found, full = choices[0], ""
        for ranked in choices[1 : sizes.index(wanted) + 1]:
            chosen = choose_bits(draft.place, ranked.need, job, self.model, draft.least)
            if isinstance(chosen, str) or chosen[0] != draft.bits:
                refused = chosen if isinstance(chosen, str) else chosen[0]
                full = by_rank.memory_note(found.rank, draft.bits, ranked.rank, refused)
                break
            draft, found = draft._replace(bits_reason=chosen[1]), ranked
        notes = (found.note, full, by_rank.unmeasured_note(own.source))
        return Seated(draft, found, by_rank.capability_reason(found.rank, sizes, own, fastest, job_batch(job), notes))

    def _timed(self, draft: Draft, ranked: Ranked, job: JobSpec) -> Timed:
        pace = self.model.pace(draft.place.device, ranked.need, draft.bits, draft.place.free.undisturbed())
        return Timed(draft.place.device, pace.step_s(job_batch(job)), pace.source)


def plan_of(
    view: FleetView, job: JobSpec, model: CostModel, seated: list[Seated], left_out: dict[str, str], bound: int, *,
    one_batch: bool = False, ends: bool = False,
) -> Plan:  # fmt: skip
    """The plan for participants whose ranks are chosen: batch by speed and live load, and what all of it takes.

    `bound`: of the global adapter's rank. `one_batch`: the job's for all, where memory holds it. `ends`: whether work
    ends with its round (`common.Ends`).
    """
    drafts = [one.draft for one in seated]
    target, reason = round_target(drafts, [one.ranked.need for one in seated], job, model, ends=ends)
    if one_batch:
        reason = f"batch {job_batch(job)} for every device that holds it"
    links = links_of(view, job, drafts, [one.ranked.ranks for one in seated], bound, target, model)
    together, steps = Ends(job, model) if ends else None, job.rounds.local_steps
    sizes = batches_to_the_jobs(job) if one_batch else batch_sizes(job.strategy, job.training.accumulation)
    works: dict[str, Work] = {}
    predicted: dict[str, float] = {}
    for (draft, ranked, rank_reason), link in zip(seated, links, strict=True):
        device, end = draft.place.device, End(job.rounds.train_for_s)
        if together is not None:
            end = together.of(device, draft.bits, link.left.seconds, steps, link.moves, link.usual)
        batch, step_s, why = _batch(draft, ranked, sizes, model, None if one_batch else link.left)
        transfer = f"transfer {seconds(link.seconds)} ({link.reading})"
        predicted[device], steps_why = steps_reason(job, steps, step_s, transfer, end)
        reasons = {"rank": rank_reason, "batch": why, "bits": draft.bits_reason, "steps": steps_why}
        if draft.place.info.agents > 1:
            reasons["agents"] = agents_reason(draft.place)
        works[device] = Work(
            ranks=ranked.ranks, batch=batch, bits=draft.bits, steps=steps, agents=draft.place.agents,
            train_for_s=end.limit, extra_steps=end.extra, reasons=reasons,
        )  # fmt: skip
    return Plan(
        participants=works, deadline_s=job.rounds.deadline_s, predicted_s=predicted, left_out=left_out,
        together=together is not None and together.together,
        reason=f"{reason}; {len(works)} of {plural(len(view.candidates), 'candidate')} take part",
    )  # fmt: skip


def _batch(
    draft: Draft, ranked: Ranked, sizes: tuple[int, ...], model: CostModel, target: Target | None
) -> tuple[int, float, str]:
    """(batch of `sizes`, seconds per step, reason): by `target`; None: the largest that memory holds."""
    place, need, bits = draft.place, ranked.need, draft.bits
    if target is not None:
        return choose_batch(place, need, bits, model, sizes, target)
    batch, why = batch_by_memory(place, need, bits, model, sizes, "as every device has it")
    return batch, model.pace(place.device, need, bits, place.free).step_s(batch), why


def _choices(view: FleetView, job: JobSpec, policy: RankPolicy, bound: int) -> list[Ranked]:
    """What each rank to choose from would ask, by rank."""
    if policy == "none":
        return [Ranked(0, {}, demand(view.facts, job, {}), "")]
    modules = tuned_modules(view.facts, job.base)
    found = []
    for rank in by_rank.rank_sizes(job.strategy.rank, policy):
        ranks, note = by_rank.of_modules(modules, rank)
        found.append(Ranked(rank, ranks, demand(view.facts, job, ranks, bound), note))
    return found
