"""TOML as written for the programs of an emulation reads back as it was."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from muster.testbed import toml
from shared.settings import parse_toml

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
SCALAR = st.one_of(
    TEXT, st.booleans(), st.integers(-(2**63), 2**63 - 1), st.floats(allow_nan=False, allow_infinity=False)
)
TABLES = st.recursive(
    st.dictionaries(TEXT, st.one_of(SCALAR, st.lists(SCALAR, max_size=4)), max_size=4),
    lambda inner: st.dictionaries(TEXT, st.one_of(SCALAR, inner), max_size=4),
    max_leaves=12,
)


@given(TABLES)
def test_what_is_written_reads_back(tables: dict[str, Any]) -> None:
    assert parse_toml(toml.dumps(tables), "test") == tables


def test_none_is_left_out_and_what_toml_does_not_know_is_refused() -> None:
    assert parse_toml(toml.dumps({"a": None, "b": 1}), "test") == {"b": 1}
    with pytest.raises(TypeError):
        toml.dumps({"a": float("nan")})
    with pytest.raises(TypeError):
        toml.dumps({"a": object()})


def test_merging_goes_table_by_table() -> None:
    base = {"a": {"x": 1, "y": 2}, "b": 3}
    assert toml.merged(base, {"a": {"y": 5}, "c": 6}) == {"a": {"x": 1, "y": 5}, "b": 3, "c": 6}
    assert toml.merged(base, {"a": 4}) == {"a": 4, "b": 3}
    assert base == {"a": {"x": 1, "y": 2}, "b": 3}
