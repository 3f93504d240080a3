"""Which rows are left out of training."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.held_out import places, some


@given(rows=st.integers(0, 2000), share=st.floats(0.001, 0.5))
def test_about_the_share_is_left_out_and_never_all(rows: int, share: float) -> None:
    left_out = list(places(rows, share))
    assert len(left_out) <= rows // 2
    every = round(1.0 / share)
    assert len(left_out) == rows // every
    assert all(0 <= place < rows for place in left_out)


@given(rows=st.integers(0, 500), more=st.integers(0, 500), share=st.floats(0.001, 0.5))
def test_rows_that_are_added_change_nothing_for_those_before(rows: int, more: int, share: float) -> None:
    assert list(places(rows + more, share))[: len(places(rows, share))] == list(places(rows, share))


def test_without_a_share_none_is_left_out() -> None:
    assert list(places(1000, 0.0)) == []
    assert list(places(30, 0.1)) == [9, 19, 29]


@given(rows=st.integers(1, 2000), share=st.floats(0.01, 1.0), most=st.integers(0, 300))
def test_rows_to_judge_on_are_spread_over_all(rows: int, share: float, most: int) -> None:
    chosen = some(rows, share, most)
    assert chosen == sorted(set(chosen)) and chosen[0] == 0 and chosen[-1] < rows
    whole = some(rows, share, 0)
    assert len(chosen) == (min(most, len(whole)) if most else len(whole))
    if len(chosen) > 2:
        gaps = [b - a for a, b in zip(chosen, chosen[1:], strict=False)]
        assert max(gaps) <= 2 * min(gaps), "a part of the file counts for more"


@pytest.mark.parametrize(
    ("share", "most", "chosen"), [(1.0, 0, [0, 1, 2, 3, 4, 5]), (0.5, 0, [0, 2, 4]), (1.0, 2, [0, 3])]
)
def test_such_as(share: float, most: int, chosen: list[int]) -> None:
    assert some(6, share, most) == chosen
