"""Linear layers in bf16 on processors that have no instructions for it.

There a product of bf16 matrices is emulated, 10 to 50 times slower than one of float32. Inside `fast_products` the
operands of a linear layer are widened (layers of 8 and 4 bits do it by themselves), and the result is rounded to bf16
as the hardware would: it accumulates in float32, too. Attention stays as it is: its products are small. What is kept
for the backward pass stays bf16, so that memory is as planned, but for one widened layer at a time.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode


@functools.cache
def is_slow(device: str) -> bool:
    """Whether products of bf16 matrices are emulated on `device`."""
    if device != "cpu":
        return False
    # No public question gives the answer of the library that computes them; without it, all is emulated.
    there: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]  # torch leaves it untyped
    return not (there and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def fast_products(device: str) -> AbstractContextManager[object]:
    """Where bf16 is emulated: a context that computes its products in float32. Elsewhere it changes nothing."""
    return Widened() if is_slow(device) else nullcontext()


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x (.. x in) @ W.T + bias, W (out x in), without gradients: for the bodies of autograd functions."""
    return _linear(x, weight, bias) if _is_half(x) and is_slow(x.device.type) else functional.linear(x, weight, bias)


def product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """left @ right, without gradients. A backward pass does not see the context."""
    return _product(left, right) if _is_half(left) and is_slow(left.device.type) else left @ right


class Widened(TorchFunctionMode):
    """Widens the operands of linear layers in bf16, for their gradients too."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:  # fmt: skip
        """See the module."""
        kwargs = kwargs or {}
        if func is functional.linear and len(args) >= 2 and all(map(_is_half, args[:2])):
            bias = args[2] if len(args) > 2 else kwargs.get("bias")
            apply: Any = _Linear.apply
            return apply(args[0], args[1], bias)
        return func(*args, **kwargs)


class _Linear(torch.autograd.Function):
    """x (.. x in) @ W.T + bias for W (out x in), all bf16; without a bias None."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight if ctx.needs_input_grad[0] else None)
        return _linear(x, weight, bias)

    @staticmethod
    def backward(
        ctx: Any, *grads: torch.Tensor
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        x, weight = ctx.saved_tensors
        rows = grads[0].reshape(-1, grads[0].shape[-1])
        to_x = _product(grads[0], weight) if weight is not None else None
        to_weight = _product(rows.T, x.reshape(-1, x.shape[-1])) if x is not None else None
        return to_x, to_weight, rows.float().sum(dim=0).to(rows.dtype) if ctx.needs_input_grad[2] else None


def _linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return functional.linear(x.float(), weight.float(), None if bias is None else bias.float()).to(x.dtype)


def _product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    return (left.float() @ right.float()).to(left.dtype)


def _is_half(value: object) -> bool:
    return isinstance(value, torch.Tensor) and value.dtype is torch.bfloat16
