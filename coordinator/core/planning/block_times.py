"""What a device takes for a forward pass and for a block of back-propagation, learned from whole steps (for `legend`).

A device measures steps, not their parts. Let y be the core-seconds per sample of a round, of steps with the job's batch
(what of a step does not grow with its batch weighs more in a small one: the cost model tells the two apart, once the
device was seen at two batches or told its probe), and b the blocks its gradient went through, by FLOP; then
y = c (phi + b), c the device's time of a block and phi the blocks that a forward pass takes as long as. c is each
device's own, a ratio of moving averages (rho = 0.8); phi belongs to the model and the kind of machine, so all devices
of a kind tell it together, by the depths they were seen at. As depths settle they tell nothing new: then phi stays as
it was. All of it, rho included, is our reading of LEGEND's estimate of a device's capacity.
"""

from __future__ import annotations

import math

import msgspec
import numpy as np
from msgspec.structs import replace

from coordinator.core.facts import ModelFacts
from coordinator.core.planning.base import RoundReport
from coordinator.core.planning.cost_model import (
    BITS_TIME,
    CostModel,
    mean_step_s,
    measures_link,
    used_cores,
)
from coordinator.core.planning.demand import Demand, block_flop, demand
from coordinator.core.planning.drafts import job_batch
from coordinator.core.planning.readings import capacity
from shared.jobs import JobSpec
from shared.messages import Load, UpdateFacts, Work

KEEP = 0.8
"""rho: the weight of the past against one new round; ours."""
FORWARD = 0.7
"""Seconds of a FLOP forward against one backward, before a device was seen at several depths (`bench/depth.py`)."""
DOUBT = 0.002
"""Weight of phi as it was against what the depths tell now: a factor of 2 is worth 3 % of one device's times."""


class Seen(msgspec.Struct, frozen=True, kw_only=True):
    """What a device's rounds taught, as moving averages over its rounds.

    y: core-seconds per sample at 32 bits and the job's batch; b: blocks that the gradient went through, by FLOP.
    """

    time: float = 0.0
    """Of y."""
    blocks: float = 0.0
    """Of b."""
    blocks_square: float = 0.0
    """Of b b."""
    blocks_time: float = 0.0
    """Of b y."""
    rounds: int = 0
    byte_s: float = 0.0
    """Of seconds per byte over its link; 0: not yet known."""

    def split(self, forward_blocks: float) -> tuple[float, float]:
        """(core-seconds per sample of the forward pass, per block of back-propagation) in steps with the job's
        batch, where the former takes as long as `forward_blocks` of the latter."""
        block = self.time / (forward_blocks + self.blocks)
        return forward_blocks * block, block


NEVER = Seen()


class BlockTimes(msgspec.Struct, frozen=True, kw_only=True):
    """All that was learned of a fleet; `learn` returns a new one."""

    devices: dict[str, Seen] = {}
    forward_blocks: dict[str, float] = {}
    """"cpu" and "gpu" -> phi; absent: nothing told yet."""

    def forward(self, usual: float, *, gpu: bool) -> float:
        """phi of a kind of machine."""
        return self.forward_blocks.get(_kind(gpu), usual)

    def learn(self, report: RoundReport, model: CostModel) -> BlockTimes:
        """With one more round; `model` knows it already. Only where the report names the job and the base."""
        if report.facts is None or report.job is None:
            return self
        devices, needs, plain = dict(self.devices), dict[int, Demand](), demand(report.facts, report.job, {})
        batch, block = job_batch(report.job), block_flop(report.facts, report.job)
        for device, result in sorted(report.results.items()):
            work, found = report.works[device], devices.get(device, NEVER)
            # Most works of a plan share a mapping.
            need = needs.get(id(work.ranks)) or needs.setdefault(
                id(work.ranks), demand(report.facts, report.job, work.ranks)
            )
            if (sample_s := _sample_s(device, result, report.loads.get(device), work, need, batch, model)) > 0:
                found = _with_time(found, sample_s, (need.flop - plain.flop) / block)
            devices[device] = _with_link(found, report.adapter_bytes, result.fetch_s)
        kinds: dict[bool, list[Seen]] = {False: [], True: []}
        for device, seen in sorted(devices.items()):
            if seen.rounds > 1 and seen.time > 0:
                kinds[device in model.devices and model.devices[device].gpu].append(seen)
        usual = usual_forward(report.facts, report.job)
        forward = {_kind(gpu): _phi(found, self.forward(usual, gpu=gpu)) for gpu, found in kinds.items() if found}
        return BlockTimes(devices=devices, forward_blocks={**self.forward_blocks, **forward})


def usual_forward(facts: ModelFacts, job: JobSpec) -> float:
    """phi before anything was measured."""
    return FORWARD * demand(facts, job, {}).flop / block_flop(facts, job)


def _kind(gpu: bool) -> str:
    return "gpu" if gpu else "cpu"


def _phi(found: list[Seen], before: float) -> float:
    """The phi that explains best what devices took at their depths, by least squares; near `before` where they tell
    little.

    The c that fits best leaves E[y y] - E[y (phi + b)]^2 / E[(phi + b)^2] of a device's squares; relative to E[y]^2 the
    devices count alike, and one seen at a single depth tells nothing.
    """
    time, blocks, square, product = np.array(
        [(seen.time, seen.blocks, seen.blocks_square, seen.blocks_time) for seen in found]
    ).T
    tried = before * np.geomspace(1 / 16, 16, 161)
    phi = tried[:, None]
    explained = ((phi + product / time) ** 2 / (phi * phi + 2 * phi * blocks + square)).sum(axis=1)
    return float(tried[np.argmax(explained - DOUBT * np.log(tried / before) ** 2)])


def _sample_s(
    device: str, result: UpdateFacts, load: Load | None, work: Work, need: Demand, batch: int, model: CostModel
) -> float:  # fmt: skip
    """Core-seconds per sample of a step with `batch` samples, by the step that the device did; 0: nothing tells."""
    cores = used_cores(model.devices.get(device), result, load, work.agents)
    if cores is None or result.step_s <= 0 or result.steps < 1 or result.batch < 1:
        return 0.0
    step_s = mean_step_s(result)
    if result.batch != batch:
        # However much of the device it usually gets.
        used = capacity(None, load, work.agents)._replace(cores=math.inf, free=cores)
        pace = model.pace(device, need, result.bits, used)
        step_s *= pace.step_s(batch) / pace.step_s(result.batch)
    return step_s * cores / batch / BITS_TIME[result.bits]


def _with_time(found: Seen, sample_s: float, blocks: float) -> Seen:
    """With a round's time, and the blocks that its gradient went through."""
    if blocks <= 0:
        return found
    known = found.rounds > 0
    return replace(
        found,
        time=_average(found.time, sample_s, known=known),
        blocks=_average(found.blocks, blocks, known=known),
        blocks_square=_average(found.blocks_square, blocks * blocks, known=known),
        blocks_time=_average(found.blocks_time, blocks * sample_s, known=known),
        rounds=found.rounds + 1,
    )


def _with_link(found: Seen, size: int, fetch_s: float) -> Seen:
    if not measures_link(size, fetch_s):
        return found
    return replace(found, byte_s=_average(found.byte_s, fetch_s / size, known=found.byte_s > 0))


def _average(before: float, new: float, *, known: bool) -> float:
    return KEEP * before + (1.0 - KEEP) * new if known else new
