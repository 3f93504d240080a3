"""`mergesfl` (MergeSFL, arXiv 2311.13348, ICDE 2024): split learning with merged features and regulated batches.

**The paper's** (abstract; more of it as recalled, `split_control` says which): devices run the lower part of the model
and the server the rest; each round a control module estimates what a sample takes on each device, gives batches so that
all finish together, chooses who takes part so that the merged labels look like the fleet's, under the bandwidth that
the server takes in, tunes the batches, and spends what bandwidth is left. **Our reading**:

* D, the batch of the fastest device, is `strategy.batch`; spare bandwidth raises batches up to `strategy.batch_max`.
* how many are selected is `rounds.sample`, met exactly as far as the bandwidth allows; without it any number from
  `rounds.min_devices` on, and all where bandwidth is not bounded either. The draw that other strategies make of the
  ready devices is not made.
* B, the bytes a step may take, is `split.ingress` times the seconds of a step by the formula, D (mu_l + beta_l).
* of more than 200 candidates 200 are drawn by hash and planned over. Phi0 is the mean mix of those.
* the block of the cut is the job's, or the one of the smallest mu + beta on the median device that its memory holds; it
  stays for the whole job. Of several agents of a device one trains.
* batches are moved only while KL is above `split.kl`: below it equal finishing times are worth more. Then they are
  aligned: whole samples leave up to one of a slow device unused, and a step up to twice as long may leave less.
* where the round begins batches follow the links that its downloads have just shown (`regulation`).
* without labels (causal tasks, owners that don't tell them) a device counts as having the mean mix; where none tells
  any, KL is 0 and who was used rarely goes first.

The rivals: `splitfed` (random selection, the job's batch for all) and `adasfl` (random selection, regulated batches)
without merging; `mergesfl-uniform` (selection as above, the job's batch for all) and `mergesfl-random` (random
selection, regulated batches) with it. They neither move batches nor spend spare bandwidth; that bounds them all alike.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import msgspec
import numpy as np
from msgspec.structs import replace

from coordinator.core.aggregation.registry import merges
from coordinator.core.draw import Draw, drawn
from coordinator.core.planning import split_control as control
from coordinator.core.planning.base import Candidate, FleetView, Plan, RoundReport
from coordinator.core.planning.common import End, global_rank, moved, nobody, steps_reason
from coordinator.core.planning.cost_model import CostModel
from coordinator.core.planning.demand import Demand, tuned_modules
from coordinator.core.planning.drafts import job_batch
from coordinator.core.planning.lower_part import feature_bytes, lower_demand, lower_facts
from coordinator.core.planning.ranks import of_modules
from coordinator.core.planning.reasons import plural, seconds, word
from coordinator.core.planning.regulation import Regulated, Regulation
from coordinator.core.planning.sizing import Seat, choose_bits, fits, seat
from coordinator.core.planning.split_control import Bools, Fleet, Floats, Ints
from coordinator.core.planning.split_times import Sample, SplitTimes, median
from shared.errors import UserError
from shared.jobs import Bits, JobSpec
from shared.messages import Work

MOST = 200
"""Candidates that a plan is made over."""
_REGULATED = ("mergesfl", "mergesfl-random", "adasfl")
_SEARCHED = ("mergesfl", "mergesfl-uniform")


class Draft(NamedTuple):
    """A device that can take part, before anyone is selected."""

    place: Seat
    bits: Bits
    bits_reason: str
    most: int
    """The largest batch."""
    bound: str
    """What makes it that."""
    sample: Sample


class Cut(NamedTuple):
    """Where the model is cut, and what that asks of a device."""

    block: int
    ranks: dict[str, int]
    need: Demand
    features: float
    """Bytes of a sample, one way."""
    note: str = ""


class Control(NamedTuple):
    """What the control module decided. Arrays have an entry per draft."""

    chosen: Bools
    batches: Ints
    formula: Ints
    factor: float
    times: Floats
    kl: float
    budget: float
    told: Bools
    mixes: Floats
    goal: Floats

    @property
    def step_s(self) -> float:
        """Seconds of a step of the slowest."""
        return float((self.batches * self.times)[self.chosen].max())


class MergeSflPlanner(msgspec.Struct, frozen=True, kw_only=True):
    """See the module."""

    name: str = "mergesfl"
    model: CostModel = CostModel()
    times: SplitTimes = SplitTimes()
    used: dict[str, int] = {}
    """Device -> rounds it was selected for."""
    block: int = 0
    """Of the rounds so far; 0: none yet."""

    def learn(self, report: RoundReport) -> MergeSflPlanner:
        """The planner that also knows this round."""
        model = self.model.learn(report)
        used = dict(self.used)
        for device in report.works:
            used[device] = used.get(device, 0) + 1
        blocks = [work.split.block for work in report.works.values() if work.split is not None]
        return replace(
            self, model=model, times=self.times.learn(report, model), used=used, block=max(blocks, default=self.block)
        )

    # ---- planning

    def plan(self, view: FleetView, job: JobSpec) -> Plan:
        """The next round. Raises `UserError` where the base can't be cut there, or no candidate can take part."""
        if job.strategy.split.tuning == "full":
            job = replace(job, strategy=replace(job.strategy, bits=32))
        left_out: dict[str, str] = {}
        seats: list[Seat] = []
        for candidate in self._drawn(view, job, left_out):
            # One agent of a device trains.
            alone = replace(candidate, info=replace(candidate.info, agents=1))
            place = seat(alone, job, view.fresh_s, self.model)
            if isinstance(place, str):
                left_out[candidate.device] = place
            else:
                seats.append(place)
        if not seats:
            raise UserError(nobody(job, left_out))
        cut = self._cut(seats, view, job)
        drafts = self._drafts(seats, cut, job, left_out)
        if not drafts:
            raise UserError(nobody(job, left_out))
        made = self._control(drafts, cut, view, job)
        for row, draft in enumerate(drafts):
            if not made.chosen[row]:
                left_out[draft.place.device] = "not selected for this round"
        return self._plan(drafts, made, cut, view, job, left_out)

    def _drawn(self, view: FleetView, job: JobSpec, left_out: dict[str, str]) -> list[Candidate]:
        """At most `MOST` candidates, by id."""
        devices = [candidate.device for candidate in view.candidates]
        taken = set(drawn(devices, MOST, Draw(job.seed, view.round, 0)))
        for device in devices:
            if device not in taken:
                left_out[device] = f"not among the {MOST} of {len(devices)} candidates that the plan is made over"
        return sorted((one for one in view.candidates if one.device in taken), key=lambda one: one.device)

    def _cut(self, seats: Sequence[Seat], view: FleetView, job: JobSpec) -> Cut:
        """The job's block, that of the rounds so far, or the cheapest on the median device."""
        blocks, asked = view.facts.blocks, job.strategy.split.block
        if blocks < 2 or asked >= blocks:
            raise UserError(
                f"strategy.split.block {asked}: the base has {plural(blocks, 'block')}, so at most {blocks - 1} run on "
                "the devices"
            )
        if asked:
            return _cut_at(asked, view, job, f"{asked} asked")
        if self.block and self.block < blocks:
            return _cut_at(self.block, view, job, "as in the rounds before")
        first = _cut_at(1, view, job)
        batch, bits = job_batch(job), {one.device: _most_bits(one, job) for one in seats}
        samples = {
            one.device: self.times.sample(one, first.need, bits[one.device], first.features, batch, self.model)
            for one in seats
        }
        middle = next(one for one in seats if one.device == median(samples))
        found: list[tuple[float, int, Cut]] = []
        for block in range(1, blocks):
            cut = _cut_at(block, view, job)
            chosen = choose_bits(middle, cut.need, job, self.model, min(job.strategy.batch_min, middle.rows))
            if isinstance(chosen, str):
                break
            took = self.times.sample(middle, cut.need, chosen[0], cut.features, batch, self.model).whole
            found.append((took, block, cut))
        if not found:
            return first._replace(note=f"the least, though {middle.device}, the median device, can't hold it")
        took, _, cut = min(found, key=lambda one: one[:2])
        note = f"the least of {plural(len(found), 'block')}: {seconds(took)} a sample on {middle.device}, the median"
        return cut._replace(note=note)

    def _drafts(self, seats: Sequence[Seat], cut: Cut, job: JobSpec, left_out: dict[str, str]) -> list[Draft]:
        """Who can do the cut, with what a sample takes there."""
        drafts = []
        for place in seats:
            least = min(job.strategy.batch_min, place.rows)
            chosen = choose_bits(place, cut.need, job, self.model, least)
            if isinstance(chosen, str):
                left_out[place.device] = chosen
                continue
            most, bound = _most(place, cut.need, chosen[0], job, self.model)
            sample = self.times.sample(place, cut.need, chosen[0], cut.features, job_batch(job), self.model)
            drafts.append(Draft(place, *chosen, most, bound, sample))
        return drafts

    def _control(self, drafts: Sequence[Draft], cut: Cut, view: FleetView, job: JobSpec) -> Control:
        """Batches and selection, as the module says."""
        strategy, default = job.strategy, job_batch(job)
        times = np.array([max(draft.sample.whole, 1e-12) for draft in drafts])
        most = np.array([draft.most for draft in drafts], dtype=np.int64)
        least = min(strategy.batch_min, default)
        formula = control.regulated(times, default, least, np.minimum(most, default))
        if self.name not in _REGULATED:
            formula = np.minimum(most, default)
        labels = [draft.place.info.datasets[job.task.dataset].labels for draft in drafts]
        causal = job.task.kind == "causal"
        mixes, goal, told = control.mixes_of([{} if causal else one for one in labels])
        step_s = default * float(times.min())
        budget = float(np.floor(strategy.split.ingress * step_s / cut.features)) if strategy.split.ingress else 0.0
        # A budget below one sample is still a budget: one device takes part, and the plan says that it exceeds it.
        budget = max(budget, 1.0) if strategy.split.ingress else 0.0
        rarity = np.array([1.0 / (1 + self.used.get(draft.place.device, 0)) for draft in drafts])
        # Where neither a number nor bandwidth bounds them all take part.
        asked = job.rounds.sample or (0 if budget else len(drafts))
        took = formula * times if self.name == "mergesfl" else None
        fleet = Fleet(formula, mixes, goal, rarity, budget, job.rounds.min_devices, asked, took)
        seed = _seed(job, view.round)
        chosen = control.select(fleet, seed) if self.name in _SEARCHED else _random(drafts, fleet, job, view.round)
        batches, factor = formula, 1.0
        if self.name == "mergesfl":
            batches = control.tuned(fleet, chosen, times, most, least, strategy.split.kl)
            batches = control.aligned(fleet, chosen, batches, times, most, strategy.split.kl)
            batches, factor = control.scaled(batches, chosen, most, budget)
        return Control(
            chosen, batches, formula, factor, times, control.kl_of(fleet, chosen, batches), budget, told, mixes, goal
        )  # fmt: skip

    def _plan(
        self, drafts: Sequence[Draft], made: Control, cut: Cut, view: FleetView, job: JobSpec, left_out: dict[str, str]
    ) -> Plan:
        rounds = job.rounds
        full = job.strategy.split.tuning == "full"
        bound = 0 if full else global_rank(view, job, job.strategy.rank)
        below = replace(view, facts=lower_facts(view.facts, cut.block, full=full))
        size = moved(below, job, cut.ranks, bound, 1).both
        split = replace(job.strategy.split, block=cut.block)
        works: dict[str, Work] = {}
        predicted: dict[str, float] = {}
        for row, draft in enumerate(drafts):
            if not made.chosen[row]:
                continue
            device, own_s = draft.place.device, float(made.batches[row] * made.times[row])
            took, reading = self.model.transfer(device, size)
            # Merged features wait for the slowest in every step.
            step_s = made.step_s if merges(self.name) else own_s
            transfer = f"transfer {seconds(took)} ({reading})"
            predicted[device], steps = steps_reason(
                job, rounds.local_steps, step_s, transfer, End(rounds.train_for_s)
            )  # fmt: skip
            reasons = {
                "rank": _rank_reason(cut, view, job), "batch": self._batch_reason(drafts, made, row, job),
                "bits": draft.bits_reason, "steps": steps,
                "split": _split_reason(draft, cut, view, job, told=bool(made.told[row])),
            }  # fmt: skip
            works[device] = Work(
                ranks=cut.ranks, batch=int(made.batches[row]), bits=draft.bits, steps=rounds.local_steps,
                train_for_s=rounds.train_for_s, split=split, reasons=reasons,
            )  # fmt: skip
        taking = f"{len(works)} of {plural(len(view.candidates), 'candidate')} take part"
        return Plan(
            participants=works, deadline_s=rounds.deadline_s, predicted_s=predicted, left_out=left_out,
            reason=f"{self._reason(made, cut, job)}; {taking}",
            regulation=_regulation(drafts, made, cut, job) if self.name == "mergesfl" else None,
        )  # fmt: skip

    # ---- words

    def _batch_reason(self, drafts: Sequence[Draft], made: Control, row: int, job: JobSpec) -> str:
        draft, fast = drafts[row], drafts[int(np.argmin(made.times))]
        batch, formula, default = int(made.batches[row]), int(made.formula[row]), job_batch(job)
        if self.name in _REGULATED:
            own = f"{seconds(draft.sample.whole)} per sample here ({draft.sample.source}) at {draft.place.free}"
            reading = f"{default} x {seconds(fast.sample.whole)} of {fast.place.device} / {own}"
        else:
            reading = f"{default} for every device that holds it"
        notes = []
        if batch == draft.most or formula == draft.most:
            notes.append(f"{draft.most} is the most: {draft.bound}")
        if made.factor > 1.0:
            notes.append(f"scaled by {made.factor:.2f} into spare bandwidth, {formula} by the formula")
        elif batch != formula:
            notes.append(f"moved from {formula} for more even labels or less waiting")
        return word("batch", batch, reading, f"{draft.most} at most", *notes)

    def _reason(self, made: Control, cut: Cut, job: JobSpec) -> str:
        """How the participants were selected."""
        how = "by genetic search" if self.name in _SEARCHED else "at random"
        verb = "meets" if made.kl <= job.strategy.split.kl else "exceeds"
        samples = int(made.batches[made.chosen].sum())
        unknown = int((made.chosen & ~made.told).sum())
        labels = f" ({plural(unknown, 'device')} of untold labels taken as the mean mix)" if unknown else ""
        wait = control.waiting(made.batches, made.chosen, made.times)
        words = (
            f"{plural(int(made.chosen.sum()), 'device')} selected {how}: KL {made.kl:.4f}{labels} {verb} "
            f"{job.strategy.split.kl:g}; {plural(samples, 'sample')} a step in {seconds(made.step_s)}, "
            f"waiting {wait:.0%}; cut after block {cut.block}"
        )
        if not made.budget:
            return f"{words}; ingress not bounded, nothing to scale into"
        over = "meets" if samples <= made.budget else "exceeds"
        return f"{words}; {samples} samples a step {over} the {made.budget:.0f} that ingress takes"


def _cut_at(block: int, view: FleetView, job: JobSpec, note: str = "") -> Cut:
    ranks: dict[str, int] = {}
    bound = 0
    if job.strategy.split.tuning == "lora":
        below = [module for module in tuned_modules(view.facts, job.base) if module.block < block]
        ranks, _ = of_modules(below, job.strategy.rank)
        bound = global_rank(view, job, job.strategy.rank)
    need = lower_demand(view.facts, job, ranks, block, bound)
    return Cut(block, ranks, need, feature_bytes(view.facts, job, block), note)


def _regulation(drafts: Sequence[Draft], made: Control, cut: Cut, job: JobSpec) -> Regulation:
    seats = {
        draft.place.device: Regulated(
            compute_s=draft.sample.compute, transmit_s=draft.sample.transmit, most=draft.most,
            least=min(job.strategy.batch_min, draft.most, int(made.batches[row])), mix=made.mixes[row].tolist(),
        )
        for row, draft in enumerate(drafts) if made.chosen[row]
    }  # fmt: skip
    return Regulation(
        participants=seats, sample_bytes=2 * cut.features, goal=made.goal.tolist(), kl=job.strategy.split.kl,
        budget=made.budget,
    )  # fmt: skip


def _most_bits(place: Seat, job: JobSpec) -> Bits:
    """The bits that a first look at speeds takes: the job's, or the most that are proven."""
    asked = job.strategy.bits
    return max(place.info.bits) if asked == "auto" else asked


def _most(place: Seat, need: Demand, bits: Bits, job: JobSpec, model: CostModel) -> tuple[int, str]:
    """(the largest batch, what makes it that): the job's, its rows, what memory holds or once ran out."""
    most, why = max(job.strategy.batch_max, job.strategy.batch_min), "the largest batch of the job"
    if place.rows < most:
        most, why = place.rows, f"the data set has {plural(place.rows, 'row')}"
    limit = model.batch_limit(place.device, bits)
    if limit is not None and limit < most:
        most, why = limit, f"{limit + 1} ran out of memory before"
    footprint = model.footprint(place.device, need, bits, place.info)

    def holds(size: int) -> bool:
        return fits(place, need, bits, size, footprint.bytes(size), model)

    if holds(most):
        return max(1, most), why
    held, over = min(job.strategy.batch_min, most), most
    while over - held > 1:
        middle = (held + over) // 2
        held, over = (middle, over) if holds(middle) else (held, middle)
    return max(1, held), f"{over} would not fit its {place.budget}"


def _random(drafts: Sequence[Draft], fleet: Fleet, job: JobSpec, round: int) -> Bools:
    """As many as `rounds.sample` says, in the order of a draw by hash, as long as the budget holds them."""
    devices = [draft.place.device for draft in drafts]
    order = {
        device: hashlib.sha256(f"{job.seed}/{round}/{device}/select".encode()).digest() for device in devices
    }  # fmt: skip
    chosen = np.zeros(len(drafts), dtype=np.bool_)
    samples = 0
    for row in sorted(range(len(drafts)), key=lambda row: order[devices[row]]):
        if int(chosen.sum()) == fleet.largest:
            break
        more = samples + int(fleet.batches[row])
        if fleet.holds(more) or not chosen.any():
            chosen[row], samples = True, more
    return chosen


def _seed(job: JobSpec, round: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{job.seed}/{round}/select".encode()).digest()[:8], "little")


def _rank_reason(cut: Cut, view: FleetView, job: JobSpec) -> str:
    if job.strategy.split.tuning == "full":
        return word("rank", 0, f"{cut.need.adapter_params} parameters trained themselves", "0 factors asked")
    whole = len(tuned_modules(view.facts, job.base))
    reading = f"{job.strategy.rank} asked on {plural(len(cut.ranks), 'module')} of the device's blocks"
    return word("rank", max(cut.ranks.values(), default=0), reading, f"{plural(whole, 'module')} in all")


def _split_reason(draft: Draft, cut: Cut, view: FleetView, job: JobSpec, *, told: bool) -> str:
    untold = "" if told or job.task.kind == "causal" else "its labels are not told: taken as the mean mix"
    features = f"{cut.features / 1024:.0f} KiB of features"
    return word(
        "split", cut.block, f"{draft.sample}, {features}", f"{view.facts.blocks - 1} blocks at most", cut.note, untold
    )
