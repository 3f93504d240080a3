"""The searches that `fedpipe`'s is compared with: within the bounds, and the best where few choices are all tried."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from msgspec.structs import replace

from coordinator.core.facts import ModelFacts, ModuleSpec
from coordinator.core.planning.base import FleetView
from coordinator.core.planning.cost_model import CostModel
from coordinator.core.planning.fedpipe import Search, searched
from coordinator.core.planning.rank_choice import UNDER_TRAINING, Options, choose
from tests.unit.planning_cases import device, job

FILE = Path(__file__).parents[2] / "bench" / "lib" / "rank_search.py"
SCORES = {"k": 0.5, "o": 0.3, "q": 0.2}


@pytest.fixture(scope="module")
def rank_search() -> ModuleType:
    """The module of the benchmarks, which are no package."""
    spec = importlib.util.spec_from_file_location("rank_search", FILE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def search() -> Search:
    """One block whose adapters weigh as much as the base, on devices from too small for any rank to large enough."""
    sides = {"k": (2048, 2048), "o": (4096, 2048), "q": (2048, 8)}
    modules = [ModuleSpec(name=name, out=out, inp=inp, block=0) for name, (out, inp) in sides.items()]
    facts = ModelFacts(
        modules=modules, base_digest="d" * 64, linear_params=400_000, other_params=1000, blocks=1, hidden=64,
        intermediate=27_000,
    )  # fmt: skip
    devices = [device(f"d{memory}", memory=memory, bits=(4,)) for memory in range(431, 445)]
    made = job(rank=32, batch_min=4)
    made = replace(made, strategy=replace(made.strategy, name="fedpipe"))
    return searched(FleetView(round=2, candidates=tuple(devices), facts=facts), made, modules, SCORES, CostModel())


def exact(search: Search) -> list[float]:
    return [choice.objective for choice in choose(search.sites, search.task, True)]


def test_random_candidates_stay_within_the_bounds_and_many_of_them_find_the_best(
    rank_search: ModuleType, search: Search
) -> None:
    best, options = exact(search), Options(search.sites, search.task)
    assert 0 < sum(worth < max(best) - 1e-9 for worth in best) < len(best), "the bounds matter for some"
    for seed in range(5):
        few = rank_search.random_search(np.random.default_rng(seed), options, search.task.items, 1)
        assert np.all(few <= np.array(best) + 1e-12) and np.any(few < np.array(best) - 1e-3)
    many = rank_search.random_search(np.random.default_rng(0), options, search.task.items, 5000)
    assert many == pytest.approx(best)


def test_a_device_without_any_candidate_reaches_nothing(rank_search: ModuleType, search: Search) -> None:
    options = Options(search.sites, search.task)
    options.places[0] = -1
    found = rank_search.random_search(np.random.default_rng(0), options, search.task.items, 2)
    assert found[0] == 0 == rank_search.equal_ranks(options, search.task.items)[0] and np.all(found[1:] > 0)


def test_equal_ranks_are_the_best_of_all_levels_that_fit(rank_search: ModuleType, search: Search) -> None:
    items, options = search.task.items, Options(search.sites, search.task)
    ranks, weight, value = (0, 2, 4, 8, 16, 32), [0] * 6, [0.0] * 6
    for level, rank in enumerate(ranks):
        for item, module_ranks in zip(items, search.levels, strict=True):
            own = module_ranks.index(min(rank, module_ranks[-1]))
            weight[level] += item.weights[own]
            value[level] += item.values[own]
    assert search.levels[2] == (0, 2, 4, 8), "a module that is too small for the higher ranks"
    for found, rooms in zip(rank_search.equal_ranks(options, items), options.rooms, strict=True):
        wanted = [
            (1 - under) * value[level]
            for row in rooms for under, room in zip(UNDER_TRAINING, row, strict=True)
            for level in range(6) if weight[level] <= room
        ]  # fmt: skip
        assert found == pytest.approx(max(wanted))
