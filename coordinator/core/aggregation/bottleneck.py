"""`bottleneck`: means of bottleneck adapters, each number over the devices that hold it. FedAdapter (Cai et al.,
MobiCom 2023, arXiv 2205.10162).

The paper's, by its abstract: small adapters in the top layers first, deeper and larger ones later, devices split into
trial groups (`planning.fedadapter`). Our reading: the averaging, which the abstract leaves open. Adapters of unequal
width share their first rows and columns, since they grew from one; every number is the mean over the devices that
trained it, weighted by samples. The next global adapter holds what the round's devices trained and no more: what a
smaller configuration leaves out is dropped.

Adapters travel as dense tensors, named in `tensors_of`; a work's `ranks` give the width of each block. `modules` are
the blocks, hidden x hidden. There are no factors.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import numpy as np

from coordinator.core.aggregation import admission
from coordinator.core.aggregation.base import DenseFold, Expectation, Wide, narrow
from coordinator.core.aggregation.dense import NoFold
from coordinator.core.facts import ModuleSpec
from shared.adapter import Adapter, Factors
from shared.starts import Start
from shared.tensors import Array

PART = ".bottleneck."
"""In the name of every tensor of an adapter; the head's have no such part."""


class Bottleneck:
    """The aggregator `bottleneck`. `width`: the largest that an adapter may have."""

    name = "bottleneck"
    start: Start = "bottleneck"

    def __init__(self, width: int) -> None:
        self.global_rank = width

    def admit(self, update: Adapter, expected: Expectation) -> str | None:
        """Why `update` must be refused, or None: it must hold the adapters of its work, and the head."""
        wanted = {name: tensor.shape for name, tensor in expected.before.dense.items() if PART not in name}
        for block, width in expected.ranks.items():
            if width > 0:
                wanted |= tensors_of(expected.modules[block], width)
        return (
            admission.identity_fault(update, expected)
            or admission.names_fault("module", update.factors, ())
            or admission.names_fault("dense tensor", update.dense, wanted)
            or _shape_fault(update, wanted)
            or _numbers_fault(update, expected)
        )

    # The protocol hands every method a module and its factors.
    def begin(self, module: ModuleSpec, current: Factors | None, residual: Factors | None) -> NoFold:  # noqa: ARG002
        """Nothing is folded by module."""
        return NoFold()


class HoldersFold(DenseFold):
    """Mean of one tensor over those who hold it, number by number: smaller ones are a first part of it."""

    def __init__(self, current: Array, server_lr: float = 1.0) -> None:
        super().__init__(current, server_lr)
        self._weights: Wide = np.zeros(current.shape)

    def add(self, weight: float, tensor: Array) -> None:
        """Take one device's tensor."""
        part = tuple(slice(0, side) for side in tensor.shape)
        self._sum[part] += np.multiply(tensor, weight, dtype=np.float64)
        self._weights[part] += weight

    def finish(self) -> Array:
        """The mean as float32; the current number where nobody reported one."""
        held = self._weights > 0.0
        mean = np.where(held, self._sum / np.where(held, self._weights, 1.0), self._current)
        return narrow(self._current + self._server_lr * (mean - self._current))


def tensors_of(block: ModuleSpec, width: int) -> dict[str, tuple[int, ...]]:
    """The tensors of a block's adapter: name -> shape."""
    hidden, name = block.out, f"{block.name}{PART}"
    return {
        f"{name}down.weight": (width, hidden), f"{name}down.bias": (width,),
        f"{name}up.weight": (hidden, width), f"{name}up.bias": (hidden,),
    }  # fmt: skip


def union(before: Mapping[str, Array], held: Iterable[Mapping[str, Array]]) -> dict[str, Array]:
    """The tensors of the next global adapter with their current values: those that are held, each as large as the
    largest; zero where there is none yet."""
    shapes: dict[str, tuple[int, ...]] = {}
    for tensors in held:
        for name, tensor in tensors.items():
            known = shapes.get(name, tensor.shape)
            shapes[name] = tuple(max(sides) for sides in zip(known, tensor.shape, strict=True))
    return {name: _padded(before.get(name), shape) for name, shape in sorted(shapes.items())}


def _padded(tensor: Array | None, shape: tuple[int, ...]) -> Array:
    made = np.zeros(shape, np.float32)
    if tensor is not None:
        part = tuple(slice(0, min(sides)) for sides in zip(shape, tensor.shape, strict=True))
        made[part] = tensor[part]
    return made


def _shape_fault(update: Adapter, wanted: Mapping[str, tuple[int, ...]]) -> str | None:
    for name in sorted(update.dense):
        if (shape := update.dense[name].shape) != wanted[name]:
            return f"dense tensor {name!r:.100}: shape {shape}, expected {wanted[name]}"
    return None


def _numbers_fault(update: Adapter, expected: Expectation) -> str | None:
    """By the change against the start, in which what has grown is zero but for the rows of down: a constant."""
    square = 0.0
    for name, tensor in sorted(update.dense.items()):
        with np.errstate(invalid="ignore"):
            change = tensor.astype(np.float64) - _padded(expected.before.dense.get(name), tensor.shape)
        found = float(np.sum(np.square(change)))
        if not math.isfinite(found):
            return f"dense tensor {name!r:.100} holds numbers that are not finite"
        square += found
    if math.sqrt(square) > expected.norm_bound:
        return f"norm of the change is {math.sqrt(square):.4g}, above the bound {expected.norm_bound:.4g}"
    return None
