"""Batches that follow the links of a round: by hand, within their bounds, against devices that lie."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.core.planning.regulation import Regulated, Regulation, again, most


def planned(*seats: tuple[float, float, int], kl: float = 9.0, budget: float = 0.0) -> Regulation:
    """Devices a, b, ... of (compute, transmit, most), 1 MB to move for a sample, labels alike."""
    names = "abcdefghijkl"
    return Regulation(
        participants={
            name: Regulated(compute_s=compute, transmit_s=transmit, most=largest, mix=[0.5, 0.5])
            for name, (compute, transmit, largest) in zip(names, seats, strict=False)
        },
        sample_bytes=1e6, goal=[0.5, 0.5], kl=kl, budget=budget,
    )  # fmt: skip


def test_a_link_that_is_slower_than_planned_lowers_the_batch_and_one_that_is_faster_raises_it() -> None:
    plan = planned((0.5, 0.5, 64), (0.5, 0.5, 64), (0.5, 0.5, 64))
    batches = {"a": 12, "b": 12, "c": 12}
    assert again(plan, batches, {}) == batches, "nobody told"
    assert again(plan, batches, {"a": 2e6, "b": 2e6, "c": 2e6}) == batches, "as planned"
    # a: 0.5 + 1.5 s, b: 0.5 + 0.1 s, c as planned; in 12 s nobody waits.
    assert again(plan, batches, {"a": 1e6 / 1.5, "b": 1e7}) == {"a": 6, "b": 20, "c": 12}


def test_who_cannot_do_one_sample_in_time_takes_one_and_nobody_is_stretched_for_it() -> None:
    plan = planned((0.5, 0.5, 64), (0.5, 0.5, 64))
    assert again(plan, {"a": 12, "b": 12}, {"a": 1.0, "b": 2e6}) == {"a": 1, "b": 12}


def test_a_first_plan_that_knows_no_link_does_not_make_all_batches_one() -> None:
    """5 MB/s where 0.01 to 0.04 s of compute were planned: a sample takes 0.21 to 0.24 s, 4 of b, the median, 0.9 s."""
    plan = planned((0.01, 0.0, 64), (0.02, 0.0, 64), (0.04, 0.0, 64))
    found = again(plan, {"a": 8, "b": 4, "c": 2}, dict.fromkeys("abc", 5e6))
    assert min(found.values()) >= 3 and max(found.values()) <= 8


def test_the_budget_holds_with_those_who_are_not_moved() -> None:
    plan = planned((0.5, 0.5, 64), (0.5, 0.5, 64), (0.5, 0.5, 64), budget=20.0)
    found = again(plan, {"a": 6, "b": 6, "c": 6}, {"a": 1e9, "b": 1e9, "c": 1.0})
    assert found["c"] == 1 and sum(found.values()) <= 20


def test_the_smallest_batch_of_the_job_is_kept() -> None:
    seats = {name: Regulated(compute_s=0.5, transmit_s=0.5, least=4, most=64, mix=[0.5, 0.5]) for name in ("a", "b")}
    plan = Regulation(participants=seats, sample_bytes=1e6, goal=[0.5, 0.5], kl=9.0)
    assert again(plan, {"a": 12, "b": 12}, {"a": 1e5, "b": 2e6})["a"] == 4


def test_ingress_and_the_largest_batch_bound_it() -> None:
    plan = planned((0.5, 0.5, 13), (0.5, 0.5, 64), budget=30.0)
    found = again(plan, {"a": 12, "b": 12}, {"a": 1e9, "b": 1e9})
    assert sum(found.values()) <= 30 and found["a"] <= 13


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.booleans())
def test_every_batch_is_within_its_bounds_and_no_step_is_more_than_twice_as_long(seed: int, bound: bool) -> None:
    rng = np.random.default_rng(seed)
    seats = [(float(c), float(t), int(m)) for c, t, m in rng.uniform((0.01, 0.01, 4), (2, 2, 64), (8, 3))]
    plan = planned(*seats, budget=200.0 if bound else 0.0)
    longest = 8.0
    batches = {n: max(1, min(int(longest / (c + t)), m)) for n, (c, t, m) in zip(plan.participants, seats, strict=True)}
    links = {name: float(10 ** rng.uniform(4, 8)) for name in batches if rng.random() < 0.8}
    found = again(plan, batches, links)
    assert found.keys() == batches.keys()
    assert all(1 <= found[name] <= max(plan.participants[name].most, 1) for name in found)
    times = {
        name: one.compute_s + (1e6 / links[name] if name in links else one.transmit_s)
        for name, one in plan.participants.items()
    }
    step = max(batches[name] * (one.compute_s + one.transmit_s) for name, one in plan.participants.items())
    able = [name for name in found if times[name] <= step]
    if able and links:
        assert max(found[name] * times[name] for name in able) <= 2.0 * 1.03 * step + 1e-6


def test_the_most_that_an_update_may_claim() -> None:
    plan = planned((0.5, 0.5, 40))
    assert (most(plan, "a", 12), most(plan, "z", 12), most(None, "a", 12)) == (40, 12, 12)


def test_labels_stay_even_as_far_as_six_tenths_of_a_batch() -> None:
    """a and b hold one class each; a's link came fast. Its batch falls back toward b's, though it would wait."""
    seats = {
        name: Regulated(compute_s=0.5, transmit_s=0.5, most=64, mix=mix)
        for name, mix in (("a", [1.0, 0.0]), ("b", [0.0, 1.0]))
    }
    plan = Regulation(participants=seats, sample_bytes=1e6, goal=[0.5, 0.5], kl=0.0)
    found = again(plan, {"a": 12, "b": 12}, {"a": 1e9})
    assert found["b"] == 12 and found["a"] == pytest.approx(0.6 * 24, abs=1.5)
