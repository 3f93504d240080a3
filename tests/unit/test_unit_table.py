"""Units as rows of bits, against lists and sets of them."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from coordinator.core.planning.pruned import Sound, fault, held_against
from shared import units
from shared.pruning_order import Pruning
from tests.unit.planning_cases import result

Lists = dict[str, list[int]]
TOLD = result(batch=8, step_s=1.0)


def group(name: str, count: int) -> units.Group:
    slices = (
        units.Slice(module=f"{name}.up", side="out", width=2, starts=(0, 2 * count)),
        units.Slice(module=f"{name}.down", side="in", width=1),
    )
    return units.Group(name=name, block=0, kind="channels", count=count, slices=slices)


@st.composite
def rounds(draw: st.DrawFn) -> tuple[list[units.Group], list[tuple[Lists, Lists, float, float]]]:
    """Groups; and of some devices the units that were there, those that are left (most of them of the former), the
    ratio at the beginning and that of the order."""
    groups = [group(str(number), count) for number, count in enumerate(draw(st.lists(st.integers(1, 20), min_size=1)))]
    devices = []
    for _ in range(draw(st.integers(0, 4))):
        within, kept = {}, {}
        for one in groups:
            every = st.integers(0, one.count - 1)
            there = draw(st.sets(every, min_size=1))
            within[one.name] = sorted(there)
            left = draw(st.sets(st.sampled_from(within[one.name]))) | draw(st.sets(every, max_size=1))
            kept[one.name] = sorted(left)
        begin, ratio = sorted((draw(st.floats(0, 0.99)), draw(st.floats(0, 0.99))))
        devices.append((draw(st.sampled_from([within, {}])), kept, begin, ratio))
    return groups, devices


@given(rounds())
def test_updates_are_held_against_their_orders_as_by_sets(
    drawn: tuple[list[units.Group], list[tuple[Lists, Lists, float, float]]],
) -> None:
    groups, devices = drawn
    told = []
    for within, kept, begin, ratio in devices:
        order = Pruning(ratio=ratio, begin=begin, kept=units.pack(groups, within) if within else {})
        told.append((order, replace(TOLD, kept=units.pack(groups, kept))))
    for found, (within, kept, begin, ratio), (order, facts) in zip(
        held_against(groups, told), devices, told, strict=True
    ):
        whole = {one.name: list(range(one.count)) for one in groups} | within
        astray = any(_is_astray(one.count, whole[one.name], kept[one.name], begin, ratio) for one in groups)
        assert fault(groups, order, facts) == (found if isinstance(found, str) else "")
        if astray:
            assert isinstance(found, str)
        else:
            begun = max(units.ratio_of(groups, whole), begin)
            assert found == Sound(facts, begun, units.ratio_of(groups, kept))


def _is_astray(count: int, there: list[int], left: list[int], begin: float, ratio: float) -> bool:
    if not left or set(left) - set(there):
        return True
    most, least = (max(1, min(len(there), count - math.floor(share * count + 1e-9))) for share in (begin, ratio))
    return not least <= len(left) <= most


@pytest.mark.parametrize(
    ("kept", "reason"),
    [
        ({"0": b"\x00\x00"}, "0: at least one unit has to stay"),
        ({"0": b"\x00\xfc"}, "0: at least one unit has to stay"),
        ({"0": b"\x01"}, "1 bytes for the units of '0'"),
        ({"0": b"\x01\x00", "1": b"\x01"}, "it does not tell which units of each group are left"),
        ({"0": b"\xe0\xff"}, ""),
    ],
)
def test_bits_beyond_a_groups_units_say_nothing(kept: dict[str, bytes], reason: str) -> None:
    """The group has ten: six bits of the second byte are nobody's."""
    assert fault([group("0", 10)], Pruning(ratio=0.5), replace(TOLD, kept=kept)) == reason


def test_a_model_without_units_has_none_to_tell() -> None:
    assert fault([], Pruning(ratio=0.5), TOLD) == ""
    assert fault([], Pruning(ratio=0.5), replace(TOLD, kept={"0": b"\x01"})) == "it has no units to prune"


@given(st.lists(st.integers(1, 30), min_size=1, max_size=3), st.floats(0, 0.99))
def test_sizes_at_a_ratio_are_those_of_any_units(counts: list[int], ratio: float) -> None:
    groups = [group(str(number), count) for number, count in enumerate(counts)]
    sizes = {f"{one.name}.up": (4 * one.count, 5) for one in groups}
    sizes |= {f"{one.name}.down": (5, one.count) for one in groups}
    alike = {one.name: np.zeros(one.count) for one in groups}
    assert units.sizes_at(groups, ratio, sizes) == units.sizes_left(groups, units.best(groups, alike, ratio), sizes)
