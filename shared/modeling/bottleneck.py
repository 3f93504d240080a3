"""Bottleneck adapters: y = h + up(gelu(down(h))) after the feed-forward part of a transformer block.

Placed as Pfeiffer et al. do, one a block, at the second of Houlsby's two places (arXiv 1902.00751): on the output h of
the feed-forward part's last projection, before it joins the residual stream. Down (width x hidden) and up (hidden x
width) have biases. Tensors go by name, `<block>.bottleneck.down.weight` and so on, where `<block>` is the path of the
block; they are float32 and compute in the precision of their input.

A new row of down is drawn from the job's seed, the block and the row's number alone, so that all devices grow alike;
its column of up is zero: growing changes no output.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from shared.modeling.base_model import Base
from shared.modeling.faults import AdapterFault, ModelFault
from shared.modeling.parameters import set_module
from shared.starts import fixed_rows
from shared.tensors import Array

LAST_PROJECTION: Mapping[str, str] = {"bert": "output.dense", "gpt2": "mlp.c_proj", "llama": "mlp.down_proj"}
"""Model type -> path, within a block, of the last projection of the feed-forward part."""
TENSORS = ("down.weight", "down.bias", "up.weight", "up.bias")


@dataclass(frozen=True)
class Site:
    """Where a block's adapter goes: on linear layer `linear`, over features of width `hidden`; `index` of the block."""

    block: str
    linear: str
    hidden: int
    index: int


class Bottlenecked(nn.Module):
    """A linear layer with an adapter on its output."""

    def __init__(self, layer: nn.Module, tensors: Mapping[str, Array], device: str) -> None:
        super().__init__()
        self.layer = layer
        self.adapter = nn.ParameterDict(
            {
                name.replace(".", "_"): nn.Parameter(torch.from_numpy(np.array(tensors[name], np.float32)).to(device))
                for name in TENSORS
            }
        )

    def part(self, name: str) -> nn.Parameter:
        """One of `TENSORS`."""
        tensor: nn.Parameter = self.adapter[name.replace(".", "_")]
        return tensor

    def get_base_layer(self) -> nn.Module:
        """The layer without the adapter."""
        return self.layer

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """The layer's output through the adapter."""
        given: torch.Tensor = self.layer(input)
        down, down_bias, up, up_bias = (self.part(name).to(given.dtype) for name in TENSORS)
        inner = nn.functional.gelu(nn.functional.linear(given, down, down_bias))
        return given + nn.functional.linear(inner, up, up_bias)


def sites(base: Base) -> dict[str, Site]:
    """The blocks of `base` that can take an adapter, by path. Raises `ModelFault` for another architecture."""
    kind = base.model.config.model_type
    last = LAST_PROJECTION.get(kind)
    if last is None:
        known = ", ".join(sorted(LAST_PROJECTION))
        raise ModelFault(f"{base.folder}: bottleneck adapters fit blocks of {known}, not of {kind}")
    found = {}
    for linear in base.linears.values():
        path = linear.name.removesuffix(f".{last}")
        # BERT's attention has an output.dense as well, in a part of its own.
        if path != linear.name and path.rpartition(".")[2].isdigit():
            found[path] = Site(path, linear.name, linear.out, linear.block)
    return found


def tensor_names(block: str) -> dict[str, str]:
    """Part of the adapter -> the name under which it travels."""
    return {part: f"{block}.bottleneck.{part}" for part in TENSORS}


def width_of(dense: Mapping[str, Array], block: str) -> int:
    """The width of a block's adapter among `dense`; 0: there is none."""
    tensor = dense.get(tensor_names(block)["down.weight"])
    return 0 if tensor is None else int(tensor.shape[0])


def shapes(site: Site, width: int) -> dict[str, tuple[int, ...]]:
    """Shapes of an adapter's parts."""
    hidden = site.hidden
    return {"down.weight": (width, hidden), "down.bias": (width,), "up.weight": (hidden, width), "up.bias": (hidden,)}


def dense_shapes(base: Base, dense: Mapping[str, Array]) -> dict[str, tuple[int, ...]]:
    """The shapes that the adapters in `dense` must have, each block's as wide as its first matrix says.

    Raises `AdapterFault` where that matrix is none.
    """
    wanted: dict[str, tuple[int, ...]] = {}
    for block, site in sites(base).items():
        names = tensor_names(block)
        if any(name in dense for name in names.values()):
            tensor = dense.get(names["down.weight"])
            if tensor is None or tensor.ndim != 2:
                raise AdapterFault(f"adapter of block {block}: {names['down.weight']} is no matrix or is missing")
            wanted |= {names[part]: shape for part, shape in shapes(site, tensor.shape[0]).items()}
    return wanted


def grown(dense: Mapping[str, Array], site: Site, width: int, seed: int) -> dict[str, Array]:
    """The adapter of a block at `width`: what `dense` holds of it, cut or grown to that width."""
    names = tensor_names(site.block)
    parts = {part: np.zeros(shape, np.float32) for part, shape in shapes(site, width).items()}
    parts["down.weight"] = fixed_rows(seed, site.block, width, site.hidden)
    known = min(width, width_of(dense, site.block))
    if known:
        parts["down.weight"][:known] = dense[names["down.weight"]][:known]
        parts["down.bias"][:known] = dense[names["down.bias"]][:known]
        parts["up.weight"][:, :known] = dense[names["up.weight"]][:, :known]
        parts["up.bias"][:] = dense[names["up.bias"]]
    return parts


def put_on(base: Base, dense: Mapping[str, Array], widths: Mapping[str, int], seed: int) -> dict[str, nn.Parameter]:
    """Put an adapter of its width on every block of `widths`, begun from `dense`; its tensors by name."""
    known = sites(base)
    if unknown := sorted(widths.keys() - known.keys()):
        raise AdapterFault(f"ranks name {unknown[0]}, a block that the base does not have")
    tensors: dict[str, nn.Parameter] = {}
    for block, width in sorted(widths.items()):
        if width < 1:
            continue
        site = known[block]
        layer = Bottlenecked(base.model.get_submodule(site.linear), grown(dense, site, width, seed), base.device)
        set_module(base.model, site.linear, layer)
        for part, name in tensor_names(block).items():
            tensors[name] = layer.part(part)
    return tensors


def load_export(model: Any, folder: Path) -> Any:
    """`model` of transformers with the adapters and the head that were exported to `folder`; it is changed in place.

    Raises `OSError` or `ValueError` where the folder holds none, `AttributeError`, `KeyError` or `RuntimeError` where
    they do not fit the model.
    """
    from safetensors.torch import load_file

    config = json.loads((folder / "bottleneck_config.json").read_text(encoding="utf-8"))
    tensors = load_file(folder / "bottleneck.safetensors")
    last = LAST_PROJECTION.get(model.config.model_type)
    if last is None:
        raise ValueError(f"bottleneck adapters do not fit models of type {model.config.model_type}")
    for block in config["widths"]:
        names = tensor_names(block)
        parts = {part: tensors.pop(names[part]).numpy() for part in TENSORS}
        path = f"{block}.{last}"
        set_module(model, path, Bottlenecked(model.get_submodule(path), parts, str(model.device)))
    with torch.no_grad():
        for name, tensor in tensors.items():
            model.get_parameter(name).copy_(tensor)
    return model
