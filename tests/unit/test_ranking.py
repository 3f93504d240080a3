"""Kendall's tau with ties between two orders of strategies, against values worked out by hand."""

from __future__ import annotations

import importlib.util
import math
import sys
from pathlib import Path
from types import ModuleType

import pytest

FILE = Path(__file__).parents[2] / "bench" / "lib" / "ranking.py"


@pytest.fixture(scope="module")
def ranking() -> ModuleType:
    """The module of the benchmarks, which are no package."""
    spec = importlib.util.spec_from_file_location("ranking", FILE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["ranking"] = module
    spec.loader.exec_module(module)
    return module


def test_the_spread_is_over_seeds_or_a_round(ranking: ModuleType) -> None:
    # Mean 30, squared deviations 100 + 0 + 100 over 2.
    assert ranking.timed([20.0, 30.0, 40.0], 7.0) == (30.0, 10.0)
    assert ranking.timed([20.0], 7.0) == (20.0, 7.0)
    assert ranking.timed([20.0, math.inf], 7.0) == (math.inf, 0.0)


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        ((10.0, 2.0), (12.0, 1.0), 0),
        ((10.0, 1.0), (12.0, 2.0), 0),
        ((10.0, 1.9), (12.0, 1.0), -1),
        ((12.0, 1.0), (10.0, 1.9), 1),
        ((10.0, 1.0), (math.inf, 0.0), -1),
        ((math.inf, 0.0), (10.0, 1.0), 1),
        ((math.inf, 0.0), (math.inf, 0.0), 0),
    ],
)
def test_times_within_the_larger_spread_are_ties(
    ranking: ModuleType, one: tuple[float, float], other: tuple[float, float], expected: int
) -> None:
    assert ranking.compared(ranking.Timed(*one), ranking.Timed(*other)) == expected


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        # All six pairs alike; all six the other way.
        ([10, 20, 30, 40], [1, 2, 3, 4], 1.0),
        ([10, 20, 30, 40], [4, 3, 2, 1], -1.0),
        # One pair of six swapped: (5 - 1) / 6.
        ([10, 20, 30, 40], [2, 1, 3, 4], 2 / 3),
        # Second ties its first two (spread 0.5): five pairs alike, none against, over sqrt(6 * 5).
        ([10, 20, 30, 40], [1, 1.4, 3, 4], 5 / math.sqrt(30)),
        # The same pair tied in both: five alike over sqrt(5 * 5).
        ([10, 10.5, 30, 40], [1, 1.4, 3, 4], 1.0),
        # First ties 1-2, second swaps 3 and 4: four alike, one against, over sqrt(5 * 6).
        ([10, 10, 30, 40], [1, 2, 4, 3], 3 / math.sqrt(30)),
        # Ties need not be transitive: in the first 1-2 and 2-3 are tied, 1-3 is not; four alike over sqrt(4 * 6).
        ([1, 1.4, 1.8, 9], [1, 2, 3, 4], 4 / math.sqrt(24)),
        # Never is slower than any time and tied with never: 3-4 in the first; five alike over sqrt(5 * 6).
        ([10, 20, math.inf, math.inf], [1, 2, 3, 4], 5 / math.sqrt(30)),
        # An order that tells nothing apart.
        ([5, 5, 5, 5], [1, 2, 3, 4], 0.0),
    ],
)
def test_tau_by_hand(ranking: ModuleType, first: list[float], second: list[float], expected: float) -> None:
    orders = [[ranking.Timed(float(value), 0.5) for value in times] for times in (first, second)]
    assert ranking.tau(*orders) == pytest.approx(expected)
    assert ranking.tau(*reversed(orders)) == pytest.approx(expected)
