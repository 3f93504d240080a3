"""What many devices say of the units of their models, as rows of bits: a round's devices are looked at all at once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from shared.units import Group

Rows = npt.NDArray[np.uint8]
"""(devices x bytes): the packed bits of all groups, one after the other, none set beyond a group's units."""
Counts = npt.NDArray[np.int64]
"""(devices x groups): units."""
_ONES = np.array([byte.bit_count() for byte in range(256)], dtype=np.uint8)


class UnitTable:
    """The groups of one model; at least one. Rows are made of `shared.units.pack`'s bits."""

    def __init__(self, groups: Sequence[Group]) -> None:
        self._names = [group.name for group in groups]
        self._whole = [((1 << group.count) - 1).to_bytes(-(-group.count // 8), "little") for group in groups]
        self._sizes = [len(bits) for bits in self._whole]
        self._starts = np.cumsum([0, *self._sizes[:-1]])
        self._units = np.array([group.count for group in groups], dtype=np.int64)

    def misfit(self, packed: Mapping[str, bytes]) -> str:
        """Why these are not the bits of all groups and no other, or ""."""
        sizes = [len(packed.get(name, b"")) for name in self._names]
        if len(packed) == len(self._names) and sizes == self._sizes:
            return ""
        if packed.keys() != set(self._names):
            return "it does not tell which units of each group are left"
        at = next(place for place, (size, right) in enumerate(zip(sizes, self._sizes, strict=True)) if size != right)
        return f"{sizes[at]} bytes for the units of {self._names[at]!r:.100}"

    def rows(self, packed: Iterable[Mapping[str, bytes]]) -> Rows:
        """A row for each of these, which fit; where one is empty, all units are there."""
        every = b"".join(self._whole)
        joined = b"".join(b"".join([one[name] for name in self._names]) if one else every for one in packed)
        found: Rows = np.frombuffer(joined, np.uint8).reshape(-1, len(every)) & np.frombuffer(every, np.uint8)
        return found

    def count(self, rows: Rows) -> Counts:
        """How many units there are."""
        found: Counts = np.add.reduceat(_ONES[rows], self._starts, axis=1, dtype=np.int64)
        return found

    def left_at(self, ratios: Sequence[float], there: Counts) -> Counts:
        """`shared.units.count_left` of each group, for devices that are at a ratio each."""
        gone = np.floor(np.array(ratios)[:, None] * self._units + 1e-9).astype(np.int64)
        found: Counts = np.maximum(1, np.minimum(self._units - gone, there))
        return found

    def ratios(self, counts: Counts) -> npt.NDArray[np.float64]:
        """`shared.units.ratio_of` of each device: the largest share that is gone of a group."""
        return np.asarray((1.0 - counts / self._units).max(axis=1))
