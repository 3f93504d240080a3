"""MergeSFL's control: the batch formula, KL by hand, selection against brute force, bounds of moves and scaling."""

from __future__ import annotations

import itertools
import math
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.core.planning import split_control as control
from coordinator.core.planning.split_control import Bools, Fleet

TIMES = st.lists(st.floats(1e-4, 10.0), min_size=1, max_size=30)


def fleet(
    seed: int,
    devices: int = 80,
    classes: int = 10,
    alpha: float = 0.2,
    budget: float = 0.0,
    most: int = 10,
    least: int = 1,
    waits: bool = False,
) -> tuple[Fleet, np.ndarray]:  # type: ignore[type-arg]  # floats
    """Speeds 1:2:4, labels by Dirichlet, some used before."""
    rng = np.random.default_rng(seed)
    times = 0.01 * rng.choice([1.0, 2.0, 4.0], devices) * rng.uniform(0.8, 1.2, devices)
    batches = control.regulated(times, 64, 1, np.full(devices, 64))
    labels = rng.dirichlet([alpha] * classes, devices)
    told = [{str(label): round(1000 * share) for label, share in enumerate(row)} for row in labels]
    mixes, goal, _ = control.mixes_of(told)
    rarity = 1.0 / (1 + rng.integers(0, 5, devices))
    return Fleet(batches, mixes, goal, rarity, budget, least, most, batches * times if waits else None), times


@settings(max_examples=200, deadline=None)
@given(TIMES, st.integers(1, 256), st.integers(1, 4), st.data())
def test_batches_are_in_inverse_proportion_to_times(
    times: list[float], default: int, least: int, data: st.DataObject
) -> None:
    most = data.draw(st.lists(st.integers(1, 300), min_size=len(times), max_size=len(times)))
    found = control.regulated(np.array(times), default, least, np.array(most))
    fastest = min(times)
    for took, batch, bound in zip(times, found, most, strict=True):
        formula = default * fastest / took
        wanted = math.floor(formula + 1e-9)
        assert batch == min(max(wanted, least), bound)
        if least < batch == wanted:
            # Nobody takes longer than the fastest, nor less by more than one sample.
            assert batch * took <= default * fastest * (1 + 1e-6) < (batch + 1) * took * (1 + 1e-5)


def test_the_fastest_gets_the_batch_and_half_its_speed_half_of_it() -> None:
    found = control.regulated(np.array([0.1, 0.2, 0.39, 8.0]), 16, 1, np.array([64, 64, 64, 64]))
    assert found.tolist() == [16, 8, 4, 1]
    assert control.regulated(np.array([0.1, 0.2]), 16, 1, np.array([10, 3])).tolist() == [10, 3]


def test_divergence_by_hand() -> None:
    mixes, goal, told = control.mixes_of([{"0": 30, "1": 10}, {"1": 7}, {}])
    assert mixes.tolist() == [[0.75, 0.25], [0.0, 1.0], [0.375, 0.625]]
    assert goal.tolist() == [0.375, 0.625] and told.tolist() == [True, True, False]
    group = Fleet(np.array([4, 2, 5]), mixes, goal, np.ones(3))
    chosen = np.array([True, True, False])
    # (4 x 0.75, 4 x 0.25 + 2) / 6 = (0.5, 0.5).
    assert control.kl_of(group, chosen) == pytest.approx(0.5 * math.log(0.5 / 0.375) + 0.5 * math.log(0.5 / 0.625))
    assert control.kl_of(group, np.array([False, True, False])) == pytest.approx(math.log(1 / 0.625))
    assert control.kl_of(group, np.array([False, False, True])) == 0.0
    mixes, goal, told = control.mixes_of([{}, {}])
    assert control.divergence(mixes.sum(axis=0), goal) == 0.0 and not told.any()


def brute(group: Fleet) -> float:
    """The largest fitness of all feasible selections."""
    size = len(group.batches)
    counts = [group.most] if group.most else range(group.smallest, size + 1)
    best = -math.inf
    for count in counts:
        for some in itertools.combinations(range(size), count):
            chosen = np.zeros(size, dtype=np.bool_)
            chosen[list(some)] = True
            if group.holds(int(group.batches[chosen].sum())):
                best = max(best, control.fitness(group, chosen))
    return best


@pytest.mark.parametrize("waits", [False, True])
@pytest.mark.parametrize(("most", "budget"), [(5, 0.0), (4, 150.0), (0, 160.0)])
def test_selection_against_brute_force_for_12_devices(most: int, budget: float, waits: bool) -> None:
    """The best of all selections, but for one fleet in twelve at most, where it is near the best."""
    gaps = []
    for seed in range(12):
        group, _ = fleet(seed, devices=12, classes=6, most=most, budget=budget, least=2, waits=waits)
        chosen = control.select(group, seed)
        assert group.holds(int(group.batches[chosen].sum())) and (not most or chosen.sum() == most)
        gaps.append(brute(group) - control.fitness(group, chosen))
    assert sum(gap > 1e-9 for gap in gaps) <= 1 and max(gaps) <= 0.01


def test_selection_is_decided_by_its_seed_and_far_better_than_a_draw() -> None:
    group, _ = fleet(3, alpha=0.1)
    first = control.select(group, 7)
    assert np.array_equal(first, control.select(group, 7)) and first.sum() == 10
    rng = np.random.default_rng(0)
    drawn = []
    for _ in range(50):
        chosen = np.zeros(80, dtype=np.bool_)
        chosen[rng.choice(80, 10, replace=False)] = True
        drawn.append(control.kl_of(group, chosen))
    assert np.median(drawn) > 0.05 and control.kl_of(group, first) <= 0.01


def test_selection_takes_less_than_a_second_for_80_devices() -> None:
    group, _ = fleet(1, classes=20, budget=300.0, waits=True)
    begun = time.process_time()
    control.select(group, 1)
    assert time.process_time() - begun < 1.0


def test_a_budget_below_the_number_selects_fewer_and_never_nobody() -> None:
    group, _ = fleet(4, devices=20, budget=90.0, most=15)
    chosen = control.select(group, 0)
    assert 1 <= chosen.sum() < 15 and group.batches[chosen].sum() <= 90
    alone, _ = fleet(4, devices=20, budget=1.0, most=15)
    assert control.select(alone, 0).sum() == 1


def test_who_was_used_rarely_goes_first_where_labels_do_not_tell() -> None:
    size = 12
    rarity = np.array([1.0 if row < 4 else 0.1 for row in range(size)])
    group = Fleet(np.full(size, 8), np.ones((size, 1)), np.ones(1), rarity, 0.0, 1, 4)
    assert np.flatnonzero(control.select(group, 5)).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("seed", range(10))
def test_moves_lower_the_divergence_and_keep_their_bounds(seed: int) -> None:
    group, times = fleet(seed, budget=300.0 if seed % 2 else 0.0)
    chosen = control.select(group, seed)
    most = np.full(80, 64)
    moved = control.tuned(group, chosen, times, most)
    before = (group.batches * times)[chosen].max()
    assert control.kl_of(group, chosen, moved) < control.kl_of(group, chosen)
    assert (moved[~chosen] == group.batches[~chosen]).all()
    assert (moved >= np.ceil(0.9 * group.batches - 1e-9)).all() and (moved <= most).all()
    assert (moved * times)[chosen].max() <= 1.03 * before * (1 + 1e-9)
    assert group.holds(int(moved[chosen].sum())) or not group.budget
    assert np.array_equal(control.tuned(group, chosen, times, most, enough=1.0), group.batches)


def test_no_move_is_left_that_would_lower_the_divergence() -> None:
    group, times = fleet(2)
    chosen = control.select(group, 2)
    moved = control.tuned(group, chosen, times, np.full(80, 64))
    now, latest = control.kl_of(group, chosen, moved), 1.03 * (group.batches * times)[chosen].max()
    for row in np.flatnonzero(chosen):
        for step in (-1, 1):
            tried = moved.copy()
            tried[row] += step
            allowed = tried[row] >= 0.9 * group.batches[row] and tried[row] <= 64 and tried[row] * times[row] <= latest
            assert not allowed or control.kl_of(group, chosen, tried) >= now - 1e-9


def chosen_of(*values: bool) -> Bools:
    return np.array(values, dtype=np.bool_)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([0.0, 300.0]))
def test_alignment_shortens_waiting_and_keeps_its_bounds(seed: int, budget: float) -> None:
    one, times = fleet(seed, budget=budget)
    most = np.random.default_rng(seed).integers(4, 200, len(times))
    one = one._replace(batches=np.minimum(one.batches, most))
    chosen = control.select(one, seed)
    found = control.aligned(one, chosen, one.batches, times, most, 0.01)
    assert (found[~chosen] == one.batches[~chosen]).all()
    assert ((found >= 1) & (found <= most))[chosen].all()
    assert control.waiting(found, chosen, times) <= control.waiting(one.batches, chosen, times) + 1e-12
    assert control.kl_of(one, chosen, found) <= max(0.01, control.kl_of(one, chosen)) + 1e-9
    took = (found * times)[chosen].max() / (one.batches * times)[chosen].max()
    assert took <= control.STRETCH + 1e-9
    assert not budget or found[chosen].sum() <= max(budget, one.batches[chosen].sum())


def test_alignment_by_hand() -> None:
    # 2 x 5 s and 3 x 3 s: one waits 1 s of 10. In 15 s, the least multiple of both, nobody waits.
    one = Fleet(np.array([2, 3]), np.ones((2, 1)), np.ones(1), np.ones(2))
    both, times = np.array([True, True]), np.array([5.0, 3.0])
    assert control.aligned(one, both, one.batches, times, np.array([9, 9])).tolist() == [3, 5]
    assert control.aligned(one, both, one.batches, times, np.array([2, 9])).tolist() == [2, 3]


@pytest.mark.parametrize("lie", [1e15, 1e-12])
def test_alignment_stays_small_where_a_device_lies_about_its_speed(lie: float) -> None:
    one, times = fleet(5, devices=40)
    times[3] = lie
    found = control.aligned(one, np.ones(40, bool), one.batches, times, np.full(40, 4096), 9.0)
    assert (found >= 1).all() and (found <= 4096).all()


def test_who_would_wait_is_left_out_where_labels_do_not_tell() -> None:
    """Of twelve alike but one whose data fills a third of the step, that one is not selected."""
    took = np.array([1.0] * 11 + [1 / 3])
    one = Fleet(np.full(12, 8), np.ones((12, 1)), np.ones(1), np.ones(12), 0.0, 1, 11, took)
    assert control.select(one, 3).tolist() == [True] * 11 + [False]
    assert control.fitness(one, np.ones(12, bool)) == pytest.approx(0.01 - 0.05 * (1 - 34 / 36))


def test_spare_bandwidth_scales_all_batches_alike() -> None:
    batches, most, chosen = np.array([16, 8, 4, 9]), np.array([64, 64, 64, 64]), chosen_of(True, True, True, False)
    grown, factor = control.scaled(batches, chosen, most, 56.0)
    assert grown.tolist() == [32, 16, 8, 9] and factor == 2.0
    assert control.scaled(batches, chosen, np.array([64, 12, 64, 1]), 56.0)[0].tolist() == [24, 12, 6, 9]
    for budget in (0.0, 29.0, 20.0):  # not bounded, less than 5 % spare, exceeded
        assert control.scaled(batches, chosen, most, budget) == (pytest.approx(batches), 1.0)


def test_waiting_is_the_mean_share_of_the_slowest_step() -> None:
    batches, times = np.array([10, 10, 1]), np.array([1.0, 0.5, 99.0])
    assert control.waiting(batches, chosen_of(True, True, False), times) == pytest.approx(0.25)
