"""An ablation: planners that know the clock's device model instead of learning from telemetry and returned timings.

What is left between such a run and an ordinary one is the price of not knowing. The oracle knows each device's step
time at its power mode and heat, and its link in the coming round; neither the noise of a step nor the foreign load of
the seconds to come. Memory is learned as ever; what a rank adds to a step is the planner's own estimate. `legend` keeps
averages of its own and takes no part. No planner knows of this module: the testbed hands them their models.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from msgspec.structs import replace

from coordinator.core.planning import registry
from coordinator.core.planning.base import Planner, RoundReport
from coordinator.core.planning.cost_model import CostModel, Pace
from coordinator.core.planning.demand import Demand
from coordinator.core.planning.readings import Capacity
from muster.testbed import device_model as dm
from muster.testbed.virtual_device import Base, VirtualDevice
from shared.jobs import Bits

KNOWN = "known"
"""Where a speed is from, in reasons."""


class TruePace(Pace):
    """Step time by the device model: `seconds` of a batch. The linear parts are its chord over `batches`."""

    seconds: Callable[[int], float]

    @staticmethod
    def of(seconds: Callable[[int], float], batches: tuple[int, int]) -> TruePace:
        """The pace whose step takes `seconds`."""
        low, high = batches
        slope = (seconds(high) - seconds(low)) / (high - low)
        pace = TruePace(max(0.0, seconds(low) - slope * low), slope, KNOWN)
        pace.seconds = seconds
        return pace

    def step_s(self, batch: int) -> float:
        """Seconds per optimizer step."""
        return self.seconds(batch)


class TrueModel(CostModel, frozen=True, kw_only=True):
    """The cost model whose step times and links are those of the virtual devices."""

    nature: Mapping[str, VirtualDevice]

    def pace(self, device: str, need: Demand, bits: Bits, free: Capacity) -> Pace:
        """Step time of `device` in the round to come."""
        known = self.nature[device]
        lowest, factors = work_of(need, known.clock.base)
        foreign = free.foreign / free.cores

        def seconds(batch: int) -> float:
            work = dm.StepWork(bits, batch, lowest, factors, known.clock.base.whole)
            return known.model.step_s(
                known.clock.table, work, known.clock.base.shape, round=known.clock.coming, heat=known.heat,
                noise=1.0, foreign=foreign,
            )  # fmt: skip

        return TruePace.of(seconds, (4, 16))

    def transfer(self, device: str, size: int) -> tuple[float, str]:
        """Seconds to move `size` bytes over the device's link in the round to come."""
        known = self.nature[device]
        rate = known.model.bandwidth(known.clock.coming)
        return size / rate, f"{size / 2**20:.1f} MiB at {rate / 1e6:.2f} MB/s"

    def learn(self, report: RoundReport) -> TrueModel:
        """What was learned of memory; times are known."""
        learned = CostModel.learn(self, report)
        return replace(
            self, devices=learned.devices, activation_scale=learned.activation_scale, load_s=learned.load_s
        )  # fmt: skip


def work_of(need: Demand, base: Base) -> tuple[int, int]:
    """(lowest tuned block, trained parameters) of `need`, from its FLOP (`demand.demand`)."""
    shape = base.shape
    factors = need.adapter_params - base.dense
    logits = 4.0 * need.other_params if need.kind == "causal" else 0.0
    flop = need.flop / shape.tokens - 2.0 * need.linear_params - 6.0 * factors - logits
    depth = flop / (2.0 * need.linear_params) if need.linear_params else 1.0
    return shape.blocks - round(min(1.0, max(0.0, depth)) * shape.blocks), need.adapter_params


@contextmanager
def planners(made: Mapping[str, Callable[[], Planner]]) -> Iterator[None]:
    """Planners of these names are `made` so meanwhile."""
    before = registry.PLANNERS
    registry.PLANNERS = {**before, **made}
    try:
        yield
    finally:
        registry.PLANNERS = before


def known_to_planners(devices: Sequence[VirtualDevice]) -> AbstractContextManager[None]:
    """Planners made meanwhile know the clock's model of `devices`."""
    model = TrueModel(nature={device.model.name: device for device in devices})

    def knowing(make: Callable[[], Planner]) -> Callable[[], Planner]:
        def made() -> Planner:
            planner: Any = make()
            return replace(planner, model=model) if hasattr(planner, "model") else planner  # type: ignore[no-any-return]  # a planner stays one

        return made

    return planners({name: knowing(make) for name, make in registry.PLANNERS.items()})
