"""Tensors in their places: where a parameter is stored, and putting parameters and modules into a model by name."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from shared.modeling.faults import ModelFault
from shared.modeling.weights import WeightFiles


@dataclass(frozen=True)
class Source:
    """The stored tensor that a parameter came from, transposed or not."""

    key: str
    transposed: bool


def put(model: nn.Module, name: str, value: torch.Tensor) -> None:
    """Make `value` the parameter `name`, frozen. Raises `ModelFault` where it has another shape."""
    path, _, leaf = name.rpartition(".")
    owner = model.get_submodule(path)
    expected = owner.get_parameter(leaf).shape
    if value.shape != expected:
        raise ModelFault(f"{name}: stored with shape {tuple(value.shape)}, its config says {tuple(expected)}")
    setattr(owner, leaf, nn.Parameter(value, requires_grad=False))


def set_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put `module` at path `name`."""
    path, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(path), leaf, module)


def stored(files: WeightFiles, source: Source) -> torch.Tensor:
    """The stored value, as a linear layer has it, fp32."""
    value = files.read(source.key).to(torch.float32)
    return value.t() if source.transposed else value
