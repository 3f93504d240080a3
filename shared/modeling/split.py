"""Split learning: a base cut at a block boundary, features of its lower part, losses and gradients of its upper one.

Both parts run the Hugging Face model's own forward pass, with modules in the place of what is gone that pass hidden
states through: masks, positions and names of parameters are those of the whole model. Where the token table is also
the output matrix (GPT-2, causal) both parts need it; it stays as stored on both sides, under full tuning, too.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm

from shared.adapter import Adapter
from shared.allocator import give_back
from shared.modeling import half, lora
from shared.modeling.base_model import Base
from shared.modeling.data import IGNORED, Batch
from shared.modeling.faults import AdapterFault, ModelFault
from shared.modeling.parameters import set_module
from shared.starts import start_of
from shared.tensors import Array


class _Layout(NamedTuple):
    """Paths inside the model without its head: list of blocks, what follows them, what makes a block's first input."""

    blocks: str
    last: str
    first: tuple[str, ...]
    kinds: tuple[str, ...]


_BERT = _Layout("encoder.layer", "pooler", ("embeddings",), ("classification",))
_GPT2 = _Layout("h", "ln_f", ("wte", "wpe", "drop"), ("classification", "causal"))
_LLAMA = _Layout("layers", "norm", ("embed_tokens",), ("classification", "causal"))
_CNN = _Layout("blocks", "last", (), ("image",))
_LAYOUTS = {
    "bert": _BERT, "roberta": _BERT, "gpt2": _GPT2, "llama": _LLAMA, "mistral": _LLAMA, "qwen2": _LLAMA,
    "muster-cnn": _CNN,
}  # fmt: skip


class Part(NamedTuple):
    """One device's batch after its blocks: hidden (n x tokens x width), targets (n, or n x tokens), mask (n x tokens).

    For a causal task targets and mask are those of the tokens, unlearned ones `IGNORED`. Of images hidden is
    (n x channels x height x width) and there is no mask.
    """

    hidden: torch.Tensor
    targets: torch.Tensor
    mask: torch.Tensor | None = None


class Answer(NamedTuple):
    """For one device: its own mean loss, the gradient of that by its hidden states, and how many rows were right."""

    loss: float
    gradient: torch.Tensor
    right: int


class _Pass(nn.Module):
    """In a lower block's place."""

    def forward(self, hidden: torch.Tensor, *_: object, **__: object) -> torch.Tensor:
        return hidden


class _Given(nn.Module):
    """In the embeddings' place: what is given has passed them."""

    word_embeddings = None

    def forward(self, *_: object, inputs_embeds: torch.Tensor, **__: object) -> torch.Tensor:
        return inputs_embeds


class _Nothing(nn.Module):
    """In the place of a table whose rows were added already."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return torch.zeros((), device=ids.device)


def blocks(base: Base) -> int:
    """How many blocks the model has. Raises `ModelFault` where it can't be cut."""
    return len(_inner(base).get_submodule(_layout(base).blocks))


def places(base: Base, names: Iterable[str]) -> dict[str, int]:
    """Where parameters of a whole base belong: index of the block; -1 before the blocks, their number after them, and
    of a token table that is the output matrix, too, which no device trains.

    Raises `ModelFault` where the model can't be cut.
    """
    layout, count, prefix = _layout(base), blocks(base), base.model.base_model_prefix
    first = tuple(f"{prefix}.{one}." for one in layout.first)
    inside = f"{prefix}.{layout.blocks}."
    found, shared = {}, tied(base)
    for name in names:
        if name in shared:
            found[name] = count
        elif name.startswith(inside):
            found[name] = int(name.removeprefix(inside).partition(".")[0])
        else:
            found[name] = -1 if name.startswith(first) else count
    return found


def tied(base: Base) -> set[str]:
    """The token table of a whole base whose output matrix it is, too."""
    if not _is_tied(base.model):
        return set()
    return {name for name in base.shapes if base.model.get_parameter(name) is _table(_inner(base))}


def lower(base: Base, block: int) -> None:
    """Make `base` its embeddings and its first `block` blocks; the memory of all others is freed.

    Takes off what it carries. There is no way back but to load it again. Raises `ModelFault`.
    """
    layout = _start(base, block)
    model, inner = base.model, _inner(base)
    shared = tied(base)
    for name, _ in list(model.named_children()):
        if name != model.base_model_prefix:
            setattr(model, name, nn.Identity())
    stay: Any = inner.get_submodule(layout.blocks)
    set_module(inner, layout.blocks, stay[:block])
    setattr(inner, layout.last, None if layout is _BERT else nn.Identity())
    base.head = {}
    _finish(base, "lower", block, shared)


def upper(base: Base, block: int) -> None:
    """Make `base` its blocks from `block` on and its head, as `lower` does the rest. Raises `ModelFault`."""
    layout = _start(base, block)
    inner = _inner(base)
    for name in layout.first:
        setattr(inner, name, {"embeddings": _Given, "wpe": _Nothing}.get(name, nn.Identity)())
    stay: Any = inner.get_submodule(layout.blocks)
    for index in range(block):
        stay[index] = _Pass()
    _finish(base, "upper", block, set())


def part_of(adapter: Adapter, base: Base) -> Adapter:
    """What of a global adapter is for the part of the model that `base` is. Raises `AdapterFault`."""
    start = start_of(adapter.notes)
    if start == "bottleneck" or adapter.kept:
        what = "bottleneck adapters" if start == "bottleneck" else "a pruned model"
        raise AdapterFault(f"adapter of round {adapter.round}: split learning is not written for {what}")
    dense = base.shapes.keys() if start in ("dense", "sides") else base.head.keys()
    return replace(
        adapter,
        factors={name: part for name, part in adapter.factors.items() if name in base.linears},
        dense={name: value for name, value in adapter.dense.items() if name in dense},
        scores={},
    )


def features(base: Base, batch: Batch) -> torch.Tensor:
    """Hidden states after the blocks of a lower part, with a graph where something is trained.

    (n x tokens x width), of pictures (n x channels x height x width).
    """
    with half.fast_products(base.device):
        if base.kind == "image":
            given: dict[str, Any] = {"pixel_values": batch.ids}
        else:
            given = {"input_ids": batch.ids, "attention_mask": batch.mask, "use_cache": False}
        found: torch.Tensor = _inner(base)(**given)[0]
    return found


def losses(
    base: Base, hidden: torch.Tensor, targets: torch.Tensor, mask: torch.Tensor | None
) -> tuple[torch.Tensor, int]:
    """Loss per sample (n, float32) of an upper part on `hidden`, and how many rows were right (causal: 0).

    Classification: cross-entropy; causal: its mean over the sample's learned tokens, 0 where there are none.
    """
    found, right = _scored(base, Part(hidden, targets, mask))
    return found, int(right.sum())


def fault(base: Base, part: Part) -> str:
    """Why a foreign part can't be computed by the upper part `base`; "" where it can."""
    hidden, targets, mask = part
    if base.kind == "image":
        return _picture_fault(base, part)
    width, most = int(base.model.config.hidden_size), base.max_tokens + 7  # batches are padded to eights
    if hidden.ndim != 3 or hidden.shape[2] != width or not 1 <= hidden.shape[1] <= most or not len(hidden):
        return f"features of shape {tuple(hidden.shape)}, the model takes (samples, up to {most}, {width})"
    wanted = hidden.shape[:2] if base.kind == "causal" else hidden.shape[:1]
    if targets.shape != wanted or mask is None or mask.shape != hidden.shape[:2]:
        return "targets or mask are not of the features' shape"
    # A causal model pads its sequences on the right, and so does every batch here.
    if not bool((mask[:, 0] == 1).all()) or bool((mask[:, 1:] > mask[:, :-1]).any()) or bool((mask < 0).any()):
        return "the mask is not ones, then zeros"
    classes = int(base.model.config.vocab_size) if base.kind == "causal" else base.labels
    known = targets[targets != IGNORED] if base.kind == "causal" else targets
    if bool((known < 0).any()) or bool((known >= classes).any()):
        return f"targets beyond the {classes} classes"
    return "" if bool(torch.isfinite(hidden).all()) else "features that are not finite"


def _picture_fault(base: Base, part: Part) -> str:
    shape = base.model.config.shape_after(base.half[1] if base.half else 0)
    if part.hidden.ndim != 4 or part.hidden.shape[1:] != shape or not len(part.hidden):
        return f"features of shape {tuple(part.hidden.shape)}, the model takes (samples, {', '.join(map(str, shape))})"
    if part.targets.shape != part.hidden.shape[:1]:
        return "targets are not of the features' shape"
    if bool((part.targets < 0).any()) or bool((part.targets >= base.labels).any()):
        return f"targets beyond the {base.labels} classes"
    return "" if bool(torch.isfinite(part.hidden).all()) else "features that are not finite"


def clipped(hidden: torch.Tensor, clip: float, noise: float, generator: torch.Generator) -> torch.Tensor:
    """`hidden` with every token's norm (of pictures: place's) at most `clip` (0: as it is), and Gaussian noise.

    `noise`: its standard deviation as a share of `clip` (of 1 without it). Drawn on the generator's device.
    """
    if clip:
        wide = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
        norm = torch.linalg.vector_norm(wide, dim=1 if hidden.ndim == 4 else -1, keepdim=True)
        hidden = hidden * (clip / norm.clamp_min(clip)).to(hidden.dtype)
    if noise:
        drawn = torch.randn(hidden.shape, generator=generator, device=generator.device)
        hidden = hidden + (drawn * (noise * (clip or 1.0))).to(hidden)
    return hidden


def merged_step(base: Base, parts: Sequence[Part], most: int = 0) -> list[Answer]:
    """One backward pass over the samples of all devices: gradients of the upper part are those of the mean over all.

    Each device's slice of the gradient is scaled to that of its own mean loss. `most`: samples computed at once, to
    bound memory (0: all, as always of pictures); sums differ by rounding alone. Gradients add to those that are there.
    Where the upper part normalises over the batch, a device's gradient is that of the loss of all, scaled the same.
    """
    leaves = [part._replace(hidden=part.hidden.detach().requires_grad_()) for part in parts]
    counts = [len(part.targets) for part in parts]
    total = sum(counts)
    sums, hits = [0.0] * len(parts), [0] * len(parts)
    # Batch normalisation is over all that is computed at once.
    for chunk in _chunks(leaves, most if most and base.kind != "image" else total):
        found, right = _scored(base, _joined([_rows(leaves[index], rows) for index, rows in chunk]))
        (found.sum() / total).backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        first = 0
        for index, rows in chunk:
            place = slice(first, first := first + rows.stop - rows.start)
            sums[index] += float(found.detach()[place].sum())
            hits[index] += int(right[place].sum())
    return [
        Answer(loss / max(1, count), _gradient(leaf.hidden, total / max(1, count)), right)
        for leaf, loss, count, right in zip(leaves, sums, counts, hits, strict=True)
    ]


def separate_step(base: Base, part: Part, most: int = 0) -> Answer:
    """The same for one device alone: the upper part's gradients are those of its mean loss."""
    return merged_step(base, [part], most)[0]


def buffers(base: Base) -> dict[str, Array]:
    """What batch normalisation remembers, by name, float32."""
    return {name: tensor.detach().cpu().float().numpy().copy() for name, tensor in _buffers(base)}


def set_buffers(base: Base, values: Mapping[str, Array]) -> None:
    """Set all that `buffers` gives. Raises `ModelFault` where names or shapes differ."""
    own = dict(_buffers(base))
    shapes = [{name: tuple(one.shape) for name, one in both.items()} for both in (own, values)]
    odd = sorted(n for n in own.keys() | values.keys() if shapes[0].get(n) != shapes[1].get(n))
    if odd:
        raise ModelFault(f"buffer {odd[0]} does not fit the model")
    for name, tensor in own.items():
        tensor.copy_(torch.from_numpy(np.array(values[name])))


def _buffers(base: Base) -> Iterator[tuple[str, torch.Tensor]]:
    for path, module in base.model.named_modules():
        if isinstance(module, _BatchNorm):
            for name, tensor in module.named_buffers(recurse=False):
                yield f"{path}.{name}", tensor


def _layout(base: Base) -> _Layout:
    kind = str(base.model.config.model_type)
    layout = _LAYOUTS.get(kind)
    if layout is None or base.kind not in layout.kinds:
        known = ", ".join(sorted(name for name, one in _LAYOUTS.items() if base.kind in one.kinds))
        raise ModelFault(f"split learning is not written for {kind} models; it is, for {base.kind}, for {known}")
    return layout


def _inner(base: Base) -> Any:
    """The model without its head."""
    return base.model.base_model


def _start(base: Base, block: int) -> _Layout:
    """The layout of a base that can be cut at `block`, with all it carried taken off."""
    layout, there = _layout(base), blocks(base)
    if base.half is not None or base.cuts:
        raise ModelFault("the base is no whole model any more; load it again to cut it")
    if not 1 <= block <= there:
        raise ModelFault(f"strategy.split.block {block}: the model can be cut after block 1 to {there}")
    lora.detach(base)
    base.restore()
    return layout


def _finish(base: Base, which: Literal["lower", "upper"], block: int, shared: set[str]) -> None:
    left = {name for name, _ in base.model.named_parameters()} - shared
    base.shapes = {name: shape for name, shape in base.shapes.items() if name in left}
    base.linears = {
        name: linear for name, linear in base.linears.items() if (linear.block < block) == (which == "lower")
    }
    base.groups = []
    base.half = (which, block)
    give_back()


def _is_tied(model: Any) -> bool:
    head = getattr(model, "lm_head", None)
    return head is not None and head.weight is _table(model.base_model)


def _table(inner: Any) -> Any:
    return inner.get_input_embeddings().weight


def _scored(base: Base, part: Part) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss per sample, float32, and which were right (causal: none)."""
    hidden = part.hidden.to(base.compute)
    with half.fast_products(base.device):
        if base.kind == "causal":
            found = _token_losses(base, hidden, part.targets, part.mask)
            return found, torch.zeros_like(found, dtype=torch.bool)
        logits = _logits(base, hidden, part.mask).float()
    right = logits.detach().argmax(dim=-1) == part.targets
    return functional.cross_entropy(logits, part.targets, reduction="none"), right


def _logits(base: Base, hidden: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    if base.kind == "image" or base.model.config.model_type in ("bert", "roberta"):
        logits: torch.Tensor = base.model(inputs_embeds=hidden, attention_mask=mask).logits
        return logits
    last = _inner(base)(inputs_embeds=hidden, attention_mask=mask, use_cache=False)[0]
    rows = torch.arange(len(last), device=last.device)
    # The model would find a sample's last token by its id.
    ends = mask.sum(dim=1) - 1 if mask is not None else torch.full_like(rows, last.shape[1] - 1)
    picked: torch.Tensor = base.model.score(last[rows, ends])
    return picked


def _token_losses(base: Base, hidden: torch.Tensor, targets: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    last = _inner(base)(inputs_embeds=hidden, attention_mask=mask, use_cache=False)[0]
    targets = targets[:, 1:]
    learned = targets != IGNORED
    logits = base.model.lm_head(last[:, :-1][learned]).float()
    each = functional.cross_entropy(logits, targets[learned], reduction="none")
    rows = learned.nonzero()[:, 0]
    return each.new_zeros(len(targets)).index_add(0, rows, each) / learned.sum(dim=1).clamp_min(1)


def _chunks(parts: Sequence[Part], most: int) -> Iterator[list[tuple[int, slice]]]:
    """At most `most` samples at a time, in order: (place of the part, which of its samples)."""
    chunk: list[tuple[int, slice]] = []
    room = most
    for index, part in enumerate(parts):
        start, rows = 0, len(part.targets)
        while start < rows:
            stop = min(rows, start + room)
            chunk.append((index, slice(start, stop)))
            room -= stop - start
            start = stop
            if not room:
                yield chunk
                chunk, room = [], most
    if chunk:
        yield chunk


def _rows(part: Part, rows: slice) -> Part:
    return Part(part.hidden[rows], part.targets[rows], None if part.mask is None else part.mask[rows])


def _joined(pieces: Sequence[Part]) -> Part:
    masks = [piece.mask for piece in pieces]
    if pieces[0].hidden.ndim == 4:
        return Part(torch.cat([piece.hidden for piece in pieces]), torch.cat([piece.targets for piece in pieces]))
    width = max(piece.hidden.shape[1] for piece in pieces)
    more = [width - piece.hidden.shape[1] for piece in pieces]
    hidden = torch.cat([functional.pad(p.hidden, (0, 0, 0, extra)) for p, extra in zip(pieces, more, strict=True)])
    mask = torch.cat([functional.pad(m, (0, extra)) for m, extra in zip(masks, more, strict=True) if m is not None])
    targets = [piece.targets for piece in pieces]
    if targets[0].ndim > 1:
        targets = [functional.pad(t, (0, extra), value=IGNORED) for t, extra in zip(targets, more, strict=True)]
    return Part(hidden, torch.cat(targets), mask)


def _gradient(leaf: torch.Tensor, factor: float) -> torch.Tensor:
    """Of a leaf, scaled; zeros where nothing flowed back to it."""
    return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad * factor
