"""What many devices say of the units of their models, as rows of bits: a round's devices are looked at all at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from operator import itemgetter

import numpy as np
import numpy.typing as npt

from shared.errors import DecodeError
from shared.units import Group

Rows = npt.NDArray[np.uint8]
"""(devices x bytes): the packed bits of all groups, one after the other, none set beyond a group's units."""
Counts = npt.NDArray[np.int64]
"""(devices x groups): units."""
_ONES = np.array([byte.bit_count() for byte in range(256)], dtype=np.uint8)


class UnitTable:
    """The groups of one model; at least one. Rows are made of `shared.units.pack`'s bits."""

    def __init__(self, groups: Sequence[Group]) -> None:
        whole = {group.name: ((1 << group.count) - 1).to_bytes(-(-group.count // 8), "little") for group in groups}
        self._names, self._sizes = list(whole), [len(bits) for bits in whole.values()]
        self._pick = itemgetter(*whole) if len(whole) > 1 else lambda packed: (packed[self._names[0]],)
        self.every = b"".join(whole.values())
        """The row of a model of which nothing is gone."""
        self._starts = np.cumsum([0, *self._sizes[:-1]])
        self._units = np.array([group.count for group in groups], dtype=np.int64)

    def row(self, packed: Mapping[str, bytes]) -> bytes:
        """The bits of all groups. Raises `DecodeError` where one is missing, or another there, or of another length."""
        missing = "it does not tell which units of each group are left"
        try:
            bits = self._pick(packed)
        except KeyError:
            raise DecodeError(missing) from None
        if len(bits) != len(packed):
            raise DecodeError(missing)
        sizes = [len(one) for one in bits]
        if sizes != self._sizes:
            at = next(
                place for place, (size, right) in enumerate(zip(sizes, self._sizes, strict=True)) if size != right
            )
            raise DecodeError(f"{sizes[at]} bytes for the units of {self._names[at]!r:.100}")
        return b"".join(bits)

    def rows(self, rows: Sequence[bytes]) -> Rows:
        """What `row` made of some devices, as one array."""
        found: Rows = np.frombuffer(b"".join(rows), np.uint8).reshape(-1, len(self.every))
        return found & np.frombuffer(self.every, np.uint8)

    def count(self, rows: Rows) -> Counts:
        """How many units there are."""
        found: Counts = np.add.reduceat(_ones(rows), self._starts, axis=1, dtype=np.int64)
        return found

    def left_at(self, ratios: Sequence[float], there: Counts) -> Counts:
        """`shared.units.count_left` of each group, for devices that are at a ratio each."""
        gone = np.floor(np.array(ratios)[:, None] * self._units + 1e-9).astype(np.int64)
        found: Counts = np.maximum(1, np.minimum(self._units - gone, there))
        return found

    def ratios(self, counts: Counts) -> list[float]:
        """`shared.units.ratio_of` of each device: the largest share that is gone of a group."""
        found: list[float] = (1.0 - counts / self._units).max(axis=1).tolist()
        return found


def _ones(rows: Rows) -> Rows:
    """The bits that are set in each byte."""
    if hasattr(np, "bitwise_count"):  # numpy 2
        found: Rows = np.bitwise_count(rows)
        return found
    return _ONES[rows]
