"""The virtual clock's device model: how long a device really takes, how much memory it really needs, what disturbs it.

It is another model than the planners' (`coordinator.core.planning.cost_model`), which never imports it: planners see
telemetry and returned timings alone. Where theirs is linear in the batch and in FLOP, this one interpolates step times
recorded from the real agent (`bench/record_steps.py`), makes large batches saturate the memory's bandwidth, throttles a
hot device, disturbs every step, and shares with other programs by another rule. Of memory that holds for the constants
only: the parts summed are those of the planners, so what a simulation says of predicted memory is no proof.

Pure: every draw is a hash of (seed, device, what, place), so a device's fate depends neither on the other devices nor
on the order of questions. Our own reading throughout: shares and ranges are those of `methods.md` section 6, classes
after FedSpine's TX2 / NX / AGX (arXiv:2501.02438); nothing here was measured on a Jetson.
"""

from __future__ import annotations

import bisect
import hashlib
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from statistics import NormalDist
from typing import Literal

import msgspec

from shared.jobs import Bits

VERSION = 4
"""Raised by whoever changes what this model charges: results of another version are of another world."""
_NORMAL = NormalDist()
MIB = 2**20
POWER_ROUNDS = 20
"""Rounds after which a device's power mode is drawn anew."""
BANDWIDTH_MBIT = (1.0, 30.0)
AUTOCORRELATION = 0.8
_MEMORY_TERMS = 40
"""Past draws that a bandwidth still feels: 0.8**40 is 1e-4."""
STEP_NOISE = 0.06
"""Standard deviation of the logarithm of a step's time."""
HEAT_S = 150.0
"""Seconds in which a busy device takes on 63 % of its heat."""
HOT = 0.7
HOTTEST_LOSS = 0.3
"""Share of the speed that a fully heated device loses; it loses none below `HOT`."""
CONTENTION = 1.25
"""What a foreign core costs the agent against an own one: it takes cache and memory bandwidth too."""
CORE_FLOPS, PROBE_ODDS = 7e10, 0.15
"""What a core of the recording machine multiplies in a second (measured four days after its steps), and how far a probe
is off (standard deviation of its logarithm)."""
BURST_SLOT_S, BURST_CHANCE, BURST_MEAN_S, BURST_MOST_S = 120.0, 0.12, 90.0, 480.0
"""Foreign programs begin in a slot with this chance and last so long on average, and at most."""


def draw(*key: object) -> float:
    """A number in (0, 1) that depends on `key` alone."""
    digest = hashlib.sha256("/".join(map(str, key)).encode()).digest()
    return (int.from_bytes(digest[:7], "little") + 0.5) / 2**56


def normal(*key: object) -> float:
    """A draw from the standard normal distribution that depends on `key` alone."""
    return _NORMAL.inv_cdf(draw(*key))


class Recorded(msgspec.Struct, frozen=True, kw_only=True):
    """One measurement of the real agent: seconds per step and peak memory of a work under a CPU quota."""

    quota: float
    bits: int
    batch: int
    blocks: int
    """Tuned blocks, counted from the output; 0: the head alone."""
    rank: int
    step_s: float
    cpu_s: float
    """CPU seconds of a step: its wall time on one idle core."""
    whole: bool = False
    """Whether every parameter of the base was tuned."""
    peak_bytes: int
    base_bytes: int


class Steps(msgspec.Struct, frozen=True, kw_only=True):
    """`profiles/steps.json`: what `bench/record_steps.py` measured, and on what."""

    machine: str
    date: str
    base: str
    blocks: int
    tokens: int
    linear_params: int
    factor_params: int
    """Parameters of the factors at rank 1 on every layer."""
    agent_bytes: int
    records: list[Recorded]


@dataclass(frozen=True)
class Kind:
    """A class of device. `quota`: share of a core of the recording machine that is as fast; `knee`: batch from which
    its memory bandwidth limits it; `holds`: bits of the base that its memory holds, with `room` for so many samples."""

    name: str
    share: float
    quota: float
    cores: float
    knee: float
    holds: int
    room: int
    whole: bool = False
    """Whether its memory holds the moments of the whole base beside it, so that all of it can be tuned."""
    bits: tuple[Bits, ...] = (4, 8, 16)
    """Precisions that its kernels run."""
    spare: int = 0
    """Bytes of memory beyond the agent's own size, whatever `holds` and `room` say; 0: what they need."""
    link: float = 0.0
    """Bytes per second of its link; 0: drawn anew each round."""
    heats: bool = True
    """Whether work makes it hot, and heat slow."""
    charge: float = 1.0
    """Steps whose time each step takes."""
    real: bool = False
    """Whether its memory is a machine's own, of which a recording tells the share that others hold; else it was made
    for small bases, and others hold of `virtual_device.SPARE`."""
    card: bool = False
    """Whether its memory is a GPU's own, whose allocator says that it is full where else the kernel ends the agent."""


EPOCH = 10.0
"""In the papers a round is a local epoch, of a hundred steps and more, which outweigh its transfers. Here some eight
are computed, and each is charged as so many: what is compared is planning of training, on links that are no faster."""
KINDS = (
    Kind("tx2", 0.30, 0.05, 6.0, 12.0, 4, 12, charge=EPOCH),
    Kind("nx", 0.40, 0.1, 6.0, 20.0, 8, 20, charge=EPOCH),
    Kind("agx", 0.10, 0.2, 8.0, 32.0, 16, 40, charge=EPOCH),
    Kind("gpu", 0.20, 0.5, 16.0, 96.0, 16, 96, charge=EPOCH, card=True),
)
"""Speeds 1 : 2 : 4 (: 10). TX2 and NX have 8 GB each, the AGX 32 GB: scaled to the small bases simulated here that is
room for so many samples beside the base at the bits that one of billions of parameters would get there. The weights of
a small base weigh little against its activations, so memory bounds batches more often than bits."""
PROFILES: dict[str, tuple[Kind, ...]] = {
    "jetson": KINDS,
    "jetson-roomy": tuple(replace(kind, holds=32, room=96, whole=True, bits=(4, 8, 16, 32)) for kind in KINDS),
    "jetson-short": tuple(replace(kind, charge=1.0) for kind in KINDS),
    "equal": (Kind("nx", 1.0, 0.1, 6.0, 20.0, 16, 40, charge=EPOCH),),
    "equal-roomy": (Kind("nx", 1.0, 0.1, 6.0, 20.0, 32, 96, whole=True, bits=(4, 8, 16, 32), charge=EPOCH),),
    "pair": (Kind("small", 0.5, 0.1, 6.0, 20.0, 4, 4, spare=192 * MIB), Kind("large", 0.5, 0.1, 6.0, 20.0, 16, 40)),
}
"""Name -> the classes of a fleet. `equal` has one class; `pair` two of equal speed, the smaller with memory for the
narrow base at 4 bits and for few ranks beside it; neither has power modes or other programs. `jetson-roomy` is `jetson`
with memory enough to tune the base itself, as no Jetson has: what full fine-tuning is granted, so that it can be
compared at all; `equal-roomy` is `equal` likewise. `jetson-short` charges each step as one: there transfers outweigh
training."""


@dataclass(frozen=True)
class Shape:
    """The base at hand, as the model counts it. `linear_params`, `other_params`: parameters in and outside the linear
    layers of its `blocks`."""

    blocks: int
    tokens: int
    linear_params: int
    other_params: int


@dataclass(frozen=True)
class StepWork:
    """What a device does in a step: `lowest` tuned block (`blocks`: none), `factors`: parameters that are trained,
    `whole`: whether they are all of the base."""

    bits: int
    batch: int
    lowest: int
    factors: int
    whole: bool = False
    left: float = 1.0
    """Share of the parameters in linear layers that was not pruned."""


@dataclass(frozen=True)
class Foreign:
    """What other programs use: a share of the device's cores, and of its spare memory."""

    share: float = 0.0
    memory: float = 0.0


class StepTable:
    """Recorded step times, interpolated: on one core over the batch, with factors for bits, depth, rank and quota."""

    def __init__(self, steps: Steps) -> None:
        self.steps = steps
        rank, batch = _usual([r.rank for r in steps.records]), _usual([r.batch for r in steps.records])
        alone = [r for r in steps.records if r.quota == 1.0 and not r.whole]
        at_16 = [r for r in alone if r.bits == 16 and r.rank == rank]
        full = [r for r in at_16 if r.blocks == steps.blocks]
        here = next(r.cpu_s for r in full if r.batch == batch)
        self._rank = rank
        self._curve = sorted((math.log(r.batch), math.log(r.cpu_s / r.batch)) for r in full)
        self._depths = sorted((float(r.blocks), r.cpu_s / here) for r in at_16 if r.batch == batch)
        self.bits = {
            r.bits: r.cpu_s / here for r in alone if (r.batch, r.blocks, r.rank) == (batch, steps.blocks, rank)
        }
        # What a rank adds is lost in the noise of a recording: by its FLOP, against those of the frozen layers.
        self._per_factor = 6.0 / (4.0 * steps.linear_params)
        whole = next((r.cpu_s / here for r in steps.records if r.whole), None)
        # Not recorded, by FLOP: a gradient of every weight comes to the passes forward and back.
        self._whole = whole / self.bits[32] if whole is not None else 1.5
        self._quotas = [(0.0, 0.0)] + sorted(
            (-math.log(r.quota), math.log(r.step_s / here)) for r in steps.records if r.quota < 1.0
        )

    def seconds(self, work: StepWork, shape: Shape, quota: float) -> float:
        """Seconds of an undisturbed step on `quota` cores of the recording machine."""
        steps = self.steps
        size = shape.linear_params * work.left / steps.linear_params
        per_sample = math.exp(_interpolated(self._curve, math.log(work.batch)))
        depth = steps.blocks * (shape.blocks - work.lowest) / shape.blocks
        usual = self._rank * steps.factor_params * depth / steps.blocks
        share = _interpolated(self._depths, depth)
        share = self._whole * share if work.whole else share + self._per_factor * (work.factors / size - usual)
        # Below one core as it was recorded; above nothing was, and a step is faster by as much as the cores are.
        stretch = math.exp(_interpolated(self._quotas, -math.log(quota))) if quota < 1.0 else 1.0 / quota
        whole = work.batch * per_sample * size * shape.tokens / steps.tokens
        return whole * max(share, 0.05) * self.bits.get(work.bits, 1.0) * stretch


def _usual(values: Sequence[int]) -> int:
    """What most records have."""
    return max(sorted(set(values)), key=list(values).count)


def _interpolated(points: Sequence[tuple[float, float]], x: float) -> float:
    """Linear between the points; beyond the ends along the last piece."""
    if len(points) == 1:
        return points[0][1]
    place = min(max(bisect.bisect([p[0] for p in points], x), 1), len(points) - 1)
    (x0, y0), (x1, y1) = points[place - 1], points[place]
    return y0 + (y1 - y0) * (x - x0) / (x1 - x0)


@dataclass(frozen=True)
class Device:
    """One virtual device: its class, and all its draws."""

    name: str
    kind: Kind
    seed: int
    restless: bool = True
    """Whether power modes change and other programs come and go."""

    def power(self, round: int) -> float:
        """Power mode of a round: the share of its class's speed that the device has, 0.5 to 1."""
        if not self.restless:
            return 1.0
        return 0.5 + 0.5 * draw(self.seed, self.name, "power", max(round - 1, 0) // POWER_ROUNDS)

    def probed(self, round: int) -> float:
        """FLOP per second of a core that a probe in `round` measures. Products alone tell a device's speed at training
        but roughly: it is another device's by chance, the same in each probe."""
        odd = math.exp(PROBE_ODDS * normal(self.seed, self.name, "probe"))
        return CORE_FLOPS * self.kind.quota / self.kind.cores * self.power(round) * odd

    def bandwidth(self, round: int) -> float:
        """Bytes per second of its link in a round: its class's, or log-uniform and correlated from round to round."""
        return self.kind.link or _bandwidth(self.seed, self.name, round)

    def noise(self, *place: object) -> float:
        """Factor on one step's time; `place` names the step."""
        return math.exp(STEP_NOISE * normal(self.seed, self.name, "step", *place))

    def foreign(self, now: float) -> Foreign:
        """What other programs use at `now` seconds."""
        if not self.restless:
            return Foreign()
        share = memory = 0.0
        last = int(now // BURST_SLOT_S)
        for slot in range(max(0, last - int(BURST_MOST_S // BURST_SLOT_S) - 1), last + 1):
            key = (self.seed, self.name, "burst", slot)
            if draw(*key) >= BURST_CHANCE:
                continue
            begin = (slot + draw(*key, "begin")) * BURST_SLOT_S
            lasts = min(BURST_MOST_S, -BURST_MEAN_S * math.log(draw(*key, "lasts")))
            if begin <= now < begin + lasts:
                share += 0.15 + 0.6 * draw(*key, "share")
                memory += 0.1 * draw(*key, "memory")
        return Foreign(min(share, 0.85), min(memory, 0.3))

    def step_s(
        self, table: StepTable, work: StepWork, shape: Shape, *, round: int, heat: float, noise: float, foreign: float
    ) -> float:
        """Seconds of a step in `round` on a device of `heat` (0 to 1), disturbed by `noise` and by other programs that
        use the share `foreign` of its cores."""
        plain = table.seconds(work, shape, self.kind.quota) * self.kind.charge
        saturated = math.pow(1.0 + (work.batch / self.kind.knee) ** 4, 0.1)
        mine = 1.0 / (1.0 + CONTENTION * foreign)
        return plain * saturated * noise / (self.power(round) * mine * (1.0 - throttled(heat)))


@lru_cache(maxsize=4096)
def _bandwidth(seed: int, name: str, round: int) -> float:
    fresh = math.sqrt(1.0 - AUTOCORRELATION**2)
    value = sum(
        math.pow(AUTOCORRELATION, back) * fresh * normal(seed, name, "link", round - back)
        for back in range(_MEMORY_TERMS)
    )
    low, high = BANDWIDTH_MBIT
    return 1e6 / 8 * low * math.exp(math.log(high / low) * float(_NORMAL.cdf(value)))


def throttled(heat: float) -> float:
    """Share of the speed that a device of `heat` gives up to stay cool."""
    return HOTTEST_LOSS * max(0.0, heat - HOT) / (1.0 - HOT)


def heated(heat: float, seconds: float, *, busy: bool) -> float:
    """Heat after `seconds` at work or at rest."""
    kept = math.exp(-seconds / HEAT_S)
    return heat * kept + (1.0 - kept if busy else 0.0)


def temperature_c(heat: float) -> float:
    """What its sensor reads."""
    return 38.0 + 44.0 * heat


BYTES_WEIGHT = {32: 4.0, 16: 2.0, 8: 1.07, 4: 0.57}
"""Per parameter of a linear layer as the agent holds it, scales and padding included."""
WORKING = 66 * MIB
"""What work adds to an agent for good: libraries, scratch, the allocator's slack."""
LOADING = 36 * MIB
"""What lies beside the base while it is loaded."""


@dataclass(frozen=True)
class MemoryTable:
    """What the recorded agent's memory says. `per_sample`: activations at 16 bits through all blocks, of the recorded
    base and tokens."""

    agent_bytes: int
    per_sample: float
    size: float
    """linear parameters x tokens of the recording."""

    @staticmethod
    def of(steps: Steps) -> MemoryTable:
        """From the peaks over the batch at 16 bits (the slope of the least-squares line)."""
        usual = (1.0, 16, steps.blocks, _usual([r.rank for r in steps.records]))
        found = [
            (r.batch, r.peak_bytes) for r in steps.records
            if not r.whole and (r.quota, r.bits, r.blocks, r.rank) == usual
        ]  # fmt: skip
        mean_b, mean_p = (sum(p[i] for p in found) / len(found) for i in (0, 1))
        spread = sum((b - mean_b) ** 2 for b, _ in found)
        slope = sum((b - mean_b) * (p - mean_p) for b, p in found) / spread
        return MemoryTable(steps.agent_bytes, slope, float(steps.linear_params * steps.tokens))

    def loaded(self, shape: Shape, bits: int) -> int:
        """Resident bytes of an agent that holds the base."""
        other = shape.other_params * (4 if bits == 32 else 2)
        return int(self.agent_bytes + shape.linear_params * BYTES_WEIGHT[bits] + other)

    def peak(self, shape: Shape, work: StepWork) -> int:
        """Resident bytes at the worst moment of a round: at work, or while the base is loaded."""
        wide = 1.6 if work.bits == 32 else 1.0
        depth = 0.25 + 0.75 * (shape.blocks - work.lowest) / shape.blocks
        activations = self.per_sample * shape.linear_params * shape.tokens / self.size * work.batch * wide * depth
        return int(self.loaded(shape, work.bits) + WORKING + 16 * work.factors + max(activations, LOADING))


def fleet(profile: str, count: int, seed: int) -> list[Device]:
    """`count` devices of a profile in the shares of its classes, in an order drawn by each device's own hash."""
    return drawn(PROFILES[profile], count, seed, restless=profile.startswith("jetson"))


def drawn(kinds: Sequence[Kind], count: int, seed: int, *, restless: bool = True) -> list[Device]:
    """`count` devices of these classes, as `fleet`."""
    width = max(2, len(str(count)))
    found = []
    for number in range(count):
        name = f"sim-{number + 1:0{width}d}"
        # The golden ratio spreads any number of devices over the classes as evenly as their shares allow.
        place = (number * 0.6180339887498949 + draw(seed, "classes")) % 1.0
        for kind in kinds:
            place -= kind.share
            if place < 0:
                break
        found.append(Device(name, kind, seed, restless))
    return found


Happening = Literal["join", "leave", "crash"]
UP_S, DOWN_S, CRASH_SHARE, LATE_SHARE, LATE_S = 2400.0, 180.0, 0.4, 0.1, 600.0
"""Mean seconds up and away; shares of absences that are crashes, and of devices that join late, within `LATE_S`."""


def happenings(device: Device) -> Iterator[tuple[float, Happening]]:
    """When the device joins, leaves and crashes, in order, without an end."""
    if not device.restless:
        yield 0.0, "join"
        return
    key = (device.seed, device.name, "presence")
    late = draw(*key, "late") < LATE_SHARE
    now = LATE_S * draw(*key, "joins") if late else 0.0
    yield now, "join"
    for place in itertools.count():
        now -= UP_S * math.log(draw(*key, place, "up"))
        yield now, "crash" if draw(*key, place, "kind") < CRASH_SHARE else "leave"
        now -= DOWN_S * math.log(draw(*key, place, "down"))
        yield now, "join"
