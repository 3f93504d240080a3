"""`fedpipe`: important weights, then batch and ranks within each device's budget (FedPipe, arXiv 2404.06448).

**The paper's** (abstract, public digests): find the weights that matter by an SVD of the adapters and a sensitivity
score; give each server the batch and the ranks that its compute holds, to lower its under-training; choose the bits of
the frozen model by memory; aggregate adapters of unequal rank. It tunes four kinds of matrices, Wq, Wk, Wv and Wo.
**Our reading**: all formulas (`shared.modeling.importance`, `rank_choice`, `knapsack`), and

* candidates are the modules that the job tunes: `base.targets` names the kinds, the paper's four or others.
* warm-up: rounds over all candidates at rank 8 (`strategy.rank` where that is less), planned like `uniform` but for the
  allowance, until they asked for `strategy.warm_up_steps` local steps. In the last of them, and in further ones until a
  device has told any, scores are asked for: B begins at 0, and its first steps tell little of what matters. They are
  training rounds like any other, of the job's local steps.
* bits: the largest that the device has proven and its memory holds, as for every planner (`sizing.choose_bits`): also
  32, where the design has 16, 8 and 4.
* S_m = sum_i p_i S_im, with p_i as the aggregator weighs the device (samples, none above `strategy.max_share`). What a
  device claims of modules that it was not asked for does not count, and its claims are made to sum to 1.
* W* is the smallest set with `WANTED` of the score; of equal scores the cheaper module first.
* every `strategy.rescore_every` rounds one round is as in the warm-up, since modules that are not tuned have no
  gradients: the new scores replace the old. A round that told none is followed by another.
* ranks are 0, 2, 4, 8, 16, 32 up to `strategy.rank` (and it, below 32), the largest being g's r_max; the target is
  the median device's time with that rank on all of W*, as in `uniform`. Depth counts as for all of W*: an upper bound.
* where nothing fits the target, the least batch and ranks are asked all the same; where telemetry is old, half the
  batch.
* all devices of a round end together (`common.Ends`): who is slower than thought, or was given what nobody can do
  in time, delivers what it has done; who is faster goes on meanwhile. So the target has no allowance.

Aggregation is `fsr`: exact for unequal ranks and unequal sets of matrices.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import msgspec
from msgspec.structs import replace

from coordinator.core.aggregation.base import shares
from coordinator.core.facts import ModelFacts, ModuleSpec
from coordinator.core.planning import knapsack
from coordinator.core.planning.base import FleetView, Plan, RoundReport, Weights
from coordinator.core.planning.common import Ends, global_rank, steps_reason
from coordinator.core.planning.cost_model import CostModel
from coordinator.core.planning.demand import Demand, demand, dense_params, tokens_of, tuned_modules
from coordinator.core.planning.drafts import Draft, Link, drafts_of, links_of, round_target
from coordinator.core.planning.knapsack import Item
from coordinator.core.planning.rank_choice import EXACT_DEVICES, Choice, Site, Task, choose, site
from coordinator.core.planning.reasons import mebibytes, plural, seconds, word
from coordinator.core.planning.sizing import agents_reason, batch_sizes
from coordinator.core.planning.uniform import UniformPlanner
from shared.jobs import JobSpec
from shared.messages import Work

WARM_UP_RANK = 8
WANTED = 0.8
"""Share of the score that the chosen modules have together."""
RANKS = (2, 4, 8, 16, 32)


class FedPipePlanner(msgspec.Struct, frozen=True, kw_only=True):
    """See the module. `scores`: module -> merged share, with sum 1; `scored`: the round they are from, 0 for none;
    `wanted`: share of the score that the chosen modules have together, 1 for all of them."""

    name: str = "fedpipe"
    model: CostModel = CostModel()
    scores: dict[str, float] = {}
    scored: int = 0
    wanted: float = WANTED

    def learn(self, report: RoundReport) -> FedPipePlanner:
        """The planner that also knows this round."""
        learned = replace(self, model=self.model.learn(report))
        scores = merged_scores(report)
        return replace(learned, scores=scores, scored=report.round) if scores else learned

    def plan(self, view: FleetView, job: JobSpec) -> Plan:
        """The next round. Raises `UserError` where no candidate can take part, with the reason per device."""
        modules = tuned_modules(view.facts, job.base)
        known = {module.name: self.scores[module.name] for module in modules if self.scores.get(module.name, 0.0) > 0}
        if not known or view.round - self.scored >= job.strategy.rescore_every:
            return self._over_all(view, job, modules)
        return self._tuning(view, job, modules, important(known, modules, self.wanted))

    def _over_all(self, view: FleetView, job: JobSpec, modules: Sequence[ModuleSpec]) -> Plan:
        """A round over all candidates, planned like `uniform`; at the end of the warm-up and after it every device
        tells its scores."""
        rank, warm_up = min(WARM_UP_RANK, job.strategy.rank), job.strategy.warm_up_steps
        before = (view.round - 1) * job.rounds.local_steps
        score = before + job.rounds.local_steps >= warm_up
        low = replace(job, strategy=replace(job.strategy, rank=rank))
        plan = UniformPlanner(model=self.model, ends=True).plan(view, low)
        if self.scored:
            age, every = view.round - self.scored, job.strategy.rescore_every
            reading, bound = (
                f"scores of round {self.scored} are {plural(age, 'round')} old",
                f"a new score every {every}",
            )
        else:
            reading = f"{plural(before, 'step')} and no scores before round {view.round}"
            bound = f"the warm-up of {plural(warm_up, 'step')}"
        note = f"all modules tuned at rank {rank}{' to score them' if score else ''}"
        why = word("weights", len(modules), reading, bound, note)
        works = {
            device: replace(work, score=score, reasons={**work.reasons, "weights": why})
            for device, work in plan.participants.items()
        }
        weights = Weights(scores=self.scores, selected=[module.name for module in modules], scored=self.scored)
        return replace(plan, participants=works, reason=f"{why}; {plan.reason}", weights=weights)

    def _tuning(
        self, view: FleetView, job: JobSpec, modules: Sequence[ModuleSpec], chosen: Sequence[ModuleSpec]
    ) -> Plan:
        """A round over the chosen modules, with batch and ranks by each device's budget."""
        search = searched(view, job, chosen, self.scores, self.model)
        drafts, links, sites = search.drafts, search.links, search.sites
        exactly = len(drafts) <= EXACT_DEVICES
        choices = choose(sites, search.task, exactly)
        weights_why = _weights_reason(chosen, modules, self.scores, self.scored, self.wanted)
        desk = _Desk(view, job, chosen, search, self.model, weights_why)
        written = [desk.write(*row) for row in zip(drafts, links, sites, choices, strict=True)]
        means = f"ranks {'exactly' if exactly else 'greedily'} by J"
        if exactly and (unproven := sum(not one.proven for one in choices)):
            means += f" (the solver found no optimum for {plural(unproven, 'device')}: not proven there)"
        taking = f"{len(written)} of {plural(len(view.candidates), 'candidate')} take part"
        return Plan(
            participants={draft.place.device: work for draft, (work, _) in zip(drafts, written, strict=True)},
            deadline_s=job.rounds.deadline_s,
            reason=f"{weights_why}; {search.reason}; {means}; {taking}",
            predicted_s={draft.place.device: took for draft, (_, took) in zip(drafts, written, strict=True)},
            left_out=search.left_out,
            weights=Weights(scores=self.scores, selected=[module.name for module in chosen], scored=self.scored),
            together=Ends(job, self.model).together,
        )


def merged_scores(report: RoundReport) -> dict[str, float]:
    """The fleet's share of each module in what the devices of `report` scored; empty where none did."""
    told: list[tuple[int, dict[str, float]]] = []
    for device, facts in sorted(report.results.items()):
        work = report.works.get(device)
        if work is None or not work.score:
            continue
        own = {name: share for name, share in facts.importance.items() if share > 0 and work.ranks.get(name, 0) > 0}
        total = math.fsum(own.values())
        if total > 0:
            told.append((facts.samples, {name: share / total for name, share in own.items()}))
    largest = report.job.strategy.max_share if report.job is not None else 1.0
    weights = shares([samples for samples, _ in told], largest)
    names = sorted({name for _, own in told for name in own})
    sums = {
        name: math.fsum(w * own.get(name, 0.0) for w, (_, own) in zip(weights, told, strict=True)) for name in names
    }
    total = math.fsum(sums.values())
    return {name: value / total for name, value in sums.items()} if total > 0 else {}


def important(scores: Mapping[str, float], modules: Sequence[ModuleSpec], share: float = WANTED) -> list[ModuleSpec]:
    """The smallest set of `modules` with `share` of their scores, by name; of equal scores the cheaper first."""
    ranked = sorted(modules, key=lambda m: (-scores.get(m.name, 0.0), m.out + m.inp, m.name))
    wanted = share * math.fsum(scores.get(module.name, 0.0) for module in modules)
    taken: list[ModuleSpec] = []
    for module in ranked:
        if math.fsum(scores.get(one.name, 0.0) for one in taken) >= wanted - 1e-12:
            break
        taken.append(module)
    return sorted(taken, key=lambda module: module.name)


def rank_levels(module: ModuleSpec, cap: int) -> tuple[int, ...]:
    """The ranks that a module may get: 0 and those of `RANKS`, none above `cap` or the module's size."""
    return (0, *sorted({min(rank, cap, module.out, module.inp) for rank in RANKS}))


def gain(rank: int, largest: int) -> float:
    """g(r): how much of a module's score the rank is worth; 1 at the largest."""
    return math.log2(1 + rank) / math.log2(1 + largest)


class Search(NamedTuple):
    """The second stage of a round before anything is chosen: what all devices choose from, and what each has for it.

    `levels`: the ranks behind those of each item; `bound`: of the global adapter's rank; `reason`: of the round target.
    """

    task: Task
    levels: list[tuple[int, ...]]
    bound: int
    drafts: list[Draft]
    links: list[Link]
    sites: list[Site]
    left_out: dict[str, str]
    reason: str


def searched(
    view: FleetView, job: JobSpec, chosen: Sequence[ModuleSpec], scores: Mapping[str, float], model: CostModel
) -> Search:
    """The second stage over the modules `chosen`. Raises `UserError` where no candidate can take part."""
    task, levels, most = _task(view, job, chosen, scores)
    sizes = batch_sizes(job.strategy, job.training.accumulation)
    drafts, left_out = drafts_of(view, job, task.need, sizes[:1], model)
    bound = global_rank(view, job, job.strategy.rank)
    target, reason = round_target(drafts, [demand(view.facts, job, most, bound)] * len(drafts), job, model, ends=True)
    links = links_of(view, job, drafts, [most] * len(drafts), bound, target, model)
    sites = [site(draft, sizes, task, link.left, model) for draft, link in zip(drafts, links, strict=True)]
    return Search(task, levels, bound, drafts, links, sites, left_out, reason)


def _task(
    view: FleetView, job: JobSpec, chosen: Sequence[ModuleSpec], scores: Mapping[str, float]
) -> tuple[Task, list[tuple[int, ...]], dict[str, int]]:
    """(what devices choose from, the ranks behind its levels, the highest ranks of all)."""
    cap = min(job.strategy.rank, RANKS[-1])
    levels = [rank_levels(module, cap) for module in chosen]
    items = [
        Item(
            tuple(rank * (module.out + module.inp) for rank in ranks),
            tuple(scores[module.name] * gain(rank, cap) for rank in ranks),
        )
        for module, ranks in zip(chosen, levels, strict=True)
    ]
    least = {module.name: ranks[1] for module, ranks in zip(chosen, levels, strict=True)}
    task = Task(
        items=items,
        need=demand(view.facts, job, least, global_rank(view, job, job.strategy.rank)),
        params=sum(item.weights[1] for item in items),
        dense=dense_params(view.facts),
        flop_per_param=6.0 * tokens_of(job),
    )
    return task, levels, {module.name: ranks[-1] for module, ranks in zip(chosen, levels, strict=True)}


class _Tuned(NamedTuple):
    """What devices with the same levels share."""

    ranks: dict[str, int]
    need: Demand
    params: int
    value: float


class _Desk:
    """Words the choices of a round as works."""

    def __init__(
        self, view: FleetView, job: JobSpec, chosen: Sequence[ModuleSpec], search: Search, model: CostModel,
        weights_why: str,
    ) -> None:  # fmt: skip
        self._facts: ModelFacts = view.facts
        self._job, self._chosen, self._levels, self._task = job, chosen, search.levels, search.task
        self._bound, self._model, self._weights_why = search.bound, model, weights_why
        self._ends = Ends(job, model)
        self._most = math.fsum(item.values[-1] for item in search.task.items)
        self._tuned: dict[tuple[int, ...], _Tuned] = {}

    def write(self, draft: Draft, link: Link, one: Site, choice: Choice) -> tuple[Work, float]:
        """(the device's work, seconds of training expected)."""
        place = draft.place
        tuned = self._of(choice.levels)
        batch, notes = _cautious(place.caution, choice, one)
        step_s, why = self._model.step(place.device, tuned.need, draft.bits, batch, place.free)
        took = choice.steps * step_s
        met = choice.objective > 0
        reading = f"{why}, {plural(choice.steps, 'step')} {seconds(took)}"
        batch_why = word(
            "batch", batch, reading, f"{seconds(link.left.seconds)} round target", *notes,
            verb="meets" if met and took <= link.left.seconds * (1 + 1e-6) else "exceeds",
        )  # fmt: skip
        transfer = f"transfer {seconds(link.seconds)} ({link.reading})"
        asked = self._job.rounds.local_steps
        if choice.steps < asked:
            transfer = f"{asked - choice.steps} of the job's {asked} left undone; {transfer}"
        end = self._ends.of(place.device, draft.bits, link.left.seconds, choice.steps, link.moves, link.usual)
        predicted, steps_why = steps_reason(self._job, choice.steps, step_s, transfer, end)
        reasons = {
            "weights": self._weights_why, "rank": self._rank_reason(draft, link, one, choice, tuned),
            "batch": batch_why, "bits": draft.bits_reason, "steps": steps_why,
        }  # fmt: skip
        if place.info.agents > 1:
            reasons["agents"] = agents_reason(place)
        work = Work(
            ranks=tuned.ranks, batch=batch, bits=draft.bits, steps=choice.steps, agents=place.agents,
            train_for_s=end.limit, extra_steps=end.extra, reasons=reasons,
        )  # fmt: skip
        return work, predicted

    def _of(self, levels: tuple[int, ...]) -> _Tuned:
        if levels not in self._tuned:
            given = zip(self._chosen, self._levels, levels, strict=True)
            ranks = {module.name: ranks[level] for module, ranks, level in given if level}
            need = demand(self._facts, self._job, ranks, self._bound)
            params = knapsack.weight(self._task.items, levels)
            self._tuned[levels] = _Tuned(ranks, need, params, knapsack.value(self._task.items, levels))
        return self._tuned[levels]

    def _rank_reason(self, draft: Draft, link: Link, one: Site, choice: Choice, tuned: _Tuned) -> str:
        """What the ranks are worth, and the bound that kept them from more."""
        ranks = sorted(tuned.ranks.values())
        spread = f"{ranks[0]} to {ranks[-1]}" if ranks[0] < ranks[-1] else f"{ranks[0]}"
        reading = f"ranks {spread} on {plural(len(ranks), 'module')}, {plural(tuned.params, 'parameter')}"
        room = max(choice.room, 0)
        if choice.by_memory and choice.batch in one.proven:
            limit = mebibytes(draft.place.budget.limit)
            bound = f"{room} that have run under the {limit} memory limit at batch {choice.batch}"
        elif choice.by_memory:
            bound = f"{room} that {draft.place.budget} leaves at batch {choice.batch}"
        else:
            bound = f"{room} that {seconds(link.left.seconds)} leave at batch {choice.batch} and {draft.place.free}"
        worth = f"worth {tuned.value:.3f} of {self._most:.3f} at under-training {choice.under:.0%}"
        if choice.objective <= 0:
            return word("rank", ranks[-1], reading, bound, worth, "the least ranks all the same", verb="exceeds")
        return word("rank", ranks[-1], reading, bound, worth)


def _cautious(caution: str, choice: Choice, one: Site) -> tuple[int, list[str]]:
    """(batch, notes): the chosen batch, at most half of it where telemetry is old."""
    if choice.objective <= 0:
        notes = ["the least batch all the same"]
    else:
        notes = [choice.above, f"J {choice.objective:.3f}"]
    if not caution:
        return choice.batch, notes
    halved = ([size for size in one.allowed if size <= choice.batch // 2] or [one.batches[0]])[-1]
    if halved < choice.batch:
        return halved, [*notes, f"{caution}: cautious batch {halved} instead of {choice.batch}"]
    return choice.batch, [*notes, f"{caution}: batch {choice.batch} is the least already"]


def _weights_reason(
    chosen: Sequence[ModuleSpec], modules: Sequence[ModuleSpec], scores: Mapping[str, float], scored: int,
    wanted: float,
) -> str:  # fmt: skip
    """Which set, how much of the score it has, and of which round the score is."""
    share = math.fsum(scores.get(module.name, 0.0) for module in chosen)
    reading = f"{share:.3f} of the score of round {scored} on {len(chosen)} of {plural(len(modules), 'module')}"
    ranked = sorted(chosen, key=lambda module: -scores.get(module.name, 0.0))
    most = ", ".join(f"{module.name} {scores.get(module.name, 0.0):.3f}" for module in ranked[:3])
    return word("weights", len(chosen), reading, f"{wanted:g} wanted", f"most: {most}")
