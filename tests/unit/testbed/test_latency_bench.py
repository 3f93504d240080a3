"""`bench/latency.py`: three models take turns in every order, and each keeps its own times."""

from __future__ import annotations

import importlib
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

pytest.importorskip("torch")
BENCH = Path(__file__).parents[3] / "bench"


@pytest.fixture
def latency(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The benchmark, which finds its neighbours beside it as `bench/run.py` lets it."""
    monkeypatch.setattr(sys, "path", [str(BENCH), *sys.path])
    return importlib.import_module("bench.latency")


def test_every_order_comes_up_equally_often(latency: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []
    costs = {"base": 2.0, "merged": 2.5, "unmerged": 4.0}

    def seconds(model: str, batch: int, tokens: int) -> float:  # noqa: ARG001 - the signature of what it stands for
        ran.append(model)
        return costs[model]

    monkeypatch.setattr(latency, "seconds", seconds)
    turns = 12
    assert latency.in_turns(list(costs), 1, 8, turns) == [[2.0, 2.5, 4.0]] * turns
    measured = ran[-3 * turns :]
    orders = Counter(tuple(measured[start : start + 3]) for start in range(0, len(measured), 3))
    assert sorted(orders.values()) == [2] * 6


def test_a_figure_is_the_median_of_ratios_within_a_turn(latency: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that is slow for two turns of three, where medians of times would compare other turns."""
    took = [[1.0, 1.1, 1.3], [9.0, 9.0, 9.0], [5.0, 6.0, 8.0]]
    monkeypatch.setattr(latency, "in_turns", lambda *_: took)

    class Model:
        def named_modules(self) -> list[tuple[str, Any]]:
            return [("", self)]

    three = latency.Models(Model(), Model(), Model())
    merged, unmerged = latency.figures("tiny", "a tiny model", three, 1, 8, len(took))
    assert (merged["name"], merged["value"], merged["target"]) == ("latency.tiny_merged_1x8", 1.1, "<= 1.05")
    assert (unmerged["name"], unmerged["value"], unmerged["target"]) == ("latency.tiny_unmerged_1x8", 1.3, "")
