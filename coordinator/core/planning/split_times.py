"""mu and beta: seconds a device takes to compute, and its link to transmit, one sample of split learning.

MergeSFL's moving average, a = 0.8 (its form is our recollection of the paper). Kept are core-seconds per FLOP and
seconds per byte, so that neither live load nor the block of the cut spoils what was learned; the first measurement
stands as it is. Where a device tells its probe, what was learned moves with it: a power mode of last week is not a
speed of today (our reading). A device that was not measured takes the cost model's step time at the job's batch. beta
counts features up and their gradient down at the rate of the device's downloads; 0 as long as that is not known. The
wait that devices tell (`UpdateFacts.wait_s`) holds the top model and the slowest of the others too, so no beta is made
of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import msgspec

from coordinator.core.planning.base import RoundReport
from coordinator.core.planning.cost_model import BITS_TIME, CostModel, measures_link, usable, used_cores
from coordinator.core.planning.demand import Demand
from coordinator.core.planning.lower_part import demand_of, own_compute
from coordinator.core.planning.readings import probed_flops
from coordinator.core.planning.reasons import plural, seconds
from coordinator.core.planning.sizing import Seat
from shared.jobs import Bits

KEEP = 0.8
"""a: the weight of the past against one new round."""


class Seen(msgspec.Struct, frozen=True, kw_only=True):
    """Moving averages of one device."""

    flop_s: float = 0.0
    """Core-seconds per FLOP at 32 bits."""
    flops: float = 0.0
    """FLOP per second of the probe that `flop_s` goes with; 0: none was told."""
    byte_s: float = 0.0
    """Seconds per byte over its link; 0: not known."""
    rounds: int = 0


class Sample(NamedTuple):
    """Seconds of one sample on a device, and where they are from."""

    compute: float
    """mu."""
    transmit: float
    """beta."""
    source: str

    @property
    def whole(self) -> float:
        """mu + beta."""
        return self.compute + self.transmit

    def __str__(self) -> str:
        return f"{seconds(self.compute)} compute + {seconds(self.transmit)} transfer per sample ({self.source})"


class SplitTimes(msgspec.Struct, frozen=True, kw_only=True):
    """All that was learned of a fleet; `learn` returns a new one."""

    devices: dict[str, Seen] = {}

    def learn(self, report: RoundReport, model: CostModel) -> SplitTimes:
        """With one more round; `model` knows it already."""
        if report.facts is None or report.job is None:
            return self
        devices = dict(self.devices)
        for device, result in sorted(report.results.items()):
            work = report.works[device]
            if work.split is None:
                continue
            found = devices.get(device, Seen())
            own = own_compute(result, work)
            cores = used_cores(model.devices.get(device), own, report.loads.get(device), work.agents)
            need = demand_of(report.facts, report.job, work)
            if cores is not None and own.step_s > 0 and own.batch > 0 and own.steps > 0 and need.flop > 0:
                seen = own.step_s * cores / own.batch / need.flop / BITS_TIME[own.bits]
                probe = probed_flops(report.infos.get(device))
                flop_s = _average(_moved(found, probe), seen, known=found.rounds > 0)
                found = msgspec.structs.replace(
                    found, flop_s=flop_s, flops=probe or found.flops, rounds=found.rounds + 1
                )
            if measures_link(report.adapter_bytes, result.fetch_s):
                byte_s = _average(found.byte_s, result.fetch_s / report.adapter_bytes, known=found.byte_s > 0)
                found = msgspec.structs.replace(found, byte_s=byte_s)
            devices[device] = found
        return SplitTimes(devices=devices)

    def sample(
        self, place: Seat, need: Demand, bits: Bits, features: float, batch: int, model: CostModel
    ) -> Sample:  # fmt: skip
        """mu and beta of the device at `place`. `features`: bytes of a sample one way; `batch`: the job's."""
        found = self.devices.get(place.device, Seen())
        known = model.devices.get(place.device)
        if found.rounds:
            compute = _moved(found, place.free.flops) * need.flop * BITS_TIME[bits] / usable(place.free, known)
            source = f"averaged over {plural(found.rounds, 'round')}"
        else:
            pace = model.pace(place.device, need, bits, place.free)
            compute, source = pace.step_s(batch) / batch, pace.source
        link = f"{1e-6 / found.byte_s:.2f} MB/s" if found.byte_s else "link not yet measured"
        return Sample(compute, 2.0 * features * found.byte_s, f"{source}, {link}")


def median(samples: Mapping[str, Sample]) -> str:
    """The device of median mu + beta, the lower one of two."""
    ordered = sorted(samples, key=lambda device: (samples[device].whole, device))
    return ordered[(len(ordered) - 1) // 2]


def _moved(found: Seen, probe: float) -> float:
    """Core-seconds per FLOP on a device that now probes so many FLOP per second."""
    return found.flop_s * found.flops / probe if found.flops and probe else found.flop_s


def _average(before: float, new: float, *, known: bool) -> float:
    return KEEP * before + (1.0 - KEEP) * new if known else new
