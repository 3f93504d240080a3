"""Rounds of `fedspine` with the real worker and agents: the model shrinks, learns, and is evaluated at its size."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from coordinator.core.aggregation.base import Expectation
from coordinator.core.planning import pruned
from coordinator.core.planning.base import RoundReport
from coordinator.fold import Reported, fold_round
from coordinator.workers.model_worker import ModelWorker
from coordinator.workers.protocol import Prepare, WorkerFailed
from edge_daemon.protocol import Trained
from shared import adapter as adapters
from shared import units
from shared.frames import FrameWriter
from shared.jobs import BaseSpec, EvaluationSpec, JobSpec, RoundsSpec, StrategySpec, TrainingSpec
from tests.training.agent_rounds import Rounds
from tests.training.test_agent import Agent, running
from tests.training.tiny_models import COLOURS, colour_rows, write_jsonl


class Pruned(Rounds):
    """Rounds whose fold says how small the model is, as the coordinator's does."""

    def run_pruned(self, round: int) -> float:
        plan = self.plan(round)
        before, reported, results = adapters.read_file(self.current), [], {}
        for name, work in sorted(plan.participants.items()):
            order = self.order(plan, round, name)
            facts = self.agent.ask(order, Trained).facts
            assert work.prune is not None
            assert not pruned.fault(self.facts.groups, work.prune, facts) and facts.change > 0
            update = adapters.read_file(Path(order.update_path))
            expected = Expectation(
                job="whole", round=round, attempt=1, device=name, base_digest=self.facts.base_digest,
                ranks=work.ranks, modules={module.name: module for module in self.facts.modules},
                alpha_ratio=self.job.training.alpha_ratio, before=before, seed=self.job.seed,
                places=units.places(self.facts.groups, units.unpack(self.facts.groups, facts.kept)),
            )  # fmt: skip
            assert self.aggregator.admit(update, expected) is None
            reported.append(Reported(name, facts.samples, Path(order.update_path)))
            results[name] = facts
        folded = fold_round(self.aggregator, self.facts.modules, before, None, reported, round=round)
        parts = [
            pruned.Told(folded.weights[one.device], results[one.device].kept, adapters.read_file(one.path).scores)
            for one in reported
        ]
        kept, scores = pruned.model_left(self.facts.groups, before, parts, self.job.strategy.prune)
        self.current = self.folder / f"round-{round}.adapter"
        self.current.write_bytes(adapters.write(replace(folded.adapter, kept=kept, scores=scores)))
        self.planner = self.planner.learn(
            RoundReport(
                round=round, works=plan.participants, results=results, facts=self.facts, job=self.job,
                infos={name: self._candidate(name).info for name in self.data},
            )
        )  # fmt: skip
        assert self.metrics().pruned == pytest.approx(pruned.ratio_of(self.facts.groups, kept))
        return pruned.ratio_of(self.facts.groups, kept)


def job_of(name: str, evaluated: Path) -> JobSpec:
    return JobSpec(
        name="tiny", base=BaseSpec(model="tiny"), task=COLOURS, rounds=RoundsSpec(count=6, local_steps=16),
        strategy=StrategySpec(name=name, rank=4, batch=8, batch_min=8, prune=0.5, prune_step=0.3, prune_every=8),
        training=TrainingSpec(lr=1e-2), evaluation=EvaluationSpec(data=str(evaluated)),
    )  # fmt: skip


@pytest.fixture
def agent(colours: Path) -> Iterator[Agent]:
    with running(colours) as one:
        yield one


@pytest.mark.timeout(300)
def test_rounds_prune_and_teach(tmp_path: Path, bert: Path, agent: Agent) -> None:
    data = {}
    for index, name in enumerate(("edge-01", "edge-02")):
        data[name] = tmp_path / f"{name}.jsonl"
        write_jsonl(data[name], colour_rows(120, seed=index))
    held_out = tmp_path / "held-out.jsonl"
    write_jsonl(held_out, colour_rows(60, seed=9))
    rounds = Pruned(tmp_path, agent, job_of("fedspine", held_out), bert, data)
    assert {group.kind for group in rounds.facts.groups} == {"heads", "channels"}
    first = rounds.metrics()
    ratios = [rounds.run_pruned(number) for number in range(1, 7)]
    last = rounds.metrics()
    assert ratios == sorted(ratios) and ratios[0] < ratios[-1]
    assert ratios[-1] == pytest.approx(0.5, abs=0.06)
    assert last.loss < 0.8 * first.loss, "the smaller model has learned"


def test_an_architecture_that_can_not_be_pruned_is_refused_by_name(tmp_path: Path, bert: Path) -> None:
    folder = tmp_path / "other"
    shutil.copytree(bert, folder)
    config = json.loads((folder / "config.json").read_text())
    config["model_type"] = "electra"
    (folder / "config.json").write_text(json.dumps(config))
    held_out = tmp_path / "held-out.jsonl"
    write_jsonl(held_out, colour_rows(6, seed=9))
    worker = ModelWorker(FrameWriter(io.BytesIO()))
    answer = worker.answer(
        Prepare(job=job_of("fedspine", held_out), base_path=str(folder), adapter_path=str(tmp_path / "a"))
    )
    assert isinstance(answer, WorkerFailed) and answer.operator


def test_a_base_of_too_many_units_is_refused_when_the_job_is_prepared(
    tmp_path: Path, bert: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(units, "MAX_GROUP", 63)
    held_out = tmp_path / "held-out.jsonl"
    write_jsonl(held_out, colour_rows(6, seed=9))
    answer = ModelWorker(FrameWriter(io.BytesIO())).answer(
        Prepare(job=job_of("fedspine", held_out), base_path=str(bert), adapter_path=str(tmp_path / "a"))
    )
    assert isinstance(answer, WorkerFailed) and answer.operator
    assert "0.channels has 64 units, a message holds 63 of a group" in answer.reason
