"""Shares: disjoint, whole, reproducible, skewed as asked."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from muster.testbed import partition
from muster.testbed.partition import Shares
from muster.testbed.rows import read_rows
from shared.errors import UserError

LABELS = [number % 10 for number in range(2000)]


def dealers(labels: list[int], devices: int, seed: int) -> list[Callable[[], Shares]]:
    return [
        lambda: partition.dirichlet(labels, devices, 0.3, seed),
        lambda: partition.by_field(labels, devices, seed),
        lambda: partition.at_random(len(labels), devices, seed),
    ]


@given(
    devices=st.integers(1, 12),
    seed=st.integers(0, 2**32),
    labels=st.lists(st.integers(0, 5), min_size=12 * partition.AT_LEAST, max_size=300),
)
def test_every_row_has_one_owner_and_every_device_enough(devices: int, seed: int, labels: list[int]) -> None:
    for deal in dealers(labels, devices, seed):
        shares = deal()
        assert len(shares) == devices
        assert sorted(row for share in shares for row in share) == list(range(len(labels)))
        assert min(map(len, shares)) >= partition.AT_LEAST
        assert shares == deal()


def test_another_seed_deals_otherwise() -> None:
    for one, other in zip(dealers(LABELS, 4, 1), dealers(LABELS, 4, 2), strict=True):
        if one() == other():
            # Ten equal groups over four devices: which group goes where does not need the seed.
            assert one() == partition.by_field(LABELS, 4, 3)


def largest_label_share(shares: Shares) -> float:
    """Mean over devices of the share of their commonest label."""
    tops = [max(Counter(LABELS[row] for row in share).values()) / len(share) for share in shares]
    return sum(tops) / len(tops)


def test_a_smaller_alpha_skews_more() -> None:
    strong = largest_label_share(partition.dirichlet(LABELS, 6, 0.05, seed=3))
    weak = largest_label_share(partition.dirichlet(LABELS, 6, 1.0, seed=3))
    none = largest_label_share(partition.dirichlet(LABELS, 6, 1000.0, seed=3))
    assert strong > 0.4 > weak > none
    assert none < 0.15


def test_a_field_value_stays_whole_on_one_device() -> None:
    shares = partition.by_field([f"source {label}" for label in LABELS], 4, seed=0)
    owners = [{device for device, share in enumerate(shares) if any(LABELS[r] == n for r in share)} for n in range(10)]
    assert all(len(found) == 1 for found in owners)
    assert max(map(len, shares)) <= 600


def test_fewer_values_than_devices_are_cut() -> None:
    shares = partition.by_field(["a"] * 100 + ["b"] * 20, 4, seed=0)
    assert sorted(map(len, shares)) == [20, 25, 25, 50]


@pytest.mark.parametrize("deal", dealers([0] * 15, 2, 0))
def test_too_few_rows_are_refused(deal: Callable[[], Shares]) -> None:
    with pytest.raises(UserError, match="15 rows are too few for 2 devices"):
        deal()


@pytest.mark.parametrize("alpha", [0.0, -1.0, float("nan")])
def test_alpha_must_be_positive(alpha: float) -> None:
    with pytest.raises(UserError, match="alpha"):
        partition.dirichlet(LABELS, 2, alpha, 0)


def test_shares_are_written_as_they_were_dealt_and_alike_each_time(tmp_path: Path) -> None:
    rows = [{"text": f"row {number}", "label": number % 3} for number in range(40)]
    shares = partition.at_random(len(rows), 3, seed=5)
    names = ["edge-01", "edge-02", "edge-03"]
    paths = partition.write_shares(rows, shares, tmp_path, names)
    assert [path.name for path in paths] == [f"{name}.jsonl.gz" for name in names]
    for path, share in zip(paths, shares, strict=True):
        assert read_rows(path) == [rows[number] for number in share]
    before = [path.read_bytes() for path in paths]
    assert [path.read_bytes() for path in partition.write_shares(rows, shares, tmp_path, names)] == before


@pytest.mark.parametrize(
    ("content", "reason"),
    [(b"", "no rows"), (b"\n\n", "no rows"), (b'{"text": 1}\n[1]\n', "line 2"), (b"{", "line 1")],
)
def test_faulty_rows_are_refused_with_their_line(tmp_path: Path, content: bytes, reason: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    with pytest.raises(UserError, match=reason):
        read_rows(path)


def test_a_file_that_is_missing_or_no_gzip_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        read_rows(tmp_path / "none.jsonl")
    (tmp_path / "rows.jsonl.gz").write_bytes(b"plain")
    with pytest.raises(UserError, match="can't be read"):
        read_rows(tmp_path / "rows.jsonl.gz")


def test_a_row_without_the_field_is_named() -> None:
    with pytest.raises(UserError, match="row 2 has no plain value in field 'source'; it has: text"):
        partition.column([{"text": "a", "source": "x"}, {"text": "b"}], "source", "file")
