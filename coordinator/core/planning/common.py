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
ROUNDED = 1e-9
"""Of a step: what is later than a limit by no more than that is so by rounding."""
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


class End(NamedTuple):
    """When a work ends. `limit`: seconds from receipt after which no step begins (`Work.train_for_s`; 0: none);
    `extra`: as `Work.extra_steps`; `begins_s`: when the first step should begin (0: not reckoned)."""

    limit: float
    extra: int = 0
    begins_s: float = 0.0


class Ends:
    """When the works of a plan end, so that all deliver at one time: nobody waits long for a device that is slower than
    was thought, and one that is faster goes on meanwhile."""

    def __init__(self, job: JobSpec, model: CostModel) -> None:
        self._rounds, self._devices, self.links = job.rounds, model.devices, Links(model)
        self._measured, self._load_s = model.measured, model.load_s

    def transfer_s(self, device: str, size: int) -> float:
        """Seconds that `size` bytes should take (`Links`), at `ASSUMED_LINK` as long as none was measured."""
        known = self._devices.get(device)
        return size / ((known.link if known is not None else 0.0) or self.links.usual or ASSUMED_LINK)

    @property
    def together(self) -> bool:
        """As `Plan.together`: what ends works before their time can be told."""
        return not self._measured

    def of(
        self, device: str, bits: Bits, train_s: float, steps: int, moves: Moved, usual_s: float = 0.0
    ) -> End:  # fmt: skip
        """The end of a work of `steps`, for which there are `train_s`; partial work counts.

        The download of `moves` has the time that it should take; where that and the upload take less than `usual_s`,
        which the target leaves for all to move theirs, there is the rest as well. A step that has begun is finished:
        half of one is taken off, so that on the mean work ends at that time. A device that did not train over such a
        base yet loads it within that: it trains less, and nobody waits for it. Loading leaves half the time to train,
        and so does a download of `LINK_LATE` times what it should take; where one of these is later than all others
        end, there are no extra steps. The job's own limit holds, too: alone before speeds were measured, without extra
        steps. `DEADLINE_SHARE` of the deadline is enough for the upload as well (of which half the deadline is the most
        that is kept free), so that what is delivered then still counts.
        """
        rounds = self._rounds
        if not self._measured:
            return End(rounds.train_for_s)
        known = self._devices.get(device)
        loaded = known is not None and (str(bits) in known.fits or str(bits) in known.peaks)
        loads_s = 0.0 if loaded else self._load_s
        down_s, up_s = self.transfer_s(device, moves.down), self.transfer_s(device, moves.up)
        ends_s = train_s * (1 - 1 / (2 * max(1, steps)))
        in_time = DEADLINE_SHARE * rounds.deadline_s - min(up_s, rounds.deadline_s / 2)
        with_all = ends_s + max(down_s, usual_s - up_s)
        late = ends_s / 2 + max(LINK_LATE * down_s, down_s + loads_s)
        limit = min(max(with_all, late), in_time, rounds.train_for_s or math.inf)
        return End(limit, 0 if late > with_all else math.ceil(EXTRA * steps), down_s + loads_s)


def steps_reason(job: JobSpec, steps: int, step_s: float, transfer: str, end: End) -> tuple[float, str]:
    """(seconds of training expected, reason of the number of steps)."""
    limit, extra, begins_s = end
    done, expected = steps_within(limit, steps + extra, step_s, begins_s), steps * step_s
    reading = f"{steps} asked x {seconds(step_s)} = {seconds(expected)}"
    if limit:
        last_s = begins_s + (steps - 1) * step_s
        reading += f"{f' from {seconds(begins_s)} on' if begins_s else ''}, the last from {seconds(last_s)}"
        met, bound, note = last_s < limit, f"{seconds(limit)} training time", "partial work counts"
    else:
        met, bound = expected <= job.rounds.deadline_s, f"{seconds(job.rounds.deadline_s)} deadline"
        note = "an update after the deadline is lost"
    further = f"up to {extra} more while there is time" if extra else ""
    notes = ("" if met else note, further, transfer)
    return done * step_s, word("steps", steps, reading, bound, *notes, verb="meets" if met else "exceeds")


def steps_within(limit: float, steps: int, step_s: float, begins_s: float = 0.0) -> int:
    """How many of `steps`, the first at `begins_s`, begin before `limit` seconds, one in any case; 0: no limit."""
    return min(steps, max(1, math.ceil((limit - begins_s) / step_s - ROUNDED))) if limit and step_s > 0 else steps


def nobody(job: JobSpec, left_out: Mapping[str, str]) -> str:
    """That no candidate can do the job, and why each of them (of the first ten) can't."""
    if not left_out:
        return f"no device can do job {job.name}: there are no candidates"
    told = "; ".join(f"{device}: {why}" for device, why in list(left_out.items())[:10])
    more = f"; and {len(left_out) - 10} more" if len(left_out) > 10 else ""
    return f"no device can do job {job.name}: {told}{more}"
