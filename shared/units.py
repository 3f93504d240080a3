"""Units of structured pruning: which rows and columns of a model make one head or one FFN channel. Needs numpy alone.

A unit goes as a whole: of a BERT head the rows of query, key and value and the columns behind them of the attention's
output; of GPT-2 the same, with all three in one layer; of LLaMA a group of query heads with the key and value head that
they share. Of an FFN channel the row that makes it (in LLaMA of gate and up) and the column that reads it. Units keep
their numbers in the whole model, and at least one of each group stays.

On the wire the units that stay are bits in the messages (`pack`), their scores bytes in the adapter files
(`pack_scores`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

import msgspec
import numpy as np
import numpy.typing as npt

from shared.adapter import Factors, Places
from shared.errors import DecodeError

Side = Literal["out", "in"]
Kept = Mapping[str, Sequence[int]]
"""Group -> the units that stay, rising; a group that is not named stays whole."""
FloatArray = npt.NDArray[np.float64]
Scores = Mapping[str, FloatArray]
"""Group -> what each of its units matters, by its number in the whole model."""
MAX_GROUP, MAX_BYTES = 32_768, 96 * 1024
"""Units of one group, and bytes of all groups' bits: a message holds no more (`shared.codec`)."""
_STEPS = 254
_DECADES = 4.0


class Slice(msgspec.Struct, frozen=True, kw_only=True):
    """A unit's part of one linear layer: `width` rows or columns for each unit, from each of `starts`."""

    module: str
    side: Side
    width: int
    starts: tuple[int, ...] = (0,)

    def places(self, units: Sequence[int]) -> Places:
        """Indices of the rows or columns of these units, in the order of the layer."""
        own = np.asarray(units, dtype=np.intp)[:, None] * self.width + np.arange(self.width)[None, :]
        return np.concatenate([start + own.ravel() for start in self.starts])


class Group(msgspec.Struct, frozen=True, kw_only=True):
    """Units that are alike: the heads, or the FFN channels, of one block."""

    name: str
    block: int
    kind: Literal["heads", "channels"]
    count: int
    slices: tuple[Slice, ...]


def fault(known: Iterable[Group], kept: Kept) -> str:
    """Why `kept` is not of these groups, or "": names, at least one unit in each, rising."""
    counts = {group.name: group.count for group in known}
    for name, units in kept.items():
        if name not in counts:
            return f"there is no group {name} to prune"
        if not len(units):
            return f"{name}: at least one unit has to stay"
        if list(units) != sorted(set(units)) or units[0] < 0 or units[-1] >= counts[name]:
            return f"{name}: units have to rise from 0 to {counts[name] - 1}"
    return ""


def too_many(known: Sequence[Group]) -> str:
    """Why the bits of these groups fit no message, or ""."""
    widest = max(known, key=lambda group: group.count, default=None)
    if widest is not None and widest.count > MAX_GROUP:
        return f"{widest.name} has {widest.count} units, a message holds {MAX_GROUP} of a group"
    size = sum(len(group.name) + -(-group.count // 8) for group in known)
    return f"the bits of its units take {size} bytes, a message holds {MAX_BYTES}" if size > MAX_BYTES else ""


def places(known: Iterable[Group], kept: Kept) -> dict[str, dict[Side, Places]]:
    """Module -> side -> the rows or columns of the whole layer that stay, for the layers that become smaller."""
    found: dict[str, dict[Side, Places]] = {}
    for group in known:
        if group.name in kept and len(kept[group.name]) < group.count:
            for one in group.slices:
                found.setdefault(one.module, {})[one.side] = one.places(kept[group.name])
    return found


def sizes_left(known: Sequence[Group], kept: Kept, sizes: Mapping[str, tuple[int, int]]) -> dict[str, tuple[int, int]]:
    """(out, in) of each layer of `sizes` once only `kept` stays."""
    cut = places(known, kept)
    sides = {name: cut.get(name, {}) for name in sizes}
    return {
        name: (len(sides[name].get("out", range(out))), len(sides[name].get("in", range(inp))))
        for name, (out, inp) in sizes.items()
    }


def share(known: Sequence[Group], kept: Kept, sizes: Mapping[str, tuple[int, int]]) -> float:
    """The share of the groups' weights that is gone. `sizes`: (out, in) of each whole layer."""
    names = {one.module for group in known for one in group.slices}
    whole = {name: sizes[name] for name in names}
    left = sizes_left(known, kept, whole)
    return 1 - sum(out * inp for out, inp in left.values()) / sum(out * inp for out, inp in whole.values())


def sizes_at(known: Sequence[Group], ratio: float, sizes: Mapping[str, tuple[int, int]]) -> dict[str, tuple[int, int]]:
    """The same where `ratio` of each group goes, whichever units these are."""
    found = dict(sizes)
    for group in known:
        left = count_left(group, ratio, group.count)
        for one in group.slices if left < group.count else ():
            (out, inp), cut = found[one.module], left * one.width * len(one.starts)
            found[one.module] = (cut, inp) if one.side == "out" else (out, cut)
    return found


def best(known: Sequence[Group], scores: Scores, ratio: float, within: Kept | None = None) -> dict[str, list[int]]:
    """The units that stay where `ratio` of each group goes, the least of them first, at least one stays.

    Equal ratios in all groups of the same size give layers of the same size, which an ordinary model folder can say.
    `within`: only these are there any more; none of them goes that would not have to. Ties go by number.
    """
    kept: dict[str, list[int]] = {}
    for group in known:
        there = list(within[group.name]) if within and group.name in within else list(range(group.count))
        of_group = scores[group.name]
        first = sorted(there, key=lambda unit: (-of_group[unit], unit))
        kept[group.name] = sorted(first[: count_left(group, ratio, len(there))])
    return kept


def count_left(group: Group, ratio: float, there: int) -> int:
    """How many units of a group stay where `ratio` of it goes and only so many are `there` any more."""
    return max(1, min(group.count - math.floor(ratio * group.count + 1e-9), there))


def ratio_of(known: Sequence[Group], kept: Kept) -> float:
    """The ratio that `kept` was pruned to: the largest share that is gone of a group, for small groups lag behind."""
    return max((1.0 - len(kept.get(group.name, range(group.count))) / group.count for group in known), default=0.0)


# ---- on the wire


def pack(known: Iterable[Group], kept: Kept) -> dict[str, bytes]:
    """Group -> a bit for each unit, lowest bit first, set where it stays."""
    found = {}
    for group in known:
        bits = np.zeros(group.count, dtype=np.uint8)
        bits[list(kept.get(group.name, range(group.count)))] = 1
        found[group.name] = np.packbits(bits, bitorder="little").tobytes()
    return found


def unpack(known: Iterable[Group], packed: Mapping[str, bytes]) -> dict[str, list[int]]:
    """What `pack` was given. Raises `DecodeError`; a group that is not named stays whole."""
    kept = {}
    counts = {group.name: group.count for group in known}
    for name, bits in packed.items():
        count = counts.get(name, -1)
        if len(bits) != -(-count // 8):
            raise DecodeError(f"{len(bits)} bytes for the units of {name!r:.100}")
        kept[name] = np.flatnonzero(np.unpackbits(np.frombuffer(bits, np.uint8), bitorder="little")[:count]).tolist()
    reason = fault(known, kept)
    if reason:
        raise DecodeError(reason)
    return kept


def pack_scores(scores: Scores) -> dict[str, bytes]:
    """A byte a unit: 0 for none, else its logarithm over four decades below the largest of its group."""
    found = {}
    for name, values in scores.items():
        top = float(values.max(initial=0.0))
        level = np.zeros(len(values), dtype=np.uint8)
        if top > 0:
            there = values > 0
            decades = np.log10(values[there] / top) / _DECADES
            level[there] = 1 + np.round(_STEPS * np.clip(1 + decades, 0, 1)).astype(np.uint8)
        found[name] = level.tobytes()
    return found


def unpack_scores(packed: Mapping[str, bytes]) -> dict[str, npt.NDArray[np.float64]]:
    """What `pack_scores` was given, as shares of the largest of each group, to 2 %."""
    found = {}
    for name, level in packed.items():
        values = np.frombuffer(level, np.uint8).astype(np.float64)
        found[name] = np.where(values > 0, 10.0 ** (_DECADES * ((values - 1) / _STEPS - 1)), 0.0)
    return found


def scores_of(known: Iterable[Group], packed: Mapping[str, bytes]) -> dict[str, FloatArray]:
    """`unpack_scores` for these groups, zeros where one is not named. Raises `DecodeError` for others' scores."""
    counts = {group.name: group.count for group in known}
    for name, level in packed.items():
        if len(level) != counts.get(name, -1):
            raise DecodeError(f"{len(level)} scores for the units of {name!r:.100}")
    return {name: np.zeros(count) for name, count in counts.items()} | unpack_scores(packed)


def left_of(factors: Factors, rows: Places | None, columns: Places | None) -> Factors:
    """Factors of a whole layer as those of a smaller one that has only these rows and columns (None: all)."""
    b = factors.b if rows is None else factors.b[rows]
    a = factors.a if columns is None else factors.a[:, columns]
    return dataclasses.replace(factors, b=b, a=a, rows=rows, columns=columns)


def expanded(factors: Factors, out: int, inp: int) -> Factors:
    """Factors of a smaller layer as those of the whole one (out x inp): zero where it has no row or column."""
    b, a = factors.b, factors.a
    if factors.rows is not None:
        b = np.zeros((out, b.shape[1]), dtype=np.float32)
        b[factors.rows] = factors.b
    if factors.columns is not None:
        a = np.zeros((a.shape[0], inp), dtype=np.float32)
        a[:, factors.columns] = factors.a
    return Factors(b=b, a=a, scaling=factors.scaling, sigma=factors.sigma, trained=factors.trained)
