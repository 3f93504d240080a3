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
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn

from shared import units
from shared.adapter import Places
from shared.modeling.base_model import Base, Cut
from shared.modeling.faults import ModelFault
from shared.modeling.parameters import put, set_module
from shared.modeling.weights import WeightFiles
from shared.units import Group, Kept, Side, Slice


def groups(model: Any) -> list[Group]:
    """All groups of a whole model, block by block. Raises `ModelFault` for an architecture that is not supported."""
    kind = str(model.config.model_type)
    if kind not in _ARCHITECTURES:
        raise ModelFault(f"pruning is not written for {kind} models; it is for {', '.join(sorted(_ARCHITECTURES))}")
    modules = dict(model.named_modules())
    return list(_ARCHITECTURES[kind](modules))


def groups_of(base: Base) -> list[Group]:
    """Those of the whole model of a base with no adapter on it, looked up once, before anything is pruned."""
    if not base.groups:
        base.groups = groups(base.model)
    return base.groups


def chosen(known: Sequence[Group], *, heads: bool) -> list[Group]:
    """The groups that a job prunes: FFN channels, and `heads`, if wanted."""
    return [group for group in known if heads or group.kind == "channels"]


def check_kept(known: Sequence[Group], kept: Kept) -> None:
    """Raise `ModelFault` unless `kept` names groups of the model, and in each at least one unit, rising."""
    reason = units.fault(known, kept)
    if reason:
        raise ModelFault(reason)


def gone(base: Base, packed: Mapping[str, bytes]) -> float:
    """The ratio that a model of `packed` units was pruned to; {}: 0. Raises `DecodeError`, `ModelFault`."""
    return units.ratio_of(groups_of(base), units.unpack(groups_of(base), packed)) if packed else 0.0


def masked(model: nn.Module, known: Sequence[Group], kept: Kept) -> None:
    """Zero, in place, the columns that read the units which do not stay: as if they said nothing. The reference."""
    check_kept(known, kept)
    with torch.no_grad():
        for group in known:
            gone = sorted(set(range(group.count)) - set(kept.get(group.name, range(group.count))))
            for one in group.slices if gone else ():
                if one.side == "in":
                    places = torch.from_numpy(one.places(gone))
                    model.get_submodule(one.module).get_parameter("weight")[:, places] = 0.0


def prune(base: Base, kept: Kept) -> None:
    """Make the layers of `base`, with no adapter on it, those of the units that stay, be they more or less than now.

    Raises `ModelFault`.
    """
    known = groups_of(base)
    check_kept(known, kept)
    wanted = units.places(known, kept)
    for name in sorted(wanted.keys() | base.cuts.keys()):
        sides = wanted.get(name, {})
        _cut(base, name, sides.get("out"), sides.get("in"))
    for group in known:
        if group.kind == "heads":
            _tell_attention(base.model, group, len(kept.get(group.name, range(group.count))))


def _cut(base: Base, module: str, rows: Places | None, columns: Places | None) -> None:
    """Make linear layer `module` that of some `rows` and `columns` of the stored one (None: all), at the base's bits,
    and its bias, too. Nothing is done where it is that already."""
    cut = (rows, columns)
    if all(_same(*pair) for pair in zip(base.cuts.get(module, (None, None)), cut, strict=True)):
        return
    # Memory may run out here: the base, which is held for the next work, has changed in nothing yet.
    layer, out, inp = _part_of(base, module, cut)
    base.whole.setdefault(module, base.linears[module])
    set_module(base.model, module, layer)
    base.cuts.pop(module, None)
    if rows is not None or columns is not None:
        base.cuts[module] = cut
    base.linears[module] = replace(base.linears[module], out=out, inp=inp)
    base.shapes |= {f"{module}.{name}": tuple(p.shape) for name, p in layer.named_parameters()}


def _part_of(base: Base, module: str, cut: Cut) -> tuple[nn.Module, int, int]:
    """What `cut` leaves of linear layer `module`, at the base's bits and frozen, and its size (out, in)."""
    files = WeightFiles(base.folder)
    value = base.value(files, f"{module}.weight", cut).contiguous()
    out, inp = value.shape
    has_bias = base.model.get_submodule(module).bias is not None
    layer: nn.Module
    if base.bits < 16:
        from shared.modeling.quantization import quantized

        layer = quantized(value, has_bias, base.bits, base.compute, base.device)
    else:
        layer = nn.Linear(inp, out, bias=has_bias, device="meta")
        put(layer, "weight", value.to(base.device, base.compute))
    if has_bias:
        put(layer, "bias", base.value(files, f"{module}.bias", cut).to(base.device, base.compute))
    return layer, out, inp


def frozen(base: Base, name: str) -> torch.Tensor:
    """The weight of linear layer `name` without its adapter, float32."""
    layer: Any = base.model.get_submodule(name)
    layer = layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer
    weight: torch.Tensor = layer.dequantized() if hasattr(layer, "dequantized") else layer.weight
    return weight.detach().float()


def requantized(base: Base) -> float:
    """Relative error of the pruned layers' weights against the stored ones, mean over the layers; 0 from 16 bits on."""
    if base.bits >= 16 or not base.cuts:
        return 0.0
    files, errors = WeightFiles(base.folder), []
    for name in base.cuts:
        exact = base.value(files, f"{name}.weight")
        errors.append(float((frozen(base, name).cpu() - exact).norm() / exact.norm().clamp_min(1e-30)))
    return sum(errors) / len(errors)


def _same(one: Places | None, other: Places | None) -> bool:
    return one is other or (one is not None and other is not None and np.array_equal(one, other))


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
    slices = (*(_slice(name, "out", 1) for name in makers), _slice(reader, "in", 1))
    return Group(
        name=f"{block}.channels", block=block, kind="channels", count=modules[makers[0]].out_features, slices=slices
    )


def _slice(module: str, side: Side, width: int, starts: tuple[int, ...] = (0,)) -> Slice:
    return Slice(module=module, side=side, width=width, starts=starts)


def _bert(modules: Mapping[str, Any]) -> Iterator[Group]:
    for name, module in modules.items():
        if name.endswith(".attention.self") and hasattr(module, "query"):
            layer = name.removesuffix(".attention.self")
            block, width = int(layer.rpartition(".")[2]), module.attention_head_size
            yield Group(
                name=f"{block}.heads", block=block, kind="heads", count=module.num_attention_heads,
                slices=(
                    *(_slice(f"{name}.{part}", "out", width) for part in ("query", "key", "value")),
                    _slice(f"{layer}.attention.output.dense", "in", width),
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
                name=f"{block}.heads", block=block, kind="heads", count=module.num_heads,
                slices=(_slice(f"{name}.c_attn", "out", width, starts), _slice(f"{name}.c_proj", "in", width)),
            )  # fmt: skip
            yield _channels(block, modules, [f"{layer}.mlp.c_fc"], f"{layer}.mlp.c_proj")


def _llama(modules: Mapping[str, Any]) -> Iterator[Group]:
    for name, module in modules.items():
        if name.endswith(".self_attn") and hasattr(module, "q_proj"):
            layer = name.removesuffix(".self_attn")
            block, width = int(layer.rpartition(".")[2]), module.head_dim
            shared = module.num_key_value_groups * width
            yield Group(
                name=f"{block}.heads", block=block, kind="heads",
                count=modules[f"{name}.k_proj"].out_features // width,
                slices=(
                    _slice(f"{name}.q_proj", "out", shared), _slice(f"{name}.k_proj", "out", width),
                    _slice(f"{name}.v_proj", "out", width), _slice(f"{name}.o_proj", "in", shared),
                ),
            )  # fmt: skip
            gate, up, down = (f"{layer}.mlp.{part}_proj" for part in ("gate", "up", "down"))
            yield _channels(block, modules, [gate, up], down)


_ARCHITECTURES: dict[str, Callable[[Mapping[str, Any]], Iterator[Group]]] = {
    "bert": _bert, "roberta": _bert, "gpt2": _gpt2, "llama": _llama, "mistral": _llama, "qwen2": _llama,
}  # fmt: skip
