"""Batch, ranks and steps of every device of a fleet: FedPipe's second stage, over arrays.

For each batch b and each permitted under-training u of a device, the ranks of the chosen matrices are a multiple-choice
knapsack (`knapsack`) whose capacity is what memory and time leave for the adapter's parameters, r_m (out_m + in_m):

    memory: what the batch leaves of the budget, at `BYTES_TRAINED` for a parameter
    time:   n (overhead + b per_flop (base + 6 tokens parameters)) <= round target, n = ceil((1 - u) local steps)

and the best of J = (1 - u) sum_m S_m g(r_m) is taken; of equal ones the largest batch, then the least under-training.
The under-training is done: n steps are asked for. The figures, J included, are our reading of the paper, which says
that batch and rank follow the server's compute, to lower its under-training rate; u counts the job's local steps, the
same for all, where the design has epochs of the device's own data.

Capacities between two multiples of the weights' common divisor have the same solution, so that devices of a class share
theirs, and a fleet of any size asks for few different ones.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from coordinator.core.planning import knapsack
from coordinator.core.planning.cost_model import CostModel, Pace
from coordinator.core.planning.demand import BYTES_TRAINED, Demand
from coordinator.core.planning.drafts import Draft
from coordinator.core.planning.footprint import Footprint
from coordinator.core.planning.knapsack import Item, Levels, Numbers
from coordinator.core.planning.sizing import Target

Flags = npt.NDArray[np.bool_]
UNDER_TRAINING = (0.0, 0.1, 0.2, 0.3)
"""Shares of the local steps that a device may leave undone."""
EXACT_DEVICES = 32
"""Fleets up to this size are solved exactly: a second of one core at most, where all devices differ."""
_TIE = 1e-9


class Task(NamedTuple):
    """What all devices choose from: the ranks of the matrices as knapsack items, and what they cost.

    `need`: the demand with the least rank of each item, `params` its adapter parameters in these items, `dense` those
    beside them. `flop_per_param`: per sample.
    """

    items: Sequence[Item]
    need: Demand
    params: int
    dense: int
    flop_per_param: float


class Site(NamedTuple):
    """One device: the batches it holds, the parameters that memory leaves at each, its pace at the least ranks.

    `proven`: the batches whose room has run under the device's limit, though it is above the budget.
    """

    batches: tuple[int, ...]
    rooms: tuple[float, ...]
    proven: frozenset[int]
    pace: Pace
    left: Target
    note: str
    """What stopped the next batch."""
    allowed: tuple[int, ...]
    """By data, and where memory ran out before."""


class Choice(NamedTuple):
    """What one device does. `room`: parameters it could hold and train in time; below 0: not even none.

    `objective`: J, 0 where nothing fits and the least is asked all the same. `proven`: nothing else is known
    to be worth more, by an exact solution.
    """

    batch: int
    under: float
    steps: int
    levels: tuple[int, ...]
    objective: float
    room: int
    by_memory: bool
    above: str
    """Why not the next larger batch."""
    proven: bool


def steps_at(under: float, steps: int) -> int:
    """The local steps of a device that leaves the share `under` of `steps` undone at most."""
    return max(1, math.ceil((1 - under) * steps - _TIE))


def site(draft: Draft, sizes: tuple[int, ...], task: Task, left: Target, model: CostModel) -> Site:
    """The batches that data, memory and time hold, with the room that memory leaves at each, from the largest down to
    the first that leaves room for all ranks and steps: below it nothing is gained. One that time does not hold stays,
    as the reason why no larger one is taken."""
    place, bits = draft.place, draft.bits
    pace = model.pace(place.device, task.need, bits, place.free)
    footprint = model.footprint(place.device, task.need, bits, place.info)
    allowed, note = _allowed(place.rows, sizes, model.batch_limit(place.device, bits))
    in_time = steps_at(UNDER_TRAINING[-1], left.steps)
    slow = bisect_right(allowed, left.seconds, key=lambda size: in_time * pace.step_s(size))
    lightest, most = min(item.weights[1] for item in task.items), sum(item.weights[-1] for item in task.items)
    batches: list[int] = []
    rooms: list[float] = []
    ran: set[int] = set()
    for size in reversed(allowed[: slow + 1]):
        room, proven = memory_room(draft, task, size, model, footprint)
        if room < lightest and size > allowed[0]:
            note = f"{size} leaves no room for ranks in {place.budget.bytes / 2**20:.0f} MiB memory"
            continue
        batches.append(size)
        rooms.append(room)
        ran |= {size} if proven else set()
        if room >= most and _time_room(pace, left, size, task) >= most:
            break
    if not batches:
        room, proven = memory_room(draft, task, draft.least, model, footprint)
        batches, rooms, ran = [draft.least], [room], {draft.least} if proven else set()
    return Site(tuple(batches[::-1]), tuple(rooms[::-1]), frozenset(ran), pace, left, note, tuple(allowed))


def _allowed(rows: int, sizes: tuple[int, ...], limit: int | None) -> tuple[tuple[int, ...], str]:
    """(the batches that data and an earlier lack of memory allow, what stopped the next one)."""
    count = bisect_right(sizes, rows)
    if limit is not None and (within := bisect_right(sizes, limit)) < count:
        return sizes[:within], f"{sizes[within]} ran out of memory before (limit {limit})"
    stopped = f"the data set has {rows} rows" if count < len(sizes) else f"{sizes[-1]} is the largest batch of the job"
    return sizes[:count], stopped


def _time_room(pace: Pace, left: Target, batch: int, task: Task) -> float:
    """Adapter parameters that the round target leaves where all steps are done (`_time_rooms`)."""
    ratio = (left.seconds / max(1, left.steps) - pace.fixed_s) / batch / max(pace.per_sample_s, 1e-15)
    return task.params + (ratio - 1) * task.need.flop / task.flop_per_param


def memory_room(draft: Draft, task: Task, batch: int, model: CostModel, footprint: Footprint) -> tuple[float, bool]:
    """(adapter parameters that memory holds at `batch`, whether by having run); infinite where no limit was told."""
    place = draft.place
    if not place.budget.limit:
        return math.inf, False
    size = footprint.bytes(batch)
    room = task.params + (place.budget.bytes - size) / BYTES_TRAINED
    known = model.devices.get(place.device)
    met = known.peaks.get(str(draft.bits)) if known is not None else None
    if met is None or met.micro < task.need.micro(batch) or not 0 < met.limit <= place.budget.limit:
        return room, False
    if met.activations < task.need.activations:
        return room, False  # it ran with fewer blocks
    # What has run under this limit fits, whatever its size is thought to be.
    ran = met.adapter_params - task.dense
    holds = ran > room and place.budget.holds(size + BYTES_TRAINED * (ran - task.params), proven=True)
    return (ran, True) if holds else (room, False)


def choose(sites: Sequence[Site], task: Task, exactly: bool) -> list[Choice]:
    """The best choice of each device; by the greedy where the solver finds no optimum, or `exactly` is not asked."""
    options = Options(sites, task)
    solved = _solve(options, task, exactly)
    flat = solved.values.reshape(len(sites), -1)
    best = flat.max(axis=1)
    # Options are ordered by what is taken of equal ones.
    first = np.argmax(flat >= best[:, None] * (1 - _TIE), axis=1)
    return [
        _choice(index, options, solved, place) if worth > 0 else _least(index, options, task, solved.proven[index])
        for index, (worth, place) in enumerate(zip(best.tolist(), first.tolist(), strict=True))
    ]


class Options:
    """What each device can choose from: (devices x batches x under-trainings) arrays.

    `batches`: from the largest to the smallest, 0 where there are fewer; `rooms`: parameters that fit; `by_memory`:
    whether memory bounds them; `places`: index into `capacities`, -1 where nothing fits.
    """

    def __init__(self, sites: Sequence[Site], task: Task) -> None:
        count = max(len(one.batches) for one in sites)
        shape = (len(sites), count)
        self.sites = sites
        self.batches = np.zeros(shape, dtype=np.int64)
        memory = np.full(shape, -1.0)
        for index, one in enumerate(sites):
            self.batches[index, : len(one.batches)] = one.batches[::-1]
            memory[index, : len(one.rooms)] = one.rooms[::-1]
        time = _time_rooms(sites, self.batches, task)
        self.by_memory = memory[:, :, None] <= time
        self.rooms = np.where(self.batches[:, :, None] > 0, np.minimum(memory[:, :, None], time), -1.0)
        most = sum(item.weights[-1] for item in task.items)
        one_unit = knapsack.unit(task.items)
        units = np.floor(np.clip(self.rooms, -1.0, most) / one_unit).astype(np.int64)
        found, places = np.unique(units, return_inverse=True)
        self.capacities: Levels = np.maximum(found, 0) * one_unit
        self.places: Levels = np.where(units < 0, -1, places.reshape(units.shape))


def _time_rooms(sites: Sequence[Site], batches: Levels, task: Task) -> Numbers:
    """Adapter parameters that the round target leaves: devices x batches x under-trainings."""
    fixed, per_sample, wanted, steps = (
        np.array(column, dtype=np.float64)[:, None, None]
        for column in zip(
            *((one.pace.fixed_s, one.pace.per_sample_s, one.left.seconds, one.left.steps) for one in sites),
            strict=True,
        )
    )
    counts = np.maximum(1.0, np.ceil((1 - np.array(UNDER_TRAINING)) * steps - _TIE))
    samples = np.maximum(batches, 1)[:, :, None]
    # Seconds per sample against those of the least ranks.
    ratio = (wanted / counts - fixed) / samples / np.maximum(per_sample, 1e-15)
    rooms: Numbers = task.params + (ratio - 1) * task.need.flop / task.flop_per_param
    return rooms


class _Solved(NamedTuple):
    """`values`: J of each option; `levels`: of each capacity. `known`: J of each option that need not be its best, and
    `how` it is known. `proven`: for each device whether its best is."""

    values: Numbers
    known: Numbers
    how: str
    levels: list[tuple[int, ...]]
    proven: list[bool]


def _solve(options: Options, task: Task, exactly: bool) -> _Solved:
    """Every option's J, exact for the best of a device where that is asked."""
    levels = knapsack.greedy(task.items, options.capacities)
    worth = knapsack.values(task.items, levels)
    share = 1 - np.array(UNDER_TRAINING)
    fits = options.places >= 0
    known, how, proven = worth, "by the greedy", [False] * len(options.places)
    if exactly:
        most = knapsack.bound(task.items, options.capacities)
        solved, failed = np.zeros((2, len(worth)), dtype=bool)
        proven = [
            _solve_exactly(places, fit, share, task.items, options.capacities, most, levels, worth, solved, failed)
            for places, fit in zip(options.places, fits, strict=True)
        ]
        # What was not solved is known by its bound alone; where the greedy finds no room there is none.
        known, how = np.where(solved | (worth <= 0), worth, most), "at most"
    values, told = (np.where(fits, share * found[options.places], -1.0) for found in (worth, known))
    return _Solved(values, told, how, [tuple(row) for row in levels.tolist()], proven)


def _solve_exactly(
    places: Levels, fit: Flags, share: Numbers, items: Sequence[Item], capacities: Levels, most: Numbers,
    levels: Levels, worth: Numbers, solved: Flags, failed: Flags,
) -> bool:  # fmt: skip
    """Solve, in place, each capacity of one device that may hold its best choice by its bound, the likeliest first;
    whether its best is known then."""
    proven = True
    bounds = np.where(fit, share * most[places], -1.0)
    for flat in np.argsort(-bounds, axis=None, kind="stable"):
        spot = np.unravel_index(flat, bounds.shape)
        place = places[spot]
        best = np.max(np.where(fit, share * worth[places], -1.0))
        if bounds[spot] < best * (1 - _TIE) or bounds[spot] <= 0:
            break
        if solved[place] or worth[place] >= most[place] * (1 - _TIE):
            continue
        found = None if failed[place] else knapsack.exact(items, int(capacities[place]))
        if found is None:
            failed[place], proven = True, False
        else:
            levels[place], worth[place], solved[place] = found, knapsack.value(items, found), True
    return proven


def _choice(index: int, options: Options, solved: _Solved, flat: int) -> Choice:
    """The option at place `flat` of a device's."""
    one = options.sites[index]
    row, under = divmod(flat, len(UNDER_TRAINING))
    best, above = float(solved.values[index, row, under]), one.note
    if row:
        size, rival = options.batches[index, row - 1], float(solved.known[index, row - 1].max())
        told = f"{size} would give J {rival:.3f} {solved.how}"
        most = f"{UNDER_TRAINING[-1]:.0%} of the steps undone"
        above = told if rival > 0 else f"{size} has no room for ranks even with {most}"
    return Choice(
        batch=int(options.batches[index, row]),
        under=UNDER_TRAINING[under],
        steps=steps_at(UNDER_TRAINING[under], one.left.steps),
        levels=solved.levels[options.places[index, row, under]],
        objective=best,
        room=int(min(float(options.rooms[index, row, under]), 2.0**53)),
        by_memory=bool(options.by_memory[index, row, under]),
        above=above,
        proven=solved.proven[index],
    )


def _least(index: int, options: Options, task: Task, proven: bool) -> Choice:
    """What is asked of a device that has no room for any rank: the smallest of everything."""
    one, under = options.sites[index], len(UNDER_TRAINING) - 1
    last = len(one.batches) - 1
    return Choice(
        batch=one.batches[0],
        under=UNDER_TRAINING[under],
        steps=steps_at(UNDER_TRAINING[under], one.left.steps),
        levels=tuple(1 for _ in task.items),
        objective=0.0,
        room=int(max(float(options.rooms[index, last, under]), 0.0)),
        by_memory=bool(options.by_memory[index, last, under]),
        above="",
        proven=proven,
    )
