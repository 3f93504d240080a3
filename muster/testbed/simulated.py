"""What a simulated run gave, round by round, and the figures that strategies are compared by. Pure.

The same seed on the same machine gives the same bytes: no wall time is in here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import msgspec

from coordinator.core.facts import Metrics
from coordinator.web.views import JobView, RoundView


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """One device in one round. Seconds are virtual."""

    device: str
    kind: str
    """Its class."""
    status: str
    predicted_s: float
    """Of training, as planned."""
    trained_s: float
    """Of training, as it was."""
    own_s: float
    """From the plan until its update was admitted; 0: none was."""
    predicted_peak: int
    """Bytes the plan expected the agent to hold; 0: not known."""
    peak: int
    batch: int
    bits: int
    rank: int
    """The largest of any module."""
    modules: int
    """How many are tuned."""
    params: int
    """Parameters that it trains: factors and head, or the whole base."""
    steps: int
    pruned: float = 0.0
    """Share of its heads and channels that is to be gone at the end."""


class RoundResult(msgspec.Struct, frozen=True, kw_only=True):
    """One round."""

    round: int
    seconds: float
    """From its plan to its commit."""
    at: float
    """Of its commit, since the job was submitted."""
    loss: float | None
    accuracy: float | None
    perplexity: float | None
    accepted: bool
    bytes_up: int
    bytes_down: int
    """Over the devices' links since the commit before, all messages."""
    waiting: float
    prediction_error: float | None
    """Mean of |predicted - trained| / trained seconds over the devices that delivered; None: none did."""
    devices: list[Outcome]
    pruned: float = 0.0
    """Share of the units that the model which was evaluated lacks, as planned: that of its devices, the mean; never
    less than in a round before."""


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """`result.json`."""

    job: str
    state: str
    strategy: str
    aggregator: str
    profile: str
    devices: int
    data: str
    alpha: float
    seed: int
    lr: float
    baseline: Metrics | None
    rounds: list[RoundResult]
    bytes_by_device: dict[str, tuple[int, int]]
    """Device -> (up, down) over its link in the whole run."""
    happened: list[tuple[float, str, str]] = []
    """(seconds, device, join | leave | crash)."""


class Watched(NamedTuple):
    """What the run saw beside the records: seconds of plans and admissions, bytes at each commit."""

    planned_at: dict[int, float]
    committed_at: dict[int, float]
    admitted_at: dict[tuple[int, str], float]
    bytes_at: dict[int, tuple[int, int]]


class Expected(NamedTuple):
    """What a device's work was expected to take: peak bytes of its agent (0: not known), parameters it trains."""

    peak: int
    params: int


def waiting_share(own: Sequence[float]) -> float:
    """Share of the round that devices spend waiting for the slowest: sum(slowest - own) / (n * slowest)."""
    slowest = max(own, default=0.0)
    return sum(slowest - one for one in own) / (len(own) * slowest) if slowest > 0 else 0.0


def quality(round: RoundResult) -> float | None:
    """What is compared: accuracy, or where there is none the loss with its sign turned. More is better."""
    if round.accuracy is not None:
        return round.accuracy
    return -round.loss if round.loss is not None else None


def time_to(rounds: Sequence[RoundResult], target: float) -> float | None:
    """Virtual seconds from the first plan until an accepted round's quality reaches `target`; None: it never does."""
    reached = _first(rounds, target)
    return None if reached is None else rounds[reached].at - first_plan(rounds)


def first_plan(rounds: Sequence[RoundResult]) -> float:
    """Seconds from submission to the first plan: devices join and prove what they can, whatever the strategy."""
    return rounds[0].at - rounds[0].seconds if rounds else 0.0


def whole_run(rounds: Sequence[RoundResult]) -> float:
    """Virtual seconds from the first plan to the last commit."""
    return rounds[-1].at - first_plan(rounds) if rounds else 0.0


def bytes_to(rounds: Sequence[RoundResult], target: float) -> int | None:
    """Bytes over all links until an accepted round's quality reaches `target`; None: it never does."""
    reached = _first(rounds, target)
    if reached is None:
        return None
    return sum(one.bytes_up + one.bytes_down for one in rounds[: reached + 1])


def mean_waiting(rounds: Sequence[RoundResult]) -> float:
    """The waiting share of the mean round."""
    return sum(one.waiting for one in rounds) / len(rounds) if rounds else 0.0


def best_quality(rounds: Sequence[RoundResult]) -> float | None:
    """The best quality of an accepted round."""
    return max((q for one in rounds if one.accepted and (q := quality(one)) is not None), default=None)


def _first(rounds: Sequence[RoundResult], target: float) -> int | None:
    for place, one in enumerate(rounds):
        found = quality(one)
        if one.accepted and found is not None and found >= target:
            return place
    return None


def round_results(
    job: JobView, watched: Watched, kinds: Mapping[str, str], expected: Mapping[int, Mapping[str, Expected]]
) -> list[RoundResult]:
    """The committed rounds. `kinds`: of each device; `expected`: by round and device."""
    found: list[RoundResult] = []
    before = (0, 0)
    pruned = 0.0
    for view in job.rounds:
        if view.round not in watched.committed_at:
            continue
        devices = _outcomes(view, watched, kinds, expected.get(view.round, {}))
        now = watched.bytes_at[view.round]
        done = [one for one in devices if one.own_s > 0]
        metrics = view.metrics
        if metrics is not None:
            pruned = _rounded(metrics.pruned)  # what was evaluated, be it accepted or not
        found.append(
            RoundResult(
                round=view.round, seconds=_rounded(watched.committed_at[view.round] - watched.planned_at[view.round]),
                at=_rounded(watched.committed_at[view.round]), loss=metrics.loss if metrics else None,
                accuracy=metrics.accuracy if metrics else None, perplexity=metrics.perplexity if metrics else None,
                accepted=bool(view.accepted), bytes_up=now[0] - before[0], bytes_down=now[1] - before[1],
                waiting=_rounded(waiting_share([one.own_s for one in done])),
                prediction_error=_error(done), devices=devices, pruned=pruned,
            )
        )  # fmt: skip
        before = now
    return found


def _outcomes(
    view: RoundView, watched: Watched, kinds: Mapping[str, str], expected: Mapping[str, Expected]
) -> list[Outcome]:
    found = []
    for part in view.participants:
        facts, ranks = part.facts, {name: rank for name, rank in part.work.ranks.items() if rank > 0}
        at = watched.admitted_at.get((view.round, part.device))
        need = expected.get(part.device, Expected(0, 0))
        found.append(
            Outcome(
                device=part.device, kind=kinds[part.device], status=part.status,
                predicted_s=_rounded(part.predicted_s), trained_s=_rounded(facts.train_s) if facts else 0.0,
                own_s=_rounded(at - watched.planned_at[view.round]) if at is not None else 0.0,
                predicted_peak=need.peak, peak=facts.peak_bytes if facts else 0,
                batch=facts.batch if facts else part.work.batch, bits=part.work.bits,
                rank=max(ranks.values(), default=0), modules=len(ranks),
                params=need.params, steps=facts.steps if facts else 0,
                pruned=part.work.prune.ratio if part.work.prune else 0.0,
            )
        )  # fmt: skip
    return found


def _error(done: Sequence[Outcome]) -> float | None:
    errors = [abs(one.predicted_s - one.trained_s) / one.trained_s for one in done if one.trained_s > 0]
    return _rounded(sum(errors) / len(errors)) if errors else None


def _rounded(value: float) -> float:
    return round(value, 6)
