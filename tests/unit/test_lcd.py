"""LCD: the progression by hand, the choice of depths against trying every candidate, the example of the design."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.core.planning import lcd
from tests.unit.lcd_reference import Found, brute_force


@st.composite
def fleets(
    draw: st.DrawFn,
) -> tuple[list[list[float]], list[int], list[bool], list[float], tuple[int, ...]]:
    blocks, devices = draw(st.integers(1, 7)), draw(st.integers(1, 7))
    numbers = st.floats(0.1, 30.0)
    times = []
    for _ in range(devices):
        forward, block, unit = draw(numbers), draw(numbers), draw(st.floats(0.0, 2.0))
        times.append([forward + k * block + unit * k * k for k in range(1, blocks + 1)])
    most = draw(st.lists(st.integers(1, blocks), min_size=devices, max_size=devices))
    halved = draw(st.lists(st.booleans(), min_size=devices, max_size=devices))
    rows = draw(st.lists(st.integers(1, 1000), min_size=devices, max_size=devices))
    rank = draw(st.integers(1, 32))
    ranks = lcd.progression(blocks, blocks * rank, lcd.first_rank(rank))
    return times, most, halved, [count / sum(rows) for count in rows], ranks


@settings(max_examples=300, deadline=None)
@given(fleets())
def test_the_sweep_finds_what_trying_every_candidate_finds(
    fleet: tuple[list[list[float]], list[int], list[bool], list[float], tuple[int, ...]],
) -> None:
    times, most, halved, shares, ranks = fleet
    best, eps, candidates = brute_force(*fleet)
    choice = lcd.choose(np.array(times), np.array(most), np.array(halved), np.array(shares), ranks)
    assert choice.candidates == candidates
    # Rounding may decide where two candidates are alike, or one lies on the bound of waiting.
    if abs(choice.bound - eps) < 1e-9:
        assert choice.utility == pytest.approx(best.utility, rel=1e-9)
    again = _judge(choice.depths.tolist(), times, shares, ranks)
    assert choice.round_s == pytest.approx(again.round_s)
    assert choice.waiting == pytest.approx(again.waiting / again.round_s, abs=1e-9)
    assert choice.coverage == pytest.approx(again.coverage)
    assert choice.utility == pytest.approx(again.utility)
    assert choice.waiting <= choice.bound + 1e-9
    assert np.all(choice.depths <= np.array(most)) and np.all(choice.depths >= 1)


def _judge(depths: list[int], times: list[list[float]], shares: list[float], ranks: tuple[int, ...]) -> Found:
    taken = [row[k - 1] for row, k in zip(times, depths, strict=True)]
    worth = [sum(ranks[len(ranks) - k :]) / sum(ranks) for k in depths]
    longest = max(taken)
    return Found(
        depths, longest, sum(longest - t for t in taken) / len(taken), depths.count(len(ranks)) / len(depths),
        sum(p * w for p, w in zip(shares, worth, strict=True)) / longest,
    )  # fmt: skip


@pytest.mark.parametrize("seed", range(40))
def test_the_depths_are_those_of_brute_force(seed: int) -> None:
    """On fleets drawn so that no two candidates are alike."""
    rng = np.random.default_rng(seed)
    blocks, devices = int(rng.integers(2, 9)), int(rng.integers(2, 12))
    speed = rng.choice([1.0, 2.0, 4.0], devices) * rng.uniform(0.8, 1.2, devices)
    ranks = lcd.progression(blocks, blocks * 8, 2)
    times = (3.0 + np.arange(1, blocks + 1) * rng.uniform(0.5, 2.0))[None, :] / speed[:, None]
    most, halved = rng.integers(1, blocks + 1, devices), rng.random(devices) < 0.2
    shares = rng.dirichlet(np.ones(devices))
    best, eps, _ = brute_force(times.tolist(), most.tolist(), halved.tolist(), shares.tolist(), ranks)
    choice = lcd.choose(times, most, halved, shares, ranks)
    assert choice.depths.tolist() == best.depths
    assert choice.bound == pytest.approx(eps)


def test_the_progression_of_the_design() -> None:
    assert lcd.progression(12, 96, 2) == (2, 3, 4, 5, 6, 7, 9, 10, 11, 12, 13, 14)
    assert lcd.progression(6, 48, 2) == (2, 4, 7, 9, 12, 14)
    # 1 + 2/11 (l - 1), by hand: 1 1.18 1.36 1.55 1.73 1.91 2.09 2.27 2.45 2.64 2.82 3
    assert lcd.progression(12, 24, 1) == (1, 1, 1, 2, 2, 2, 2, 2, 2, 3, 3, 3)
    assert lcd.progression(1, 8, 2) == (8,)
    assert [lcd.first_rank(rank) for rank in (1, 4, 7, 8, 15, 16, 64)] == [1, 1, 1, 2, 2, 4, 4]


@given(st.integers(1, 80), st.integers(1, 256))
def test_ranks_rise_and_keep_their_sum(blocks: int, rank: int) -> None:
    first = lcd.first_rank(rank)
    ranks = lcd.progression(blocks, blocks * rank, first)
    assert len(ranks) == blocks
    assert list(ranks) == sorted(ranks) and ranks[0] >= 1
    assert blocks * rank - blocks // 2 <= sum(ranks) <= blocks * rank
    if blocks > 1:
        assert (ranks[0], ranks[-1]) == (first, 2 * rank - first)


def test_the_simulated_fleet_of_the_design() -> None:
    """80 devices of speeds 1 : 2 : 4; there 44.6 s against 96.7 s, and 7 % against 39 % of the round waiting."""
    ranks = lcd.progression(12, 96, 2)
    depths = np.arange(1, 13)
    rounds, waiting, full_rounds, full_waiting = [], [], [], []
    for seed in range(5):
        rng = np.random.default_rng(seed)
        speed = np.repeat([1.0, 2.0, 4.0], [30, 40, 10]) * rng.uniform(0.93, 1.07, 80)
        unit = 0.15 / np.exp(rng.uniform(0.0, np.log(30.0), 80))
        training = (29.0 + 58.0 * depths / 12)[None, :] / speed[:, None]
        times = training + unit[:, None] * np.cumsum(ranks[::-1])[None, :]
        choice = lcd.choose(times, np.full(80, 12), np.zeros(80, bool), np.full(80, 1 / 80), ranks)
        assert choice.bound == 0.15 and choice.coverage >= 0.1
        rounds.append(choice.round_s)
        waiting.append(choice.waiting)
        full_rounds.append(times[:, -1].max())
        full_waiting.append(1.0 - times[:, -1].mean() / times[:, -1].max())
    assert np.mean(full_rounds) == pytest.approx(96.7, rel=0.08)
    assert np.mean(rounds) == pytest.approx(44.6, rel=0.08)
    assert np.mean(full_waiting) == pytest.approx(0.39, abs=0.04)
    assert np.mean(waiting) == pytest.approx(0.07, abs=0.03)


def test_coverage_is_asked_of_those_who_can() -> None:
    """Nobody's memory reaches block 1: no coverage is asked, and the search ends."""
    times = np.array([[1.0, 2.0, 3.0], [2.0, 4.0, 6.0]])
    choice = lcd.choose(times, np.array([2, 2]), np.zeros(2, bool), np.array([0.5, 0.5]), (1, 2, 3))
    assert (choice.asked, choice.coverage) == (0.0, 0.0)
    assert choice.depths.max() == 2


def test_coverage_takes_a_slower_round() -> None:
    """Alone, waiting and utility would stop at depth 1; one of ten devices must tune block 1."""
    times = np.array([[10.0, 100.0], *[[10.0, 101.0 + i] for i in range(9)]])
    free = lcd.choose(times[1:], np.full(9, 1), np.zeros(9, bool), np.full(9, 1 / 9), (1, 3))
    assert free.depths.tolist() == [1] * 9
    choice = lcd.choose(times, np.full(10, 2), np.zeros(10, bool), np.full(10, 0.1), (1, 3))
    assert choice.coverage >= 0.1 and choice.depths[0] == 2


def test_equal_devices_get_equal_depths() -> None:
    times = np.tile([1.0, 2.0, 3.0], (5, 1))
    choice = lcd.choose(times, np.full(5, 3), np.zeros(5, bool), np.full(5, 0.2), (1, 2, 3))
    assert len(set(choice.depths.tolist())) == 1
    assert choice.waiting == 0.0
    assert choice.candidates == 3
