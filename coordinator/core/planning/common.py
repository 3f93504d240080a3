"""What planners do alike around their own method: traffic of a round, the reason of the steps, nobody who can."""

from __future__ import annotations

import math
from collections.abc import Mapping

from coordinator.core.aggregation import registry as aggregation
from coordinator.core.planning.base import FleetView
from coordinator.core.planning.cost_model import CostModel
from coordinator.core.planning.demand import traffic
from coordinator.core.planning.reasons import seconds, word
from shared.jobs import Bits, JobSpec
from shared.starts import averages_factors

LATE = 1.1
"""Round times after which a device that is late begins no further step: partial work counts."""
DEADLINE_SHARE = 0.9
"""Of the deadline, what training may fill; the rest is for fetching, loading and delivering."""


def global_rank(view: FleetView, job: JobSpec, rank: int) -> int:
    """An upper bound of the global adapter's rank: what the rounds so far can have added, up to its cap.

    `rank`: the largest that an agent trains in a round.
    """
    agents = sum(candidate.info.agents for candidate in view.candidates)
    return min(aggregation.create(job.strategy).global_rank, (view.round - 1) * agents * rank)


def moved(view: FleetView, job: JobSpec, ranks: Mapping[str, int], bound: int, agents: int) -> int:
    """Bytes over a device's link in the round: the global adapter (of rank `bound` at most) down, the update of its
    agents up."""
    # Factors that are averaged are so on the device already; products are stacked.
    start = aggregation.create(job.strategy).start
    sends_a = start != "frozen_a" or view.round == 1
    stacked = 1 if averages_factors(start) else agents
    down, up, _ = traffic(view.facts, ranks, bound, job.training.codec, stacked, sends_a=sends_a)
    return (view.adapter_bytes or down) + up


def time_limit(job: JobSpec, model: CostModel, device: str, bits: Bits, round_s: float) -> float:
    """Seconds from receipt after which a device delivers what it has done, so that nobody waits long for one that is
    slower than was thought; 0: no limit.

    The job's own, or `LATE` times `round_s`, which the work should take with its transfers. That not before speeds were
    measured; a device that did not train over such a base yet has the time to load it. What is delivered then still
    counts at the deadline.
    """
    if not model.measured:
        return job.rounds.train_for_s
    known = model.devices.get(device)
    loads_s = 0.0 if known is not None and str(bits) in known.fits else model.load_s
    bounds = LATE * round_s + loads_s, DEADLINE_SHARE * job.rounds.deadline_s, job.rounds.train_for_s or math.inf
    return min(bounds)


def steps_reason(job: JobSpec, steps: int, step_s: float, transfer: str, *, limit: float) -> tuple[float, str]:
    """(seconds of training expected, reason of the number of steps). `limit`: as in `Work.train_for_s`."""
    expected = steps * step_s
    bound, name = (limit, "training time") if limit else (job.rounds.deadline_s, "deadline")
    met = expected <= bound
    note = "" if met else ("partial work counts" if limit else "an update after the deadline is lost")
    reading = f"{steps} asked x {seconds(step_s)} = {seconds(expected)}"
    reason = word(
        "steps", steps, reading, f"{seconds(bound)} {name}", note, transfer, verb="meets" if met else "exceeds"
    )
    return (min(expected, limit) if limit else expected), reason


def nobody(job: JobSpec, left_out: Mapping[str, str]) -> str:
    """That no candidate can do the job, and why each of them (of the first ten) can't."""
    if not left_out:
        return f"no device can do job {job.name}: there are no candidates"
    told = "; ".join(f"{device}: {why}" for device, why in list(left_out.items())[:10])
    more = f"; and {len(left_out) - 10} more" if len(left_out) > 10 else ""
    return f"no device can do job {job.name}: {told}{more}"
