"""`bench/on_cuda.py` where there is no CUDA: all of its figures of memory but what the allocator would tell."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from bench import run as bench
from shared.jobs import Bits

BENCH = Path(__file__).parents[2] / "bench"


@pytest.fixture
def on_cuda(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The benchmark, which finds its neighbours and its library beside it as `bench/run.py` lets it."""
    monkeypatch.setattr(sys, "path", [str(BENCH), str(BENCH / "lib"), *sys.path])
    return importlib.import_module("bench.on_cuda")


@pytest.fixture
def predicted_memory(on_cuda: ModuleType) -> ModuleType:  # noqa: ARG001 - its path
    return importlib.import_module("predicted_memory")


@pytest.mark.parametrize("gpu", [False, True])
@pytest.mark.parametrize("bits", [16, 8, 4])
def test_the_prediction_is_near_what_a_step_of_the_agents_loop_takes(
    predicted_memory: ModuleType, bits: Bits, gpu: bool
) -> None:
    """Of the allocator: what backward takes for a moment beside the activations included."""
    found = predicted_memory.without_cuda(bits, predicted_memory.Size(8, 96), gpu=gpu)
    assert found["met"] is True, found
    assert 0 <= found["value"] <= 10
    assert "8 x 96 tokens" in found["note"]


def test_a_gpus_memory_is_not_predicted_by_a_cpus(predicted_memory: ModuleType) -> None:
    found = predicted_memory.off(16, predicted_memory.allocated_here, predicted_memory.Size(8, 96), gpu=True)
    assert found["met"] is False, found
    assert found["value"] > 30


def test_memory_that_nobody_predicted_is_told(predicted_memory: ModuleType) -> None:
    """An allocator that needs a fifth more at the worst moment."""

    def wasteful(base: Any, steps: Callable[[int], Any]) -> Any:
        met = predicted_memory.allocated_here(base, steps)
        return met._replace(peak=met.peak + (met.peak - met.rest) // 5)

    size = predicted_memory.Size(4, 96)
    plain, found = (predicted_memory.off(16, measure, size) for measure in (predicted_memory.allocated_here, wasteful))
    assert plain["met"] is True and found["met"] is False
    expected = 100 - (100 - plain["value"]) / 1.2
    assert found["value"] == pytest.approx(expected, abs=0.1), "of the activations, not of all memory"


def test_the_allocator_is_asked_with_the_moments_still_there(
    on_cuda: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    happened: list[str] = []

    class Loop:
        def __del__(self) -> None:
            happened.append("moments gone")

    def steps(count: int) -> Loop:
        happened.append(f"{count} steps")
        return Loop()

    for name, answer in (
        ("empty_cache", None), ("reset_peak_memory_stats", None), ("synchronize", None), ("memory_allocated", 70),
        ("max_memory_allocated", 100),
    ):  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, lambda name=name, answer=answer: (happened.append(name), answer)[1])
    assert on_cuda.allocated(None, steps) == (70, 100)
    assert happened == [
        "empty_cache", "reset_peak_memory_stats", "5 steps", "synchronize", "memory_allocated", "max_memory_allocated",
        "moments gone",
    ]  # fmt: skip


def test_without_cuda_every_figure_is_recorded_as_not_run(
    on_cuda: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["on_cuda.py"])
    assert on_cuda.main() == 0
    printed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [one["name"] for one in printed][2:] == ["cuda.memory_16", "cuda.memory_8", "cuda.memory_4"]
    page = bench.render([bench.complete(one, "on_cuda", "", "", "2026-01-01") for one in printed])
    assert page.count("| not run  |") == len(printed)
    assert page.count("| not run  | <= 10 |  |") == 3, "neither met nor missed"
