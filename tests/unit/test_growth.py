"""What the soak run calls growth: a leak in each kind, and none in what only jitters or takes memory in steps."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

FILE = Path(__file__).parents[2] / "bench" / "lib" / "growth.py"


@pytest.fixture(scope="module")
def growth() -> ModuleType:
    """The module of the benchmarks, which are no package."""
    spec = importlib.util.spec_from_file_location("growth", FILE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["growth"] = module  # dataclasses look it up
    spec.loader.exec_module(module)
    return module


def held(growth: ModuleType, name: str, per_round: float = 0.0, *, open_every: int = 0, step_at: int = 0) -> Any:
    """500 rounds of a program of 70 MB that jitters by 200 kB and has 20 to 22 descriptors open."""
    found = growth.Held(name)
    for round in range(100, 501, 10):
        jitter = 100_000 * (round // 10 % 3)
        step = 1_000_000 if step_at and round >= step_at else 0
        more = (round - 100) // open_every if open_every else 0
        found.add(round, int(70e6 + jitter + step + per_round * (round - 100)), 20 + round // 10 % 3 + more)
    return found


def test_jitter_and_one_step_of_the_allocator_are_no_growth(growth: ModuleType) -> None:
    assert growth.grown([held(growth, "coordinator"), held(growth, "broker", step_at=300)]) == ""


def test_a_leak_of_memory_is_named_with_its_rate(growth: ModuleType) -> None:
    line = growth.grown([held(growth, "coordinator"), held(growth, "edge-1", 8_000.0)])
    assert line.startswith("edge-1: RSS by 8.")
    assert "kB a round, 3." in line
    assert "coordinator" not in line


def test_descriptors_that_stay_open_are_named(growth: ModuleType) -> None:
    line = growth.grown([held(growth, "coordinator", open_every=50), held(growth, "edge-1")])
    assert line.startswith("coordinator: file descriptors by ")
    assert line.count(";") == 0
