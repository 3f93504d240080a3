"""The cost model of all planners: step time and memory of a work on a device, corrected by what it measured.

**Step time** = overhead_s / min(1, e) + FLOP * per_flop_s / e, with e = the cores (or share of the GPU) the agent can
use. Speeds are per core and an observation counts by the cores the agent really used, so a prediction follows the live
load at once while foreign load never spoils what was learned. One `Fit` per device and bits; bits not yet met on a
device take the speed of those that were, times `BITS_TIME`. A device not yet met is as much faster than the median of
the fleet as its probe was (`DeviceInfo.flops`, `Pool`), or equal to its median where it told none.

**Memory** = agent + `WORKING_BYTES` + weights(bits) + 16 B per trained parameter + 4 B per frozen one + the larger of
the micro-batch's activations and loading. The base is loaded layer by layer: `LOADING_BYTES` and a layer twice in fp32
lie beside it at the worst moment. Once the device has trained, its measured peak replaces the sum, moved only by the
difference in batch, adapter and (from the nearest bits it has trained at) weights; activations that loading may have
hidden move it by what exceeds loading. A batch that ran out of memory is a hard bound for those bits.

Every prediction comes with the readings it rests on.
"""

from __future__ import annotations

import statistics
from collections.abc import Collection, Mapping
from typing import NamedTuple, cast

import msgspec
from msgspec.structs import replace

from coordinator.core.facts import ModelFacts
from coordinator.core.planning.base import RoundReport
from coordinator.core.planning.demand import BYTES_LOADED, BYTES_TRAINED, Demand, demand
from coordinator.core.planning.fit import BAND, Fit, Pool
from coordinator.core.planning.footprint import SURE, Footprint, Measured, activations, footprint_of, scratch
from coordinator.core.planning.lower_part import demand_of, own_compute
from coordinator.core.planning.pruned import facts_at, middle
from coordinator.core.planning.readings import MIB, Capacity, capacity, has_gpu_memory, probed_flops, shares_memory
from coordinator.core.planning.reasons import mebibytes, plural, seconds
from shared.jobs import Bits, JobSpec
from shared.messages import DeviceInfo, Load, UpdateFacts, Work

BITS_TIME: Mapping[int, float] = {32: 1.0, 16: 1.0, 8: 1.05, 4: 1.3}
"""Step time against fp32 before a device measured its own."""
CPU_FLOPS, GPU_FLOPS = 8e9, 5e12
"""Per core and per GPU, before anything was measured. Only ratios matter then: all devices start alike."""
MEDIAN_SPEED, PROBED_SPEED, ASSUMED_SPEED = "median of the fleet", "its probe against the fleet's", "assumed speed"
"""Where a speed is from that its device did not measure."""
AGENT_BYTES, SMALL_AGENT_BYTES = 256 * MIB, 48 * MIB
"""Agent without a model where a device tells none: with torch, and the one of `least_squares`."""
CUDA_BYTES = 400 * MIB
"""A CUDA context, which the allocator's figures do not contain."""
LEAST_CORES = 0.01
LEAST_MEASURED_BYTES, LEAST_MEASURED_S = 64 * 1024, 0.01


class DeviceModel(msgspec.Struct, frozen=True, kw_only=True):
    """What one device taught. Keys are bits as text, since maps on disk have text keys."""

    fits: dict[str, Fit] = {}
    peaks: dict[str, Measured] = {}
    limits: dict[str, int] = {}
    """Largest batch that fits, as met by running out of memory; 0: none."""
    gpu: bool = False
    occupancy: float = 1.0
    """Share of an undisturbed device's cores that the agent uses; held like the values of a `Fit`."""
    occupancy_now: float = 1.0
    activation_scale: float = 0.0
    """Measured against estimated activations; 0: not yet known."""
    activation_share: float = 0.0
    """How far that rests on the activations themselves, 0 to 1."""
    agent_bytes: int = 0
    """Agent as measured with a base loaded, less what the base should take."""
    link: float = 0.0
    """Bytes per second of its downloads, a moving average; 0: not yet known."""
    own_bytes: int = 0
    """What the agent held at the end of the last round."""
    flops: float = 0.0
    """Of its probe; 0: not told."""
    cores: float = 0.0
    """Of each of its agents, undisturbed (1 for a GPU); 0: it did not train yet."""


class Pace(NamedTuple):
    """Step time at one capacity, linear in the batch."""

    fixed_s: float
    per_sample_s: float
    source: str

    def step_s(self, batch: int) -> float:
        """Seconds per optimizer step."""
        return self.fixed_s + self.per_sample_s * batch

    def step(self, batch: int, free: Capacity) -> tuple[float, str]:
        """Seconds per optimizer step, with the readings used; `free`: the capacity that it is for."""
        value = self.step_s(batch)
        return value, f"step {seconds(value)} ({self.source}) at {free}"


class CostModel(msgspec.Struct, frozen=True, kw_only=True):
    """All that was learned of a fleet; `learn` returns a new one."""

    devices: dict[str, DeviceModel] = {}
    cpu: tuple[float, float] = (0.0, 1 / CPU_FLOPS)
    """(overhead_s, per_flop_s) per core at 32 bits: the median of the fleet."""
    gpu: tuple[float, float] = (0.0, 1 / GPU_FLOPS)
    cpu_pool: Pool = Pool()
    """Per core at 32 bits, of the devices that told their probe."""
    gpu_pool: Pool = Pool()
    activation_scale: float = 1.0
    """Median of the fleet."""
    load_s: float = 0.0
    """The longest that a base was seen to take to load."""

    @property
    def measured(self) -> bool:
        """Whether any speed was."""
        return any(known.fits for known in self.devices.values())

    def pace(self, device: str, need: Demand, bits: Bits, free: Capacity) -> Pace:
        """Step time of `device` over a base of `bits` with `free` to use."""
        known = self.devices.get(device)
        overhead, per_flop, source = self._speed(known, bits, free)
        used = usable(free, known)
        return Pace(overhead / min(used, 1.0), need.flop * per_flop / used, source)

    def step(self, device: str, need: Demand, bits: Bits, batch: int, free: Capacity) -> tuple[float, str]:
        """Seconds per optimizer step, with the readings used."""
        return self.pace(device, need, bits, free).step(batch, free)

    def met(self, need: Demand, but: Collection[str]) -> list[Pace]:
        """Step times on the devices that have trained, at the bits they did so most, with nothing else running; without
        those in `but`."""
        found = []
        for device, known in self.devices.items():
            if device not in but and known.fits and known.cores:
                bits = max(known.fits.items(), key=lambda item: (item[1].rounds, item[0]))[0]
                free = Capacity(known.cores, 0.0, known.cores, known.gpu)
                found.append(self.pace(device, need, cast("Bits", int(bits)), free))
        return found

    def memory(self, device: str, need: Demand, bits: Bits, batch: int, info: DeviceInfo) -> tuple[float, str]:
        """Bytes at the worst moment of a round, with the readings used; never falling with the batch."""
        found = self.footprint(device, need, bits, info)
        return found.bytes(batch), found.words(batch)

    def footprint(self, device: str, need: Demand, bits: Bits, info: DeviceInfo) -> Footprint:
        """What `memory` says, for any batch."""
        known = self.devices.get(device) or _UNKNOWN
        gpu, scale = bool(info.gpus), known.activation_scale or self.activation_scale
        # Of memory that the GPU shares the context is taken since the probe: the device counts it as used.
        context = CUDA_BYTES if gpu and not shares_memory(info) else 0
        # What the agent holds in RAM takes nothing of a GPU's own memory.
        agent = known.agent_bytes or (0 if has_gpu_memory(info) else info.agent_bytes or _agent_bytes(need))
        agent += context
        return footprint_of(known.peaks, need, bits, scale, context, agent, gpu=gpu)

    def batch_limit(self, device: str, bits: Bits) -> int | None:
        """The largest batch that fits, where memory ran out before; 0: none at these bits."""
        known = self.devices.get(device)
        return None if known is None else known.limits.get(str(bits))

    def has_run(self, device: str, need: Demand, bits: Bits, batch: int, limit: int) -> bool:
        """Whether the device trained at these bits with at least so many samples at once when it last did, under a
        memory limit of at most `limit` bytes."""
        known = self.devices.get(device)
        met = known.peaks.get(str(bits)) if known is not None else None
        return (
            met is not None
            and met.micro >= need.micro(batch)
            and met.adapter_params >= need.adapter_params
            and met.activations >= need.activations
            and 0 < met.limit <= limit
        )

    def own_bytes(self, device: str, info: DeviceInfo) -> int:
        """What the agent holds now, by its last measurement or its size before a model is loaded."""
        known = self.devices.get(device)
        return max(info.agent_bytes, known.own_bytes if known is not None else 0)

    def transfer(self, device: str, size: int) -> tuple[float, str]:
        """Seconds to move `size` bytes over the device's link, with the reading; 0 s where it was not yet measured."""
        known = self.devices.get(device)
        if known is None or not known.link:
            return 0.0, "link not yet measured"
        return size / known.link, f"{mebibytes(size)} at {known.link / 1e6:.2f} MB/s"

    def learn(self, report: RoundReport) -> CostModel:
        """The model that also knows `report`. Speeds are learned where the report names the job and the base."""
        devices = dict(self.devices)
        seen: dict[str, _Seen] = {}
        known_needs: Needs = {}
        for device, work in sorted(report.works.items()):
            found = devices.get(device) or _UNKNOWN
            result, load = report.results.get(device), report.loads.get(device)
            found = _with_limits(found, work, result, report.batch_limits.get(device))
            if result is not None:
                found = _with_probe(found, info := report.infos.get(device))
                if report.facts is not None and report.job is not None:
                    need = _demand_of(report.facts, report.job, work, known_needs)
                    found, step = _observed(found, need, own_compute(result, work), load, work.agents)
                    if step is not None:
                        seen[device] = step
                    found = _with_memory(found, need, result, self.activation_scale, load, work.agents, info)
                found = _with_link(found, report.adapter_bytes, result.fetch_s)
                found = replace(found, own_bytes=result.peak_bytes or found.own_bytes)
            if found is not _UNKNOWN:
                devices[device] = found
        cpu = _pooled(self.cpu_pool, devices, seen, gpu=False)
        gpu = _pooled(self.gpu_pool, devices, seen, gpu=True)
        for device, step in seen.items():
            devices[device] = _fitted(devices[device], step, gpu if devices[device].gpu else cpu)
        scales = [known.activation_scale for known in devices.values() if known.activation_share >= SURE]
        return CostModel(
            devices=devices,
            cpu=_median_speed(devices, gpu=False) or self.cpu,
            gpu=_median_speed(devices, gpu=True) or self.gpu,
            cpu_pool=cpu,
            gpu_pool=gpu,
            activation_scale=statistics.median(scales or [1.0]),
            load_s=max([self.load_s, *(one.load_s for one in report.results.values())]),
        )

    def _speed(self, known: DeviceModel | None, bits: Bits, free: Capacity) -> tuple[float, float, str]:
        """(overhead_s, per_flop_s, where they are from)."""
        if known is not None and known.fits:
            fit = known.fits.get(str(bits))
            if fit is not None:
                return fit.overhead_s, fit.per_flop_s, f"fitted on {plural(fit.rounds, 'round')}"
            other, fit = max(known.fits.items(), key=lambda item: (item[1].rounds, item[0]))
            ratio = BITS_TIME[bits] / BITS_TIME[int(other)]
            return fit.overhead_s * ratio, fit.per_flop_s * ratio, f"from {plural(fit.rounds, 'round')} at {other} bits"
        ratio = BITS_TIME[bits]
        # Where steps were measured, but none of a device that told its probe, the median knows more.
        if free.flops and (self.cpu_pool.s11 or self.gpu_pool.s11 or not self.devices):
            # What a step takes beyond bare products is the same for all; that of the other kind before nothing.
            pools = (self.gpu_pool, self.cpu_pool) if free.gpu else (self.cpu_pool, self.gpu_pool)
            pool = next((pool for pool in pools if pool.s11), Pool(per_flop=1.0))
            source = PROBED_SPEED if pool.s11 else ASSUMED_SPEED
            return pool.overhead * ratio / free.flops, pool.per_flop * ratio / free.flops, source
        overhead, per_flop = self.gpu if free.gpu else self.cpu
        return overhead * ratio, per_flop * ratio, MEDIAN_SPEED if self.devices else ASSUMED_SPEED


_UNKNOWN = DeviceModel()


def usable(free: Capacity, known: DeviceModel | None) -> float:
    """Cores (or share of the GPU) the agent will get: what is free, but no more than it uses undisturbed."""
    if free.gpu or known is None:
        return max(free.free, LEAST_CORES)
    return max(min(free.free, known.occupancy * free.cores), LEAST_CORES)


def used_cores(found: DeviceModel | None, result: UpdateFacts, load: Load | None, agents: int) -> float | None:
    """Cores (or share of the GPU) behind the times in `result`; None where nothing tells."""
    free = capacity(None, load, agents)
    if free.gpu:
        used = free.free
    elif result.cores_used > 0:
        used = result.cores_used
    elif load is not None:
        used = usable(free, found)
    else:
        return None
    return max(used, LEAST_CORES)


def _agent_bytes(need: Demand) -> int:
    return SMALL_AGENT_BYTES if need.kind == "least_squares" else AGENT_BYTES


Variant = tuple[float, int]
"""The ratio to which a work prunes the model, and the block at which it splits it; 0: it does not."""
Needs = dict[tuple[Variant, int | tuple[tuple[str, int], ...]], Demand]
"""By the variant and the ranks, and by the identity of their mapping, which most works of a plan share."""


def _demand_of(facts: ModelFacts, job: JobSpec, work: Work, known: Needs) -> Demand:
    """The demand of `work`; most works of a round share one."""
    ratio = middle(facts.groups, work.prune) if work.prune is not None else 0.0
    variant = ratio, work.split.block if work.split is not None else 0
    found = known.get((variant, id(work.ranks)))
    if found is None:
        key = variant, tuple(sorted(work.ranks.items()))
        found = known.get(key) or _worked_out(facts, job, work, ratio)
        known[key] = known[variant, id(work.ranks)] = found
    return found


def _worked_out(facts: ModelFacts, job: JobSpec, work: Work, ratio: float) -> Demand:
    if work.split is not None:
        return demand_of(facts, job, work)
    return demand(facts_at(facts, ratio), job, work.ranks)


def _with_probe(found: DeviceModel, info: DeviceInfo | None) -> DeviceModel:
    flops = probed_flops(info)
    return replace(found, flops=flops) if flops else found


def _with_limits(found: DeviceModel, work: Work, result: UpdateFacts | None, met: int | None) -> DeviceModel:
    bits = str(result.bits if result is not None else work.bits)
    told = [limit for limit in (found.limits.get(bits), met) if limit is not None]
    if result is not None and result.batch_limit:
        told.append(result.batch_limit)
    return replace(found, limits={**found.limits, bits: min(told)}) if told else found


class _Seen(NamedTuple):
    """A round's step time on one device, as `Fit.learn` takes it."""

    x0: float
    x1: float
    step_s: float
    bits: Bits


def _observed(
    found: DeviceModel, need: Demand, result: UpdateFacts, load: Load | None, agents: int
) -> tuple[DeviceModel, _Seen | None]:
    """(`found` with what of the device `result` tells, the step time; None where it tells none)."""
    if result.step_s <= 0 or result.steps < 1 or result.batch < 1:
        return found, None
    free = capacity(None, load, agents)
    found = replace(found, gpu=free.gpu, cores=free.cores)
    if not free.gpu and result.cores_used > 0 and load is not None:
        found = _with_occupancy(found, free, result.cores_used)
    used = used_cores(found, result, load, agents)
    if used is None:
        return found, None
    return found, _Seen(1 / min(used, 1.0), need.flop * result.batch / used, mean_step_s(result), result.bits)


def _pooled(pool: Pool, devices: Mapping[str, DeviceModel], seen: Mapping[str, _Seen], *, gpu: bool) -> Pool:
    """The pool with what the devices of its kind that told their probe have `seen`."""
    told = []
    for device, one in seen.items():
        known = devices[device]
        if known.gpu == gpu and known.flops:
            unit = BITS_TIME[one.bits] / known.flops
            told.append((one.x0 * unit, one.x1 * unit, one.step_s))
    return pool.learn(told)


def _fitted(found: DeviceModel, one: _Seen, pool: Pool) -> DeviceModel:
    share = pool.share(one.x0, one.x1) if found.flops else None
    fit = found.fits.get(str(one.bits), Fit()).learn(one.x0, one.x1, one.step_s, share)
    return replace(found, fits={**found.fits, str(one.bits): fit})


def measures_link(size: int, fetch_s: float) -> bool:
    """Whether a download of `size` bytes tells of the link: those too small or too quick measure latency."""
    return size >= LEAST_MEASURED_BYTES and fetch_s >= LEAST_MEASURED_S


def _with_link(found: DeviceModel, size: int, fetch_s: float) -> DeviceModel:
    if not measures_link(size, fetch_s):
        return found
    seen = size / fetch_s
    return replace(found, link=(found.link + seen) / 2 if found.link else seen)


def mean_step_s(result: UpdateFacts) -> float:
    """Mean seconds per step: under a CPU quota steps are short or throttled, and their median is neither."""
    return result.train_s / result.steps if result.train_s > 0 else result.step_s


def _with_occupancy(found: DeviceModel, free: Capacity, used: float) -> DeviceModel:
    """Learned undisturbed only; it rises fast and falls slowly, for a load that came late is no lasting loss."""
    if free.foreign > 0:
        return found
    seen = min(1.0, used / free.cores)
    if not found.fits:
        return replace(found, occupancy=seen, occupancy_now=seen)
    now = found.occupancy_now + (0.5 if seen > found.occupancy_now else 0.2) * (seen - found.occupancy_now)
    held = found.occupancy if 1 / BAND <= now / found.occupancy <= BAND else now
    return replace(found, occupancy=held, occupancy_now=now)


def _with_memory(
    found: DeviceModel, need: Demand, result: UpdateFacts, fleet_scale: float, load: Load | None, agents: int,
    info: DeviceInfo | None,
) -> DeviceModel:  # fmt: skip
    if not result.peak_bytes or result.batch < 1:
        return found
    bits = str(result.bits)
    # Of a GPU the limit is its own memory, which the allocator can't exceed unseen: there the estimate decides.
    limit = load.memory_limit // agents if load is not None and not load.gpus else 0
    told = 0 < result.base_bytes <= result.peak_bytes
    gpu = bool(info.gpus) if info is not None else found.gpu
    agent = int(result.base_bytes - need.weight_bytes(result.bits) - BYTES_LOADED * need.adapter_params)
    working = scratch(need, load, info, agent)
    moving = result.peak_bytes - result.base_bytes - (BYTES_TRAINED - BYTES_LOADED) * need.adapter_params - working
    met = Measured(
        peak=result.peak_bytes, micro=need.micro(result.batch), adapter_params=need.adapter_params, limit=limit,
        activations=need.activations, kept=need.activation_bytes(result.bits, gpu=gpu),
        moving=moving if told and result.load_s > 0 else 0,
    )  # fmt: skip
    before = found.peaks.get(bits)
    if before is not None and (before.micro, before.adapter_params) == (met.micro, met.adapter_params):
        # A slightly lower peak is noise: keep the higher one, so that no batch flaps at the edge of memory.
        met = before if 0.9 * before.peak <= met.peak <= before.peak else met
    found = replace(found, peaks={**found.peaks, bits: met})
    if not told:
        return found
    seen = found.activation_scale or fleet_scale, found.activation_share
    scale, share = activations(seen, fleet_scale, need, result, moving, working, gpu=gpu)
    if (scale, share) == seen:
        scale = found.activation_scale  # who taught nothing of them follows what the fleet learns
    return replace(found, agent_bytes=max(1, agent), activation_scale=scale, activation_share=share)


def _median_speed(devices: Mapping[str, DeviceModel], *, gpu: bool) -> tuple[float, float] | None:
    """(overhead_s, per_flop_s) at 32 bits of the median device of a kind."""
    overheads: list[float] = []
    per_flops: list[float] = []
    for known in devices.values():
        if known.gpu == gpu and known.fits:
            bits, fit = max(known.fits.items(), key=lambda item: (item[1].rounds, item[0]))
            overheads.append(fit.overhead_s / BITS_TIME[int(bits)])
            per_flops.append(fit.per_flop_s / BITS_TIME[int(bits)])
    return (statistics.median(overheads), statistics.median(per_flops)) if per_flops else None
