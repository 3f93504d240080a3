"""The steps of `doctor --cuda` with torch, on the CPU. On CUDA itself they were not run on hardware."""

from __future__ import annotations

import pytest

from edge_daemon.training import cuda_steps


def test_every_step_after_the_driver_works_on_the_cpu() -> None:
    done = list(cuda_steps.steps("cpu"))
    assert [step["step"] for step in done] == ["torch", "memory", "32 bits", "16 bits", "8 bits", "4 bits", "end"]
    assert all(step["good"] for step in done), done
    assert "bound 0.011" in str(done[-2]["text"])


def test_a_wrong_product_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    from shared.modeling import quantization

    monkeypatch.setitem(quantization.ERROR_BOUNDS, 4, 1e-9)
    last = list(cuda_steps.steps("cpu"))[-1]
    assert (last["step"], last["good"]) == ("4 bits", False)
    assert "the bound is 1e-09" in str(last["text"])
