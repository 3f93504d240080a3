"""Bits from memory, batch from speed and live load: what every planner asks for each device, with the reasons.

Nothing here remembers the last plan: a foreign load lowers the batch in the very next plan, and its removal gives the
old plan back. What keeps noise from moving batches lies elsewhere: speeds are held within a band (`fit`), small foreign
readings count as none (`readings`), the round target does not depend on live load.
"""

from __future__ import annotations

import functools
import math
from bisect import bisect
from typing import NamedTuple

from coordinator.core.planning.base import Candidate
from coordinator.core.planning.cost_model import CostModel, Pace
from coordinator.core.planning.demand import Demand
from coordinator.core.planning.readings import Budget, Capacity, budget, capacity
from coordinator.core.planning.reasons import mebibytes, plural, seconds, word
from shared.jobs import Bits, JobSpec, StrategySpec
from shared.messages import DeviceInfo

SLACK = 1.2
"""Where nothing ends a work that is late, the round target is the median device's time with so much allowance: a device
a little slower keeps its batch, above all where a step's time hardly depends on it."""
ROUNDING = 1 + 1e-9
"""The device whose time is the target meets it, to the last bit."""
SMALL_MARGIN = 0.8
"""Cautious bits are taken where more than this share of the memory budget would be filled."""
LARGEST = "the largest batch of the job"
"""What the largest of a job's batches is called in reasons."""


class Seat(NamedTuple):
    """A device that may take part: what it offers in this round, each of its `agents` where it has several.

    `caution`: why to be careful, else empty.
    """

    device: str
    info: DeviceInfo
    free: Capacity
    budget: Budget
    rows: int
    caution: str
    agents: int = 1
    all_rows: int = 0
    """Of the device."""


class Target(NamedTuple):
    """Seconds that all devices' local steps should take together at most."""

    seconds: float
    steps: int


@functools.lru_cache(maxsize=64)  # a plan asks for each device
def batch_sizes(strategy: StrategySpec, accumulation: int) -> tuple[int, ...]:
    """The batches to choose from, rising: the job's batch halved and doubled inside its bounds, with quarters of each
    between, and the lower bound. Steps are a quarter at most, so that a device comes as close to the round target.

    Multiples of `accumulation` where there are any, so that no micro-batch is smaller than the others; steps are then
    of that size at least.
    """
    least, most = strategy.batch_min, max(strategy.batch_min, strategy.batch_max)
    middle = min(max(strategy.batch, least), most)
    found = {least, middle}
    size = float(middle)
    while size > least:
        size /= 2
    while size <= most:
        sizes = {int(size * (4 + quarters) / 4) for quarters in range(4)}
        found |= {one for one in sizes | {one // accumulation * accumulation for one in sizes} if least <= one <= most}
        size *= 2
    whole = {size for size in found if size % accumulation == 0}
    return tuple(sorted(whole or found))


def seat(candidate: Candidate, job: JobSpec, fresh_s: float, model: CostModel) -> Seat | str:
    """What the candidate offers, or why it can't take part."""
    info, load = candidate.info, candidate.load
    if info.problem:
        return f"reports a problem: {info.problem}"
    if not info.bits:
        return "no precision proven yet"
    data = info.datasets.get(job.task.dataset)
    if data is None and job.task.dataset in info.faulty:
        return f"data set {job.task.dataset!r} can't be read there: {info.faulty[job.task.dataset]}"
    if data is None:
        has = ", ".join(sorted(info.datasets)[:5]) or "none"
        return f"no data set {job.task.dataset!r} (it has {has})"
    if data.rows < 1:
        return f"data set {job.task.dataset!r} has 0 rows"
    caution = ""
    if load is None:
        caution = "no telemetry yet"
    elif candidate.load_age_s > fresh_s:
        caution = f"telemetry is {candidate.load_age_s:.0f} s old (limit {fresh_s:g} s)"
    own = model.own_bytes(candidate.device, info)
    # Every one of them needs rows of its own, and a GPU or a core.
    agents = max(1, min(info.agents, data.rows, len(info.gpus) or math.ceil(info.cores)))
    return Seat(
        candidate.device, info, capacity(info, load, agents), budget(info, load, own, agents), data.rows // agents,
        caution, agents, data.rows,
    )  # fmt: skip


def agents_reason(place: Seat) -> str:
    """Why so many agents of a device with several train."""
    info, rows = place.info, place.all_rows
    if info.gpus:
        has, each = plural(len(info.gpus), "GPU"), "1 GPU"
    else:
        has, each = f"{info.cores:.2f} cores", "1 core or part of one"
    reading = f"{info.agents} ready, {has} and {plural(rows, 'row')} on the device"
    return word("agents", place.agents, reading, f"{each} and 1 row for each")


def choose_bits(place: Seat, need: Demand, job: JobSpec, model: CostModel, least: int) -> tuple[Bits, str] | str:
    """The largest proven bits whose memory holds `least` samples per step, with the reason; or why none will do."""
    asked = job.strategy.bits
    proven: list[Bits] = sorted(place.info.bits, reverse=True)
    if asked != "auto":
        if asked not in proven:
            return f"{asked} bits not proven here (proven: {', '.join(map(str, sorted(proven)))})"
        proven = [asked]
    told: list[str] = []
    fitting: list[tuple[Bits, float, str]] = []
    for bits in proven:
        limit = model.batch_limit(place.device, bits)
        if limit is not None and limit < least:
            if not fitting:
                told.append(f"{bits} bits ran out of memory above batch {limit}")
            continue
        size, why = model.memory(place.device, need, bits, least, place.info)
        if fits(place, need, bits, least, size, model):
            fitting.append((bits, size, why))
            if not place.caution or len(fitting) == 2:
                break
        elif not fitting:
            told.append(f"{bits} bits would take {mebibytes(size)}")
    if not fitting:
        return f"memory: {'; '.join(told)} at batch {least}, over {place.budget}"
    bits, size, why = fitting[0]
    if len(fitting) == 2 and place.budget.limit and size > SMALL_MARGIN * place.budget.bytes:
        told.append(f"{place.caution}: cautious {fitting[1][0]} bits instead of {bits}, which takes {mebibytes(size)}")
        bits, size, why = fitting[1]
    if asked != "auto":
        told.append(f"{bits} bits asked")
    elif bits == proven[0] < 32:
        told.append(f"{bits} bits are the most proven here")
    bound = str(place.budget)
    if not place.budget.holds(size):
        bound = f"{mebibytes(place.budget.limit)} memory limit by having run under it"
    return bits, word("bits", bits, f"{mebibytes(size)} at batch {least} ({why})", bound, *told)


def fits(place: Seat, need: Demand, bits: Bits, batch: int, size: float, model: CostModel) -> bool:
    """Whether the device holds `size` bytes, which `batch` takes: by its budget, or by having run them."""
    budget = place.budget
    return budget.holds(size) or budget.holds(size, proven=model.has_run(place.device, need, bits, batch, budget.limit))


def choose_batch(
    place: Seat, need: Demand, bits: Bits, model: CostModel, sizes: tuple[int, ...], target: Target,
    pace: Pace | None = None, largest: str = LARGEST,
) -> tuple[int, float, str]:  # fmt: skip
    """(batch, seconds per step, reason): the largest of `sizes` that data and memory hold and that meets the target.

    `bits` must hold the smallest size (`choose_bits`). Where telemetry is old, the next batch of at most half. `pace`:
    of a planner that measures by itself, in place of the cost model's. `largest`: what the largest of `sizes` is.
    """
    held, note = held_batches(place, need, bits, model, sizes, largest)
    pace = pace or model.pace(place.device, need, bits, place.free)
    # A larger batch takes longer: the sizes in time are the first ones.
    in_time = max(1, bisect(held, target.seconds, key=lambda size: target.steps * pace.step_s(size)))
    batch = held[in_time - 1]
    if batch < held[-1]:
        above = held[in_time]
        note = f"{above} would take {seconds(target.steps * pace.step_s(above))}"
    notes = [note]
    if place.caution:
        halved = [size for size in held if size <= batch // 2] or held[:1]
        notes.append(
            f"{place.caution}: cautious batch {halved[-1]} instead of {batch}"
            if halved[-1] < batch
            else f"{place.caution}: batch {batch} is the least already"
        )
        batch = halved[-1]
    step_s, why = pace.step(batch, place.free)
    met = target.steps * step_s <= target.seconds
    if not met:
        notes.append("the least batch all the same")
    reading = f"{why}, {plural(target.steps, 'step')} {seconds(target.steps * step_s)}"
    bound = f"{seconds(target.seconds)} round target"
    return batch, step_s, word("batch", batch, reading, bound, *notes, verb="meets" if met else "exceeds")


def batch_by_memory(
    place: Seat, need: Demand, bits: Bits, model: CostModel, sizes: tuple[int, ...], told: str
) -> tuple[int, str]:
    """(batch, reason): the largest of `sizes` that data and memory hold, for planners whose knob of speed is another.

    `bits` must hold the smallest size (`choose_bits`). `told`: why no larger one than the job's.
    """
    held, note = held_batches(place, need, bits, model, sizes)
    batch = held[-1]
    if batch == sizes[-1]:
        note = f"{batch} is the batch of the job, {told}"
    size, why = model.memory(place.device, need, bits, batch, place.info)
    bound = str(place.budget)
    if not place.budget.holds(size):
        bound = f"{mebibytes(place.budget.limit)} memory limit by having run under it"
    return batch, word("batch", batch, f"{mebibytes(size)} ({why})", bound, note)


def held_batches(
    place: Seat, need: Demand, bits: Bits, model: CostModel, sizes: tuple[int, ...], largest: str = LARGEST
) -> tuple[list[int], str]:
    """The sizes that data and memory hold, rising and never empty, and what stopped the next one. `largest`: what the
    largest of `sizes` is."""
    limit = model.batch_limit(place.device, bits)
    allowed, note = len(sizes), f"{sizes[-1]} is {largest}"
    for index, size in enumerate(sizes):
        if size > place.rows:
            allowed, note = index, f"the data set has {plural(place.rows, 'row')}"
            break
        if limit is not None and size > limit:
            allowed, note = index, f"{size} ran out of memory before (limit {limit})"
            break
    if not allowed:
        return ([place.rows] if sizes[0] > place.rows else []), note

    footprint = model.footprint(place.device, need, bits, place.info)

    def holds(size: int) -> bool:
        return fits(place, need, bits, size, footprint.bytes(size), model)

    # The smallest is held as it is; what holds a batch holds a smaller one, and most devices hold the largest.
    if allowed == 1 or holds(sizes[allowed - 1]):
        return list(sizes[:allowed]), note
    most = 1 + bisect(range(1, allowed), 0, key=lambda index: not holds(sizes[index]))
    taken = footprint.bytes(sizes[most])
    over = f"{sizes[most]} would take {mebibytes(taken)} of {mebibytes(place.budget.bytes)} memory"
    return list(sizes[:most]), over
