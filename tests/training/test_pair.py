"""Two devices of equal speed and unequal memory, as the study `pair` of `bench/planning.py` has them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from bench import planning_runs
from bench.planning_grid import Method, Run
from muster.testbed.simulate import Session, result_of


@pytest.mark.data
def test_devices_of_unequal_memory_get_unequal_ranks_and_finish_together(tmp_path: Path, muster_data: Path) -> None:
    run = Run(Method("fedpipe"), "dbpedia14", 1.0, 0, 0.02, "test", 3, variant="pair")
    asked = planning_runs.simulation(run, tmp_path)
    planning_runs.write_job(run, asked)
    with Session(0) as session:
        found = result_of(replace(asked, data=str(muster_data / "dbpedia14")), session, print)
    assert len(found.rounds) == 3
    for one in found.rounds[1:]:
        small, large = sorted(one.devices, key=lambda part: part.kind, reverse=True)
        assert (small.kind, small.bits, large.kind, large.bits) == ("small", 4, "large", 16)
        assert small.modules == large.modules and small.params < large.params, "the same matrices, at lower ranks"
        assert small.status == large.status == "done"
        assert one.waiting < 0.25, "neither waits long for the other"
