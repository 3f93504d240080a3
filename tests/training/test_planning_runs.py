"""Runs of `bench/planning.py` side by side give what they give one after the other."""

from __future__ import annotations

import math
import tempfile
import time
from pathlib import Path

import pytest

from bench.planning_grid import Method, Run
from bench.planning_runs import Runners

pytestmark = [pytest.mark.data, pytest.mark.timeout(240)]


def test_runs_side_by_side_are_those_of_one_process(muster_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MUSTER_DATA", str(muster_data))
    runs = [Run(Method(name), "dbpedia14", 1.0, 0, 0.02, "test", 1) for name in ("fedlora", "head")]
    with Runners(0) as here:
        wanted = {one.run: one.result for one in here.each(runs, math.inf)}
    with Runners(2) as abreast:
        found = {one.run: one.result for one in abreast.each(runs, math.inf)}
        assert list(abreast.each(runs, -math.inf)) == [], "none is begun once the time is up"
    assert found == wanted and all(len(result.rounds) == 1 for result in found.values())


def test_who_is_interrupted_waits_for_no_run_and_leaves_no_scratch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt), Runners(1) as runners:
        assert runners._pool is not None
        assert Path(runners._pool.submit(tempfile.mkdtemp).result()).is_relative_to(tmp_path)
        runners._pool.submit(time.sleep, 1000.0)
        raise KeyboardInterrupt
    assert time.monotonic() - began < 60.0
    assert list(tmp_path.iterdir()) == []
