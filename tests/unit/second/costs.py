"""What works cost and what devices taught, written a second time from the formulas: plain loops over the log's rounds.

Constants stand here again as numbers, so that a change of the planners' own shows. Units: seconds, bytes, FLOP.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from coordinator.core.facts import ActivationFacts, ModelFacts, ModuleSpec
from shared.jobs import JobSpec
from shared.messages import DeviceInfo, Load, UpdateFacts
from tests.unit.second.history import Done

MIB = 2**20
SLOWER = {32: 1.0, 16: 1.0, 8: 1.05, 4: 1.3}
BYTES = {32: 4.0, 16: 2.0, 8: 1 + 4 / 64, 4: 0.5 + 1 / 64 + 4 / 64 / 256}


# ---- what a work asks


@dataclass(frozen=True)
class Need:
    """Per sample where it grows with the batch. `blocks`: that the gradient passes, by FLOP."""

    flop: float
    activations: dict[int, float]
    on_gpu: dict[int, float]
    trained: int
    frozen: int
    base: dict[int, float]
    largest: int
    parts: int
    tiny: bool
    blocks: float

    def micro(self, batch: int) -> int:
        return math.ceil(batch / self.parts)


def tokens(job: JobSpec) -> int:
    return 1 if job.task.kind == "least_squares" else job.task.max_tokens


def usual_batch(job: JobSpec) -> int:
    """The job's batch, within its bounds."""
    least = job.strategy.batch_min
    return min(max(job.strategy.batch, least), max(least, job.strategy.batch_max))


def tuned(facts: ModelFacts, job: JobSpec) -> list[ModuleSpec]:
    wanted = job.base.targets
    found = [one for one in facts.modules if not wanted or one.name.split(".")[-1] in wanted]
    return sorted(found, key=lambda one: one.name)


def need_of(facts: ModelFacts, job: JobSpec, ranks: Mapping[str, int], global_rank: int = 0) -> Need:
    """Of a classifier or of least squares: a LoRA, bottleneck adapters, the head alone, or every parameter."""
    assert job.task.kind != "causal"
    given = [(one, ranks[one.name]) for one in facts.modules if ranks.get(one.name, 0)]
    whole = all(f"{one.name}.weight" in facts.dense for one in facts.modules)
    share = 1 - min(max(one.block, 0) for one, _ in given) / facts.blocks if given else float(whole)
    factors = sum(rank * (one.out + one.inp) for one, rank in given)
    dense = sum(math.prod(shape) for shape in facts.dense.values())
    words, linear, tiny = tokens(job), facts.linear_params, job.task.kind == "least_squares"
    backward = 2 * linear * (share + whole) + 6 * factors
    frozen = {bits: linear * BYTES[bits] + facts.other_params * (4 if bits == 32 else 2) for bits in BYTES}
    return Need(
        flop=words * (2 * linear + backward),
        activations=_activations(facts, facts.activations, words, share, tiny=tiny),
        on_gpu=_activations(facts, facts.activations_gpu or facts.activations, words, share, tiny=tiny),
        trained=factors + dense,
        frozen=sum(_kept(one, global_rank) for one in facts.modules),
        base=dict.fromkeys(BYTES, 0.0) if whole else frozen,
        largest=facts.largest or max(one.out * one.inp for one in facts.modules),
        parts=job.training.accumulation,
        tiny=tiny,
        blocks=backward / (2 * linear / facts.blocks),
    )


def _kept(one: ModuleSpec, rank: int) -> int:
    kept = min(rank, one.out, one.inp)
    return min(kept * (one.out + one.inp + 1), one.out * one.inp) if kept else 0


def _activations(
    facts: ModelFacts, counted: Mapping[str, ActivationFacts], words: int, share: float, *, tiny: bool
) -> dict[int, float]:
    if counted:
        full, half = (counted[bits].fixed + facts.blocks * share * counted[bits].block for bits in ("32", "16"))
    else:
        wide = facts.intermediate or 4 * facts.hidden
        full = 4.0 * words * facts.blocks * share * (8 * facts.hidden + 2 * wide + 2 * facts.heads * words)
        if tiny:
            full = 8.0 * (facts.hidden + facts.linear_params / facts.hidden)
        half = 0.6 * full
    return {32: full, 16: half, 8: half, 4: half}


def traffic(
    facts: ModelFacts, job: JobSpec, ranks: Mapping[str, int], bound: int, agents: int, adapter: int
) -> tuple[int, int]:
    """Bytes over the link: the global adapter down (of rank `bound` where its size is not known), the update up."""
    assert job.training.codec == "fp32"
    dense = sum(math.prod(shape) for shape in facts.dense.values())
    given = [(one, ranks[one.name]) for one in facts.modules if ranks.get(one.name, 0)]
    up = 4 * (sum(agents * rank * (one.out + one.inp) for one, rank in given) + dense)
    return adapter or 4 * (sum(_kept(one, bound) for one, _ in given) + dense), up


# ---- what a reading says


@dataclass(frozen=True)
class Free:
    """Compute: cores in all, used by others, and left to an agent; a GPU counts as one core."""

    cores: float
    foreign: float
    left: float
    gpu: bool
    flops: float = 0.0
    """Of the probe."""


def free_of(info: DeviceInfo | None, load: Load | None, agents: int) -> Free:
    return replace(_free_of(info, load, agents), flops=info.flops if info else 0.0)


def _free_of(info: DeviceInfo | None, load: Load | None, agents: int) -> Free:
    if info.gpus if info is not None else load is not None and load.gpus:
        used = [0.0]
        for gpu in load.gpus if load else []:
            told = gpu.foreign_utilization
            used.append(told if told is not None else (gpu.utilization or 0.0) if load and load.phase == "idle" else 0)
        foreign = min(1.0, max(used))
        foreign = foreign if foreign >= 0.1 else 0.0
        return Free(1.0, foreign, max(0.5, 1.0 - foreign), True)
    cores = (load.cores if load else 0.0) or (info.cores if info else 0.0) or 1.0
    foreign = min(load.foreign_cores, cores) if load else 0.0
    if foreign < max(0.05, 0.1 * cores):
        return Free(cores / agents, 0.0, cores / agents, False)
    fair = cores * math.ceil(cores) / (math.ceil(cores) + math.ceil(foreign))
    return Free(cores / agents, foreign / agents, max(cores - foreign, fair) / agents, False)


# ---- what rounds taught


def solved(told: list[tuple[float, float, float, float]], share: float, weight: float) -> tuple[float, float]:
    """(overhead, per FLOP) by least squares of (weight, x0, x1, seconds), neither below 0."""
    s00, s01, s11 = (sum(w * a * b for w, a, b in of) for of in (
        [(w, u0, u0) for w, u0, _, _ in told], [(w, u0, u1) for w, u0, u1, _ in told],
        [(w, u1, u1) for w, _, u1, _ in told],
    ))  # fmt: skip
    r0, r1 = sum(w * u0 * t for w, u0, _, t in told), sum(w * u1 * t for w, _, u1, t in told)
    s00, r0 = (1 + weight) * s00, r0 + weight * share * r0
    size = s00 * s11 - s01 * s01
    overhead, per_flop = (r0 * s11 - s01 * r1) / size, (s00 * r1 - s01 * r0) / size
    if overhead < 0:
        return 0.0, r1 / s11
    return (r0 / s00, 0.0) if per_flop < 0 else (overhead, per_flop)


@dataclass
class Speed:
    """Of one device at one precision: every observation kept, solved anew each time."""

    seen: list[tuple[float, float, float, float]] = field(default_factory=list)
    overhead: float = 0.0
    per_flop: float = 0.0

    def learn(self, x0: float, x1: float, took: float, share: float) -> None:
        expected = self.overhead * x0 + self.per_flop * x1 if self.seen else took
        if len(self.seen) > 1:
            took = min(max(took, expected / 2), 2 * expected)
        keep = 0.7 if 1 / 1.2 <= took / expected <= 1.2 else 0.5
        self.seen.append((x0 / expected, x1 / expected, took / expected, keep))
        weights = [math.prod(later[3] for later in self.seen[place + 1 :]) for place in range(len(self.seen))]
        told = [(w, u0, u1, t) for w, (u0, u1, t, _) in zip(weights, self.seen, strict=True)]
        # The prior: a step of this length has `share` overhead, with 5 % of the weight.
        overhead, per_flop = solved(told, share, 0.05)
        held = len(self.seen) > 1 and 1 / 1.2 <= (overhead * x0 + per_flop * x1) / expected <= 1.2
        if not held:
            self.overhead, self.per_flop = overhead, per_flop


@dataclass(frozen=True)
class Peak:
    """The most memory that a work took."""

    bytes: int
    micro: int
    trained: int
    limit: int
    activations: float
    kept: float
    moving: float


@dataclass
class Known:
    """What one device taught."""

    speeds: dict[int, Speed] = field(default_factory=dict)
    peaks: dict[int, Peak] = field(default_factory=dict)
    limits: dict[int, int] = field(default_factory=dict)
    gpu: bool = False
    cores: float = 0.0
    flops: float = 0.0
    busy: float = 1.0
    busy_now: float = 1.0
    scale: float = 0.0
    trust: float = 0.0
    agent: int = 0
    own: int = 0
    link: float = 0.0
    steps: list[tuple[float, float]] = field(default_factory=list)
    """(core-seconds per sample at the job's batch, blocks) of each round."""
    byte_s: list[float] = field(default_factory=list)

    def best(self) -> tuple[int, Speed]:
        """The precision that it trained at most."""
        return max(self.speeds.items(), key=lambda item: (len(item[1].seen), str(item[0])))


def averaged(values: Iterable[float]) -> float:
    """The moving average with weight 0.8 for the past."""
    found = list(values)
    count = len(found)
    return sum((0.8 ** (count - 1 - i)) * (0.2 if i else 1.0) * value for i, value in enumerate(found))


class Fleet:
    """Everything that `past` taught."""

    def __init__(self, past: Iterable[Done], facts: ModelFacts, job: JobSpec) -> None:
        self.facts, self.job = facts, job
        self.known: dict[str, Known] = {}
        self.usual = {False: (0.0, 1 / 8e9), True: (0.0, 1 / 5e12)}
        self.pools: dict[bool, list[list[tuple[float, float, float]]]] = {False: [], True: []}
        self.scale = 1.0
        self.loaded_s = 0.0
        """The longest that one was seen to load a base."""
        plain = need_of(facts, job, {})
        self.phi = dict.fromkeys(
            (False, True), 0.7 * plain.flop / (2.0 * tokens(job) * facts.linear_params / facts.blocks)
        )
        for done in past:
            self._learn(done)

    def usable(self, device: str, free: Free) -> float:
        known = self.known.get(device)
        left = free.left if free.gpu or known is None else min(free.left, known.busy * free.cores)
        return max(left, 0.01)

    def pace(self, device: str, need: Need, bits: int, free: Free) -> tuple[float, float]:
        """(seconds of a step whatever its batch, seconds a sample)."""
        known = self.known.get(device)
        if known is not None and bits in known.speeds:
            overhead, per_flop = known.speeds[bits].overhead, known.speeds[bits].per_flop
        elif known is not None and known.speeds:
            other, speed = known.best()
            ratio = SLOWER[bits] / SLOWER[other]
            overhead, per_flop = speed.overhead * ratio, speed.per_flop * ratio
        elif free.flops and (self.pools[False] or self.pools[True] or not self.known):
            overhead, per_flop = (part * SLOWER[bits] / free.flops for part in self.pooled(free.gpu))
        else:
            overhead, per_flop = (part * SLOWER[bits] for part in self.usual[free.gpu])
        used = self.usable(device, free)
        return overhead / min(1.0, used), need.flop * per_flop / used

    def pooled(self, gpu: bool) -> tuple[float, float]:
        """What all devices that told their probe have in common; those of the other kind before nothing."""
        pool = self.pools[gpu] or self.pools[not gpu]
        told = [
            (0.9 ** (len(pool) - 1 - age), x0 / took, x1 / took, 1.0)
            for age, round in enumerate(pool)
            for x0, x1, took in round
        ]
        return solved(told, 0.05, 0.001) if told else (0.0, 1.0)

    def memory(self, device: str, info: DeviceInfo, need: Need, bits: int, batch: int) -> float:
        known = self.known.get(device, Known())
        scale = known.scale or self.scale
        context = 400 * MIB if info.gpus else 0
        on_gpu = any(gpu.memory_bytes for gpu in info.gpus)
        plain = info.agent_bytes or (48 if need.tiny else 256) * MIB
        kept = need.on_gpu if info.gpus else need.activations
        agent = (known.agent or (0 if on_gpu else plain)) + context
        if not known.peaks:
            working = 0 if need.tiny else 68 * MIB
            fixed = agent + working + need.base[bits] + 16 * need.trained + 4 * need.frozen
            return fixed + max(need.micro(batch) * kept[bits] * scale, 32 * MIB + 8 * need.largest)
        other = min(known.peaks, key=lambda one: (abs(one - bits), str(one)))
        peak = known.peaks[other]
        then = peak.micro * peak.kept * scale
        hidden = max(0.0, min(peak.moving, 32 * MIB + 8 * need.largest))
        more = max(need.micro(batch) * kept[bits] * scale, hidden) - max(then, hidden)
        more += need.base[bits] - need.base[other]
        more += 16 * (need.trained - peak.trained)
        return max(context + peak.bytes + more, min(context + peak.bytes, agent + need.base[bits]))

    @property
    def measured(self) -> bool:
        return any(one.speeds for one in self.known.values())

    def _learn(self, done: Done) -> None:
        seen: list[tuple[Known, int, float, float, float]] = []
        for device, work in sorted(done.works.items()):
            result = done.results.get(device)
            known = self.known.get(device, Known())
            bits = result.bits if result else work.bits
            told = [known.limits.get(bits), done.limits.get(device), (result and result.batch_limit) or None]
            if limits := [limit for limit in told if limit is not None]:
                known.limits[bits] = min(limits)
            if result is not None:
                need, load = need_of(self.facts, self.job, work.ranks), done.loads.get(device)
                known.flops = done.infos[device].flops or known.flops
                seen.append((known, result.bits, *self._timed(known, need, result, load, work.agents)))
                self._learn_memory(known, need, result, load, work.agents, done.infos[device])
                if done.fetched >= 65536 and result.fetch_s >= 0.01:
                    rate = done.fetched / result.fetch_s
                    known.link = (known.link + rate) / 2 if known.link else rate
                    known.byte_s.append(result.fetch_s / done.fetched)
                known.own = result.peak_bytes or known.own
                self.loaded_s = max(self.loaded_s, result.load_s)
            if result is not None or limits:
                self.known[device] = known
        for gpu in (False, True):
            pool = [
                (x0 * SLOWER[bits] / one.flops, x1 * SLOWER[bits] / one.flops, took)
                for one, bits, x0, x1, took in seen
                if one.gpu == gpu and one.flops
            ]
            usual = statistics.median(took / x1 for _, x1, took in pool) if pool else 0.0
            overhead, per_flop = self.pooled(gpu) if self.pools[gpu] else (0.0, usual)
            pool = [one for one in pool if 1 / 4 <= one[2] / (overhead * one[0] + per_flop * one[1]) <= 4]
            self.pools[gpu] += [pool] if pool else []
        for one, bits, x0, x1, took in seen:
            share = 0.05
            if one.flops:
                overhead, per_flop = self.pooled(one.gpu)
                share = overhead * x0 / (overhead * x0 + per_flop * x1)
            one.speeds.setdefault(bits, Speed()).learn(x0, x1, took, share)
        for gpu in (False, True):
            speeds = [one.best() for one in self.known.values() if one.speeds and one.gpu == gpu]
            if speeds:
                self.usual[gpu] = (
                    statistics.median(speed.overhead / SLOWER[bits] for bits, speed in speeds),
                    statistics.median(speed.per_flop / SLOWER[bits] for bits, speed in speeds),
                )
        scales = [one.scale for one in self.known.values() if one.trust >= 0.5]
        self.scale = statistics.median(scales) if scales else 1.0
        self._learn_blocks(done)

    def _cores(self, known: Known, result: UpdateFacts, load: Load | None, agents: int) -> float:
        free = free_of(None, load, agents)
        if free.gpu:
            return max(free.left, 0.01)
        if result.cores_used > 0:
            return max(result.cores_used, 0.01)
        assert load is not None
        return max(0.01, min(free.left, known.busy * free.cores))

    def _timed(
        self, known: Known, need: Need, result: UpdateFacts, load: Load | None, agents: int
    ) -> tuple[float, float, float]:
        free = free_of(None, load, agents)
        known.gpu, known.cores = free.gpu, free.cores
        if not free.gpu and result.cores_used > 0 and load is not None and free.foreign == 0:
            seen = min(1.0, result.cores_used / free.cores)
            if not known.speeds:
                known.busy = known.busy_now = seen
            else:
                known.busy_now += (0.5 if seen > known.busy_now else 0.2) * (seen - known.busy_now)
                if not 1 / 1.2 <= known.busy_now / known.busy <= 1.2:
                    known.busy = known.busy_now
        used = self._cores(known, result, load, agents)
        return 1 / min(1.0, used), need.flop * result.batch / used, result.train_s / result.steps

    def _learn_memory(
        self, known: Known, need: Need, result: UpdateFacts, load: Load | None, agents: int, info: DeviceInfo
    ) -> None:
        if not result.peak_bytes:
            return
        limit = load.memory_limit // agents if load is not None and not load.gpus else 0
        kept = (need.on_gpu if info.gpus else need.activations)[result.bits]
        based = 0 < result.base_bytes <= result.peak_bytes
        rest = int(result.base_bytes - need.base[result.bits] - 4 * need.trained)
        working = 0 if rest > info.agent_bytes + 34 * MIB else 68 * MIB
        if need.tiny or any(gpu.memory_bytes for gpu in info.gpus):
            working = 0
        over, hides = result.peak_bytes - result.base_bytes - 12 * need.trained - working, result.load_s > 0
        peak = Peak(
            result.peak_bytes, need.micro(result.batch), need.trained, limit, need.activations[32], kept,
            over if based and hides else 0,
        )  # fmt: skip
        old = known.peaks.get(result.bits)
        same = old is not None and (old.micro, old.trained) == (peak.micro, peak.trained)
        if old is None or not same or not 0.9 * old.bytes <= peak.bytes <= old.bytes:
            known.peaks[result.bits] = peak
        if not based:
            return
        known.agent = max(1, rest)
        before = known.scale or self.scale
        thought = need.micro(result.batch) * kept
        trust = 1 / (1 + (max(working / 2, 16 * MIB) / thought) ** 2) if thought else 0.0
        if thought <= 0 or trust < 0.1 or trust < known.trust / 2:
            return
        low, high = (
            min(20.0, max(0.05, (1 - trust) * self.scale + trust * one / thought)) for one in (over, over + working / 2)
        )  # of what activations took
        loading = 32 * MIB + 8 * need.largest if hides else 0.0
        after = (before + min(before, high)) / 2
        if low * thought <= loading:
            after = (before + min(before, loading / thought)) / 2
        elif low > before:
            after = (before + low) / 2 if hides else low
        if low * thought > loading or after != before:
            known.scale = after
        if low * thought > loading:
            known.trust = trust

    def _learn_blocks(self, done: Done) -> None:
        """For `legend`: what of a step is the forward pass."""
        for device, result in done.results.items():
            work, known = done.works[device], self.known[device]
            load, need = done.loads.get(device), need_of(self.facts, self.job, work.ranks)
            cores = self._cores(known, result, load, work.agents)
            # What a step of the job's batch takes as much longer as the cost model has it.
            usual = usual_batch(self.job)
            overhead, per_flop = known.speeds[result.bits].overhead, known.speeds[result.bits].per_flop
            fixed, sample = overhead / min(1.0, cores), need.flop * per_flop / cores
            step_s = result.train_s / result.steps * (fixed + sample * usual) / (fixed + sample * result.batch)
            known.steps.append((step_s * cores / usual / SLOWER[result.bits], need.blocks))
        for gpu in (False, True):
            seen = [one.steps for one in self.known.values() if one.gpu == gpu and len(one.steps) > 1]
            if seen:
                self.phi[gpu] = _phi(seen, self.phi[gpu])


def _phi(seen: list[list[tuple[float, float]]], before: float) -> float:
    best, found = -math.inf, before
    for place in range(161):
        phi = before * 16 ** ((place - 80) / 80)
        explained = -0.002 * math.log(phi / before) ** 2
        for steps in seen:
            time = averaged(y for y, _ in steps)
            square = averaged((phi + b) ** 2 for _, b in steps)
            explained += averaged(y * (phi + b) for y, b in steps) ** 2 / square / time**2
        if explained > best:
            best, found = explained, phi
    return found
