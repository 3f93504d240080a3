"""A release of least squares, measured as the test agents do it: from the files of its folder, in numpy."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from edge_daemon import protocol
from muster.testbed import least_squares
from muster.testbed.least_squares import MODULE, WEIGHT, Rows
from shared import release_pack
from shared.adapter import Adapter, Factors
from shared.errors import DecodeError
from shared.held_out import places
from shared.held_out import some as places_of
from shared.release_messages import MOST, Score

_PREFIX = f"base_model.model.{MODULE}"


def evaluate(order: protocol.Evaluate, rows: Rows | None) -> protocol.Evaluated | protocol.Unfit:
    """The answer to `order`; `rows` None: there are none for it here."""
    try:
        # An agent that only trains works without it.
        from safetensors import SafetensorError
    except ImportError as error:
        return protocol.Unfit(release=order.release, kind="base", reason=f"{error}: no release can be read here")
    try:
        release = read(Path(order.folder))
        if release.base_digest != order.base_digest:
            raise DecodeError("made for another base")
    except (DecodeError, OSError, SafetensorError, KeyError) as error:
        return protocol.Unfit(release=order.release, kind="load", reason=f"it does not load: {error}")
    if rows is None:
        return protocol.Evaluated(release=order.release)
    kept = held_out(rows, order.hold_out)
    trained_on = order.trained_on and not len(kept)
    some = share_of(kept, 1.0, order.rows) if len(kept) else share_of(rows, order.share, order.rows)
    after = least_squares.loss_of(release, some)
    if not after <= MOST:
        return protocol.Unfit(release=order.release, kind="score", reason=f"its loss is {after}")
    before = least_squares.loss_of(_before(order), some)
    scores = [Score(loss=loss, rows=len(some), trained_on=trained_on) for loss in (before, after)]
    return protocol.Evaluated(release=order.release, before=scores[0], after=scores[1])


def read(folder: Path) -> Adapter:
    """The adapter in the folder of a release. Raises `OSError`, `DecodeError`, `SafetensorError`, `KeyError`."""
    from safetensors.numpy import load_file

    about = release_pack.about(folder)
    factors: dict[str, Factors] = {}
    dense = {}
    if about.kind == "model":
        dense = {WEIGHT: load_file(folder / "model.safetensors")[WEIGHT]}
    else:
        tensors = load_file(folder / "adapter_model.safetensors")
        if tensors:
            b, a = tensors[f"{_PREFIX}.lora_B.weight"], tensors[f"{_PREFIX}.lora_A.weight"]
            factors = {MODULE: Factors(b=b, a=a)}
    return Adapter(
        kind="global", job=about.job, round=about.round, base_digest=about.base_digest, factors=factors, dense=dense
    )


def share_of(rows: Rows, share: float, most: int) -> Rows:
    """Every so many-th row of all, at most `most` (0: all of these)."""
    chosen = places_of(len(rows), share, most)
    return Rows(rows.x[chosen], rows.y[chosen])


def held_out(rows: Rows, share: float) -> Rows:
    """The rows that training leaves out."""
    left_out = list(places(len(rows), share))
    return Rows(rows.x[left_out], rows.y[left_out])


def learned(rows: Rows, share: float) -> Rows:
    """The others."""
    left_out = list(places(len(rows), share))
    return Rows(np.delete(rows.x, left_out, axis=0), np.delete(rows.y, left_out, axis=0)) if left_out else rows


def _before(order: protocol.Evaluate) -> Adapter:
    """What is active now, if it is for the same task; else the base alone, which is zero."""
    if order.previous:
        previous = Path(order.previous)
        about = release_pack.about(previous)
        if (about.task, about.base_digest) == (order.task, order.base_digest):
            return read(previous)
    return Adapter(kind="global", job=order.release, round=0, base_digest=order.base_digest, factors={}, dense={})
