"""What planners do alike around their own method: traffic of a round, the reason of the steps, nobody who can."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from typing import NamedTuple

from coordinator.core.aggregation import registry as aggregation
from coordinator.core.planning.base import FleetView
from coordinator.core.planning.cost_model import CostModel
from coordinator.core.planning.demand import traffic
from coordinator.core.planning.reasons import seconds, word
from shared.jobs import Bits, JobSpec
from shared.starts import averages_factors

LINK_LATE = 2.0
"""How much longer than it should a download may take. Links vary by factors, and nothing is won by a download whose
device then has no time to train: its upload comes late all the same."""
ASSUMED_LINK = 5e5
"""Bytes per second of links as long as none was measured: 4 Mb/s."""
DEADLINE_SHARE = 0.9
"""Of the deadline, what training may fill; the rest is for loading, and for transfers that take longer."""


def global_rank(view: FleetView, job: JobSpec, rank: int) -> int:
    """An upper bound of the global adapter's rank: what the rounds so far can have added, up to its cap.

    `rank`: the largest that an agent trains in a round.
    """
    agents = sum(candidate.info.agents for candidate in view.candidates)
    return min(aggregation.create(job.strategy).global_rank, (view.round - 1) * agents * rank)


class Moved(NamedTuple):
    """Bytes over a device's link in a round."""

    down: int
    up: int

    @property
    def both(self) -> int:
        """Down and up."""
        return self.down + self.up


def moved(view: FleetView, job: JobSpec, ranks: Mapping[str, int], bound: int, agents: int) -> Moved:
    """What goes over a device's link in the round: the global adapter (of rank `bound` at most) down, the update of its
    agents up."""
    # Factors that are averaged are so on the device already; products are stacked.
    start = aggregation.create(job.strategy).start
    sends_a = start != "frozen_a" or view.round == 1
    stacked = 1 if averages_factors(start) else agents
    down, up, _ = traffic(
        view.facts, ranks, bound, job.training.codec, stacked, sends_a=sends_a, global_codec=job.strategy.global_codec
    )
    return Moved(view.adapter_bytes or down, up)


class Links:
    """Seconds of transfers over the devices' links, and over the median one where a device's own was not measured."""

    def __init__(self, model: CostModel) -> None:
        links = [known.link for known in model.devices.values() if known.link]
        self._model = model
        self.usual = statistics.median(links) if links else 0.0
        """Bytes per second; 0: none was measured."""

    def transfer(self, device: str, size: int) -> tuple[float, str]:
        """Seconds to move `size` bytes, with the reading; 0 s where no link was measured."""
        took, reading = self._model.transfer(device, size)
        return (took, reading) if took or not size or not self.usual else (size / self.usual, self.unmeasured())

    def unmeasured(self) -> str:
        """The reading of a link that was not measured."""
        told = f": the median's {self.usual / 1e6:.2f} MB/s" if self.usual else ""
        return f"link not yet measured{told}"


EXTRA = 0.25
"""Of the steps, how many more a device may do that is faster than was thought."""


class Limits:
    """How long the works of a plan may take, so that all deliver at one time: nobody waits long for a device that is
    slower than was thought, and one that is faster goes on meanwhile."""

    def __init__(self, job: JobSpec, model: CostModel) -> None:
        self._rounds, self._devices, self.links = job.rounds, model.devices, Links(model)
        self._measured, self._load_s = model.measured, model.load_s

    def transfer_s(self, device: str, size: int) -> float:
        """Seconds that `size` bytes should take (`Links`), at `ASSUMED_LINK` as long as none was measured."""
        return self.links.transfer(device, size)[0] or size / ASSUMED_LINK

    @property
    def together(self) -> bool:
        """As `Plan.together`: what ends works before their time can be told."""
        return not self._measured

    def begins_s(self, device: str, bits: Bits, moves: Moved) -> float:
        """Seconds from receipt after which its first step should begin."""
        return self.transfer_s(device, moves.down) + self._loads_s(device, bits)

    def _loads_s(self, device: str, bits: Bits) -> float:
        known = self._devices.get(device)
        return 0.0 if known is not None and str(bits) in known.fits else self._load_s

    def extra(self, steps: int) -> int:
        """As `Work.extra_steps`: none where nothing ends them."""
        return math.ceil(EXTRA * steps) if self._measured else 0

    def of(
        self, device: str, bits: Bits, train_s: float, steps: int, moves: Moved, usual_s: float = 0.0
    ) -> float:  # fmt: skip
        """Seconds from receipt after which the device begins no further step and delivers what it has done; 0: no
        limit. Partial work counts.

        The job's own, or `train_s`, which there is for its `steps`, and what the download of `moves` should take; where
        that and the upload take less than `usual_s`, which the target leaves for all to move theirs, the rest as well.
        A step that has begun is finished: half of one is taken off, so that on the mean work ends at that time. A
        download of `LINK_LATE` times what it should take leaves half the time to train. The job's alone before speeds
        were measured; a device that did not train over such a base yet has the time to load it. `DEADLINE_SHARE` of the
        deadline is enough for the upload as well (of which half the deadline is the most that is kept free), so that
        what is delivered then still counts.
        """
        rounds = self._rounds
        if not self._measured:
            return rounds.train_for_s
        loads_s = self._loads_s(device, bits)
        down_s, up_s = self.transfer_s(device, moves.down), self.transfer_s(device, moves.up)
        ends_s = train_s * (1 - 1 / (2 * max(1, steps)))
        in_time = DEADLINE_SHARE * rounds.deadline_s - min(up_s, rounds.deadline_s / 2)
        late_s = max(ends_s + max(down_s, usual_s - up_s), ends_s / 2 + LINK_LATE * down_s)
        return min(late_s + loads_s, in_time, rounds.train_for_s or math.inf)


def steps_reason(
    job: JobSpec, steps: int, step_s: float, transfer: str, *, limit: float, extra: int = 0, begins_s: float = 0.0
) -> tuple[float, str]:  # fmt: skip
    """(seconds of training expected, reason of the number of steps).

    `limit`: as in `Work.train_for_s`, after which no step begins; the download has its part of it, which is not taken
    off here. `extra`: steps that the device goes on for until then; `begins_s`: when the first of all steps should
    begin.
    """
    done, expected = steps_within(limit, steps, step_s), steps * step_s
    more = min(extra, max(0, math.ceil((limit - begins_s) / step_s) - steps)) if extra and step_s > 0 else 0
    reading = f"{steps} asked x {seconds(step_s)} = {seconds(expected)}"
    if limit:
        reading += f", the last from {seconds((steps - 1) * step_s)} on"
        met, bound, note = done == steps, f"{seconds(limit)} training time", "partial work counts"
    else:
        met, bound = expected <= job.rounds.deadline_s, f"{seconds(job.rounds.deadline_s)} deadline"
        note = "an update after the deadline is lost"
    further = f"up to {extra} more while there is time" if extra else ""
    notes = ("" if met else note, further, transfer)
    return (done + more) * step_s, word("steps", steps, reading, bound, *notes, verb="meets" if met else "exceeds")


def steps_within(limit: float, steps: int, step_s: float) -> int:
    """How many of `steps` begin before `limit` seconds, one in any case; 0: no limit."""
    return min(steps, max(1, math.ceil(limit / step_s))) if limit and step_s > 0 else steps


def nobody(job: JobSpec, left_out: Mapping[str, str]) -> str:
    """That no candidate can do the job, and why each of them (of the first ten) can't."""
    if not left_out:
        return f"no device can do job {job.name}: there are no candidates"
    told = "; ".join(f"{device}: {why}" for device, why in list(left_out.items())[:10])
    more = f"; and {len(left_out) - 10} more" if len(left_out) > 10 else ""
    return f"no device can do job {job.name}: {told}{more}"
