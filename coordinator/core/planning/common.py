"""What planners do alike around their own method: traffic of a round, the reason of the steps, nobody who can."""

from __future__ import annotations

from collections.abc import Mapping

from coordinator.core.aggregation import registry as aggregation
from coordinator.core.planning.base import FleetView
from coordinator.core.planning.demand import traffic
from coordinator.core.planning.reasons import seconds, word
from shared.jobs import JobSpec

DEADLINE_SHARE = 0.9
"""Of the deadline, what training may fill; the rest is for fetching, loading and delivering."""


def global_rank(view: FleetView, job: JobSpec, rank: int) -> int:
    """An upper bound of the global adapter's rank: what the rounds so far can have added, up to its cap.

    `rank`: the largest that an agent trains in a round.
    """
    agents = sum(candidate.info.agents for candidate in view.candidates)
    return min(job.strategy.global_rank, (view.round - 1) * agents * rank)


def moved(view: FleetView, job: JobSpec, ranks: Mapping[str, int], bound: int, agents: int) -> int:
    """Bytes over a device's link in the round: the global adapter (of rank `bound` at most) down, the update of its
    agents up."""
    # Factors that are averaged are so on the device already; products are stacked.
    stacked = 1 if aggregation.create(job.strategy).start == "factors" else agents
    down, up, _ = traffic(view.facts, ranks, bound, job.training.codec, stacked)
    return (view.adapter_bytes or down) + up


def steps_reason(job: JobSpec, step_s: float, transfer: str) -> tuple[float, str]:
    """(seconds of training expected, reason of the number of steps)."""
    steps, limit = job.rounds.local_steps, job.rounds.train_for_s
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
