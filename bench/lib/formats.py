"""Frozen weights at formats that no layer of the agent holds: what they become, and the bytes they take packed.

NormalFloat of 3 and 2 bits is our reading: bitsandbytes' construction with fewer levels (design: `methods.md` 1.3).
"""

from __future__ import annotations

import importlib
from typing import Any, NamedTuple

import torch

from shared.modeling.quantization import BLOCK, normal_levels

SCALE_BLOCK = 256
"""Scales that share one of their own, where scales are quantized too."""


class Rounded(NamedTuple):
    """A weight as its format gives it back, and the bytes of codes and scales, packed."""

    weight: torch.Tensor
    bytes: int


def normal_offset(bits: int) -> float:
    """The outermost quantile for so many bits, by the formula that gives bitsandbytes' for 4."""
    return 1 - 0.5 * (1 / 2 ** (bits + 1) + 1 / (2 ** (bits + 1) - 2))


def normal_float(weight: torch.Tensor, bits: int) -> Rounded:
    """NormalFloat of `bits`, scales quantized to 8 bits as NF4's are."""
    return nearest(weight, normal_levels(bits, normal_offset(bits)), bits, quantized_scales=True)


def int8(weight: torch.Tensor) -> Rounded:
    """255 equal steps, the largest magnitude of a block at the end; fp32 scales."""
    return nearest(weight, torch.arange(-127, 128) / 127, 8)


def fp4(weight: torch.Tensor) -> Rounded:
    """bitsandbytes' 4-bit floating point, scales quantized to 8 bits."""
    functional: Any = importlib.import_module("bitsandbytes.functional")
    codes, state = functional.quantize_4bit(weight, blocksize=BLOCK, compress_statistics=True, quant_type="fp4")
    scales = state.absmax.nbytes + state.state2.absmax.nbytes + state.offset.nbytes
    return Rounded(functional.dequantize_4bit(codes, state), codes.nbytes + scales)


def nearest(weight: torch.Tensor, levels: torch.Tensor, bits: int, *, quantized_scales: bool = False) -> Rounded:
    """Each weight as the nearest of `levels` (ascending, in [-1, 1]) times the largest magnitude of its block of 64.

    `weight`: float32, a multiple of 64 of them. The levels themselves are shared by all weights and not counted.
    """
    blocks = weight.reshape(-1, BLOCK)
    scales = blocks.abs().amax(dim=1, keepdim=True)
    codes = torch.bucketize(blocks / scales.clamp_min(1e-30), (levels[1:] + levels[:-1]) / 2)
    size = -(-weight.numel() * bits // 8)
    kept = _quantized(scales) if quantized_scales else Rounded(scales, scales.nbytes)
    return Rounded((levels[codes] * kept.weight).reshape(weight.shape), size + kept.bytes)


def _quantized(scales: torch.Tensor) -> Rounded:
    """Scales less their mean at 8 bits, as bitsandbytes stores those of its 4-bit layers."""
    functional: Any = importlib.import_module("bitsandbytes.functional")
    mean = scales.mean()
    codes, state = functional.quantize_blockwise(scales - mean, blocksize=SCALE_BLOCK)
    return Rounded(
        functional.dequantize_blockwise(codes, state) + mean, codes.nbytes + state.absmax.nbytes + mean.nbytes
    )
