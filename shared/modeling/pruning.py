"""Structured pruning: which rows and columns of a model make one head or one FFN channel, and cutting them out.

A unit goes as a whole: of a BERT head the rows of query, key and value and the columns behind them of the attention's
output; of GPT-2 the same, with all three in one layer; of LLaMA a group of query heads with the key and value head that
they share. Of an FFN channel the row that makes it (in LLaMA of gate and up) and the column that reads it.

Matrices become physically smaller. Their values are cut from the stored ones, at 8 and 4 bits before they are quantized
again, so that pruning step by step drifts nowhere. Units keep their numbers in the whole model, and at least one of
each group stays.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from shared.modeling.base_model import Base
from shared.modeling.faults import ModelFault

Side = Literal["out", "in"]
Kept = Mapping[str, Sequence[int]]
"""Group -> the units that stay, rising; a group that is not named stays whole."""


@dataclass(frozen=True)
class Slice:
    """A unit's part of one linear layer: `width` rows or columns for each unit, from each of `starts`."""

    module: str
    side: Side
    width: int
    starts: tuple[int, ...] = (0,)

    def places(self, units: Sequence[int]) -> torch.Tensor:
        """Indices of the rows or columns of these units, in the order of the layer."""
        own = torch.as_tensor(units, dtype=torch.long)[:, None] * self.width + torch.arange(self.width)[None, :]
        return torch.cat([start + own.flatten() for start in self.starts])


@dataclass(frozen=True)
class Group:
    """Units that are alike: the heads, or the FFN channels, of one block."""

    name: str
    block: int
    kind: Literal["heads", "channels"]
    count: int
    slices: tuple[Slice, ...]


def groups(model: Any) -> list[Group]:
    """All groups of a whole model, block by block. Raises `ModelFault` for an architecture that is not supported."""
    kind = str(model.config.model_type)
    if kind not in _ARCHITECTURES:
        raise ModelFault(f"pruning is not written for {kind} models; it is for {', '.join(sorted(_ARCHITECTURES))}")
    modules = dict(model.named_modules())
    return list(_ARCHITECTURES[kind](modules))


def check_kept(known: Sequence[Group], kept: Kept) -> None:
    """Raise `ModelFault` unless `kept` names groups of the model, and in each at least one unit, rising."""
    counts = {group.name: group.count for group in known}
    for name, units in kept.items():
        if name not in counts:
            raise ModelFault(f"there is no group {name} to prune")
        if not units:
            raise ModelFault(f"{name}: at least one unit has to stay")
        if list(units) != sorted(set(units)) or units[0] < 0 or units[-1] >= counts[name]:
            raise ModelFault(f"{name}: units have to rise from 0 to {counts[name] - 1}")


def places(known: Sequence[Group], kept: Kept) -> dict[str, dict[Side, torch.Tensor]]:
    """Module -> side -> the rows or columns of the whole layer that stay, for the layers that become smaller."""
    check_kept(known, kept)
    found: dict[str, dict[Side, torch.Tensor]] = {}
    for group in known:
        if group.name in kept and len(kept[group.name]) < group.count:
            for one in group.slices:
                found.setdefault(one.module, {})[one.side] = one.places(kept[group.name])
    return found


def masked(model: nn.Module, known: Sequence[Group], kept: Kept) -> None:
    """Zero, in place, the columns that read the units which do not stay: as if they said nothing. The reference."""
    check_kept(known, kept)
    with torch.no_grad():
        for group in known:
            gone = sorted(set(range(group.count)) - set(kept.get(group.name, range(group.count))))
            for one in group.slices if gone else ():
                if one.side == "in":
                    model.get_submodule(one.module).get_parameter("weight")[:, one.places(gone)] = 0.0


def prune(base: Base, kept: Kept) -> None:
    """Make the layers of a whole `base`, with no adapter on it, those of the units that stay. Raises `ModelFault`."""
    prune_known(base, groups(base.model), kept)


def prune_known(base: Base, known: Sequence[Group], kept: Kept) -> None:
    """`prune`, also of a base that was pruned before; `known`: the groups of the whole one."""
    cut = places(known, kept)
    for name, sides in cut.items():
        base.cut(name, sides.get("out"), sides.get("in"))
    for group in known:
        if group.kind == "heads" and group.name in kept:
            _tell_attention(base.model, group, len(kept[group.name]))


def share(known: Sequence[Group], kept: Kept, sizes: Mapping[str, tuple[int, int]]) -> float:
    """The share of the groups' weights that is gone. `sizes`: (out, in) of each whole layer."""
    names = {one.module for group in known for one in group.slices}
    whole = sum(sizes[name][0] * sizes[name][1] for name in names)
    left = 0
    cut = places(known, kept)
    for name in names:
        sides = cut.get(name, {})
        out = len(sides["out"]) if "out" in sides else sizes[name][0]
        left += out * (len(sides["in"]) if "in" in sides else sizes[name][1])
    return 1 - left / whole


def _tell_attention(model: nn.Module, group: Group, heads: int) -> None:
    """Fix what an attention module remembers of its width; its forward pass reads the shapes otherwise."""
    owner: Any = model.get_submodule(group.slices[0].module.rpartition(".")[0])
    if hasattr(owner, "split_size"):
        owner.split_size = heads * owner.head_dim
        owner.num_heads = heads
    elif hasattr(owner, "all_head_size"):
        owner.num_attention_heads = heads
        owner.all_head_size = heads * owner.attention_head_size


def _channels(block: int, modules: Mapping[str, Any], makers: Sequence[str], reader: str) -> Group:
    """The FFN channels that the layers `makers` make, one row each, and `reader` reads."""
    slices = (*(Slice(name, "out", 1) for name in makers), Slice(reader, "in", 1))
    return Group(f"{block}.channels", block, "channels", modules[makers[0]].out_features, slices)


def _bert(modules: Mapping[str, Any]) -> Iterator[Group]:
    for name, module in modules.items():
        if name.endswith(".attention.self") and hasattr(module, "query"):
            layer = name.removesuffix(".attention.self")
            block, width = int(layer.rpartition(".")[2]), module.attention_head_size
            yield Group(
                f"{block}.heads", block, "heads", module.num_attention_heads,
                (
                    *(Slice(f"{name}.{part}", "out", width) for part in ("query", "key", "value")),
                    Slice(f"{layer}.attention.output.dense", "in", width),
                ),
            )  # fmt: skip
            yield _channels(block, modules, [f"{layer}.intermediate.dense"], f"{layer}.output.dense")


def _gpt2(modules: Mapping[str, Any]) -> Iterator[Group]:
    for name, module in modules.items():
        if name.endswith(".attn") and hasattr(module, "c_attn"):
            layer = name.removesuffix(".attn")
            block, width = int(layer.rpartition(".")[2]), module.head_dim
            starts = (0, module.split_size, 2 * module.split_size)
            yield Group(
                f"{block}.heads", block, "heads", module.num_heads,
                (Slice(f"{name}.c_attn", "out", width, starts), Slice(f"{name}.c_proj", "in", width)),
            )  # fmt: skip
            yield _channels(block, modules, [f"{layer}.mlp.c_fc"], f"{layer}.mlp.c_proj")


def _llama(modules: Mapping[str, Any]) -> Iterator[Group]:
    for name, module in modules.items():
        if name.endswith(".self_attn") and hasattr(module, "q_proj"):
            layer = name.removesuffix(".self_attn")
            block, width = int(layer.rpartition(".")[2]), module.head_dim
            shared = module.num_key_value_groups * width
            yield Group(
                f"{block}.heads", block, "heads", modules[f"{name}.k_proj"].out_features // width,
                (
                    Slice(f"{name}.q_proj", "out", shared), Slice(f"{name}.k_proj", "out", width),
                    Slice(f"{name}.v_proj", "out", width), Slice(f"{name}.o_proj", "in", shared),
                ),
            )  # fmt: skip
            gate, up, down = (f"{layer}.mlp.{part}_proj" for part in ("gate", "up", "down"))
            yield _channels(block, modules, [gate, up], down)


_ARCHITECTURES: dict[str, Callable[[Mapping[str, Any]], Iterator[Group]]] = {
    "bert": _bert, "roberta": _bert, "gpt2": _gpt2, "llama": _llama, "mistral": _llama, "qwen2": _llama,
}  # fmt: skip
