"""The plans of `fedpipe` and `legend` made again from the event log on disk, by a second implementation that tries all.

Nothing but the SQLite file goes in: jobs, works, what devices measured and what the coordinator had read of them.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import pytest
from msgspec.structs import replace

from coordinator.core.facts import ActivationFacts, ModelFacts, ModuleSpec
from coordinator.core.planning.digest import plan_digest
from shared.jobs import Bits, JobSpec, RoundsSpec
from shared.messages import Work
from tests.unit.planning_cases import job, minilm
from tests.unit.second import fedpipe, legend
from tests.unit.second.costs import Fleet
from tests.unit.second.edges import MIB, Edge, Table
from tests.unit.second.history import Story, read
from tests.unit.second.seats import Asked, Scene

ROUNDS, SEEDS = 7, (0, 1, 2, 3, 4, 5, 11)
PLANNERS: dict[str, Callable[[Scene], dict[str, Asked]]] = {"fedpipe": fedpipe.plan, "legend": legend.plan}


def matrices() -> ModelFacts:
    """Two blocks whose adapters weigh as much as the base: ranks matter for time and memory."""
    sides = {"k": (1024, 1024), "o": (2048, 1024), "q": (1024, 512), "v": (1024, 768)}
    modules = [
        ModuleSpec(name=f"block.{block}.{kind}", out=out, inp=inp, block=block)
        for block in range(2)
        for kind, (out, inp) in sides.items()
    ]
    return ModelFacts(
        modules=modules, dense={"head": [4, 64]}, base_digest="d" * 64, linear_params=900_000, other_params=5000,
        blocks=2, hidden=64, largest=500_000,
        activations={"32": ActivationFacts(fixed=1e5, block=3e6), "16": ActivationFacts(fixed=1e5, block=1.8e6)},
        activations_gpu={"32": ActivationFacts(fixed=9e4, block=1.3e6), "16": ActivationFacts(fixed=9e4, block=7e5)},
    )  # fmt: skip


def asked(name: str, seed: int) -> JobSpec:
    """Half of the jobs have one batch: there the ranks have to give way."""
    one = seed % 2 == 1
    made = job(
        rank={"fedpipe": 16, "legend": 8}[name], batch=8, batch_min=8 if one else 1, batch_max=8 if one else 16,
        accumulation=2 if seed % 3 == 2 else 1,
        rounds=RoundsSpec(
            count=ROUNDS, min_devices=2, quorum=0.2, local_steps=10, deadline_s=60.0 if seed % 3 == 1 else 900.0,
        ),
    )  # fmt: skip
    return replace(
        made, strategy=replace(made.strategy, name=name, warm_up_steps=warm_up(seed), rescore_every=4, max_share=0.4)
    )


def warm_up(seed: int) -> int:
    """Two rounds in some jobs, one in the others."""
    return 10 if seed % 2 else 15


def fleet(rng: random.Random, tight: int) -> list[Edge]:
    """Devices of three speeds; some with little memory (from `tight` MiB on), a GPU, two agents, few rows."""
    edges = [
        Edge(
            f"edge-{number}", cores=rng.choice([0.5, 1.0, 2.0]) * rng.uniform(0.9, 1.1),
            flops=rng.choice([4e9, 8e9, 8e9, 16e9]) * rng.uniform(0.9, 1.1), link=rng.uniform(1e5, 3e6),
            overhead_s=rng.uniform(0.0, 0.05), rows=rng.choice([12, 700, 5000]), probed=number % 2 == 0,
        )
        for number in range(5)
    ]  # fmt: skip
    for number in range(4):
        memory = (tight + rng.randrange(60)) * MIB
        # Beside the reserve of 64 MiB a few MiB are left for adapters and activations, or less than nothing.
        base = memory - int(rng.uniform(60, 76) * MIB)
        bits: tuple[Bits, ...] = (4, 8) if rng.random() < 0.5 else (4, 16, 32)
        edges.append(Edge(f"small-{number}", memory=memory, bits=bits, flops=9e9, base=base))
    edges.append(
        Edge("gpu", cores=8.0, memory=8192 * MIB, gpu=True, flops=8e11, base=200 * MIB, overhead_s=1e-4, probed=True)
    )
    edges.append(Edge("pair", cores=2.0, agents=2, flops=8e9 * rng.uniform(0.9, 1.1), rows=900))
    return [*edges, Edge("bare", bits=()), Edge("tiny", memory=180 * MIB)]


def change(rng: random.Random, edges: list[Edge], least: int) -> None:
    """Between two rounds: other programs come and go, readings stop, memory runs out above `least`."""
    for edge in edges:
        edge.foreign_cores = rng.choice([0.0, 0.0, 0.02, 0.6]) * (1.0 if edge.gpu else edge.cores)
        edge.foreign = rng.choice([0, 0, 10 * MIB, 90 * MIB])
        edge.mute = rng.random() < 0.2
        edge.fails = rng.random() < 0.1
        edge.fits = rng.choice([2 * least, 10**9, 10**9, 10**9])


@lru_cache
def played(folder: Path, name: str, seed: int) -> Story:
    """A job whose third round is repeated, since nobody delivers; as its log tells it."""
    facts = {"fedpipe": matrices, "legend": minilm}[name]()
    rng, spec = random.Random(seed), asked(name, seed)
    edges = fleet(rng, tight=400)
    table = Table(folder / f"{name}-{seed}", edges, facts, spec, seed)
    table.open()
    for number in range(ROUNDS + 1):
        change(rng, edges, spec.strategy.batch_min)
        if number == 2:
            for edge in edges:
                edge.fails = True
        table.round(beats=rng.choice([1, 3, 5]))
    assert table.rig.job.phase == "exporting"
    return read(table.close())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("logs")


def again(story: Story, name: str) -> list[dict[str, Asked]]:
    """Each plan of the log, recomputed."""
    return [
        PLANNERS[name](Scene(one, story.spec, story.facts, Fleet(one.past, story.facts, story.spec)))
        for one in story.plans
    ]


def agree(story: Story, found: list[dict[str, Asked]]) -> None:
    for planned, mine in zip(story.plans, found, strict=True):
        plan, where = planned.record.plan, f"round {planned.record.round}.{planned.record.attempt}"
        assert plan_digest(plan) == planned.record.digest
        assert mine.keys() == plan.participants.keys(), where
        assert planned.record.infos.keys() == plan.participants.keys() | plan.left_out.keys(), where
        for device, work in plan.participants.items():
            own = mine[device]
            assert (own.ranks, own.batch, own.bits) == (work.ranks, work.batch, work.bits), (where, device)
            assert (own.steps, own.agents, own.score) == (work.steps, work.agents, work.score), (where, device)
            assert own.limit == pytest.approx(work.train_for_s, rel=1e-6), (where, device)
            assert own.extra == work.extra_steps, (where, device)
            assert own.seconds == pytest.approx(plan.predicted_s[device], rel=1e-6), (where, device)


def works(folder: Path, name: str) -> list[Work]:
    stories = [played(folder, name, seed) for seed in SEEDS]
    return [work for story in stories for one in story.plans for work in one.record.plan.participants.values()]


@pytest.mark.parametrize("seed", SEEDS)
def test_fedpipe_is_recomputed_from_the_log(folder: Path, seed: int) -> None:
    story = played(folder, "fedpipe", seed)
    agree(story, again(story, "fedpipe"))
    rounds = [(one.record.round, one.record.attempt) for one in story.plans]
    assert rounds == [(1, 1), (2, 1), (3, 1), (3, 2), *((number, 1) for number in range(4, ROUNDS + 1))]
    scoring = [all(work.score for work in one.record.plan.participants.values()) for one in story.plans]
    if warm_up(seed) == 15:
        assert scoring == [False, True, *[False] * 4, True, False]
    else:
        assert scoring == [True, *[False] * 4, True, False, False]


@pytest.mark.parametrize("seed", SEEDS)
def test_legend_is_recomputed_from_the_log(folder: Path, seed: int) -> None:
    story = played(folder, "legend", seed)
    agree(story, again(story, "legend"))


def test_the_plans_of_fedpipe_differ_in_all_that_it_chooses(folder: Path) -> None:
    found = works(folder, "fedpipe")
    tuned = [work for work in found if "all modules tuned" not in work.reasons["weights"]]
    assert {work.bits for work in found} == {4, 8, 16, 32} and {work.steps for work in tuned} == {7, 8, 9, 10}
    assert {work.batch for work in found} >= {1, 2, 4, 8, 16}
    assert {len(set(work.ranks.values())) for work in tuned} >= {1, 2, 3}
    assert any("that have run under the" in work.reasons["rank"] for work in tuned)
    for bound in ("memory budget", "s leave at batch"):
        partly = [work for work in tuned if bound in work.reasons["rank"] and len(set(work.ranks.values())) > 1]
        assert len(partly) > 1, bound


def test_the_plans_of_legend_differ_in_all_that_it_chooses(folder: Path) -> None:
    found = works(folder, "legend")
    assert {work.bits for work in found} == {4, 8, 16, 32}
    assert {len(work.ranks) // 4 for work in found} == {1, 2, 3, 4, 5, 6}
    for stopped in ("MiB memory", "of the deadline", "would take", "cautious depth", "there are"):
        assert any(stopped in work.reasons["depth"] for work in found), stopped


@pytest.mark.parametrize("name", PLANNERS)
def test_readings_change_between_the_rounds_and_so_do_the_plans(folder: Path, name: str) -> None:
    for seed in SEEDS:
        plans = [one.record for one in played(folder, name, seed).plans]
        for before, after in itertools.pairwise(plans):
            assert before.loads != after.loads
        assert any(age > plans[0].fresh_s for one in plans for age in one.load_ages.values())
        asked_of = [
            {device: (w.batch, w.bits, w.ranks) for device, w in one.plan.participants.items()} for one in plans
        ]
        assert sum(before != after for before, after in itertools.pairwise(asked_of)) >= len(plans) // 2
