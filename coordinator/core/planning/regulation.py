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
    least: int = 1
    most: int
    """Its smallest and its largest batch."""
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

    A step takes as long as planned, and where links were not known as the median device needs for its planned batch; or
    up to twice as long where whole samples leave less unused then. Who can't do its smallest batch in that time does
    that, and the others are not planned to wait for it.
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
    if not all(one.transmit_s for one in seats):
        step_s = max(step_s, float(np.median(planned * times)))
    most = np.array([one.most for one in seats], dtype=np.int64)
    least = np.minimum([one.least for one in seats], most)
    wanted = np.clip(np.floor(step_s / times + 1e-9), least, most).astype(np.int64)
    while plan.budget and wanted.sum() > plan.budget and (wanted > least).any():
        wanted[int(np.argmax(np.where(wanted > least, wanted, 0)))] -= 1
    able = least * times <= step_s
    if able.any():
        mixes = np.array([one.mix for one in seats])
        # What those take who are not moved is not left for the others.
        budget = max(1.0, plan.budget - float(wanted[~able].sum())) if plan.budget else 0.0
        fleet = Fleet(wanted, mixes, np.array(plan.goal), np.ones(len(names)), budget)
        moved = control.tuned(fleet, able, times, most, least, plan.kl, LEAST_SHARE)
        wanted = control.aligned(fleet._replace(batches=moved), able, moved, times, most, plan.kl)
    return {name: int(batch) for name, batch in zip(names, wanted, strict=True)}
