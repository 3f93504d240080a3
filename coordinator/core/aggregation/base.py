"""What an aggregator is, and what all of them share: shares of the data, the mean of dense tensors.

A round is folded module by module: `begin` opens a module, `add` takes one device's part, `finish` gives the module's
next global factors. The caller adds parts in device-id order, so that the bytes of the result do not depend on which
update arrived first. Nothing here reads a file or a clock.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from coordinator.core.facts import ModuleSpec
from shared.adapter import Adapter, Factors, Places
from shared.norms import column_weights
from shared.starts import Start
from shared.tensors import Array
from shared.units import Side

Wide = npt.NDArray[np.float64]
NORM_BOUND = 1e6
"""A change no sound training makes; keeps the sums within float32 where no better bound is known."""
UNBOUNDED = 2**31 - 1
"""A global rank that no module reaches."""


@dataclass(frozen=True)
class Expectation:
    """What an update must be: the identity of its work, and the global adapter its device started from.

    `ranks`: as assigned, 0 or absent for a module that is not tuned. `modules`: of the base, by name.
    `stacked`: how many agents' factors lie side by side in each module. `norm_bound`: largest Euclidean norm of the
    change (`norms.change_norm`) that is believed. `seed`: the job's. `places`: of a pruned device, the rows and columns
    of each layer that are left. `dense`: the dense tensors that it must hold; None: all that the global adapter has.
    """

    job: str
    round: int
    attempt: int
    device: str
    base_digest: str
    ranks: Mapping[str, int]
    modules: Mapping[str, ModuleSpec]
    alpha_ratio: float
    before: Adapter
    stacked: int = 1
    norm_bound: float = NORM_BOUND
    seed: int = 0
    places: Mapping[str, Mapping[Side, Places]] = field(default_factory=dict)
    dense: frozenset[str] | None = None


@dataclass(frozen=True)
class Part:
    """One device's factors of one module; `weight`: its share of the round's samples."""

    weight: float
    factors: Factors


@dataclass(frozen=True)
class Folded:
    """The next state of one module.

    `factors`: what devices, evaluation and export use; None: the module is not tuned. `residual`: what recompression
    cut off and the next round adds again; it stays on the coordinator. `lost_energy`: share of the squared singular
    values of the exact sum that `factors` lacks; `forgotten_energy`: share that `residual` lacks too. `norm`:
    Frobenius norm of the product of `factors`.
    """

    factors: Factors | None
    residual: Factors | None = None
    lost_energy: float = 0.0
    forgotten_energy: float = 0.0
    norm: float = 0.0


class ModuleFold(Protocol):
    """The fold of one module; its memory does not grow with the number of parts."""

    def add(self, part: Part) -> None:
        """Take one device's part; the arrays are not kept."""

    def finish(self) -> Folded:
        """The next state; the fold is used up. Without any part the module is unchanged."""


class Aggregator(Protocol):
    """A way to make the next global adapter of the round's updates."""

    name: str
    start: Start
    """What a device trains; written into the global adapter's notes under `shared.starts.START_NOTE`."""
    global_rank: int
    """No module of the global adapter has more directions, as far as this method bounds them."""

    def admit(self, update: Adapter, expected: Expectation) -> str | None:
        """Why `update` must be refused, or None."""

    def begin(self, module: ModuleSpec, current: Factors | None, residual: Factors | None) -> ModuleFold:
        """Open the fold of `module` from its global factors and the residual of the last round."""


def fold_module(
    aggregator: Aggregator, module: ModuleSpec, current: Factors | None, residual: Factors | None, parts: Iterable[Part]
) -> Folded:
    """Fold one module over `parts`, in the order they come."""
    fold = aggregator.begin(module, current, residual)
    for part in parts:
        fold.add(part)
    return fold.finish()


def shares(samples: Sequence[int], max_share: float = 1.0) -> list[float]:
    """Each device's share of the round: samples over their sum, none above `max_share` (sample counts are claims).

    What a cap cuts off goes to the others in proportion; where all would be above it, they share equally. All zero
    where no sample was trained on.
    """
    total = sum(samples)
    if total == 0:
        return [0.0] * len(samples)
    working = [index for index, count in enumerate(samples) if count > 0]
    if max_share * len(working) <= 1.0:
        return [1.0 / len(working) if count > 0 else 0.0 for count in samples]
    capped: set[int] = set()
    while True:
        rest = sum(samples[index] for index in working if index not in capped)
        left = 1.0 - max_share * len(capped)
        weights = {i: max_share if i in capped else samples[i] / rest * left for i in working}
        above = {index for index, weight in weights.items() if weight > max_share and index not in capped}
        if not above:
            return [weights.get(index, 0.0) for index in range(len(samples))]
        capped |= above


class DenseFold:
    """Weighted mean of one dense tensor, summed in float64."""

    def __init__(self, current: Array, server_lr: float = 1.0) -> None:
        """`server_lr`: how far the tensor moves, 1: to the mean."""
        self._current = current
        self._server_lr = server_lr
        self._sum: Wide = np.zeros(current.shape)
        self._weight = 0.0

    def add(self, weight: float, tensor: Array) -> None:
        """Take one device's tensor."""
        self._sum += np.multiply(tensor, weight, dtype=np.float64)
        self._weight += weight

    def finish(self) -> Array:
        """The mean as float32; the current tensor where nobody reported one."""
        if self._weight == 0.0:
            return self._current
        mean = self._sum / self._weight
        if self._server_lr == 1.0:
            return narrow(mean)
        return narrow(self._current + self._server_lr * (mean - self._current))


def narrow(array: npt.NDArray[Any]) -> Array:
    """`array` as contiguous float32. Raises `FloatingPointError` where a number is none that float32 holds."""
    with np.errstate(over="ignore"):
        found = np.ascontiguousarray(array, dtype=np.float32)
    if not np.isfinite(found).all():
        raise FloatingPointError("the aggregate is not finite")
    return found


def product(factors: Factors) -> Wide:
    """What `factors` add to W, (out x in) in float64. For tests and small modules: it is dense."""
    dense: Wide = (factors.b.astype(np.float64) * column_weights(factors)) @ factors.a.astype(np.float64)
    return dense
