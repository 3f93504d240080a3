"""Fold a round: from the admitted update files to the next global adapter.

Updates are memory-mapped one at a time, in device-id order. As many modules and dense tensors as the memory budget
allows are folded in one pass over the files, so memory depends on the number neither of devices nor of modules, and
repeating the fold after a crash gives the same bytes. For that BLAS must run on one thread: the service sets
`OPENBLAS_NUM_THREADS=1` before numpy is imported (two threads are slower at these sizes, too).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from coordinator.core.aggregation.base import Aggregator, DenseFold, Folded, Part, shares
from coordinator.core.aggregation.bottleneck import HoldersFold, union
from coordinator.core.aggregation.product_sum import workspace_bytes
from coordinator.core.facts import ModuleSpec
from shared import adapter as adapter_files
from shared.adapter import Adapter, Factors
from shared.jobs import Codec
from shared.starts import START_NOTE, has_factors
from shared.tensors import Array, rounded

FOLD_BYTES = 64 * 1024 * 1024
"""Budget of what is open at once; a single module or tensor may exceed it."""
ROLE_NOTE = "role"


class Reported(NamedTuple):
    """An admitted update; `samples`: what its device trained on."""

    device: str
    samples: int
    path: Path


@dataclass(frozen=True)
class ModuleStats:
    """One module after the fold; energies as in `Folded`."""

    rank: int
    lost_energy: float
    forgotten_energy: float
    norm: float


@dataclass(frozen=True)
class FoldResult:
    """The next global adapter (for devices, evaluation, export), the residual that stays here, and how it went.

    `weights`: each device's share of the result.
    """

    adapter: Adapter
    residual: Adapter | None
    modules: dict[str, ModuleStats]
    weights: dict[str, float]

    @property
    def norm(self) -> float:
        """Euclidean norm of what the adapter adds to all modules."""
        return math.sqrt(sum(stats.norm**2 for stats in self.modules.values()))

    @property
    def lost_energy(self) -> float:
        """Share of the squared singular values of all modules' sums that the adapter lacks."""
        totals = [(stats.norm**2 / (1.0 - stats.lost_energy), stats.lost_energy) for stats in self.modules.values()]
        total = sum(energy for energy, _ in totals)
        return sum(energy * lost for energy, lost in totals) / total if total > 0.0 else 0.0


def fold_round(
    aggregator: Aggregator,
    modules: Sequence[ModuleSpec],
    previous: Adapter,
    residual: Adapter | None,
    updates: Sequence[Reported],
    *,
    round: int,
    max_share: float = 1.0,
    server_lr: float = 1.0,
    codec: Codec = "fp32",
    memory_bytes: int = FOLD_BYTES,
) -> FoldResult:
    """The global adapter after `round`, from `previous` and the updates the aggregator admitted, in any order.

    `modules`: all that can be tuned; `residual`: of the last fold; `max_share`: cap of one device's share;
    `server_lr`: how far the dense tensors move, and `codec`: what they are rounded to (the aggregator knows its own).
    Raises `ValueError` where a device is counted twice or nobody reported, `DecodeError` for a file that rotted.
    """
    ordered = sorted(updates)
    weights = dict(zip((u.device for u in ordered), shares([u.samples for u in ordered], max_share), strict=True))
    if not ordered or len(weights) != len(ordered):
        raise ValueError("a fold needs at least one update, and each device once")
    carried = {} if residual is None else residual.factors
    dense: dict[str, Array] = {}
    folded: dict[str, Folded] = {}
    current: Mapping[str, Array] = previous.dense
    fold: type[DenseFold] = DenseFold
    if aggregator.start == "bottleneck":
        current = union(current, (adapter_files.read_file(update.path).dense for update in ordered))
        fold = HoldersFold
    for group, tensors in _groups(modules if has_factors(aggregator.start) else (), current, memory_bytes):
        means = {name: fold(one, server_lr) for name, one in tensors.items()}
        walk = _Walk(aggregator, group, previous.factors, carried, means)
        for update in ordered:
            walk.add(weights[update.device], adapter_files.read_file(update.path))
        folded.update(walk.finish_modules())
        dense.update(walk.finish_dense())
    dense, taken = _published(dense, {} if residual is None else residual.dense, codec)
    return _result(aggregator, previous, folded, dense, taken, weights, round)


def _published(
    dense: Mapping[str, Array], carried: Mapping[str, Array], codec: Codec
) -> tuple[dict[str, Array], dict[str, Array]]:
    """(the dense tensors as devices get them, what rounding took of each); `carried`: what it took a round ago."""
    if codec == "fp32":
        return dict(dense), {}
    exact = {
        name: tensor + carried[name] if name in carried and carried[name].shape == tensor.shape else tensor
        for name, tensor in dense.items()
    }
    sent = {name: rounded(tensor, codec) for name, tensor in exact.items()}
    return sent, {name: exact[name] - tensor for name, tensor in sent.items()}


class _Walk:
    """One pass over all update files, for one group of modules and dense tensors."""

    def __init__(
        self,
        aggregator: Aggregator,
        group: Sequence[ModuleSpec],
        current: dict[str, Factors],
        residual: dict[str, Factors],
        dense: dict[str, DenseFold],
    ) -> None:
        self._folds = {m.name: aggregator.begin(m, current.get(m.name), residual.get(m.name)) for m in group}
        self._dense = dense

    def add(self, weight: float, update: Adapter) -> None:
        """Take one device's update; nothing of it is kept."""
        for name, fold in self._folds.items():
            factors = update.factors.get(name)
            if factors is not None:
                fold.add(Part(weight, factors))
        for name, mean in self._dense.items():
            if name in update.dense:
                mean.add(weight, update.dense[name])

    def finish_modules(self) -> Iterator[tuple[str, Folded]]:
        """The modules one by one, each freed before the next."""
        while self._folds:
            name = next(iter(self._folds))
            yield name, self._folds.pop(name).finish()

    def finish_dense(self) -> dict[str, Array]:
        """The means of the dense tensors."""
        return {name: mean.finish() for name, mean in self._dense.items()}


def _groups(
    modules: Sequence[ModuleSpec], dense: Mapping[str, Array], memory_bytes: int
) -> Iterator[tuple[list[ModuleSpec], dict[str, Array]]]:
    """Modules in their order, then dense tensors, cut so that each group fits the budget; one group at least."""
    parts: list[tuple[int, ModuleSpec | str]] = [(workspace_bytes(one.out, one.inp), one) for one in modules]
    parts += [(8 * tensor.size, name) for name, tensor in dense.items()]
    group: list[ModuleSpec] = []
    tensors: dict[str, Array] = {}
    used = 0
    for need, part in parts:
        if used and used + need > memory_bytes:
            yield group, tensors
            group, tensors, used = [], {}, 0
        if isinstance(part, str):
            tensors[part] = dense[part]
        else:
            group.append(part)
        used += need
    yield group, tensors


def _result(
    aggregator: Aggregator,
    previous: Adapter,
    folded: dict[str, Folded],
    dense: dict[str, Array],
    taken: dict[str, Array],
    weights: dict[str, float],
    round: int,
) -> FoldResult:
    carried = {name: fold.residual for name, fold in folded.items() if fold.residual is not None}
    adapter = Adapter(
        kind="global",
        job=previous.job,
        round=round,
        base_digest=previous.base_digest,
        factors={name: fold.factors for name, fold in folded.items() if fold.factors is not None},
        dense=dense,
        notes={START_NOTE: aggregator.start},
    )
    left = bool(carried or taken)
    residual = replace(adapter, factors=carried, dense=taken, notes={ROLE_NOTE: "residual"}) if left else None
    modules = {
        name: ModuleStats(
            rank=0 if fold.factors is None else fold.factors.rank,
            lost_energy=fold.lost_energy,
            forgotten_energy=fold.forgotten_energy,
            norm=fold.norm,
        )
        for name, fold in folded.items()
    }
    return FoldResult(adapter=adapter, residual=residual, modules=modules, weights=weights)
