"""Steps of split learning that nobody can go on with: refused again and again, or forgotten by who would send them."""

from __future__ import annotations

from coordinator.core import split_round as conduct
from shared.steps import Begin, End, Query
from tests.unit.test_split_round import WORK, begun, do, features, hello, said, takes


def test_features_that_are_refused_again_and_again_end_the_round() -> None:
    """The device sends the same, since nobody tells it anything; the round has what was done before."""
    made = begun("a")
    do(made, "a")
    for time in range(conduct.PATIENCE + 1):
        assert made.phase == "stepping"
        assert takes(made.on_features("a", features(1, 2), 2.0 + time)) == [(2, ("a",))]
        made.refuse("a", 2)
        last = made.untaken(2.0 + time)
    assert made.phase == "over" and said(last, "a") == [End(work=WORK, run=1)] and made.done == 1


def test_a_step_that_is_done_after_all_forgets_the_refusals() -> None:
    made = begun("a")
    for step in range(1, 6):
        for _ in range(conduct.PATIENCE):
            made.on_features("a", features(1, step), 1.0)
            made.refuse("a", step)
            made.untaken(1.0)
        do(made, "a")
    assert made.phase == "stepping" and made.done == 5


def test_a_device_that_has_forgotten_a_step_that_got_lost_takes_all_back() -> None:
    """It ran out of memory over a gradient; with it the features of the next step went, which were lost on the way."""
    made = begun("a")
    do(made, "a")
    made.saved({0, 1})
    assert made.on_features("a", features(1, 3), 2.0) == []
    assert made.tick(11.9) == []
    again = made.tick(12.1)
    assert said(again, "a") == [Query(work=WORK, run=2)] and made.phase == "gathering"
    assert Begin(work=WORK, run=2, load=1, step=1) in said(made.on_hello("a", hello(2, [0, 1]), 13.0), "a")
    do(made, "a", 14.0)
    assert made.done == 2


def test_steps_that_come_in_another_order_take_nobody_back() -> None:
    made = begun("a")
    made.on_features("a", features(1, 2), 1.0)
    assert takes(made.on_features("a", features(1, 1), 10.9)) == [(1, ("a",))]
    assert takes(made.taken(10.9)) == [(2, ("a",))]
    made.taken(11.5)
    assert made.tick(30.0) == [] and made.run == 1
