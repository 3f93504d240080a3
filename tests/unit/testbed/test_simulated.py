"""The figures that strategies are compared by, against cases computed by hand."""

from __future__ import annotations

import pytest

from muster.testbed.simulated import RoundResult, best_quality, bytes_to, mean_waiting, time_to, waiting_share


def _round(number: int, at: float, accuracy: float | None, *, loss: float = 1.0, accepted: bool = True) -> RoundResult:
    return RoundResult(
        round=number, seconds=5.0, at=at, loss=loss, accuracy=accuracy, perplexity=None, accepted=accepted,
        bytes_up=10, bytes_down=number, waiting=0.1 * number, prediction_error=0.0, devices=[],
    )  # fmt: skip


ROUNDS = [_round(1, 7.0, 0.5), _round(2, 12.0, 0.9, accepted=False), _round(3, 20.0, 0.8), _round(4, 31.0, 0.7)]


@pytest.mark.parametrize(
    ("own", "share"),
    [([], 0.0), ([4.0], 0.0), ([4.0, 4.0], 0.0), ([1.0, 3.0, 4.0], (3 + 1) / 12), ([0.0, 0.0], 0.0)],
)
def test_waiting_share(own: list[float], share: float) -> None:
    assert waiting_share(own) == pytest.approx(share)


def test_time_and_bytes_to_a_target() -> None:
    # The first plan was made 2 seconds after the submission.
    assert (time_to(ROUNDS, 0.5), bytes_to(ROUNDS, 0.5)) == (5.0, 11)
    assert (time_to(ROUNDS, 0.75), bytes_to(ROUNDS, 0.75)) == (18.0, 36)
    assert (time_to(ROUNDS, 0.85), bytes_to(ROUNDS, 0.85)) == (None, None)


def test_without_an_accuracy_the_loss_counts() -> None:
    causal = [_round(1, 7.0, None, loss=3.0), _round(2, 9.0, None, loss=2.0)]
    assert time_to(causal, -2.5) == 7.0
    assert best_quality(causal) == -2.0


def test_refused_rounds_do_not_count() -> None:
    assert best_quality(ROUNDS) == 0.8
    assert mean_waiting(ROUNDS) == pytest.approx(0.25)
    assert best_quality([]) is None
