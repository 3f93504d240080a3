"""The validation gate."""

from __future__ import annotations

import math

import pytest

from coordinator.core.facts import Metrics
from coordinator.core.gate import PATIENCE, judge


def _metrics(loss: float) -> Metrics:
    return Metrics(loss=loss, rows=100)


def test_without_evaluation_every_aggregate_is_accepted() -> None:
    assert judge([_metrics(1.0)], None, 0.1).accepted


def test_the_first_loss_is_accepted() -> None:
    assert judge([], _metrics(12.0), 0.0).accepted


@pytest.mark.parametrize(
    ("losses", "new", "worse_by", "accepted"),
    [
        ([2.0, 1.0, 1.5], 1.09, 0.1, True),
        ([2.0, 1.0, 1.5], 1.11, 0.1, False),
        ([1.0], 0.5, 0.0, True),
        ([1.0], 1.0, 0.0, True),
        ([0.0], 1e-7, 0.1, True),
        ([0.0], 1e-3, 0.1, False),
        ([-1.0], -0.95, 0.1, True),
        ([-1.0], -0.85, 0.1, False),
        ([math.nan, 1.0], 1.05, 0.1, True),
        ([math.nan], 1.05, 0.1, True),
    ],
)
def test_a_loss_is_compared_with_the_best(losses: list[float], new: float, worse_by: float, accepted: bool) -> None:
    verdict = judge([_metrics(loss) for loss in losses], _metrics(new), worse_by)
    assert verdict.accepted is accepted
    assert f"{new:.4g}" in verdict.reason
    assert not verdict.pause


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_no_number_is_always_refused(loss: float) -> None:
    assert not judge([], _metrics(loss), 1e9).accepted


def test_the_third_refusal_in_a_row_pauses_the_job() -> None:
    verdicts = [judge([_metrics(1.0)], _metrics(5.0), 0.1, refusals) for refusals in range(PATIENCE)]
    assert [verdict.pause for verdict in verdicts] == [False, False, True]
    assert not any(verdict.accepted for verdict in verdicts)
    assert "3 refusals in a row pause the job" in verdicts[-1].reason


def test_an_accepted_round_never_pauses() -> None:
    assert not judge([_metrics(1.0)], _metrics(0.9), 0.1, refusals=2).pause


def test_a_pruned_model_is_judged_against_models_as_small_alone() -> None:
    whole, half = Metrics(loss=1.0, rows=9), Metrics(loss=2.0, rows=9, pruned=0.5)
    first = judge([whole], Metrics(loss=1.8, rows=9, pruned=0.3), 0.1)
    assert first.accepted and first.reason == "loss 1.8 is the first one with 30.0% of its units gone"
    assert judge([whole, half], Metrics(loss=2.1, rows=9, pruned=0.5), 0.1).accepted
    assert not judge([whole, half], Metrics(loss=2.3, rows=9, pruned=0.5), 0.1).accepted
    assert not judge([whole, half], Metrics(loss=2.3, rows=9, pruned=0.3), 0.1).accepted, "half of it does better"
    assert not judge([whole], Metrics(loss=math.nan, rows=9, pruned=0.5), 0.1).accepted
