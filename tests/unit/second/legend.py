"""The plan of `legend` a second time: every deadline that any device's round gives is tried out."""

from __future__ import annotations

import math
import statistics
from fractions import Fraction
from typing import NamedTuple

from tests.unit.lcd_reference import Found, brute_force
from tests.unit.second.costs import SLOWER, Need, averaged, need_of, traffic, tuned, usual_batch
from tests.unit.second.seats import (
    Asked,
    Scene,
    Seat,
    capped,
    first_step,
    fits,
    held,
    seats,
    sizes_of,
    until,
    usual_link,
    with_bits,
)


class Place(NamedTuple):
    """One participant. Seconds of a step's forward pass, of a block backward (at the job's batch) and of a byte; the
    rest by depth."""

    seat: Seat
    batch: int
    forward: float
    block: float
    byte_s: float
    grown: list[float]
    """A step of `batch` against one of the job's."""
    moved: list[tuple[int, int]]
    times: list[float]
    held: int
    """The deepest that memory holds."""
    in_time: int
    """The deepest that meets the deadline."""


class Choice(NamedTuple):
    """All that is chosen; items are by depth, or by participant."""

    by_block: tuple[int, ...]
    ladder: list[dict[str, int]]
    needs: list[Need]
    places: list[Place]
    best: Found
    reached: list[int]
    """Before halving where readings are old."""
    target_s: float
    """The median of the rounds at these depths and the job's batch."""


def plan(scene: Scene) -> dict[str, Asked]:
    """What each participant is asked for."""
    chosen, steps = choose(scene), scene.job.rounds.local_steps
    asked = {}
    for place, depth in zip(chosen.places, chosen.best.depths, strict=True):
        need = chosen.needs[depth - 1]
        batch = sized(scene, place, need, left(chosen, place, depth))
        limit, extra = until(scene, place.seat, left(chosen, place, depth), steps, place.moved[depth - 1])
        begins = first_step(scene, place.seat, place.moved[depth - 1])
        asked[place.seat.device] = Asked(
            chosen.ladder[depth - 1], batch, place.seat.bits, steps, place.seat.agents,
            capped(limit, steps, step_s(scene, place, need, batch), extra, begins), limit=limit, extra=extra,
        )  # fmt: skip
    return asked


def step_s(scene: Scene, place: Place, need: Need, batch: int) -> float:
    """Seconds of a step over so many samples: of one over the job's batch, the cost model's fixed part stays as it is,
    and the rest grows."""
    usual = usual_batch(scene.job)
    return (place.forward + need.blocks * place.block) * growth(scene, place.seat, need, usual, batch)


def growth(scene: Scene, seat: Seat, need: Need, before: int, after: int) -> float:
    """By the cost model."""
    fixed, sample = scene.fleet.pace(seat.device, need, seat.bits, seat.free)
    grows = sample * before / (fixed + sample * before)
    return 1 - grows + grows * after / before


def left(chosen: Choice, place: Place, depth: int) -> float:
    """Seconds that a participant has for its steps: the target of all less its own transfers."""
    return max(0.0, chosen.target_s - sum(place.moved[depth - 1]) * place.byte_s)


def offered(scene: Scene, seat: Seat) -> list[int]:
    """The batches to choose from."""
    sizes = sizes_of(scene.job)
    return ([size for size in sizes if size <= scene.job.strategy.batch] or sizes[:1]) if seat.careful else sizes


def sized(scene: Scene, place: Place, need: Need, left_s: float) -> int:
    """The largest batch that is done in time; not beyond the job's where the reading is old."""
    sizes = held(scene, place.seat, need, offered(scene, place.seat))
    return max(
        [n for n in sizes if scene.job.rounds.local_steps * step_s(scene, place, need, n) <= left_s] or sizes[:1]
    )


def choose(scene: Scene) -> Choice:
    """Bits and batch by memory, then the depths, then what batches are to meet."""
    job, facts = scene.job, scene.facts
    modules = tuned(facts, job)
    blocks = sorted({one.block for one in modules if one.block >= 0})
    by_block = rising(len(blocks), job.strategy.rank)
    bound = scene.global_rank(by_block[-1])
    ladder: list[dict[str, int]] = []
    for depth in range(1, len(blocks) + 1):
        rank_of = {-1: by_block[-1], **dict(zip(blocks[-depth:], by_block[-depth:], strict=True))}
        ladder.append({m.name: min(rank_of[m.block], m.out, m.inp) for m in modules if m.block in rank_of})
    needs = [need_of(facts, job, ranks, bound) for ranks in ladder]
    places = [place for seat in seats(scene) if (place := _place(scene, seat, ladder, needs, bound)) is not None]
    rows = [place.seat.rows * place.seat.agents for place in places]
    times, most = [place.times for place in places], [min(place.held, place.in_time) for place in places]
    shares = [own / sum(rows) for own in rows]
    best, _, _ = brute_force(times, most, [place.seat.careful for place in places], shares, by_block)
    whole = _deadline(times, most, [place.seat.careful for place in places], best.depths)
    target = statistics.median([place.times[depth - 1] for place, depth in zip(places, best.depths, strict=True)])
    target *= 1 + 1e-9  # the median device itself meets it
    if scene.fleet.measured:
        target = min(target, 0.9 * job.rounds.deadline_s)
    return Choice(by_block, ladder, needs, places, best, whole, target)


def _deadline(times: list[list[float]], most: list[int], halved: list[bool], depths: list[int]) -> list[int]:
    """The depths before halving, at the first deadline that leads to `depths`."""
    for deadline in sorted({took for row, deepest in zip(times, most, strict=True) for took in row[:deepest]}):
        reached = [
            max([k for k in range(1, m + 1) if row[k - 1] <= deadline] or [1])
            for row, m in zip(times, most, strict=True)
        ]
        if [max(1, k // 2) if half else k for k, half in zip(reached, halved, strict=True)] == depths:
            return reached
    raise AssertionError("the choice belongs to a deadline")


def _place(scene: Scene, seat: Seat, ladder: list[dict[str, int]], needs: list[Need], bound: int) -> Place | None:
    job = scene.job
    sizes = [size for size in sizes_of(job) if size <= job.strategy.batch] or sizes_of(job)[:1]
    whole, least = min(sizes[-1], seat.rows), min(sizes[0], seat.rows)
    sat = with_bits(scene, seat, needs[0], whole) or with_bits(scene, seat, needs[0], least)
    if sat is None:
        return None
    batch = held(scene, sat, needs[0], sizes)[-1]
    forward, block, byte_s = _capacity(scene, sat, needs[-1])
    grown = [growth(scene, sat, need, usual_batch(job), batch) for need in needs]
    moved = [traffic(scene.facts, job, ranks, bound, sat.agents, scene.planned.adapter) for ranks in ladder]
    times = [
        job.rounds.local_steps * more * (forward + need.blocks * block) + sum(moves) * byte_s
        for more, need, moves in zip(grown, needs, moved, strict=True)
    ]
    times = [max(times[: depth + 1]) for depth in range(len(times))]
    deepest = max([k for k, need in enumerate(needs, 1) if fits(scene, sat, need, sat.bits, batch)] or [1])
    return Place(sat, batch, forward, block, byte_s, grown, moved, times, deepest, _in_time(scene, times))


def rising(blocks: int, mean: int) -> tuple[int, ...]:
    """Ranks from the input to the output: arithmetic, summing to `blocks` times `mean`; halves are rounded down."""
    if blocks == 1:
        return (mean,)
    first = 4 if mean >= 16 else 2 if mean >= 8 else 1
    rise = Fraction(2 * blocks * (mean - first), blocks * (blocks - 1))
    return tuple(math.ceil(first + rise * place - Fraction(1, 2)) for place in range(blocks))


def _capacity(scene: Scene, seat: Seat, deepest: Need) -> tuple[float, float, float]:
    """Seconds of a step's forward pass, of a block backward, of a byte; at the job's batch."""
    batch = usual_batch(scene.job)
    known, phi = scene.fleet.known.get(seat.device), scene.fleet.phi[seat.free.gpu]
    usual = usual_link(scene)
    byte_s = averaged(known.byte_s) if known and known.byte_s else 1 / usual if usual else 0.0
    if known is None or not known.steps:
        fixed, sample = scene.fleet.pace(seat.device, deepest, seat.bits, seat.free)
        block = (fixed + sample * batch) / (phi + deepest.blocks)
    else:
        block = averaged(y for y, _ in known.steps) / (phi + averaged(b for _, b in known.steps))
        block *= batch * SLOWER[seat.bits] / scene.fleet.usable(seat.device, seat.free)
    return phi * block, block, byte_s


def _in_time(scene: Scene, row: list[float]) -> int:
    """The deepest that meets 90 % of the deadline, once speeds are measured."""
    if not scene.fleet.measured:
        return len(row)
    return max(1, sum(took <= 0.9 * scene.job.rounds.deadline_s for took in row))
