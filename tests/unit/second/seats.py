"""Who may take part, at which precision, and the plan of `uniform`, written a second time."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from coordinator.core.facts import ModelFacts
from shared.jobs import JobSpec
from shared.messages import DeviceInfo, Load
from tests.unit.second.costs import MIB, Fleet, Free, Need, free_of, need_of, traffic, tuned, usual_batch
from tests.unit.second.history import Planned


@dataclass(frozen=True)
class Seat:
    """What a device offers. Bytes are an agent's; `limit` 0: not told."""

    device: str
    info: DeviceInfo
    free: Free
    limit: int
    foreign: int
    budget: int
    rows: int
    agents: int
    careful: bool
    bits: int = 0

    def holds(self, size: float, *, ran: bool) -> bool:
        if not self.limit or (ran and not self.foreign):
            return True
        return size <= (self.limit - self.foreign if ran else self.budget)


@dataclass(frozen=True)
class Asked:
    """What a plan asks of a device."""

    ranks: dict[str, int]
    batch: int
    bits: int
    steps: int
    agents: int
    seconds: float
    score: bool = False
    limit: float = 0.0
    """Seconds from receipt."""
    extra: int = 0
    """Steps while they are not over."""


@dataclass(frozen=True)
class Scene:
    """A moment at which a round is planned."""

    planned: Planned
    job: JobSpec
    facts: ModelFacts
    fleet: Fleet

    @property
    def bound(self) -> int:
        """Of the global adapter's rank, but for the factor that follows from the job's."""
        agents = sum(info.agents for info in self.planned.record.infos.values())
        return (self.planned.record.round - 1) * agents

    def global_rank(self, rank: int) -> int:
        """No more than the aggregator of the strategy keeps."""
        strategy = self.job.strategy
        if strategy.name in ("fedlora", "hetlora", "flexlora", "ffa"):
            return min(strategy.rank, self.bound * rank)
        if strategy.name in ("flora", "fedex"):
            return self.bound * rank
        return min(strategy.global_rank, self.bound * rank)


def seats(scene: Scene) -> list[Seat]:
    """All who have data and a precision, by id."""
    record = scene.planned.record
    found = []
    for device, info in sorted(record.infos.items()):
        data = info.datasets.get(scene.job.task.dataset)
        if info.problem or not info.bits or data is None or data.rows < 1:
            continue
        load = record.loads.get(device)
        agents = max(1, min(info.agents, data.rows, len(info.gpus) or math.ceil(info.cores)))
        known = scene.fleet.known.get(device)
        own = max(info.agent_bytes, known.own if known else 0)
        limit, foreign, reserve, share = _memory(info, load, own, agents)
        found.append(
            Seat(
                device, info, free_of(info, load, agents), limit // share, foreign // share,
                max(0, limit - reserve - foreign) // share, data.rows // agents, agents,
                load is None or record.load_ages[device] > record.fresh_s,
            )
        )  # fmt: skip
    return found


def _memory(info: DeviceInfo, load: Load | None, own: int, agents: int) -> tuple[int, int, int, int]:
    """(limit, foreign, reserve) of the machine, and the agents that share it."""
    gpus = [gpu.memory_bytes for gpu in info.gpus if gpu.memory_bytes]
    if gpus:
        limit, share = min(gpus), 1
        foreign = max([gpu.foreign_memory or 0 for gpu in load.gpus] or [0]) if load else 0
    elif load is None or not load.memory_limit:
        limit, foreign, share = info.memory_bytes, 0, agents
    else:
        limit, foreign, share = min(load.memory_limit, info.memory_bytes or load.memory_limit), 0, agents
        if load.memory_available:
            ours = max(own * agents + 48 * MIB, load.own_memory)
            used = max(0, load.memory_limit - load.memory_available - ours)
            foreign = max(0, used - (load.memory_limit - limit))
    reserve = max(limit // 20, 64 * MIB) if limit else 0
    return limit, foreign if foreign > reserve else 0, reserve, share


def sizes_of(job: JobSpec) -> list[int]:
    """The batches to choose from, rising."""
    least, most = job.strategy.batch_min, max(job.strategy.batch_min, job.strategy.batch_max)
    middle = min(max(job.strategy.batch, least), most)
    quarters = {math.floor(middle * 2.0**n * (1 + q / 4)) for n in range(-20, 20) for q in range(4)}
    quarters |= {size - size % job.training.accumulation for size in quarters}
    found = {least, middle, *(size for size in quarters if least <= size <= most)}
    return sorted([size for size in found if size % job.training.accumulation == 0] or found)


def has_run(scene: Scene, seat: Seat, need: Need, bits: int, batch: int) -> bool:
    known = scene.fleet.known.get(seat.device)
    peak = known.peaks.get(bits) if known else None
    return (
        peak is not None and peak.micro >= need.micro(batch) and peak.trained >= need.trained
        and peak.activations >= need.activations[32] and 0 < peak.limit <= seat.limit
    )  # fmt: skip


def fits(scene: Scene, seat: Seat, need: Need, bits: int, batch: int) -> bool:
    size = scene.fleet.memory(seat.device, seat.info, need, bits, batch)
    return seat.holds(size, ran=has_run(scene, seat, need, bits, batch))


def limit_of(scene: Scene, seat: Seat, bits: int) -> float:
    """The largest batch that ever fitted, as far as memory ran out."""
    known = scene.fleet.known.get(seat.device)
    return known.limits.get(bits, math.inf) if known else math.inf


def with_bits(scene: Scene, seat: Seat, need: Need, batch: int) -> Seat | None:
    """The seat at the largest precision that holds `batch`; one lower where it is tight and the reading is old."""
    asked = scene.job.strategy.bits
    able = [
        bits for bits in sorted(seat.info.bits, reverse=True)
        if asked in ("auto", bits) and limit_of(scene, seat, bits) >= batch and fits(scene, seat, need, bits, batch)
    ]  # fmt: skip
    if not able:
        return None
    size = scene.fleet.memory(seat.device, seat.info, need, able[0], batch)
    tight = seat.careful and seat.limit > 0 and size > 0.8 * seat.budget
    return replace(seat, bits=able[1] if tight and len(able) > 1 else able[0])


def drafted(scene: Scene, need: Need) -> list[Seat]:
    """Who holds `need` with the smallest batch."""
    least = sizes_of(scene.job)[0]
    found = (with_bits(scene, seat, need, min(least, seat.rows)) for seat in seats(scene))
    return [seat for seat in found if seat is not None]


def median_s(scene: Scene, taking: list[Seat], needs: Sequence[Need]) -> float:
    """The median device's time for all steps at the job's batch, undisturbed."""
    steps, batch = scene.job.rounds.local_steps, usual_batch(scene.job)
    times = []
    for seat, need in zip(taking, needs, strict=True):
        alone = replace(seat.free, foreign=0.0, left=seat.free.cores)
        fixed, sample = scene.fleet.pace(seat.device, need, seat.bits, alone)
        times.append(steps * (fixed + sample * batch))
    if scene.job.rounds.sample:
        for device, known in scene.fleet.known.items():
            if device not in {seat.device for seat in taking} and known.speeds:
                alone = Free(known.cores, 0.0, known.cores, known.gpu)
                fixed, sample = scene.fleet.pace(device, needs[0], known.best()[0], alone)
                times.append(steps * (fixed + sample * batch))
    return statistics.median(times)


def lefts(
    scene: Scene, taking: list[Seat], needs: Sequence[Need], ranks: Sequence[Mapping[str, int]], bound: int,
    slack: float,
) -> list[float]:  # fmt: skip
    """Seconds that each has for its steps: the median's time undisturbed, with `slack`, less what its link takes too
    long."""
    moves = [transfer(scene, seat, own, bound) for seat, own in zip(taking, ranks, strict=True)]
    target = slack * median_s(scene, taking, needs) * (1 + 1e-9)  # the median device itself meets it
    if scene.fleet.measured:
        target = min(target, 0.9 * scene.job.rounds.deadline_s)
    return [max(0.0, target - max(0.0, took - statistics.median(moves))) for took in moves]


AVERAGED = ("fedlora", "hetlora", "ffa", "fedex", "full", "fedadapter")
"""Strategies whose devices average what their agents trained, so that it is sent once."""


def moved(scene: Scene, seat: Seat, ranks: Mapping[str, int], bound: int) -> tuple[int, int]:
    """Bytes down and up the link; `ffa` sends no A but in the first round."""
    name, copies = scene.job.strategy.name, seat.agents
    if name in AVERAGED:
        copies = 1
    down, up = traffic(scene.facts, scene.job, ranks, bound, copies, scene.planned.adapter)
    if name == "ffa" and scene.planned.record.round > 1:
        up -= 4 * sum(copies * ranks.get(one.name, 0) * one.inp for one in scene.facts.modules)
    return down, up


def transfer(scene: Scene, seat: Seat, ranks: Mapping[str, int], bound: int) -> float:
    """Seconds of the round's transfers, over the median link where its own was not measured; 0 where none was."""
    known = scene.fleet.known.get(seat.device)
    link = known.link if known and known.link else usual_link(scene)
    return sum(moved(scene, seat, ranks, bound)) / link if link else 0.0


def usual_link(scene: Scene) -> float:
    """The median of those measured; 0: none was."""
    links = [one.link for one in scene.fleet.known.values() if one.link]
    return statistics.median(links) if links else 0.0


def held(scene: Scene, seat: Seat, need: Need, sizes: list[int]) -> list[int]:
    """The batches that data and memory hold; the smallest fits."""
    found: list[int] = []
    for size in sizes:
        if size > seat.rows:
            return found or [seat.rows]
        if size > limit_of(scene, seat, seat.bits) or (found and not fits(scene, seat, need, seat.bits, size)):
            break
        found.append(size)
    return found


def uniform(scene: Scene, rank: int, *, ends: bool = False) -> dict[str, Asked]:
    """One rank for all, the largest batch that meets the target at what is free now; where work `ends` with its round,
    a target without the allowance of 20 %."""
    ranks = {one.name: min(rank, one.out, one.inp) for one in tuned(scene.facts, scene.job)}
    bound = scene.global_rank(rank)
    need = need_of(scene.facts, scene.job, ranks, bound)
    taking = drafted(scene, need)
    asked, steps = {}, scene.job.rounds.local_steps
    everyone = len(taking)
    seconds = lefts(scene, taking, [need] * everyone, [ranks] * everyone, bound, 1.0 if ends else 1.2)
    for seat, left in zip(taking, seconds, strict=True):
        fixed, sample = scene.fleet.pace(seat.device, need, seat.bits, seat.free)
        sizes = held(scene, seat, need, sizes_of(scene.job))
        batch = max([size for size in sizes if steps * (fixed + sample * size) <= left] or sizes[:1])
        batch = careful(seat, batch, sizes)
        limit, extra, begins = scene.job.rounds.train_for_s, 0, 0.0
        if ends:
            moves = moved(scene, seat, ranks, bound)
            usual = usual_transfer(scene, taking, [ranks] * everyone, bound)
            limit, extra = until(scene, seat, left, steps, moves, usual)
            begins = first_step(scene, seat, moves)
        took = capped(limit, steps, fixed + sample * batch, extra, begins)
        asked[seat.device] = Asked(ranks, batch, seat.bits, steps, seat.agents, took, limit=limit, extra=extra)
    return asked


def careful(seat: Seat, batch: int, sizes: list[int]) -> int:
    """At most half where the reading is old."""
    return max([size for size in sizes if size <= batch // 2] or sizes[:1]) if seat.careful else batch


def capped(limit: float, steps: int, step_s: float, extra: int = 0, begins: float = 0.0) -> float:
    """The training time that is expected: steps one by one, and `extra` ones, as long as they begin in time."""
    took, left = step_s, steps + extra - 1
    while left and (not limit or begins + took < limit - 1e-9 * step_s):
        took, left = took + step_s, left - 1
    return took


def loading(scene: Scene, seat: Seat) -> float:
    """The longest that loading took anyone; 0 for who has loaded such a base."""
    own = scene.fleet.known.get(seat.device)
    return scene.fleet.loaded_s if own is None or seat.bits not in {*own.speeds, *own.peaks} else 0.0


def first_step(scene: Scene, seat: Seat, moves: tuple[int, int]) -> float:
    """Seconds before it, as long as there is an end: to download and to load."""
    return 0.0 if not scene.fleet.measured else moves_s(scene, seat, moves[0]) + loading(scene, seat)


def usual_transfer(
    scene: Scene, taking: list[Seat], ranks: Sequence[Mapping[str, int]], bound: int
) -> float:  # fmt: skip
    """The median device's transfers."""
    return statistics.median(transfer(scene, seat, own, bound) for seat, own in zip(taking, ranks, strict=True))


def until(
    scene: Scene, seat: Seat, train_s: float, steps: int, moves: tuple[int, int], usual: float = 0.0
) -> tuple[float, int]:  # fmt: skip
    """When the work of a method that has a round time begins no further step, so that all deliver together: half a step
    before it should have trained, later by what its download should take or the `usual` transfers leave beside its
    upload. A download twice as long leaves half the training, and so does loading where none was done yet. And a
    quarter more steps, but where one of these is later than the end.

    The job's own limit where that is shorter, or nothing was measured.
    """
    limit = scene.job.rounds.train_for_s
    if not scene.fleet.measured:
        return limit, 0
    down, up = (moves_s(scene, seat, size) for size in moves)
    deadline = scene.job.rounds.deadline_s
    ends = train_s - train_s / steps / 2
    shared, slow = max(ends + down, ends + usual - up), ends / 2 + down + max(down, loading(scene, seat))
    latest = max(shared, slow)
    extra = -(-steps // 4) if slow <= shared else 0
    return min(latest, 0.9 * deadline - min(up, deadline / 2), limit or math.inf), extra


def moves_s(scene: Scene, seat: Seat, size: int) -> float:
    """Seconds of so many bytes: over its link, else the median one, else 4 Mb/s."""
    own = scene.fleet.known.get(seat.device)
    if own is not None and own.link:
        return size / own.link
    return size / (usual_link(scene) or 5e5)
