"""`legend`: LoRA depth by each device's speed, rank rising toward the output (LEGEND, arXiv 2412.20004).

**The paper's** (abstract, public digest): layers near the output, with higher rank, keep accuracy at lower cost; each
device gets a depth, counted from the output, and the fleet a distribution of ranks, anew in each round by a greedy
algorithm against waiting, from an estimate of each device's capacity. **Our reading**: all formulas (`lcd`), and

* capacity: moving averages (rho = 0.8) of a step's time and of the link. A step is measured whole; what of it is the
  forward pass and what a block of back-propagation follows from the depths the fleet was seen at (`block_times`).
  Times are kept as core-seconds per sample of steps with the job's batch (a GPU counts as one core), so that live load
  lowers the capacity in the very next plan and spoils nothing that was learned. A device not yet met takes the cost
  model's step time.
* t_i(k) = f_i + k mu_i + transfer. Back-propagation through a block counts by its FLOP, so that blocks of higher rank
  count a little more than one. The sum of ranks enters by the bytes it makes (`demand.traffic`), beside the whole
  global adapter, which every device fetches, since its start model holds the blocks it does not tune, too.
* ranks: R_tot = blocks * `strategy.rank`, so that full depth costs what `uniform` does; r_1 in {1, 2, 4}, a quarter of
  it. A block has one rank in the whole fleet. Modules outside the blocks are tuned like the top block.
* k_i^max: the deepest that memory holds at the chosen bits and batch, and that meets the deadline at measured speed.
* LCD is over rounds of the job's batch: bits are the largest that hold it at depth 1, and a smaller batch is taken only
  where memory or data forbid it. Where telemetry is old, a device gets half the depth.
* depth alone can't make devices equal that differ tenfold: with the depths chosen, the median device's round is the
  target of all, each takes the batch that meets it, and all end together (`common.Ends`).
  That is ours, no part of the paper; a job with `batch_min` = `batch_max` has one batch. A device whose telemetry is
  old gets no more than the job's batch.

`aggregation.legend` is the other half: the mean of a module over the devices that tuned it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import msgspec
import numpy as np
from msgspec.structs import replace

from coordinator.core.planning import lcd
from coordinator.core.planning.base import FleetView, Plan, RoundReport
from coordinator.core.planning.block_times import NEVER, BlockTimes, usual_forward
from coordinator.core.planning.common import (
    DEADLINE_SHARE,
    End,
    Ends,
    Links,
    Moved,
    global_rank,
    moved,
    nobody,
    steps_reason,
)
from coordinator.core.planning.cost_model import (
    BITS_TIME,
    CostModel,
    Pace,
    usable,
)
from coordinator.core.planning.demand import Demand, block_flop, demand, depth_share, tuned_modules
from coordinator.core.planning.drafts import batches_to_the_jobs, job_batch
from coordinator.core.planning.reasons import mebibytes, plural, seconds, word
from coordinator.core.planning.sizing import (
    LARGEST,
    ROUNDING,
    Seat,
    Target,
    agents_reason,
    batch_sizes,
    choose_batch,
    choose_bits,
    fits,
    held_batches,
    seat,
)
from shared.errors import UserError
from shared.jobs import Bits, JobSpec
from shared.messages import Work

Floats = lcd.Floats


class Ladder(NamedTuple):
    """The depths to choose from: item k - 1 of each is for the top k blocks.

    `spans`: blocks that the gradient passes; `backward`: the FLOP of that, in blocks without adapters; `words`: the
    reason of the ranks.
    """

    by_block: tuple[int, ...]
    ranks: list[dict[str, int]]
    needs: list[Demand]
    spans: list[float]
    backward: Floats
    words: list[str]
    usual: float
    """Blocks of back-propagation without adapters that a forward pass takes, as long as no device told."""
    batch: int
    """The job's, which averages are of."""

    @property
    def blocks(self) -> int:
        """L."""
        return len(self.ranks)


class _Draft(NamedTuple):
    """A participant before its depth is chosen; times are seconds per step of the job's batch, `byte_s` seconds per
    byte."""

    place: Seat
    bits: Bits
    bits_reason: str
    batch: int
    """That depths are chosen at."""
    most: int
    stopped: str
    """Why not deeper than `most`."""
    forward: float
    block: float
    byte_s: float
    source: str
    link: str
    """That it was not measured; empty: it was."""
    grown: tuple[float, ...]
    """By depth: a step of `batch` against one of the job's."""


class _Told(NamedTuple):
    """What LCD has for one device: seconds of a round by depth, and what came of them."""

    times: list[float]
    depth: int
    reached: int
    """Before halving for old readings."""
    in_time: int
    """The deepest that meets the deadline."""
    moves: Moved
    """Over its link at this depth."""

    def transfer_s(self, draft: _Draft) -> float:
        """Seconds of that."""
        return self.moves.both * draft.byte_s


class _Sized(NamedTuple):
    """A device's batch."""

    batch: int
    step_s: float
    reason: str


class LegendPlanner(msgspec.Struct, frozen=True, kw_only=True):
    """See the module. Its state is the cost model and the capacity of each device."""

    name: str = "legend"
    model: CostModel = CostModel()
    times: BlockTimes = BlockTimes()

    def learn(self, report: RoundReport) -> LegendPlanner:
        """The planner that also knows this round."""
        model = self.model.learn(report)
        return replace(self, model=model, times=self.times.learn(report, model))

    def plan(self, view: FleetView, job: JobSpec) -> Plan:
        """The next round. Raises `UserError` where no candidate can take part, with the reason per device."""
        ladder, ends = _ladder(view, job), Ends(job, self.model)
        drafts, left_out = self._drafts(view, job, ladder, ends.links)
        if not drafts:
            raise UserError(nobody(job, left_out))
        counts = {draft.place.agents for draft in drafts}
        bound = global_rank(view, job, ladder.by_block[-1])
        traffic = {count: [moved(view, job, ranks, bound, count) for ranks in ladder.ranks] for count in counts}
        times = _times(drafts, ladder, traffic, job)
        choice, in_time = self._choose(drafts, ladder, times, job)
        target_s = self._target_s(times, choice, job)
        works: dict[str, Work] = {}
        predicted: dict[str, float] = {}
        for row, draft in enumerate(drafts):
            depth, reached = int(choice.depths[row]), int(choice.reached[row])
            told = _Told(times[row].tolist(), depth, reached, int(in_time[row]), traffic[draft.place.agents][depth - 1])
            sized = self._sized(draft, told, target_s, ladder, job)
            device = draft.place.device
            train_s = max(0.0, target_s - told.transfer_s(draft))
            end = ends.of(device, draft.bits, train_s, job.rounds.local_steps, told.moves)
            predicted[device], works[device] = _work(draft, told, sized, ladder, choice, job, end)
        taking = f"{len(works)} of {plural(len(view.candidates), 'candidate')} take part"
        return Plan(
            participants=works, deadline_s=job.rounds.deadline_s,
            reason=f"{_reason(choice, ladder)}; all that at batch {job_batch(job)}; batches for {seconds(target_s)}; "
            f"{taking}",
            predicted_s=predicted, left_out=left_out, together=ends.together,
        )  # fmt: skip

    def _choose(self, drafts: list[_Draft], ladder: Ladder, times: Floats, job: JobSpec) -> tuple[lcd.Choice, lcd.Ints]:
        """(LCD's choice, deepest that meets the deadline per device)."""
        most = np.array([draft.most for draft in drafts], dtype=np.int64)
        in_time = np.full_like(most, ladder.blocks)
        # Assumed speeds are good for ratios between devices only: they must not meet a bound in seconds.
        if self.model.measured:
            bound = DEADLINE_SHARE * job.rounds.deadline_s
            in_time = np.maximum(1, np.count_nonzero(times <= bound, axis=1)).astype(np.int64)
        rows = np.array([draft.place.rows * draft.place.agents for draft in drafts], dtype=np.float64)
        halved = np.array([bool(draft.place.caution) for draft in drafts])
        return lcd.choose(times, np.minimum(most, in_time), halved, rows / rows.sum(), ladder.by_block), in_time

    def _target_s(self, times: Floats, choice: lcd.Choice, job: JobSpec) -> float:
        """Seconds that batches are chosen for."""
        wanted = float(np.median(np.take_along_axis(times, choice.depths[:, None] - 1, axis=1))) * ROUNDING
        return min(wanted, DEADLINE_SHARE * job.rounds.deadline_s) if self.model.measured else wanted

    def _sized(self, draft: _Draft, told: _Told, target_s: float, ladder: Ladder, job: JobSpec) -> _Sized:
        """The batch of a device at its depth."""
        left = Target(max(0.0, target_s - told.transfer_s(draft)), job.rounds.local_steps)
        pace = self._pace(draft, told.depth, ladder)
        sizes, named = batch_sizes(job.strategy, job.training.accumulation), LARGEST
        if draft.place.caution:  # half the depth is the price of that; half the batch need not come to it
            sizes, named = batches_to_the_jobs(job), "the batch of the job, not to be passed by old readings"
        place, need = draft.place._replace(caution=""), ladder.needs[told.depth - 1]
        return _Sized(*choose_batch(place, need, draft.bits, self.model, sizes, left, pace, named))

    def _pace(self, draft: _Draft, depth: int, ladder: Ladder) -> Pace:
        """Of a step at this depth. Averages are of whole steps; what of one does not grow with its batch is as the cost
        model has it, or large batches would look slower than they are."""
        step_s = draft.forward + float(ladder.backward[depth - 1]) * draft.block
        known = self.model.pace(draft.place.device, ladder.needs[depth - 1], draft.bits, draft.place.free)
        fixed_s = step_s * known.fixed_s / known.step_s(ladder.batch)
        return Pace(fixed_s, (step_s - fixed_s) / ladder.batch, draft.source)

    def _drafts(
        self, view: FleetView, job: JobSpec, ladder: Ladder, links: Links
    ) -> tuple[list[_Draft], dict[str, str]]:
        """(participants in the order of their ids, candidate -> why it takes no part)."""
        sizes = batches_to_the_jobs(job)
        drafts: list[_Draft] = []
        left_out: dict[str, str] = {}
        for candidate in sorted(view.candidates, key=lambda candidate: candidate.device):
            place = seat(candidate, job, view.fresh_s, self.model)
            drafted = place if isinstance(place, str) else self._draft(place, ladder, job, sizes, links)
            if isinstance(drafted, str):
                left_out[candidate.device] = drafted
            else:
                drafts.append(drafted)
        return drafts, left_out

    def _draft(self, place: Seat, ladder: Ladder, job: JobSpec, sizes: tuple[int, ...], links: Links) -> _Draft | str:
        """Bits, batch and the deepest that memory holds, at the capacity that is free now."""
        least, wanted = min(sizes[0], place.rows), min(sizes[-1], place.rows)
        chosen = choose_bits(place, ladder.needs[0], job, self.model, wanted)
        if isinstance(chosen, str):
            chosen = choose_bits(place, ladder.needs[0], job, self.model, least)
        if isinstance(chosen, str):
            return chosen
        bits, bits_reason = chosen
        batch = held_batches(place, ladder.needs[0], bits, self.model, sizes)[0][-1]
        most, stopped = self._deepest(place, ladder, bits, batch)
        return _Draft(
            place, bits, bits_reason, batch, most, stopped, *self._capacity(place, ladder, bits, links),
            self._grown(place, ladder, bits, batch),
        )  # fmt: skip

    def _deepest(self, place: Seat, ladder: Ladder, bits: Bits, batch: int) -> tuple[int, str]:
        """(k_i^max by memory, what stopped the next block); depth 1 was found to fit."""

        def holds(depth: int) -> bool:
            need = ladder.needs[depth - 1]
            size, _ = self.model.memory(place.device, need, bits, batch, place.info)
            return fits(place, need, bits, batch, size, self.model)

        most, beyond = 1, ladder.blocks + 1
        if ladder.blocks == 1 or holds(ladder.blocks):
            return ladder.blocks, f"there are {plural(ladder.blocks, 'block')}"
        while beyond - most > 1:
            middle = (most + beyond) // 2
            most, beyond = (middle, beyond) if holds(middle) else (most, middle)
        size, _ = self.model.memory(place.device, ladder.needs[most], bits, batch, place.info)
        return most, f"{most + 1} would take {mebibytes(size)} of {mebibytes(place.budget.bytes)} memory"

    def _capacity(
        self, place: Seat, ladder: Ladder, bits: Bits, links: Links
    ) -> tuple[float, float, float, str, str]:  # fmt: skip
        """(forward seconds a step of the job's batch, seconds a step and block, seconds a byte, source, that the link
        was not measured) at what is free now."""
        seen = self.times.devices.get(place.device, NEVER)
        link = "" if seen.byte_s else links.unmeasured()
        byte_s = seen.byte_s or (1 / links.usual if links.usual else 0.0)
        forward_blocks = self.times.forward(ladder.usual, gpu=place.free.gpu)
        if seen.rounds:
            scale = ladder.batch * BITS_TIME[bits] / usable(place.free, self.model.devices.get(place.device))
            forward, block = seen.split(forward_blocks)
            return scale * forward, scale * block, byte_s, f"averaged over {plural(seen.rounds, 'round')}", link
        pace = self.model.pace(place.device, ladder.needs[-1], bits, place.free)
        block = pace.step_s(ladder.batch) / (forward_blocks + float(ladder.backward[-1]))
        return forward_blocks * block, block, byte_s, f"{pace.source}, 0 rounds of its own", link

    def _grown(self, place: Seat, ladder: Ladder, bits: Bits, batch: int) -> tuple[float, ...]:
        """By depth: a step of `batch` against one of the job's, as the cost model has it."""
        if batch == ladder.batch:
            return (1.0,) * ladder.blocks
        paces = (self.model.pace(place.device, need, bits, place.free) for need in ladder.needs)
        return tuple(pace.step_s(batch) / pace.step_s(ladder.batch) for pace in paces)


def _ladder(view: FleetView, job: JobSpec) -> Ladder:
    """Ranks, costs and words of every depth."""
    facts = view.facts
    modules = tuned_modules(facts, job.base)
    levels = sorted({module.block for module in modules if module.block >= 0}) or [-1]
    blocks = len(levels)
    total, first = blocks * job.strategy.rank, lcd.first_rank(job.strategy.rank)
    by_block = lcd.progression(blocks, total, first)
    bound = global_rank(view, job, by_block[-1])
    ranks, words = [], []
    for depth in range(1, blocks + 1):
        rank_of = dict(zip(levels[-depth:], by_block[-depth:], strict=True))
        rank_of[-1] = by_block[-1]
        tuned = [module for module in modules if module.block in rank_of]
        ranks.append({m.name: min(rank_of[m.block], m.out, m.inp) for m in tuned})
        reading = (
            f"blocks {levels[-depth]} to {levels[-1]} of {facts.blocks} get {' '.join(map(str, by_block[-depth:]))}"
        )
        clipped = sum(ranks[-1][m.name] < rank_of[m.block] for m in tuned)
        note = f"{plural(clipped, 'module')} smaller than that get their size" if clipped else ""
        rise = f"rising from {by_block[0]} over {plural(blocks, 'block')}, sum {sum(by_block)}"
        words.append(word("rank", by_block[-1], reading, f"{total} in all, {job.strategy.rank} on average", rise, note))
    needs = [demand(facts, job, chosen, bound) for chosen in ranks]
    plain, block = demand(facts, job, {}).flop, block_flop(facts, job)
    return Ladder(
        by_block=by_block, ranks=ranks, needs=needs, words=words, usual=usual_forward(facts, job),
        spans=[max(1, facts.blocks) * depth_share(facts, (m for m in modules if m.name in chosen)) for chosen in ranks],
        backward=np.array([(need.flop - plain) / block for need in needs]), batch=job_batch(job),
    )  # fmt: skip


def _times(drafts: list[_Draft], ladder: Ladder, traffic: Mapping[int, list[Moved]], job: JobSpec) -> Floats:
    """t_i(k): seconds of device i's round with k blocks, (devices x blocks), rising in k: where averages and the cost
    model disagree, no deeper round is taken for shorter."""
    forward, block, byte_s = (
        np.array(values) for values in zip(*((d.forward, d.block, d.byte_s) for d in drafts), strict=True)
    )
    both = {agents: [one.both for one in moves] for agents, moves in traffic.items()}
    sizes = np.array([both[draft.place.agents] for draft in drafts], dtype=np.float64)
    grown = np.array([draft.grown for draft in drafts])
    steps = grown * (forward[:, None] + block[:, None] * ladder.backward[None, :])
    times: Floats = np.maximum.accumulate(job.rounds.local_steps * steps + byte_s[:, None] * sizes, axis=1)
    return times


def _work(
    draft: _Draft, told: _Told, sized: _Sized, ladder: Ladder, choice: lcd.Choice, job: JobSpec, end: End
) -> tuple[float, Work]:
    """(seconds of training expected, the work) of one device."""
    took = draft.link or f"{mebibytes(told.moves.both)} at {1e-6 / draft.byte_s:.2f} MB/s"
    predicted, why_steps = steps_reason(
        job, job.rounds.local_steps, sized.step_s, f"transfer {seconds(told.transfer_s(draft))} ({took})",
        end,
    )  # fmt: skip
    reasons = {
        "rank": ladder.words[told.depth - 1], "depth": _depth_reason(draft, told, ladder, choice, job),
        "batch": sized.reason, "bits": draft.bits_reason, "steps": why_steps,
    }  # fmt: skip
    if draft.place.info.agents > 1:
        reasons["agents"] = agents_reason(draft.place)
    work = Work(
        ranks=ladder.ranks[told.depth - 1], batch=sized.batch, bits=draft.bits, steps=job.rounds.local_steps,
        agents=draft.place.agents, train_for_s=end.limit, extra_steps=end.extra, reasons=reasons,
    )  # fmt: skip
    return predicted, work


def _depth_reason(draft: _Draft, told: _Told, ladder: Ladder, choice: lcd.Choice, job: JobSpec) -> str:
    depth, caution = told.depth, draft.place.caution
    steps = job.rounds.local_steps * draft.grown[depth - 1]
    back_s = steps * draft.block * float(ladder.backward[depth - 1])
    backward = f"{seconds(back_s)} back through {ladder.spans[depth - 1]:g} of {ladder.spans[-1]:g} blocks"
    parts = f"forward {seconds(steps * draft.forward)} + {backward} + transfer {seconds(told.transfer_s(draft))}"
    reading = f"{seconds(told.times[depth - 1])} = {parts} ({draft.source}) at {draft.place.free}"
    if told.reached == draft.most:
        stopped = draft.stopped
    elif told.reached == told.in_time:
        late = f"{DEADLINE_SHARE * job.rounds.deadline_s:.0f} s, {DEADLINE_SHARE:.0%} of the deadline"
        stopped = f"{told.reached + 1} would take {seconds(told.times[told.reached])} of {late}"
    else:
        stopped = f"{told.reached + 1} would take {seconds(told.times[told.reached])}"
    careful = ""
    if caution:
        least = f"depth {depth} is the least already"
        careful = f"{caution}: " + (f"cautious depth {depth} instead of {told.reached}" if told.reached > 1 else least)
    bound = f"{seconds(choice.round_s)} round target"
    return word("depth", depth, reading, bound, stopped, careful)


def _reason(choice: lcd.Choice, ladder: Ladder) -> str:
    depths = choice.depths
    relaxed = f", relaxed from {lcd.WAITING:.0%}" if choice.bound > lcd.WAITING else ""
    return (
        f"round target {seconds(choice.round_s)}, of {choice.candidates} candidates: depths {depths.min()} to "
        f"{depths.max()} of {ladder.blocks} (mean {depths.mean():.1f}), utility {choice.utility:.3g} per second; "
        f"waiting {choice.waiting:.0%} meets {choice.bound:.0%}{relaxed}; "
        f"{choice.coverage:.0%} of the devices tune the lowest block, at least {choice.asked:.0%} asked"
    )
