"""What backward needs of the forward pass, in bytes per sample: counted on the architecture, not by a formula.

One and two blocks of the model are laid out in memory that was never written (no weights are read, pages that are not
touched take none) and run forward on a few samples of full length; what autograd saves for backward is counted, each
storage once. Adapters of other ranks, and modules without one, change it by a few per cent.

A GPU keeps less: its attention is fused with dropout too, so that no scores are kept, and of a dropout it keeps a byte
per number, where a CPU keeps a factor of the numbers' own precision. Both are counted without one: `as_on_gpu`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from shared.adapter import Adapter
from shared.jobs import Bits, TaskSpec
from shared.modeling import half, lora
from shared.modeling.base_model import Base, outline
from shared.modeling.data import IGNORED, Batch
from shared.modeling.objective import loss_sum

_RANK = 8
_FEW, _MORE = 2, 4
"""Samples of the two passes that each model makes: what both save alike does not grow with the batch."""


class Activations(NamedTuple):
    """Bytes per sample: `block` for each block that the gradient passes, `fixed` for all above the blocks."""

    fixed: float
    block: float


def count(folder: Path, task: TaskSpec, bits: Bits, *, gpu: bool = False) -> Activations:
    """Of the model in `folder` with LoRA on every linear layer. Raises `ModelFault` for an unknown architecture.

    Below 32 bits all precisions of the base give the same: they compute in bf16. `gpu`: as it would be on one.
    """
    with as_on_gpu() if gpu else nullcontext():
        return _counted(folder, task, bits)


def as_on_gpu() -> AbstractContextManager[object]:
    """A context in which a CPU keeps of attention and dropout what a GPU does; attention is without dropout there."""
    return _AsOnGpu()


def _counted(folder: Path, task: TaskSpec, bits: Bits) -> Activations:
    if task.kind == "image":
        whole = outline(folder, task, 32, 0)
        whole.model.requires_grad_(True).train()
        return Activations(fixed=(_saved(whole, _MORE) - _saved(whole, _FEW)) / (_MORE - _FEW), block=0.0)
    one, two = (_per_sample(outline(folder, task, bits, blocks)) for blocks in (1, 2))
    return Activations(fixed=2 * one - two, block=two - one)


def _per_sample(base: Base) -> float:
    dense = {name: np.zeros(tuple(tensor.shape), np.float32) for name, tensor in base.head.items()}
    nothing = Adapter(kind="global", job="", round=0, base_digest="", factors={}, dense=dense)
    lora.carry(base, nothing, dict.fromkeys(base.linears, _RANK), alpha_ratio=1.0, seed=0, round=1)
    base.model.train()
    return (_saved(base, _MORE) - _saved(base, _FEW)) / (_MORE - _FEW)


def _saved(base: Base, samples: int) -> int:
    own = (*base.model.parameters(), *base.model.buffers())
    return saved_bytes(own, lambda: loss_sum(base.model, _batch(base, samples), base.kind))


def saved_bytes(own: Iterable[torch.Tensor], forward: Callable[[], object]) -> int:
    """Bytes that autograd keeps of `forward` for backward, each storage once; `own`: tensors that don't count."""
    places = {_place(tensor) for tensor in own}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if _place(tensor) not in places:
            # Held, so that its place is not given to another tensor.
            kept[_place(tensor)] = tensor
        return tensor

    with half.fast_products("cpu"), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        forward()
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def _place(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _batch(base: Base, samples: int) -> Batch:
    """Samples of full length, but for one token of padding: without any, attention would need no mask."""
    if base.kind == "image":
        labels = torch.zeros(samples, dtype=torch.long)
        pictures = torch.zeros(samples, base.tokenizer.count)
        return Batch(ids=pictures, mask=torch.ones(samples, 1), targets=labels, weight=samples)
    shape = (samples, base.max_tokens)
    mask = torch.ones(shape, dtype=torch.long)
    mask[0, -1] = 0
    if base.kind == "classification":
        targets = torch.zeros(samples, dtype=torch.long)
    else:
        targets = torch.where(mask.bool(), 0, IGNORED)
    return Batch(ids=torch.zeros(shape, dtype=torch.long), mask=mask, targets=targets, weight=samples)


class _AsOnGpu(TorchFunctionMode):
    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:  # fmt: skip
        return _ON_GPU.get(func, func)(*args, **(kwargs or {}))


def _dropout(input: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> torch.Tensor:  # noqa: ARG001 - torch's parameters
    return torch.native_dropout(input, p, training)[0] if training and p else input


def _attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,  # noqa: ARG001 - with dropout a CPU has no fused attention
    is_causal: bool = False, **options: Any,
) -> torch.Tensor:  # fmt: skip
    return functional.scaled_dot_product_attention(query, key, value, attn_mask, 0.0, is_causal, **options)


_ON_GPU: Mapping[Callable[..., Any], Callable[..., Any]] = {
    functional.dropout: _dropout, functional.scaled_dot_product_attention: _attention,
}  # fmt: skip
