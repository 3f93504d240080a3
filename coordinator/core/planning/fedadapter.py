"""`fedadapter`: bottleneck adapters whose depth and width grow over the rounds (FedAdapter, Cai et al., MobiCom 2023,
arXiv 2205.10162).

The paper's, by its abstract: configurations grow from small and shallow to large and deep, and participants in trial
groups tell which one is worth going on with. Our reading: the rule (`progressive`), and all around it. Bits and steps
are as `uniform` has them for each device's own configuration; every device gets the same batch, as with the other
rivals. The cache of activations of the paper's frozen layers is not built.

`Work.ranks` carries the configuration: path of a block -> width of its adapter, for the top blocks alone. Whether a
round was a trial is seen from the works of its plan, so a restart learns from the log what it had learned before.

In a trial the participants, from the fastest to the slowest, are dealt out to the groups in turn; one whose memory does
not hold its group's configuration at its bits trains the present one. A group's loss falls by loss_first - loss_last,
averaged over its devices by samples; the seconds are FLOP of its steps at the job's batch by the fleet's median speed,
and its transfers by the fleet's median link.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Mapping

import msgspec
from msgspec.structs import replace

from coordinator.core.facts import ModelFacts
from coordinator.core.planning.base import FleetView, Plan, RoundReport
from coordinator.core.planning.cost_model import CostModel
from coordinator.core.planning.demand import demand, traffic
from coordinator.core.planning.drafts import Draft, batches_to_the_jobs, drafts_of, job_batch
from coordinator.core.planning.progressive import WINDOW, Limits, Progress, Shape, candidates, fastest
from coordinator.core.planning.ranks import Ranked
from coordinator.core.planning.reasons import plural, word
from coordinator.core.planning.sizing import choose_bits
from coordinator.core.planning.uniform import Seated, plan_of
from shared.jobs import JobSpec
from shared.messages import UpdateFacts


class FedAdapterPlanner(msgspec.Struct, frozen=True, kw_only=True):
    """See the module. Its state is the cost model and how far the adapters have grown."""

    name: str = "fedadapter"
    model: CostModel = CostModel()
    progress: Progress = Progress()

    def learn(self, report: RoundReport) -> FedAdapterPlanner:
        """The planner that also knows this round."""
        model = self.model.learn(report)
        results = {device: facts for device, facts in report.results.items() if facts.samples}
        if not results or report.facts is None or report.job is None:
            return replace(self, model=model)
        limits = limits_of(report.facts, report.job)
        shape = self.progress.at(limits, report.job.strategy.rank)
        shapes = {device: shape_of(report.works[device].ranks) for device in report.works}
        if len(set(shapes.values())) > 1:
            rates = _rates({device: shapes[device] for device in results}, report, results, model)
            return replace(self, model=model, progress=self.progress.decided(fastest(rates)))
        progress = self.progress.seen(_mean([(facts.samples, facts.loss_first) for facts in results.values()]))
        if progress.stalled and len(report.works) < len(candidates(shape, limits)):
            progress = progress.grown(shape, limits)
        return replace(self, model=model, progress=progress)

    def plan(self, view: FleetView, job: JobSpec) -> Plan:
        """The next round. Raises `UserError` where no candidate can take part, with the reason per device."""
        limits = limits_of(view.facts, job)
        shape = self.progress.at(limits, job.strategy.rank)
        choices = [ranked_of(one, view.facts, job) for one in candidates(shape, limits)]
        drafts, left_out = drafts_of(view, job, choices[0].need, batches_to_the_jobs(job)[::-1], self.model)
        trial = self.progress.stalled and len(drafts) >= len(choices) > 1
        seated = self._seated(drafts, choices if trial else choices[:1], job, limits)
        bound = max(ranked.rank for ranked in choices)
        plan = plan_of(view, job, self.model, seated, left_out, bound, one_batch=True)
        return replace(plan, reason=f"{plan.reason}; {self._told(shape, choices, trial=trial)}")

    def _seated(self, drafts: list[Draft], choices: list[Ranked], job: JobSpec, limits: Limits) -> list[Seated]:
        """Each participant with its configuration, by device id."""
        order = sorted(drafts, key=lambda draft: (self._step_s(draft, choices[0], job), draft.place.device))
        found = [self._sat(draft, choices, place % len(choices), job, limits) for place, draft in enumerate(order)]
        return sorted(found, key=lambda one: one.draft.place.device)

    def _sat(self, draft: Draft, choices: list[Ranked], group: int, job: JobSpec, limits: Limits) -> Seated:
        ranked, note = choices[group], ""
        if group:
            chosen = choose_bits(draft.place, ranked.need, job, self.model, draft.least)
            if isinstance(chosen, str) or chosen[0] != draft.bits:
                trial = f"the trial of {shape_of(ranked.ranks)}"
                note = f"its memory does not hold {trial}"
                if not isinstance(chosen, str):
                    note = f"{trial} would leave memory for {chosen[0]} bits only, this leaves it for {draft.bits}"
                ranked = choices[0]
            else:
                draft = draft._replace(bits_reason=chosen[1])
        shape = shape_of(ranked.ranks)
        what = f"trial group {group + 1} of {len(choices)}" if len(choices) > 1 else "all devices alike"
        reading = f"width {shape.width} in the top {plural(shape.depth, 'block')}, {what}"
        bound = f"width {limits.width} and {plural(limits.depth, 'block')} at most"
        return Seated(draft, ranked, word("rank", shape.width, reading, bound, note))

    def _step_s(self, draft: Draft, ranked: Ranked, job: JobSpec) -> float:
        pace = self.model.pace(draft.place.device, ranked.need, draft.bits, draft.place.free.undisturbed())
        return pace.step_s(job_batch(job))

    def _told(self, shape: Shape, choices: list[Ranked], *, trial: bool) -> str:
        losses = self.progress.losses
        if trial:
            tried = ", ".join(f"({shape_of(one.ranks)})" for one in choices)
            return f"a trial of {tried}: the loss went from {losses[0]:.4g} to {losses[-1]:.4g} in {WINDOW} rounds"
        return f"adapters of {shape}, {plural(len(losses), 'round')} of them seen"


def limits_of(facts: ModelFacts, job: JobSpec) -> Limits:
    """All blocks, and the job's `global_rank` as width, no larger than the model's own."""
    return Limits(depth=len(facts.modules), width=min([job.strategy.global_rank, *(one.out for one in facts.modules)]))


def widths(shape: Shape, facts: ModelFacts) -> dict[str, int]:
    """`Work.ranks` of a configuration."""
    top = sorted(facts.modules, key=lambda module: module.block)[-shape.depth :]
    return {module.name: shape.width for module in top}


def shape_of(ranks: Mapping[str, int]) -> Shape:
    """The configuration of a work."""
    tuned = [width for width in ranks.values() if width > 0]
    return Shape(depth=len(tuned), width=max(tuned, default=0))


def ranked_of(shape: Shape, facts: ModelFacts, job: JobSpec) -> Ranked:
    """What a configuration asks of a device."""
    ranks = widths(shape, facts)
    return Ranked(shape.width, ranks, demand(facts, job, ranks), "")


def common_seconds(shape: Shape, facts: ModelFacts, job: JobSpec, model: CostModel) -> float:
    """Seconds of a round with `shape` on one device of the fleet's median speed and link."""
    ranks = widths(shape, facts)
    speeds = [model.gpu if known.gpu else model.cpu for known in model.devices.values() if known.fits]
    overhead, per_flop = (statistics.median(values) for values in zip(*(speeds or [model.cpu]), strict=True))
    training = job.rounds.local_steps * (overhead + demand(facts, job, ranks).flop * job_batch(job) * per_flop)
    links = [known.link for known in model.devices.values() if known.link]
    down, up, _ = traffic(facts, ranks, shape.width, job.training.codec, global_codec=job.strategy.global_codec)
    return float(training + ((down + up) / statistics.median(links) if links else 0.0))


def _rates(
    shapes: Mapping[str, Shape], report: RoundReport, results: Mapping[str, UpdateFacts], model: CostModel
) -> dict[Shape, float]:
    """Fall of the loss per second of each group that returned anything."""
    assert report.facts is not None and report.job is not None
    falls: dict[Shape, list[tuple[int, float]]] = defaultdict(list)
    for device, shape in sorted(shapes.items()):
        facts = results[device]
        falls[shape].append((facts.samples, facts.loss_first - facts.loss_last))
    return {
        shape: _mean(seen) / common_seconds(shape, report.facts, report.job, model) for shape, seen in falls.items()
    }


def _mean(weighted: list[tuple[int, float]]) -> float:
    total = sum(count for count, _ in weighted)
    return sum(count / total * value for count, value in weighted)
