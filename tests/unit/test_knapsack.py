"""The multiple-choice knapsack: exact and greedy against brute force, and how far the greedy is off."""

from __future__ import annotations

import itertools
import math
import random

import pytest

from coordinator.core.planning.knapsack import Item, bound, exact, greedy, unit, value, weight

RANKS = (0, 2, 4, 8, 16, 32)


def best(items: list[Item], capacity: int) -> float:
    """By trying everything."""
    choices = itertools.product(*(range(len(item.weights)) for item in items))
    return max(value(items, levels) for levels in choices if weight(items, levels) <= capacity)


def by_table(items: list[Item], capacity: int) -> float:
    """By dynamic programming over whole units of weight: exact, and quick where brute force is not."""
    one = unit(items)
    table = [0.0] * (capacity // one + 1)
    for item in items:
        table = [
            max(table[room - w // one] + v for w, v in zip(item.weights, item.values, strict=True) if w // one <= room)
            for room in range(len(table))
        ]
    return table[-1]


def lora(rng: random.Random, modules: int, largest: int = 32) -> list[Item]:
    """Matrices of unequal shape and importance, as the planner makes them."""
    ranks = [rank for rank in RANKS if rank <= largest]
    shares = [rng.expovariate(1.0) for _ in range(modules)]
    sides = [rng.choice([64, 128, 192, 320]) for _ in range(modules)]
    return [
        Item(
            tuple(rank * side for rank in ranks),
            tuple(share / sum(shares) * math.log2(1 + rank) / math.log2(1 + largest) for rank in ranks),
        )
        for share, side in zip(shares, sides, strict=True)
    ]


def ragged(rng: random.Random, modules: int) -> list[Item]:
    """Any values, in which levels may be no better than lower ones."""
    made = []
    for _ in range(modules):
        count = rng.randint(1, 4)
        weights = sorted(rng.sample(range(1, 12), count))
        made.append(Item((0, *weights), (0.0, *(rng.choice([0.0, 0.5, 1.0, rng.random()]) for _ in range(count)))))
    return made


def test_a_small_case_by_hand() -> None:
    # Per weight: a1 3, b1 2, a2 .5, b2 1.
    items = [Item((0, 1, 3), (0.0, 3.0, 4.0)), Item((0, 2, 4), (0.0, 4.0, 6.0))]
    assert [tuple(levels) for levels in greedy(items, [0, 1, 2, 3, 4, 5, 7, 99]).tolist()] == [
        (0, 0), (1, 0), (0, 1), (1, 1), (1, 1), (1, 2), (2, 2), (2, 2)
    ]  # fmt: skip
    assert [exact(items, room) for room in (0, 1, 2, 3, 5, 7)] == [(0, 0), (1, 0), (0, 1), (1, 1), (1, 2), (2, 2)]
    assert bound(items, [2, 3]).tolist() == [5.0, 7.0]
    assert (value(items, (1, 2)), weight(items, (1, 2)), unit(items)) == (9.0, 5, 1)


@pytest.mark.parametrize("seed", range(30))
def test_exact_is_the_best_of_all(seed: int) -> None:
    rng = random.Random(seed)
    items = ragged(rng, rng.randint(1, 5)) if seed % 2 else lora(rng, rng.randint(1, 4))
    total = weight(items, [len(item.weights) - 1 for item in items])
    for capacity in {0, 1, total // 7, total // 3, total - 1, total, rng.randint(0, total)}:
        levels, wanted = exact(items, max(capacity, 0)), best(items, max(capacity, 0))
        assert levels is not None
        assert weight(items, levels) <= capacity
        assert value(items, levels) == pytest.approx(wanted, abs=1e-9)
        (quick,) = greedy(items, [max(capacity, 0)])
        assert weight(items, quick) <= capacity
        assert value(items, quick) <= wanted + 1e-12 <= bound(items, [capacity])[0] + 1e-9
        assert by_table(items, max(capacity, 0)) == pytest.approx(wanted)


def test_exact_on_a_model_of_real_size() -> None:
    items = lora(random.Random(5), 24)
    total = weight(items, [5] * 24)
    for share in (0.05, 0.3, 0.6):
        levels = exact(items, int(share * total))
        assert levels is not None
        assert value(items, levels) == pytest.approx(by_table(items, int(share * total)))


def test_the_greedy_is_near_the_optimum() -> None:
    """Over 24 modules: far less than a percent but where the capacity is a few ranks in all (`docs/lab-log.md`)."""
    gaps: dict[float, list[float]] = {share: [] for share in (0.05, 0.2, 0.5, 0.9)}
    for seed in range(40):
        rng = random.Random(seed)
        items = lora(rng, 24, rng.choice([8, 32]))
        total = weight(items, [len(item.weights) - 1 for item in items])
        rooms = [int(share * total) for share in gaps]
        for share, room, levels in zip(gaps, rooms, greedy(items, rooms), strict=True):
            gaps[share].append(1 - value(items, levels) / by_table(items, room))
    assert max(gaps[0.05]) < 0.05
    assert max(gaps[0.2]) < 0.015
    assert max(*gaps[0.5], *gaps[0.9]) < 0.005
    assert sum(map(sum, gaps.values())) / sum(map(len, gaps.values())) < 0.002


@pytest.mark.parametrize("seed", range(20))
def test_the_greedy_gets_half_of_the_best_at_any_capacity(seed: int) -> None:
    """What is best per weight may fill the room of what is best."""
    rng = random.Random(seed)
    items = ragged(rng, 4)
    rooms = list(range(30))
    for room, levels in zip(rooms, greedy(items, rooms), strict=True):
        assert value(items, levels) >= 0.5 * best(items, room) - 1e-12
    (lone,) = greedy([Item((0, 1), (0.0, 1.1)), Item((0, 10), (0.0, 9.0))], [10])
    assert lone.tolist() == [0, 1]


def test_equal_multiples_of_the_unit_have_equal_solutions() -> None:
    items = lora(random.Random(1), 6)
    one = unit(items)
    assert one == 2 * math.gcd(*(item.weights[1] // 2 for item in items))
    rooms = [3 * one, 4 * one - 1]
    assert greedy(items, rooms)[0].tolist() == greedy(items, rooms)[1].tolist()
