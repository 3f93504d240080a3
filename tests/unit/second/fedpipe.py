"""The plan of `fedpipe` a second time: subsets of matrices, and every rank of every one of them, are tried out."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

from coordinator.core.facts import ModuleSpec
from tests.unit.second.costs import Need, need_of, tokens, tuned
from tests.unit.second.history import Done
from tests.unit.second.seats import (
    Asked,
    Scene,
    Seat,
    capped,
    careful,
    drafted,
    first_step,
    lefts,
    limit_of,
    moved,
    sizes_of,
    uniform,
    until,
    usual_transfer,
)

RANKS = (2, 4, 8, 16, 32)


class Mix(NamedTuple):
    """A rank for each matrix."""

    worth: float
    params: int
    ranks: tuple[int, ...]


def plan(scene: Scene) -> dict[str, Asked]:
    """What each participant is asked for."""
    if over_all(scene):
        score = scene.planned.record.round >= warm_up_rounds(scene)
        found = uniform(scene, min(8, scene.job.strategy.rank), ends=True)
        return {device: Asked(**{**vars(asked), "score": score}) for device, asked in found.items()}
    modules = tuned(scene.facts, scene.job)
    scores, _ = scores_of(scene.planned.past, scene.job.strategy.max_share)
    return _tuning(scene, smallest({one.name: scores.get(one.name, 0.0) for one in modules}, modules), scores)


def over_all(scene: Scene) -> bool:
    """Whether all matrices are tuned: in the warm-up, without scores, and where those are old."""
    scores, scored = scores_of(scene.planned.past, scene.job.strategy.max_share)
    known = any(scores.get(one.name, 0.0) > 0 for one in tuned(scene.facts, scene.job))
    number = scene.planned.record.round
    return number <= warm_up_rounds(scene) or not known or number - scored >= scene.job.strategy.rescore_every


def warm_up_rounds(scene: Scene) -> int:
    """So many begin before its steps have been asked for."""
    return math.ceil(scene.job.strategy.warm_up_steps / scene.job.rounds.local_steps)


def scores_of(past: Sequence[Done], max_share: float) -> tuple[dict[str, float], int]:
    """(share of each module, round) of the last round that told any."""
    for done in reversed(past):
        told = []
        for device, result in sorted(done.results.items()):
            work = done.works[device]
            own = {n: s for n, s in result.importance.items() if s > 0 and work.score and work.ranks.get(n, 0) > 0}
            if own:
                told.append((result.samples, {name: share / sum(own.values()) for name, share in own.items()}))
        weights = capped_shares([samples for samples, _ in told], max_share)
        sums: dict[str, float] = {}
        for weight, (_, own) in zip(weights, told, strict=True):
            for name, share in own.items():
                sums[name] = sums.get(name, 0.0) + weight * share
        if sum(sums.values()) > 0:
            return {name: share / sum(sums.values()) for name, share in sums.items()}, done.round
    return {}, 0


def capped_shares(samples: list[int], cap: float) -> list[float]:
    """Shares by samples, none above `cap` where that is possible: as many of the largest are capped as it takes."""
    order = sorted(samples, reverse=True)
    if not sum(samples) or cap * len(samples) <= 1.0:
        return [1 / len(samples) if sum(samples) else 0.0 for _ in samples]
    for count in range(len(samples)):
        factor = (1.0 - cap * count) / sum(order[count:])
        if factor * order[count] <= cap:
            return [min(cap, factor * one) for one in samples]
    raise AssertionError("the smallest alone is never above the cap")


def smallest(scores: dict[str, float], modules: list[ModuleSpec]) -> list[ModuleSpec]:
    """The smallest set with 0.8 of the score: of those of its size the one with most, then the cheapest."""
    wanted = 0.8 * sum(scores.values()) - 1e-12
    for count in range(1, len(modules) + 1):
        sets = [
            found for found in itertools.combinations(modules, count)
            if sum(scores.get(one.name, 0.0) for one in found) >= wanted
        ]  # fmt: skip
        if sets:
            return list(
                min(
                    sets,
                    key=lambda found: (
                        -round(sum(scores.get(one.name, 0.0) for one in found), 12),
                        sum(one.out + one.inp for one in found),
                        [one.name for one in found],
                    ),
                )
            )
    raise AssertionError("all of them have all of the score")


class Task(NamedTuple):
    """What all devices choose from: `mixes` by falling worth, and the least ranks and the highest of each matrix."""

    chosen: list[ModuleSpec]
    mixes: list[Mix]
    least: Mix
    lightest: int
    need: Need
    most: dict[str, int]
    bound: int


def task_of(scene: Scene, chosen: list[ModuleSpec], scores: dict[str, float]) -> Task:
    cap = min(scene.job.strategy.rank, 32)
    levels = [sorted({0, *(min(rank, cap, one.out, one.inp) for rank in RANKS)}) for one in chosen]
    sides = [one.out + one.inp for one in chosen]

    def mix(ranks: tuple[int, ...]) -> Mix:
        worth = (scores[m.name] * math.log(1 + r, 2) / math.log(1 + cap, 2) for m, r in zip(chosen, ranks, strict=True))
        return Mix(sum(worth), sum(r * side for r, side in zip(ranks, sides, strict=True)), ranks)

    mixes = sorted((mix(ranks) for ranks in itertools.product(*levels) if any(ranks)), key=lambda one: -one.worth)
    least, bound = mix(tuple(own[1] for own in levels)), scene.global_rank(scene.job.strategy.rank)
    return Task(
        chosen, mixes, least, min(own[1] * side for own, side in zip(levels, sides, strict=True)),
        need_of(scene.facts, scene.job, named(chosen, least.ranks), bound), named(chosen, [own[-1] for own in levels]),
        bound,
    )  # fmt: skip


def lefts_of(scene: Scene, task: Task, taking: list[Seat]) -> list[float]:
    """Seconds for the steps of each, by the highest ranks of all."""
    need = need_of(scene.facts, scene.job, task.most, task.bound)
    return lefts(scene, taking, [need] * len(taking), [task.most] * len(taking), task.bound, 1.0)


def _tuning(scene: Scene, chosen: list[ModuleSpec], scores: dict[str, float]) -> dict[str, Asked]:
    task = task_of(scene, chosen, scores)
    taking = drafted(scene, task.need)
    found = {}
    for seat, left in zip(taking, lefts_of(scene, task, taking), strict=True):
        batches = batches_of(scene, seat, task)
        batch, steps, mix = _best(scene, seat, task, batches, left)
        batch = careful(seat, batch, list(batches))
        ranks = {name: rank for name, rank in named(chosen, mix.ranks).items() if rank}
        fixed, sample = scene.fleet.pace(
            seat.device, need_of(scene.facts, scene.job, ranks, task.bound), seat.bits, seat.free
        )
        moves = moved(scene, seat, task.most, task.bound)
        usual = usual_transfer(scene, taking, [task.most] * len(taking), task.bound)
        limit, extra = until(scene, seat, left, steps, moves, usual)
        took = capped(limit, steps, fixed + sample * batch, extra, first_step(scene, seat, moves))
        found[seat.device] = Asked(ranks, batch, seat.bits, steps, seat.agents, took, limit=limit, extra=extra)
    return found


def named(chosen: list[ModuleSpec], ranks: Sequence[int]) -> dict[str, int]:
    return {one.name: rank for one, rank in zip(chosen, ranks, strict=True)}


def batches_of(scene: Scene, seat: Seat, task: Task) -> dict[int, float]:
    """Batch -> adapter parameters that memory leaves, rising until one leaves none."""
    found: dict[int, float] = {}
    sizes = sizes_of(scene.job)
    for size in sizes:
        if size > seat.rows or size > limit_of(scene, seat, seat.bits):
            break
        room = _room(scene, seat, task, size)
        if found and room < task.lightest:
            break
        found[size] = room
    least = min(sizes[0], seat.rows)
    return found or {least: _room(scene, seat, task, least)}


def _room(scene: Scene, seat: Seat, task: Task, batch: int) -> float:
    """Parameters that fit beside all else; those that have run under this limit fit."""
    if not seat.limit:
        return math.inf
    need, params = task.need, task.least.params
    size = scene.fleet.memory(seat.device, seat.info, need, seat.bits, batch)
    room = params + (seat.budget - size) / 16
    known = scene.fleet.known.get(seat.device)
    peak = known.peaks.get(seat.bits) if known else None
    if peak is None or peak.micro < need.micro(batch) or not 0 < peak.limit <= seat.limit:
        return room
    ran = peak.trained - sum(math.prod(shape) for shape in scene.facts.dense.values())
    if peak.activations < need.activations[32] or ran <= room:
        return room
    return ran if seat.holds(size + 16 * (ran - params), ran=True) else room


class Option(NamedTuple):
    """The best ranks of one batch and one number of steps."""

    objective: float
    batch: int
    steps: int
    mix: Mix


def options_of(scene: Scene, seat: Seat, task: Task, batches: dict[int, float], left: float) -> list[Option]:
    """For each batch and each permitted under-training the mix that is worth most, where any fits."""
    asked, need = scene.job.rounds.local_steps, task.need
    fixed, sample = scene.fleet.pace(seat.device, need, seat.bits, seat.free)
    options: list[Option] = []
    for batch, room in batches.items():
        for under in (0.0, 0.1, 0.2, 0.3):
            steps = max(1, math.ceil((1 - under) * asked - 1e-9))
            for mix in task.mixes:
                flop = need.flop + 6 * tokens(scene.job) * (mix.params - task.least.params)
                if mix.params <= room and steps * (fixed + batch * sample * flop / need.flop) <= left:
                    options.append(Option((1 - under) * mix.worth, batch, steps, mix))
                    break  # they are sorted: no other is worth more
    return options


def _best(scene: Scene, seat: Seat, task: Task, batches: dict[int, float], left: float) -> tuple[int, int, Mix]:
    """(batch, steps, ranks) with the largest J; of equal ones the largest batch, then the most steps."""
    options = options_of(scene, seat, task, batches, left)
    if not options:
        return min(batches), max(1, math.ceil(0.7 * scene.job.rounds.local_steps - 1e-9)), task.least
    top = max(option.objective for option in options)
    near = [option for option in options if option.objective >= top * (1 - 1e-9)]
    _, batch, steps, mix = max(near, key=lambda option: option[1:3])
    return batch, steps, mix
