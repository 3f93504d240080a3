"""Units as the bits of numbers, against lists and sets of them."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared import units
from shared.errors import DecodeError

Lists = dict[str, list[int]]


def group(name: str, count: int) -> units.Group:
    slices = (
        units.Slice(module=f"{name}.up", side="out", width=2, starts=(0, 2 * count)),
        units.Slice(module=f"{name}.down", side="in", width=1),
    )
    return units.Group(name=name, block=0, kind="channels", count=count, slices=slices)


@st.composite
def models(draw: st.DrawFn) -> tuple[list[units.Group], Lists, Lists]:
    """Groups, the units that were there, and those that are left, most of them of the former."""
    groups, within, kept = [], {}, {}
    for number in range(draw(st.integers(1, 3))):
        one = group(str(number), draw(st.integers(1, 20)))
        groups.append(one)
        every = st.integers(0, one.count - 1)
        there = draw(st.sets(every, min_size=1))
        left = draw(st.sets(st.sampled_from(sorted(there)), min_size=1)) | draw(st.sets(every, max_size=1))
        within[one.name], kept[one.name] = sorted(there), sorted(left)
    return groups, within, kept


@given(models())
def test_bits_are_what_was_packed(model: tuple[list[units.Group], Lists, Lists]) -> None:
    groups, _, kept = model
    found = units.bits(groups, units.pack(groups, kept))
    assert found == {name: sum(1 << unit for unit in left) for name, left in kept.items()}
    assert units.bits(groups, {}) == {one.name: 2**one.count - 1 for one in groups}


@pytest.mark.parametrize(
    ("packed", "reason"),
    [
        ({"0": b"\x00\x00"}, "0: at least one unit has to stay"),
        ({"0": b"\x00\xfc"}, "0: at least one unit has to stay"),  # bits beyond its ten units say nothing
        ({"0": b"\x01"}, "1 bytes for the units of '0'"),
        ({"0": b"\x01\x00", "1": b"\x01"}, "units of groups that are not there: 1"),
    ],
)
def test_what_is_not_of_the_groups_is_refused(packed: dict[str, bytes], reason: str) -> None:
    with pytest.raises(DecodeError, match=reason):
        units.bits([group("0", 10)], packed)


@given(models(), st.floats(0, 0.99), st.floats(0, 0.99))
def test_who_went_astray_is_as_by_sets(
    model: tuple[list[units.Group], Lists, Lists], begin: float, further: float
) -> None:
    groups, within, kept = model
    ratio = max(begin, further)
    found = units.astray(groups, *(units.bits(groups, units.pack(groups, one)) for one in (kept, within)), begin, ratio)
    assert bool(found) == any(_is_astray(one.count, within[one.name], kept[one.name], begin, ratio) for one in groups)


def _is_astray(count: int, there: list[int], left: list[int], begin: float, ratio: float) -> bool:
    if set(left) - set(there):
        return True
    most, least = (
        max(1, min(len(there), count - math.floor(share * count + 1e-9))) for share in (begin, ratio)
    )  # fmt: skip
    return not least <= len(left) <= most


@given(st.lists(st.integers(1, 30), min_size=1, max_size=3), st.floats(0, 0.99))
def test_sizes_at_a_ratio_are_those_of_any_units(counts: list[int], ratio: float) -> None:
    groups = [group(str(number), count) for number, count in enumerate(counts)]
    sizes = {f"{one.name}.up": (4 * one.count, 5) for one in groups} | {
        f"{one.name}.down": (5, one.count) for one in groups
    }
    alike = {one.name: np.zeros(one.count) for one in groups}
    assert units.sizes_at(groups, ratio, sizes) == units.sizes_left(groups, units.best(groups, alike, ratio), sizes)
