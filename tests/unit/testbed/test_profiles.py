"""Kinds of fleets, and the size of a real agent."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from muster.testbed import least_squares as ls
from muster.testbed import profiles
from muster.testbed.fleet import AGENTS
from muster.testbed.profiles import MIB
from shared.errors import UserError


def test_a_larger_fleet_repeats_the_kinds_in_turn() -> None:
    fleet = profiles.shapes("mixed", 6, 400 * MIB)
    assert [shape.name for shape in fleet] == [f"edge-{i:02d}" for i in range(1, 7)]
    assert [shape.cores for shape in fleet[4:]] == [shape.cores for shape in fleet[:2]]
    assert all(shape.memory_bytes > 400 * MIB for shape in fleet)


def test_mixed_devices_differ_in_speed_and_memory() -> None:
    kinds = profiles.kinds("mixed")
    assert len({kind.spare for kind in kinds}) == len(kinds)
    assert min(kind.cores for kind in kinds) == pytest.approx(max(kind.cores for kind in kinds) / 3)
    assert len(set(profiles.shapes("equal", 3, 0))) == 3
    assert len({(shape.cores, shape.memory_bytes) for shape in profiles.shapes("equal", 3, 0)}) == 1


def test_six_light_devices_fit_on_two_cores() -> None:
    light, mixed = profiles.kinds("light"), profiles.kinds("mixed")
    assert [kind.cores for kind in light] == pytest.approx([0.4 * kind.cores for kind in mixed])
    assert len({kind.spare for kind in light}) == len(light)
    assert sum(shape.cores for shape in profiles.shapes("light", 6, 0)) < 1.7


def test_names_sort_like_numbers() -> None:
    names = [shape.name for shape in profiles.shapes("tiny", 120, 0)]
    assert names == sorted(names)


def test_an_unknown_profile_is_refused_with_those_there_are() -> None:
    with pytest.raises(UserError, match="unknown profile 'huge'; there are equal, light, mixed, tiny"):
        profiles.kinds("huge")


def test_a_real_agent_tells_its_size(tmp_path: Path) -> None:
    data = tmp_path / "rows.jsonl"
    ls.write_rows(data, ls.make_rows("4x2", 10, 1))
    size = profiles.measure_agent(AGENTS["numpy"], {"points": str(data)})
    assert 10 * MIB < size < 500 * MIB


def test_an_agent_that_does_not_start_or_answer_is_an_error() -> None:
    with pytest.raises(UserError, match="can't be started"):
        profiles.measure_agent(["/no/such/program"], {})
    with pytest.raises(UserError, match="ended before it answered|does not answer"):
        profiles.measure_agent([sys.executable, "-c", "pass"], {})
