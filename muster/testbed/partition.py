"""Who holds which rows: Dirichlet over labels, by a field, or at random. The same seed gives the same shares.

A share is a sorted list of row numbers; shares are disjoint and together hold every row.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Hashable, Sequence
from pathlib import Path

from muster.testbed.rows import Row, write_rows
from shared.errors import UserError

Shares = list[list[int]]
AT_LEAST = 8
"""Rows that every device gets, so that each has something to train on."""


def dirichlet(labels: Sequence[Hashable], devices: int, alpha: float, seed: int, at_least: int = AT_LEAST) -> Shares:
    """Each label's rows are dealt out in proportions drawn from Dirichlet(alpha): small alpha, strong skew.

    The usual partition of federated benchmarks (Hsu et al. 2019, arXiv:1909.06335, label by label).
    Raises `UserError` where there are fewer rows than `devices * at_least`, or alpha is not positive.
    """
    if not alpha > 0:
        raise UserError(f"alpha {alpha}: must be above 0")
    rng = random.Random(seed)
    shares: Shares = [[] for _ in range(devices)]
    for rows in _groups(labels).values():
        rng.shuffle(rows)
        # A tiny alpha may draw nothing but zeros.
        draws = [rng.gammavariate(alpha, 1.0) + 1e-300 for _ in range(devices)]
        total, sofar, begin = sum(draws), 0.0, 0
        for device, draw in enumerate(draws):
            sofar += draw
            end = len(rows) if device == devices - 1 else round(len(rows) * sofar / total)
            shares[device] += rows[begin:end]
            begin = end
    return _level(shares, at_least, rng)


def by_field(values: Sequence[Hashable], devices: int, seed: int, at_least: int = AT_LEAST) -> Shares:
    """All rows with one value of a field go to one device, as even in size as that allows.

    With fewer values than devices the largest groups are cut in halves.
    """
    rng = random.Random(seed)
    groups = list(_groups(values).values())
    while len(groups) < devices:
        largest = max(groups, key=len)
        if len(largest) < 2:
            break
        groups.remove(largest)
        rng.shuffle(largest)
        middle = len(largest) // 2
        groups += [largest[:middle], largest[middle:]]
    shares: Shares = [[] for _ in range(devices)]
    for rows in sorted(groups, key=lambda rows: (-len(rows), rows[0])):
        min(shares, key=len).extend(rows)
    return _level(shares, at_least, rng)


def at_random(count: int, devices: int, seed: int, at_least: int = AT_LEAST) -> Shares:
    """Rows dealt out like cards after a shuffle."""
    rng = random.Random(seed)
    rows = list(range(count))
    rng.shuffle(rows)
    return _level([rows[device::devices] for device in range(devices)], at_least, rng)


def write_shares(rows: Sequence[Row], shares: Shares, folder: Path, names: Sequence[str]) -> list[Path]:
    """One `<name>.jsonl.gz` per device, in the order of `names`."""
    paths = []
    for name, share in zip(names, shares, strict=True):
        path = folder / f"{name}.jsonl.gz"
        write_rows(path, (rows[number] for number in share))
        paths.append(path)
    return paths


def column(rows: Sequence[Row], field: str, source: str) -> list[Hashable]:
    """The values of `field`. Raises `UserError` naming the first row without it."""
    found: list[Hashable] = []
    for number, row in enumerate(rows, 1):
        value = row.get(field)
        if value is None or isinstance(value, (dict, list)):
            raise UserError(f"{source}: row {number} has no plain value in field {field!r}; it has: {', '.join(row)}")
        found.append(value)
    return found


def _groups(values: Sequence[Hashable]) -> dict[str, list[int]]:
    """Value -> row numbers; in the order of the values as text, so that numbers and texts can be mixed."""
    groups: dict[str, list[int]] = defaultdict(list)
    for number, value in enumerate(values):
        groups[str(value)].append(number)
    return {key: groups[key] for key in sorted(groups)}


def _level(shares: Shares, at_least: int, rng: random.Random) -> Shares:
    """Give every device at least so many rows, taken from the largest share at random."""
    total = sum(map(len, shares))
    if total < at_least * len(shares):
        raise UserError(f"{total} rows are too few for {len(shares)} devices: each needs at least {at_least}")
    for share in shares:
        while len(share) < at_least:
            largest = max(shares, key=len)
            share.append(largest.pop(rng.randrange(len(largest))))
    return [sorted(share) for share in shares]
