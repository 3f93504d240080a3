"""The validation gate: whether a round's aggregate becomes the global adapter. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence

import msgspec

from coordinator.core.facts import Metrics

PATIENCE = 3
"""Refusals in a row that pause the job."""
_SAME_SIZE = 1e-9
_NOISE = 1e-6
"""Losses this close are equal, so that a loss of nearly 0 does not refuse its own rounding error."""


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """What becomes of the aggregate. `pause`: this refusal was one too many, an operator must look at the job."""

    accepted: bool
    reason: str
    pause: bool = False


def judge(history: Sequence[Metrics], new: Metrics | None, worse_by: float, refusals: int = 0) -> Verdict:
    """Judge the aggregate evaluated as `new` (None: no evaluation) against the best loss of `history`.

    `history`: metrics of what was accepted before, the untuned base included; a model that was pruned is judged against
    those alone of which as much is gone, or more. `worse_by`: share above the best loss that is still accepted.
    `refusals`: how many rounds in a row were refused just before this one.
    """
    if new is None:
        return Verdict(accepted=True, reason="accepted without a judgement: no held-out data")
    if not math.isfinite(new.loss):
        return _refused(f"loss {new.loss} is not a number to go on with", refusals)
    known = [metrics.loss for metrics in comparable(history, new)]
    if not known:
        size = f" with {new.pruned:.1%} of its units gone" if new.pruned else ""
        return Verdict(accepted=True, reason=f"loss {new.loss:.4g} is the first one{size}")
    best = min(known)
    bound = best + worse_by * abs(best) + _NOISE
    told = f"the best {best:.4g} + {worse_by:.0%} = {bound:.4g}"
    if new.loss > bound:
        return _refused(f"loss {new.loss:.4g} exceeds {told}", refusals)
    return Verdict(accepted=True, reason=f"loss {new.loss:.4g} meets {told}")


def comparable(history: Sequence[Metrics], new: Metrics) -> list[Metrics]:
    """Those of `history` with a finite loss, of models that are as small as that of `new`, or smaller."""
    return [one for one in history if math.isfinite(one.loss) and one.pruned >= new.pruned - _SAME_SIZE]


def reached(metrics: Metrics | None, target: float) -> str:
    """How the evaluation reaches `rounds.target`, or "" (0: there is none)."""
    if not target or metrics is None:
        return ""
    if metrics.accuracy is not None:
        return f"accuracy {metrics.accuracy:.4g} reaches the target {target:g}" if metrics.accuracy >= target else ""
    return f"loss {metrics.loss:.4g} reaches the target {target:g}" if metrics.loss <= target else ""


def _refused(reason: str, refusals: int) -> Verdict:
    count = refusals + 1
    if count < PATIENCE:
        return Verdict(accepted=False, reason=f"{reason} (refusal {count} in a row, {PATIENCE} pause the job)")
    return Verdict(accepted=False, reason=f"{reason}; {count} refusals in a row pause the job", pause=True)
