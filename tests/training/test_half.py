"""bf16 products computed in float32: the same values and gradients, to a rounding, whichever layer asks for them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from shared.modeling import activations, half
from shared.modeling.quantization import quantized

Layer = Callable[[torch.Tensor], torch.Tensor]


def _plain() -> nn.Module:
    return nn.Linear(64, 32).to(torch.bfloat16)


def _at(bits: int) -> nn.Module:
    return quantized(torch.randn(32, 64) / 8, False, bits, torch.bfloat16, "cpu")  # type: ignore[arg-type]  # 8 or 4


def quantized_weight(layer: Any) -> torch.Tensor:
    """What the layer multiplies with, in float32."""
    value: torch.Tensor = layer.dequantized()
    return value.float()


def _results(layer: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """Output, gradient of the input and, where there is one, of the weight."""
    x = x.clone().requires_grad_()
    out = layer(x)
    layer.zero_grad()
    (out.float() * torch.linspace(-1, 1, 32)).sum().backward()  # type: ignore[no-untyped-call]  # torch leaves it so
    assert x.grad is not None
    weight = getattr(layer, "weight", None)
    grads = [] if weight is None or weight.grad is None else [weight.grad]
    bias = getattr(layer, "bias", None)
    grads += [] if bias is None or bias.grad is None else [bias.grad]
    return [out.detach().float(), x.grad.float(), *(grad.float() for grad in grads)]


@pytest.mark.parametrize("make", [_plain, lambda: _at(8), lambda: _at(4)], ids=["bf16", "NF8", "NF4"])
def test_values_and_gradients_are_those_of_the_emulated_product(make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    layer, x = make(), torch.randn(2, 5, 64).to(torch.bfloat16)
    emulated = _results(layer, x)
    with half.Widened():
        widened = _results(layer, x)
    assert len(emulated) == len(widened) == (4 if type(layer) is nn.Linear else 2)
    for one, other in zip(emulated, widened, strict=True):
        # bf16 has 8 bits: two roundings at most.
        assert torch.allclose(one, other, rtol=2**-6, atol=2**-8 * float(one.abs().max()))
        assert other.abs().sum() > 0


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("slow", [False, True])
def test_quantized_layers_widen_by_themselves(bits: int, slow: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    layer: Any = _at(bits)
    x = torch.randn(5, 64).to(torch.bfloat16)
    weight = quantized_weight(layer)
    monkeypatch.setattr(half, "is_slow", lambda device: slow)
    out, grad = _results(layer, x)
    exact = x.float() @ weight.T
    given = torch.linspace(-1, 1, 32).to(torch.bfloat16).expand(5, 32).float() @ weight
    assert torch.equal(out, exact.to(torch.bfloat16).float()) or not slow
    assert torch.equal(grad, given.to(torch.bfloat16).float()) or not slow
    assert torch.allclose(out, exact, rtol=2**-6, atol=2**-7) and torch.allclose(grad, given, rtol=2**-6, atol=2**-7)


def test_the_widened_product_is_that_of_float32_rounded_once() -> None:
    torch.manual_seed(0)
    x, weight, bias = (torch.randn(*shape).to(torch.bfloat16) for shape in ((3, 64), (32, 64), (32,)))
    with half.Widened():
        product, shifted = nn.functional.linear(x, weight), nn.functional.linear(x, weight, bias)
    wide = x.float() @ weight.float().T
    assert torch.equal(product, wide.to(torch.bfloat16))
    assert torch.equal(shifted, (wide + bias.float()).to(torch.bfloat16))


def test_what_backward_keeps_is_half_as_large_as_in_float32() -> None:
    layer, x = _plain(), torch.randn(5, 64).to(torch.bfloat16).requires_grad_()
    kept: list[torch.dtype] = []
    with half.Widened(), torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.dtype) or t, lambda t: t):
        layer(x)
    assert set(kept) == {torch.bfloat16}


def test_float32_is_left_alone() -> None:
    x, weight = torch.randn(3, 64), torch.randn(32, 64)
    with half.Widened():
        assert torch.equal(nn.functional.linear(x, weight), x @ weight.T)
        assert torch.equal(nn.functional.linear(input=x, weight=weight), x @ weight.T)


def test_an_agent_trains_inside_where_bf16_is_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    entered: list[str] = []

    class Noted(half.Widened):
        def __enter__(self) -> half.Widened:
            entered.append("")
            return super().__enter__()  # type: ignore[no-any-return, no-untyped-call]  # torch leaves it so

    monkeypatch.setattr(half, "Widened", Noted)
    for slow in (False, True):
        monkeypatch.setattr(half, "is_slow", lambda device, slow=slow: slow)
        layer, x = _plain(), torch.randn(5, 64).to(torch.bfloat16)
        assert activations.saved_bytes(layer.parameters(), partial(layer, x.requires_grad_())) > 0
        assert bool(entered) == slow
