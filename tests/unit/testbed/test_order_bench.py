"""What `bench/order.py` tells of its runs, and that it repeats none."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

LIB = Path(__file__).parents[3] / "bench" / "lib"


@pytest.fixture
def order() -> Iterator[ModuleType]:
    """The benchmark, which finds its library beside it as `bench/run.py` lets it."""
    sys.path.insert(0, str(LIB))
    try:
        yield importlib.import_module("bench.order")
    finally:
        sys.path.remove(str(LIB))


def _course(order: ModuleType, half: str, strategy: str, seed: int, reach: int, round_s: float = 5.0) -> Any:
    """Rounds of `round_s`, at the target from round `reach` on; 0: never."""
    commits = [
        order.Commit(
            at=round_s * number, seconds=round_s, trained_s=4.0, accepted=True,
            accuracy=order.TARGET if 0 < reach <= number else 0.1,
        )
        for number in range(1, 5)
    ]  # fmt: skip
    return order.Course(
        half=half, strategy=strategy, seed=seed, date="2026-01-01", took_s=1.0, busy=0.25, commits=commits
    )


def test_a_refused_round_reaches_nothing(order: ModuleType) -> None:
    course = _course(order, "emulated", "uniform", 0, 2)
    assert course.reached() is course.commits[1]
    refused = order.Commit(at=1.0, seconds=1.0, trained_s=1.0, accuracy=0.99, accepted=False)
    assert order.Course(**{**_fields(course), "commits": [refused]}).reached() is None


def _fields(course: Any) -> dict[str, Any]:
    return {name: getattr(course, name) for name in course.__struct_fields__}


def test_the_agreement_of_both_orders_is_told(order: ModuleType) -> None:
    names = ["fedpipe", "legend", "uniform"]
    # Emulated, one seed: 5 s, 20 s, never. Simulated, two seeds: 10 and 12, 30 and 34, 30 and 34: the last two tied.
    courses = [
        *(_course(order, "emulated", name, 0, reach) for name, reach in zip(names, (1, 4, 0), strict=True)),
        *(_course(order, "simulated", "fedpipe", seed, 2, round_s) for seed, round_s in enumerate((5.0, 6.0))),
        *(_course(order, "simulated", n, seed, 2, s) for n in names[1:] for seed, s in enumerate((15.0, 17.0))),
    ]
    agreement, *each = [json.loads(json.dumps(one)) for one in order.results(names, courses)]
    # Two of three pairs alike, the third tied in one order: 2 / sqrt(3 * 2).
    assert agreement["name"] == "order.tau" and agreement["value"] == pytest.approx(0.8165)
    assert "emulated fedpipe 5.0 s (spread 5.0) < legend 20.0 s (spread 5.0) < uniform never" in agreement["note"]
    assert "25%" in agreement["note"]
    assert [(one["name"], one["value"]) for one in each] == [
        ("order.fedpipe", 5.0), ("order.legend", 20.0), ("order.uniform", "never"),
    ]  # fmt: skip
    assert each[0]["note"] == (
        "emulated 5.0 s (spread 5.0), round 1, a round 5.0 s of which the slowest trained 4.0 s; "
        "simulated 11.0 s (spread 1.4), round 2, 2, a round 5.5 s of which the slowest trained 4.0 s"
    )


def test_a_finished_run_is_kept_and_another_job_is_another_run(
    order: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[str, int, str]] = []

    def run(strategy: str, seed: int, job: Path, _out: Path) -> list[Any]:
        calls.append((strategy, seed, job.read_text()))
        return list(_course(order, "simulated", strategy, seed, 1).commits)

    monkeypatch.setattr(order, "RUNS", tmp_path)
    monkeypatch.setattr(order, "HALVES", {"simulated": run})
    monkeypatch.setattr(order.psutil, "cpu_percent", lambda interval: 50.0)
    first = order.kept("simulated", "uniform", 1, "job one")
    assert order.kept("simulated", "uniform", 1, "job one") == first and first.busy == 0.5
    order.kept("simulated", "uniform", 1, "job two")
    assert calls == [("uniform", 1, "job one"), ("uniform", 1, "job two")]
