"""Frozen linear layers at 8 and 4 bits, and proof that a device can run each precision.

NormalFloat of k bits: the levels are quantiles of the normal distribution, weights are scaled per block of 64 by their
largest magnitude. 4 bits are bitsandbytes' NF4 layer, the NF4 of QLoRA (Dettmers et al., 2023, arXiv 2305.14314) with
its double quantization. 8 bits use the library's blockwise kernels with a code of 256 levels by the same rule, its
outermost quantile included: our construction, no published table. FedPipe (arXiv 2404.06448) quantizes its frozen
model so, to NF8 and NF4 by a public digest, which tells no levels.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from statistics import NormalDist
from typing import Any

import torch
from torch import nn

from shared.jobs import Bits
from shared.modeling import half
from shared.modeling.data import Beat, silent
from shared.modeling.faults import BitsFault, one_line

BLOCK = 64
OFFSET = 0.9677083
"""Outermost quantile of bitsandbytes' NF4 table; at 8 bits it gives a relative error of 3e-5."""
ERROR_BOUNDS: dict[Bits, float] = {32: 1e-10, 16: 3e-5, 8: 1e-4, 4: 0.0115}
"""Largest mean square error of a product with random normal weights, relative to the product's mean square.

Weights alone give 3e-5 at 8 bits and 0.0085 at 4; activations in bf16 add 1e-5.
"""


def normal_levels(bits: int, offset: float = OFFSET) -> torch.Tensor:
    """The 2**bits levels of NormalFloat, ascending in [-1, 1], float32; one more of them is positive than negative.

    `offset`: the outermost quantile.
    """
    above = 2 ** (bits - 1)
    inverse = NormalDist().inv_cdf

    def quantiles(count: int) -> list[float]:
        return [inverse(offset + (0.5 - offset) * i / (count - 1)) for i in range(count - 1)]

    values = quantiles(above + 1) + [0.0] + [-value for value in quantiles(above)]
    levels = torch.tensor(sorted(values), dtype=torch.float64)
    return (levels / levels.max()).to(torch.float32)


@functools.lru_cache(maxsize=4)
def _code(device: str) -> torch.Tensor:
    """The 256 levels on a device; shared by all layers."""
    return normal_levels(8).to(device)


class LinearNF(nn.Module):
    """A frozen linear layer whose weight (out x in) is stored as 8-bit NormalFloat. `bias` is a parameter or None."""

    codes: torch.Tensor
    absmax: torch.Tensor

    def __init__(self, codes: torch.Tensor, absmax: torch.Tensor, has_bias: bool, compute: torch.dtype) -> None:
        """`codes`: (out x in) uint8; `absmax`: one float32 per block of 64. A bias, if any, is to be set later."""
        super().__init__()
        self.out_features, self.in_features = codes.shape
        self.compute = compute
        self.register_buffer("codes", codes)
        self.register_buffer("absmax", absmax)
        self.bias: nn.Parameter | None = None
        if has_bias:
            self.bias = nn.Parameter(torch.zeros(self.out_features, dtype=compute), requires_grad=False)

    @property
    def qweight(self) -> torch.Tensor:
        """The codes, under the name by which peft finds out where a quantized layer without a bias lies."""
        return self.codes

    def dequantized(self) -> torch.Tensor:
        """The weight in the precision of computation."""
        return _dequantize(self.codes, self.absmax, self.compute)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (.. x in) -> (.. x out), in the precision of computation."""
        apply: Any = _Dequantized.apply
        product: torch.Tensor = apply(x.to(self.compute), self.dequantized, self.bias)
        return product


class _Dequantized(torch.autograd.Function):
    """x @ W.T + bias that dequantizes again for the gradient instead of keeping the dequantized weight for it."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, dequantized: Callable[[], torch.Tensor], bias: torch.Tensor | None
    ) -> torch.Tensor:
        ctx.dequantized = dequantized
        return half.linear(x, dequantized(), bias)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return half.product(grads[0], ctx.dequantized()), None, None


def _dequantize(codes: torch.Tensor, absmax: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    functional = _functional()
    state = functional.QuantState(absmax=absmax, code=_code(str(codes.device)), blocksize=BLOCK, dtype=dtype)
    weight: torch.Tensor = functional.dequantize_blockwise(codes, state)
    return weight


def _functional() -> Any:
    # Imported when first used: an agent whose work never needs it starts lighter.
    return importlib.import_module("bitsandbytes.functional")


@functools.lru_cache(maxsize=1)
def lora_nf() -> type[nn.Module]:
    """The peft layer around `LinearNF`."""
    from peft.tuners import lora

    class LoraNF(lora.Linear):
        """LoRA beside an 8-bit NormalFloat layer."""

        def merge(self, *_: Any, **__: Any) -> None:
            """Always refused: folding into a quantized weight costs more than the adapter is worth."""
            raise BitsFault("an adapter can't be merged into an 8-bit base; merge it into an fp32 copy")

    return LoraNF


def quantized(weight: torch.Tensor, has_bias: bool, bits: Bits, compute: torch.dtype, device: str) -> nn.Module:
    """A frozen layer of `bits` (8 or 4) with `weight` (out x in); a bias is to be set later."""
    weight = weight.detach().to(device, torch.float32).contiguous()
    if bits == 8:
        codes, state = _functional().quantize_blockwise(weight, code=_code(str(weight.device)), blocksize=BLOCK)
        return LinearNF(codes, state.absmax, has_bias, compute)
    if bits == 4:
        return _linear_4bit(weight, has_bias, compute)
    raise BitsFault(f"{bits} bits: not a quantized precision")


def parts_of(layer: Any, bits: Bits) -> dict[str, torch.Tensor]:
    """The tensors from which `from_parts` makes the same layer again, without its bias."""
    if bits == 8:
        return {"codes": layer.codes, "absmax": layer.absmax}
    return {"codes": layer.weight.data, **layer.weight.quant_state.as_dict(packed=True)}


def from_parts(
    parts: dict[str, torch.Tensor], shape: torch.Size, has_bias: bool, bits: Bits, compute: torch.dtype, device: str
) -> nn.Module:
    """The layer of `shape` (out x in) that `parts_of` took apart. Raises `BitsFault` where the parts don't fit."""
    count = shape.numel()
    try:
        found = (parts["codes"].numel(), parts["absmax"].numel())
        wanted = (count if bits == 8 else -(-count // 2), -(-count // BLOCK))
        if found != wanted:
            raise BitsFault(f"{found} codes and scales for a layer of {tuple(shape)}, which has {wanted}")
        if bits == 8:
            return LinearNF(parts["codes"].reshape(shape).to(device), parts["absmax"].to(device), has_bias, compute)
        bitsandbytes: Any = importlib.import_module("bitsandbytes")
        stats = {name: value for name, value in parts.items() if name != "codes"}
        packed = bitsandbytes.nn.Params4bit.from_prequantized(parts["codes"], stats, device=device)
        if packed.quant_state.shape != shape:
            raise BitsFault(f"a weight of {tuple(packed.quant_state.shape)} for a layer of {tuple(shape)}")
    except (KeyError, ValueError, RuntimeError) as error:
        raise BitsFault(f"parts of a quantized layer: {one_line(error, 120)}") from error
    return _around(packed, shape, has_bias, compute)


def _linear_4bit(weight: torch.Tensor, has_bias: bool, compute: torch.dtype) -> nn.Module:
    bitsandbytes: Any = importlib.import_module("bitsandbytes")
    packed = bitsandbytes.nn.Params4bit(
        weight, requires_grad=False, compress_statistics=True, quant_type="nf4", blocksize=BLOCK
    )
    return _around(packed.to(weight.device), weight.shape, has_bias, compute)


def _around(packed: Any, shape: torch.Size, has_bias: bool, compute: torch.dtype) -> nn.Module:
    """The layer of a packed 4-bit weight of `shape` (out x in)."""
    out, inp = shape
    layer: Any = _layer_4bit()(
        inp, out, bias=has_bias, compute_dtype=compute, compress_statistics=True, quant_type="nf4", device="meta"
    )
    packed.module = layer
    layer.weight = packed
    # Inference on a CPU with bf16 would repack the weight into a form that later gives no gradient.
    layer.support_avx512bf16_for_cpu = False
    if has_bias:
        layer.bias = nn.Parameter(torch.zeros(out, dtype=compute, device=packed.device), requires_grad=False)
    finished: nn.Module = layer
    return finished


@functools.lru_cache(maxsize=1)
def _layer_4bit() -> Any:
    bitsandbytes: Any = importlib.import_module("bitsandbytes")

    class Linear4bit(bitsandbytes.nn.Linear4bit):  # type: ignore[misc]  # the library leaves it untyped
        """The library's layer; where bf16 is emulated, with products in float32."""

        def dequantized(self) -> torch.Tensor:
            """The weight in the precision of computation."""
            weight: torch.Tensor = _functional().dequantize_4bit(self.weight.data, self.weight.quant_state)
            return weight.to(self.compute_dtype)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            """x (.. x in) -> (.. x out)."""
            if self.compute_dtype is not torch.bfloat16 or not half.is_slow(x.device.type):
                given: torch.Tensor = super().forward(x)
                return given
            apply: Any = _Dequantized.apply
            product: torch.Tensor = apply(x.to(self.compute_dtype), self.dequantized, self.bias)
            return product.to(x.dtype)

    return Linear4bit


def probe_bits(device: str, beat: Beat = silent) -> tuple[list[Bits], dict[str, str]]:
    """Precisions that pass a real quantize-dequantize-matmul within `ERROR_BOUNDS`; bits -> why not, for the others."""
    proven: list[Bits] = []
    notes: dict[str, str] = {}
    order: tuple[Bits, ...] = (32, 16, 8, 4)
    for bits in order:
        beat("probing")
        try:
            error = product_error(bits, device)
        except (ImportError, OSError, RuntimeError, AttributeError, ValueError, AssertionError) as fault:
            notes[str(bits)] = f"{type(fault).__name__}: {one_line(fault, 160)}"
            continue
        if error <= ERROR_BOUNDS[bits]:
            proven.append(bits)
        else:
            notes[str(bits)] = f"relative error {error:.2g} of a product, the bound is {ERROR_BOUNDS[bits]:.2g}"
    return proven, notes


def product_error(bits: Bits, device: str) -> float:
    """Relative mean square error of x @ W.T and of its gradient by x, the larger one, for random normal W and x."""
    generator = torch.Generator().manual_seed(bits)
    weight = torch.randn(192, 256, generator=generator)
    x = torch.randn(64, 256, generator=generator)
    grad = torch.randn(64, 192, generator=generator)
    compute = torch.float32 if bits == 32 else torch.bfloat16
    layer: Callable[[torch.Tensor], torch.Tensor]
    if bits < 16:
        layer = quantized(weight, False, bits, compute, device)
    else:
        held = weight.to(device, compute)
        layer = functools.partial(nn.functional.linear, weight=held)
    given = x.to(device, compute, copy=True).requires_grad_(True)
    product = layer(given)
    product.backward(grad.to(device, compute))
    assert given.grad is not None
    return max(
        _relative(product, x.double() @ weight.double().T), _relative(given.grad, grad.double() @ weight.double())
    )


def _relative(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float((found.detach().double().cpu() - exact).square().mean() / exact.square().mean())
