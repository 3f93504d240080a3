"""Every reason of every planner: parsed by a grammar of its own, each number in it equal to what was read or planned.

The plans are those of whole jobs over unequal devices; nothing but their event logs is looked at. A sentence, a note or
a place that writes one which no plan here reaches is an error, and so is a form that the grammar lacks.
"""

from __future__ import annotations

import ast
import inspect
import random
import sys
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from coordinator.core.aggregation import registry as aggregators
from coordinator.core.facts import ModelFacts, ModuleSpec
from coordinator.core.planning import reasons, registry
from shared.jobs import Bits, JobSpec, RoundsSpec
from tests.unit import reason_checks, reason_notes, reason_plans
from tests.unit.planning_cases import job, minilm
from tests.unit.reason_grammar import FORMS, NOTES, NOTES_OF, Reason, parse
from tests.unit.reason_scene import Round, Spot
from tests.unit.second.costs import Fleet
from tests.unit.second.edges import MIB, Edge, Table
from tests.unit.second.history import Story, read
from tests.unit.second.seats import Scene
from tests.unit.test_plans_recomputed import matrices

_word = reasons.word
ROUNDS, SEED = 6, 3
"""Of many seeds one with which every form is met; a change of the planners may ask for another."""
VARIANTS = ("usual", "bounded", "tight")
ALIKE = ("fedlora", "ffa", "fedex", "flexlora", "flora")
"""Strategies that are planned as another of the list is, but for what they send."""
WORDED = [name for name in registry.PLANNERS if name not in (*aggregators.PRUNING, *aggregators.SPLIT)]
"""The words of those that prune: `test_fedspine_plans.py`; of those that split: `test_mergesfl_plans.py`."""
CASES = [
    ("fedpipe", "crowded"),
    *((name, variant) for name in WORDED for variant in (VARIANTS[:1] if name in ALIKE else VARIANTS)),
]
REACHED: set[tuple[str, int]] = set()
"""(module, line) of every place that has worded a reason."""
PLANNING = Path(reasons.__file__).parent


def facts_of(name: str) -> ModelFacts:
    facts = minilm()
    if name == "fedadapter":
        blocks = [ModuleSpec(name=f"layer.{block}", out=384, inp=384, block=block) for block in range(6)]
        return replace(facts, modules=blocks, largest=384 * 1536)
    if name == "full":
        dense = {f"{one.name}.weight": [one.out, one.inp] for one in facts.modules}
        return replace(facts, dense={**dense, "others": [facts.linear_params + facts.other_params - 24 * 384 * 384]})
    return matrices() if name == "fedpipe" else facts


def job_of(name: str, variant: str) -> JobSpec:
    """`usual`: nothing is in the way; `bounded`: bits and training time; `tight`: one batch, a near deadline.

    `crowded`: as usual, with more devices than are planned exactly.
    """
    rounds: dict[str, Any] = {"count": ROUNDS, "min_devices": 2, "quorum": 0.2, "local_steps": 10}
    bits: Bits | None = None
    if variant == "bounded":
        rounds["train_for_s"], bits = 2.0, 8
    if variant == "tight":
        rounds["deadline_s"] = 12.0
    rank = {"bounded": 2, "tight": 500}.get(variant, 16)
    made = job(
        rank=rank, batch=8, batch_min=8 if variant == "tight" else 1, batch_max=8 if variant == "tight" else 16,
        bits=bits, rounds=RoundsSpec(**rounds),
    )  # fmt: skip
    if name == "legend" and variant == "usual":
        made = replace(made, strategy=replace(made.strategy, batch=64, batch_max=64))
    return replace(
        made, strategy=replace(made.strategy, name=name, warm_up_steps=15, rescore_every=3, global_rank=1024)
    )


def fleet(rng: random.Random, small: int) -> list[Edge]:
    """Fast and slow, busy, mute, with GPUs, with agents side by side; so many of little memory."""
    little = [
        Edge(
            f"small-{number}", memory=memory * MIB, base=int((memory - rng.uniform(55, 76)) * MIB), flops=8e9,
            bits=rng.choice([(4, 8), (4, 8, 16, 32), (4, 8, 16, 32)]),
        )
        for number in range(small)
        for memory in [rng.randrange(390, 560)]
    ]  # fmt: skip
    return [
        Edge("fast", cores=4.0, flops=1.1e10, probed=True), Edge("usual", flops=1e10),
        Edge("slow", cores=0.4, flops=7e9), Edge("crawling", cores=0.05, flops=5e9), Edge("creeping", cores=0.15),
        Edge("far", link=6e4), Edge("few", rows=3), Edge("some", rows=7, probed=True),
        Edge("half", bits=(4, 8, 16)), Edge("unheard", unheard=True), Edge("void", memory=0),
        Edge("tight-unheard", memory=470 * MIB, unheard=True, base=380 * MIB),
        Edge("gpu", cores=8.0, memory=8192 * MIB, gpu=True, flops=8e11, base=200 * MIB, overhead_s=1e-4),
        Edge("gpus", cores=8.0, memory=8192 * MIB, gpu=True, agents=2, flops=6e11, base=200 * MIB, overhead_s=1e-4),
        Edge("pair", cores=1.5, agents=64), Edge("late", fails=True),
        Edge("empty", rows=0), Edge("other", data="poems"), Edge("tiny", memory=190 * MIB),
        *little,
    ]  # fmt: skip


def change(rng: random.Random, edges: list[Edge], number: int, least: int) -> None:
    """Between two rounds: other programs come and go, readings stop, memory runs out."""
    for edge in edges:
        edge.foreign_cores = rng.choice([0.0, 0.0, 0.02, 0.7]) * (1.0 if edge.gpu else edge.cores)
        edge.foreign = rng.choice([0, 0, 0, 10 * MIB, 90 * MIB])
        edge.mute = rng.random() < 0.3
        edge.fits = rng.choice([2 * least, *[10**9] * 7])
        edge.fails = edge.name == "late" and number < 2
        if edge.name == "usual" and number == 1:
            edge.fits, edge.fails = 0, True


@lru_cache
def played(folder: Path, name: str, variant: str) -> Story:
    """A job of the strategy `name` as its log tells it; the first two rounds are planned without readings of some."""
    rng, spec = random.Random(f"{name}/{variant}/{SEED}"), job_of(name, variant)
    edges = fleet(rng, small=24 if variant == "crowded" else 8)
    table = Table(folder / f"{name}-{variant}", edges, facts_of(name), spec, 1)
    table.open()
    while table.rig.job.phase == "open":
        change(rng, edges, table.rig.job.committed, spec.strategy.batch_min)
        table.round(beats=1 if variant == "tight" else rng.choice([1, 3, 5]))
    assert table.rig.job.phase == "exporting", (table.rig.job.phase, table.rig.job.reason, table.rig.state.notices)
    return read(table.close())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """For the logs; while it is there every place that words a reason is noted."""

    def word(*given: Any, **named: Any) -> str:
        frame = inspect.currentframe()
        assert frame is not None and frame.f_back is not None
        REACHED.add((Path(frame.f_back.f_code.co_filename).name, frame.f_back.f_lineno))
        return _word(*given, **named)

    with pytest.MonkeyPatch.context() as patch:
        for module in list(sys.modules.values()):
            if getattr(module, "word", None) is _word and module is not reasons:
                patch.setattr(module, "word", word)
        yield tmp_path_factory.mktemp("logs")


def rounds(story: Story, name: str) -> Iterator[Round]:
    """Every plan with what its planner was given."""
    for planned in story.plans:
        yield Round(Scene(planned, story.spec, story.facts, Fleet(planned.past, story.facts, story.spec)), name)


def spots(story: Story, name: str) -> Iterator[Spot]:
    """Every reason of every work."""
    for round in rounds(story, name):
        for device, work in round.works.items():
            for number, text in work.reasons.items():
                yield Spot(round, device, parse(number, text))


@pytest.mark.parametrize(("name", "variant"), CASES)
def test_reading_bound_and_number_are_those_of_the_plan_and_of_the_telemetry(
    folder: Path, name: str, variant: str
) -> None:
    for spot in spots(played(folder, name, variant), name):
        where = (spot.scene.planned.record.round, spot.device, spot.reason.kind)
        try:
            reason_checks.FORMS[spot.reason.kind](spot, spot.reason.said)
            for note in spot.reason.notes:
                reason_notes.NOTES[note.kind](spot, note.said)
        except (AssertionError, KeyError, StopIteration, ValueError) as error:
            raise AssertionError((*where, spot.work.reasons[spot.reason.kind.split("/")[0]])) from error


@pytest.mark.parametrize(("name", "variant"), CASES)
def test_the_words_of_the_whole_plan_are_its_own(folder: Path, name: str, variant: str) -> None:
    for round in rounds(played(folder, name, variant), name):
        for kind, said in reason_plans.plan_parts(round.scene.planned.record.plan):
            reason_plans.CHECKS[kind](round, said)
        for device, text in round.scene.planned.record.plan.left_out.items():
            reason_plans.check_left_out(round, device, text)


def test_each_number_of_a_work_has_its_reason(folder: Path) -> None:
    for name, variant in CASES:
        for planned in played(folder, name, variant).plans:
            for device, work in planned.record.plan.participants.items():
                wanted = {"rank", "batch", "bits", "steps"}
                wanted |= {"depth"} if name == "legend" else {"weights"} if name == "fedpipe" else set()
                wanted |= {"agents"} if planned.record.infos[device].agents > 1 else set()
                assert work.reasons.keys() == wanted


def test_every_form_of_the_grammar_is_met(folder: Path) -> None:
    """And every check stands for a form."""
    met: set[tuple[str, ...]] = set()
    for name, variant in CASES:
        for planned in played(folder, name, variant).plans:
            for work in planned.record.plan.participants.values():
                met |= {kind for number, text in work.reasons.items() for kind in _kinds(parse(number, text))}
    verbs = {(kind, verb) for kind, (_, told, _) in FORMS.items() for verb in told.split("|")}
    notes = {(kind, "note", note) for kind, allowed in NOTES_OF.items() for note in allowed}
    assert sorted((verbs | notes) - met) == []
    words = {kind for name, variant in CASES for kind in _plan_kinds(played(folder, name, variant))}
    assert words == reason_plans.PARTS.keys() | reason_plans.LEFT_OUT.keys()
    assert reason_plans.CHECKS.keys() == reason_plans.PARTS.keys()
    assert reason_checks.FORMS.keys() == FORMS.keys() == NOTES_OF.keys()
    assert reason_notes.NOTES.keys() == NOTES.keys() == set().union(*NOTES_OF.values())


def _plan_kinds(story: Story) -> Iterator[str]:
    for planned in story.plans:
        plan = planned.record.plan
        yield from (kind for kind, _ in reason_plans.plan_parts(plan))
        yield from (reason_plans.matched(reason_plans.LEFT_OUT, text, text)[0] for text in plan.left_out.values())


def _kinds(reason: Reason) -> set[tuple[str, ...]]:
    return {(reason.kind, reason.verb), *((reason.kind, "note", note.kind) for note in reason.notes)}


@pytest.mark.parametrize(
    "text",
    [
        "batch 4: it seemed right meets 8.4 s round target",
        "bits 32: 380 MiB at batch 1 meets 3891 MiB memory budget (limit 4096 MiB, reserve 205 MiB, foreign 0 MiB)",
        "rank 8: 8 asked on 24 modules meets the smallest side 384; a note of a new kind",
        "agents 2: 2 ready on the device meets 5 rows",
    ],
)
def test_what_is_no_reason_is_found_out(text: str) -> None:
    with pytest.raises(AssertionError):
        parse(text.split(" ")[0], text)


def written() -> dict[tuple[str, int], int]:
    """(module, first line) -> last line of every place that words a reason."""
    found = {}
    for path in sorted(set(PLANNING.glob("*.py")) - {PLANNING / "fedspine.py", PLANNING / "mergesfl.py"}):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "word":
                found[path.name, node.lineno] = node.end_lineno or node.lineno
    return found


def test_every_place_that_words_a_reason_is_reached(folder: Path) -> None:
    for name, variant in CASES:
        played(folder, name, variant)
    places = written()
    missed = [
        place for place, last in places.items()
        if not any(file == place[0] and place[1] <= line <= last for file, line in REACHED)
    ]  # fmt: skip
    assert len(places) > 10 and missed == []
