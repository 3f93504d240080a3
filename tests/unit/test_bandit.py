"""S-UCB: what it offers, what it learns, and how near it comes to the best arm."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from statistics import fmean

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.core.planning.bandit import CURIOSITY, KEEP, POINTS, START, WIDTH, Bandit, Choice, Point, Pulls, Region

Reward = Callable[[float, float], float]


def anything(_: float) -> bool:
    return True


def pulled(bandit: Bandit, rng: random.Random) -> Choice:
    found = Pulls(bandit).choose((rng.random(), rng.random(), rng.random()), anything)
    assert found is not None
    return found


def holds(region: Region, at: Point) -> bool:
    left, right, low, high = region.edges
    return left <= at[0] < right and low <= at[1] < high


def test_regions_tile_the_square() -> None:
    rng, bandit = random.Random(1), Bandit()
    for _ in range(40):
        choice = pulled(bandit, rng)
        bandit = bandit.learn([(choice.at, rng.random())])
        assert sum(one.wide * one.high for one in bandit.regions) == pytest.approx(1.0)
    for _ in range(200):
        at = rng.random(), rng.random()
        assert sum(holds(one, at) for one in bandit.regions) == 1
    assert sum(holds(one, (1.0, 1.0)) for one in bandit.regions) == 1


def test_every_point_lies_in_one_region_on_their_edges_too() -> None:
    """Exact ranks lie on edges: rank 4 of 2 to 16 at a third."""
    places = [i / 36 for i in range(37)]
    edges = {min(1.0, max(0.0, one)) for at in places for one in (at, math.nextafter(at, 2), math.nextafter(at, -1))}
    edges.add(math.log(2) / math.log(8))
    bandit = Bandit().learn([((x, y), 0.5) for x in places for y in places])
    edges |= {edge for one in bandit.regions for edge in (one.x, one.x + one.wide, one.y, one.y + one.high)}
    edges = {edge for edge in edges if edge <= 1.0}
    assert len(bandit.regions) > 100
    for x in edges:
        for y in edges:
            assert sum(holds(one, (x, y)) for one in bandit.regions) == 1, (x, y)
    bandit.learn([((x, y), 0.5) for x in edges for y in edges])


def test_a_reward_in_a_gap_between_stored_regions_stops_nothing() -> None:
    stored = Bandit(regions=tuple(msgspec.structs.replace(one, wide=one.wide * 0.99) for one in Bandit().regions))
    (before, after) = (
        sum(one.pulls for one in bandit.regions) for bandit in (stored, stored.learn([((0.332, 0.1), 1.0)]))
    )
    assert after == pytest.approx(before + 1)


def test_every_region_is_tried_before_any_is_tried_again() -> None:
    rng, bandit = random.Random(2), Bandit()
    tried = set()
    for _ in range(START * START):
        choice = pulled(bandit, rng)
        tried.add((int(choice.at[0] * START), int(choice.at[1] * START)))
        bandit = bandit.learn([(choice.at, 0.5)])
    assert len(tried) >= START * START - 2, "neighbours tell of each other, and the last may be known by them"


def test_a_pull_by_hand() -> None:
    """Two pulls in one region: N = 1 * .98 + 1, their mean by N; a third halves it across the longer side."""
    at = (0.1, 0.1)
    once = Bandit().learn([(at, 0.4)])
    twice = once.learn([(at, 1.0)])
    region = next(one for one in twice.regions if holds(one, at))
    assert region.pulls == pytest.approx(1 + KEEP)
    assert region.mean == pytest.approx((0.4 * KEEP + 1.0) / (1 + KEEP))
    thrice = twice.learn([(at, 1.0)])
    assert len(thrice.regions) == START * START + 1
    halves = [one for one in thrice.regions if one.wide == pytest.approx(1 / START / 2)]
    assert [one.pulls for one in halves] == pytest.approx([(1 + KEEP * (1 + KEEP)) / 2] * 2)


@given(st.integers(0, 2**16), st.floats(0.05, 0.95), st.floats(0.05, 0.95))
def test_what_a_device_can_not_hold_is_never_offered(seed: int, most: float, least: float) -> None:
    rng, bandit = random.Random(seed), Bandit()

    for _ in range(12):
        draw = rng.random(), rng.random(), rng.random()
        choice = Pulls(bandit).choose(draw, lambda height: height <= most, (least, 1.0))
        if choice is None:
            continue
        assert choice.at[1] <= most and choice.at[0] >= least
        bandit = bandit.learn([(choice.at, rng.random())])


def test_where_nothing_fits_nothing_is_offered() -> None:
    assert Pulls(Bandit()).choose((0.5, 0.5, 0.5), lambda _: False) is None


def test_devices_of_a_class_do_not_all_try_the_same() -> None:
    rng, pulls = random.Random(3), Pulls(Bandit())
    given_out: list[Point] = []
    for _ in range(START * START):
        choice = pulls.choose((rng.random(), rng.random(), rng.random()), anything)
        assert choice is not None
        given_out.append(choice.at)
    assert len({(int(x * START), int(y * START)) for x, y in given_out}) >= START * START - 2


def test_a_choice_asks_of_a_device_no_more_than_the_heights_of_one_region_where_they_fit() -> None:
    """Each answer is a plan's prediction of memory, and a fleet has 10,000 devices."""
    rng, asked = random.Random(5), list[float]()
    bandit = Bandit().learn([((rng.random(), rng.random()), rng.random()) for _ in range(200)])
    pulls = Pulls(bandit)

    def holds(height: float) -> bool:
        asked.append(height)
        return True

    for count in range(1, 101):
        assert pulls.choose((rng.random(), rng.random(), rng.random()), holds) is not None
        assert len(asked) <= POINTS * count


def _scores(bandit: Bandit, given_out: list[Point]) -> list[tuple[float, float]]:
    """(estimate, bonus) of every region, by the formulas of the module."""
    found, count = [], sum(one.pulls for one in bandit.regions) + len(given_out)
    for here in bandit.regions:
        near = [math.exp(-(math.dist(here.middle, one.middle) ** 2) / (2 * WIDTH**2)) for one in bandit.regions]
        told = sum(k * one.pulls for k, one in zip(near, bandit.regions, strict=True))
        worth = sum(k * one.pulls * one.mean for k, one in zip(near, bandit.regions, strict=True))
        met = told + sum(math.exp(-(math.dist(here.middle, at) ** 2) / (2 * WIDTH**2)) for at in given_out)
        bonus = CURIOSITY * math.sqrt(math.log(1 + count) / met) if met > 1e-6 else math.inf
        found.append((worth / told if told > 0 else 0.0, bonus))
    return found


@pytest.mark.parametrize("learned", [0, 1, 40])
def test_the_best_region_is_taken_and_what_was_given_out_counts_for_the_bonus_alone(learned: int) -> None:
    rng, bandit = random.Random(7), Bandit()
    for _ in range(learned):
        bandit = bandit.learn([(pulled(bandit, rng).at, rng.random())])
    pulls = Pulls(bandit)
    given_out: list[Point] = []
    for _ in range(30):
        choice = pulls.choose((rng.random(), rng.random(), rng.random()), anything)
        assert choice is not None
        scores = _scores(bandit, given_out)
        (here,) = (place for place, region in enumerate(bandit.regions) if holds(region, choice.at))
        assert (choice.estimate, choice.bonus) == pytest.approx(scores[here])
        assert choice.estimate + choice.bonus == pytest.approx(max(estimate + bonus for estimate, bonus in scores))
        given_out.append(choice.at)


def test_state_survives_the_disk() -> None:
    rng, bandit = random.Random(4), Bandit()
    for _ in range(20):
        bandit = bandit.learn([(pulled(bandit, rng).at, rng.random())])
    again = msgspec.msgpack.decode(msgspec.msgpack.encode(bandit), type=Bandit)
    assert again == bandit
    assert Pulls(again).choose((0.3, 0.6, 0.9), anything) == Pulls(bandit).choose((0.3, 0.6, 0.9), anything)


def bump(rng: random.Random) -> Reward:
    """A hill somewhere on a plain of 0.1."""
    x0, y0, width = rng.random(), rng.random(), rng.uniform(0.2, 0.4)
    return lambda x, y: 0.1 + 0.85 * math.exp(-((x - x0) ** 2 + (y - y0) ** 2) / (2 * width**2))


def best(reward: Reward) -> float:
    return max(reward(i / 60, j / 60) for i in range(61) for j in range(61))


def shares(seed: int, pulls: int, changes_at: int = 0) -> list[float]:
    """Mean reward of each pull as a share of the best fixed arm's, under noise of 0.1."""
    rng = random.Random(seed)
    reward, bandit, found = bump(rng), Bandit(), list[float]()
    most = best(reward)
    for pull in range(pulls):
        if changes_at and pull == changes_at:
            reward = bump(rng)
            most = best(reward)
        at = pulled(bandit, rng).at
        found.append(reward(*at) / most)
        bandit = bandit.learn([(at, min(1.0, max(0.0, reward(*at) + rng.gauss(0, 0.1))))])
    return found


def test_it_comes_near_the_best_arm_and_finds_it_again() -> None:
    """Deterministic by its seeds; the figures of more seeds and rewards are `bench/bandit.py`'s."""
    assert fmean(fmean(shares(seed, 60)[40:]) for seed in range(8)) >= 0.85
    assert fmean(fmean(shares(seed, 110, 60)[100:]) for seed in range(8)) >= 0.8


def test_a_region_knows_its_middle() -> None:
    assert Region(0.2, 0.4, 0.2, 0.4).middle == pytest.approx((0.3, 0.6))


@pytest.mark.parametrize("span", [(0.0, 0.0), (0.0, 0.1), (1.0, 1.0), (0.4, 0.7)])
def test_arms_lie_within_the_span(span: tuple[float, float]) -> None:
    rng, bandit = random.Random(4), Bandit()
    for _ in range(60):
        choice = Pulls(bandit).choose((rng.random(), rng.random(), rng.random()), anything, span)
        assert choice is not None and span[0] <= choice.at[0] <= span[1]
        bandit = bandit.learn([(choice.at, 0.5)])
    assert len([region for region in bandit.regions if region.pulls > 0.1]) > 3, "the other side is still searched"
