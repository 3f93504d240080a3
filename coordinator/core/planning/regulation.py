"""Batches regulated once more where a round begins, by the links that its downloads have just shown.

A plan knows a link by the downloads of earlier rounds, in which the device may have stood elsewhere; where features
outweigh compute that is most of what devices wait for. Each device tells how long the download of this round took it,
so its batch can follow before the first step. Ours: no paper does it. Pure.
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec
import numpy as np

from coordinator.core.planning import split_control as control
from coordinator.core.planning.split_control import Fleet

LEAST_SHARE = 0.6
"""Of the batch that its link allows, what a device keeps for the sake of even labels."""


class Regulated(msgspec.Struct, frozen=True, kw_only=True):
    """A participant as it was planned; seconds are of one sample."""

    compute_s: float
    transmit_s: float
    most: int
    """Its largest batch."""
    mix: list[float]
    """Shares of its labels."""


class Regulation(msgspec.Struct, frozen=True, kw_only=True):
    """What batches are regulated by again. `sample_bytes`: features and gradient of a sample; `budget`: samples of a
    step that the server takes in (0: not bounded); `kl` and `goal` as in `split_control`."""

    participants: dict[str, Regulated]
    sample_bytes: float
    goal: list[float]
    kl: float
    budget: float = 0.0


def most(plan: Regulation | None, device: str, batch: int) -> int:
    """The largest batch that a device planned with `batch` may have."""
    seat = plan.participants.get(device) if plan is not None else None
    return max(batch, seat.most) if seat is not None else batch


def again(plan: Regulation, batches: Mapping[str, int], links: Mapping[str, float]) -> dict[str, int]:
    """The batches of these devices; `links`: bytes per second of whose download told.

    A step takes as long as planned, or up to twice as long where whole samples leave less unused then. Who can't do a
    single sample in that time takes one, and the others are not planned to wait for it.
    """
    names = sorted(batches.keys() & plan.participants.keys())
    if not links.keys() & set(names):
        return {name: batches[name] for name in names}
    seats = [plan.participants[name] for name in names]
    planned = np.array([batches[name] for name in names], dtype=np.int64)
    before = np.array([max(one.compute_s + one.transmit_s, 1e-12) for one in seats])
    step_s = float((planned * before).max())
    transmit = [
        plan.sample_bytes / links[name] if links.get(name, 0.0) > 0 else one.transmit_s
        for name, one in zip(names, seats, strict=True)
    ]
    times = np.maximum(np.array([one.compute_s for one in seats]) + np.array(transmit), 1e-12)
    most = np.array([one.most for one in seats], dtype=np.int64)
    wanted = np.clip(np.floor(step_s / times + 1e-9).astype(np.int64), 1, most)
    if plan.budget and wanted.sum() > plan.budget:
        wanted = np.maximum(1, np.floor(wanted * (plan.budget / wanted.sum())).astype(np.int64))
    able = times <= step_s
    if able.any():
        mixes = np.array([one.mix for one in seats])
        fleet = Fleet(wanted, mixes, np.array(plan.goal), np.ones(len(names)), plan.budget)
        moved = control.tuned(fleet, able, times, most, 1, plan.kl, LEAST_SHARE)
        wanted = control.aligned(fleet._replace(batches=moved), able, moved, times, most, plan.kl)
    return {name: int(batch) for name, batch in zip(names, wanted, strict=True)}
