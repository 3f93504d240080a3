"""One update of several agents' updates of the same work: the mean of what they add to the model, by samples.

    sum_i w_i s B_i A_i = s [w_1 B_1 .. w_k B_k] [A_1; ..; A_k],   w_i = n_i / sum n

The stack is exact and has the sum of the ranks; every agent started from the same directions of the global adapter,
so the mean contains them once, as one agent's update does. Where the aggregator averages factors itself (`fedit`,
`hetlora`, `ffa`, `fedex`), so do the agents of a device: exact for `ffa` alone, whose A they share. Numpy alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from edge_daemon.protocol import Failed, Merge, Merged
from shared import adapter as adapters
from shared.adapter import Adapter, Factors
from shared.errors import DecodeError
from shared.files import write_whole
from shared.starts import averages_factors, start_of
from shared.tensors import Array


def merge(order: Merge) -> Merged:
    """Do `order`. Raises `DecodeError` or `OSError` for a file that can't be used."""
    notes = adapters.read_file(Path(order.adapter_path)).notes
    updates = [adapters.read_file(Path(part.update_path)) for part in order.partials]
    samples = [part.samples for part in order.partials]
    weights = [count / sum(samples) for count in samples]
    merged = mean_update(updates, weights, stack=not averages_factors(start_of(notes)))
    content = adapters.write(merged, order.assignment.training.codec)
    write_whole(Path(order.update_path), content)
    return Merged(sha=hashlib.sha256(content).hexdigest(), size=len(content), norm=norm(merged))


def failure(order: Merge, error: Exception) -> Failed:
    """The answer where `merge` raised."""
    work = order.assignment
    reason = f"the updates of this device's agents can't be merged: {error or type(error).__name__}"
    return Failed(job=work.job, round=work.round, attempt=work.attempt, kind="internal", reason=reason[:300])


def mean_update(updates: Sequence[Adapter], weights: Sequence[float], *, stack: bool) -> Adapter:
    """The mean of updates of the same work by `weights`, which sum to 1.

    `stack`: of their products, exactly, at the sum of their ranks; else of their factors, at their rank. Dense tensors
    are averaged. Raises `DecodeError` where the updates are not of the same work.
    """
    first = updates[0]
    if any((one.factors.keys(), one.dense.keys()) != (first.factors.keys(), first.dense.keys()) for one in updates):
        raise DecodeError("updates of one work name other tensors")
    join = _stacked if stack else _averaged
    return Adapter(
        kind="update", job=first.job, round=first.round, base_digest=first.base_digest,
        factors={name: join([one.factors[name] for one in updates], weights) for name in first.factors},
        dense={name: _mean([one.dense[name] for one in updates], weights) for name in first.dense},
        attempt=first.attempt, device=first.device, notes=first.notes,
    )  # fmt: skip


def norm(update: Adapter) -> float:
    """Euclidean norm of all tensors of the update."""
    tensors = [tensor for part in update.factors.values() for tensor in (part.b, part.a)] + list(update.dense.values())
    return float(np.sqrt(sum(float(np.sum(np.square(tensor, dtype=np.float64))) for tensor in tensors)))


def _stacked(parts: Sequence[Factors], weights: Sequence[float]) -> Factors:
    b = np.concatenate([part.b * np.float32(weight) for part, weight in zip(parts, weights, strict=True)], axis=1)
    a = np.concatenate([part.a for part in parts], axis=0)
    return Factors(b=b, a=a, scaling=parts[0].scaling, trained=parts[0].trained)


def _averaged(parts: Sequence[Factors], weights: Sequence[float]) -> Factors:
    return Factors(
        b=_mean([part.b for part in parts], weights), a=_mean([part.a for part in parts], weights),
        scaling=parts[0].scaling, trained=parts[0].trained,
    )  # fmt: skip


def _mean(tensors: Sequence[Array], weights: Sequence[float]) -> Array:
    total = sum(np.multiply(tensor, weight, dtype=np.float64) for tensor, weight in zip(tensors, weights, strict=True))
    return np.asarray(total, dtype=np.float32)
