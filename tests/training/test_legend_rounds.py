"""`legend` from plan to aggregate with the real agent: devices of unequal speed tune unequal depths of a small BERT."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from msgspec.structs import replace

from coordinator.core.aggregation import registry as aggregation
from coordinator.core.aggregation.base import Expectation, product
from coordinator.core.facts import ModelFacts
from coordinator.core.planning import registry as planning
from coordinator.core.planning.base import Candidate, FleetView, Plan, RoundReport
from coordinator.fold import Reported, fold_round
from coordinator.workers.model_worker import ModelWorker
from coordinator.workers.protocol import Evaluate, Evaluated, Prepare, Prepared
from edge_daemon.protocol import Train, Trained
from shared import adapter as adapters
from shared.frames import FrameWriter
from shared.jobs import BaseSpec, EvaluationSpec, JobSpec, RoundsSpec, StrategySpec, TrainingSpec
from shared.messages import Assignment, BlobRef, DatasetFacts, DeviceInfo, Load, UpdateFacts
from shared.modeling import lora
from tests.training.test_agent import Agent, running
from tests.training.tiny_models import COLOURS, colour_rows, make_bert, write_jsonl

BLOCKS, MIB = 4, 2**20
CORES = {"fast": 4.0, "middle": 2.0, "slow": 1.0}


def candidate(name: str) -> Candidate:
    """The agents all run here; what their devices say of themselves differs."""
    info = DeviceInfo(
        epoch=1, cores=CORES[name], memory_bytes=4096 * MIB, bits=[32], datasets={"colours": DatasetFacts(rows=60)}
    )
    load = Load(epoch=1, seq=1, cores=CORES[name], memory_limit=4096 * MIB, memory_available=4096 * MIB)
    return Candidate(device=name, info=info, load=load)


def spec(held_out: Path) -> JobSpec:
    """Two rounds of a colour to name."""
    return JobSpec(
        name="depths", base=BaseSpec(model="tiny"), task=COLOURS, seed=3,
        rounds=RoundsSpec(count=2, local_steps=20),
        strategy=StrategySpec(name="legend", rank=4, batch=8, batch_max=8, energy=1.0),
        training=TrainingSpec(lr=4e-3, checkpoint_every=100), evaluation=EvaluationSpec(data=str(held_out)),
    )  # fmt: skip


class Rounds:
    """Plan, train, admit and fold, without a broker between."""

    def __init__(self, folder: Path, agent: Agent) -> None:
        self.folder, self.agent = folder, agent
        self.model = make_bert(folder / "model", layers=BLOCKS)
        self.job = spec(write_jsonl(folder / "held-out.jsonl", colour_rows(90, seed=9)))
        self.data = {
            name: write_jsonl(folder / f"{name}.jsonl", colour_rows(60, seed=index)) for index, name in enumerate(CORES)
        }
        self.worker = ModelWorker(FrameWriter(io.BytesIO()))
        self.current = folder / "round-0.adapter"
        prepared = self.worker.answer(Prepare(job=self.job, base_path=str(self.model), adapter_path=str(self.current)))
        assert isinstance(prepared, Prepared), prepared
        self.facts: ModelFacts = prepared.facts
        self.planner = planning.create(self.job.strategy)
        self.aggregator = aggregation.create(self.job.strategy)

    def plan(self, round: int) -> Plan:
        fleet = tuple(candidate(name) for name in sorted(CORES))
        size = self.current.stat().st_size
        view = FleetView(round=round, candidates=fleet, facts=self.facts, adapter_bytes=size)
        return self.planner.plan(view, self.job)

    def train(self, plan: Plan, round: int, name: str) -> tuple[Path, UpdateFacts]:
        content = self.current.read_bytes()
        assignment = Assignment(
            # Nobody's time is over here, so nobody goes on for what is left of it.
            job="depths", round=round, attempt=1, work=replace(plan.participants[name], extra_steps=0),
            base=self.job.base,
            base_digest=self.facts.base_digest, task=self.job.task, training=self.job.training, rounds=2,
            seed=self.job.seed, adapter=BlobRef(sha=hashlib.sha256(content).hexdigest(), size=len(content)),
        )  # fmt: skip
        update = self.folder / f"{name}-{round}.update"
        order = Train(
            assignment=assignment, base_path=str(self.model), data_path=str(self.data[name]),
            adapter_path=str(self.current), update_path=str(update), device=name,
            checkpoint_dir=str(self.folder / "work" / f"{name}-{round}"),
        )  # fmt: skip
        return update, self.agent.ask(order, Trained).facts

    def run(self, round: int) -> Plan:
        plan = self.plan(round)
        before = adapters.read_file(self.current)
        reported, results = [], {}
        for name, work in sorted(plan.participants.items()):
            path, facts = self.train(plan, round, name)
            expected = Expectation(
                job="depths", round=round, attempt=1, device=name, base_digest=self.facts.base_digest,
                ranks=work.ranks, modules={module.name: module for module in self.facts.modules},
                alpha_ratio=self.job.training.alpha_ratio, before=before,
            )  # fmt: skip
            assert self.aggregator.admit(adapters.read_file(path), expected) is None
            reported.append(Reported(name, facts.samples, path))
            # All train on this machine; their reports tell the times that their own cores would take.
            seconds = facts.steps * 0.1 * (2 + depth_of(work.ranks, self.facts)) / CORES[name]
            results[name] = replace(facts, cores_used=CORES[name], train_s=seconds)
        folded = fold_round(self.aggregator, self.facts.modules, before, None, reported, round=round)
        self.current = self.folder / f"round-{round}.adapter"
        self.current.write_bytes(adapters.write(folded.adapter))
        loads = {name: candidate(name).load for name in CORES}
        self.planner = self.planner.learn(
            RoundReport(
                round=round, works=plan.participants, results=results,
                loads={name: load for name, load in loads.items() if load is not None}, facts=self.facts, job=self.job,
                adapter_bytes=self.current.stat().st_size,
            )
        )  # fmt: skip
        return plan

    def loss(self) -> float:
        answer = self.worker.answer(Evaluate(job=self.job, base_path=str(self.model), adapter_path=str(self.current)))
        assert isinstance(answer, Evaluated), answer
        return answer.metrics.loss


@pytest.fixture(scope="module")
def agent(colours: Path) -> Iterator[Agent]:
    with running(colours) as one:
        yield one


def depth_of(ranks: dict[str, int], facts: ModelFacts) -> int:
    """Blocks that are tuned; they must be the last ones."""
    blocks = {module.block for module in facts.modules if ranks.get(module.name)}
    assert blocks == set(range(BLOCKS - len(blocks), BLOCKS))
    return len(blocks)


def test_two_rounds_of_unequal_depths_teach_the_model(tmp_path: Path, agent: Agent) -> None:
    rounds = Rounds(tmp_path, agent)
    losses = [rounds.loss()]
    for round in (1, 2):
        plan = rounds.run(round)
        depths = {name: depth_of(work.ranks, rounds.facts) for name, work in plan.participants.items()}
        assert depths["slow"] < depths["fast"] and depths["slow"] <= depths["middle"] <= depths["fast"] == BLOCKS
        assert all("depth" in work.reasons for work in plan.participants.values())
        losses.append(rounds.loss())
    assert losses[2] < losses[1] < losses[0]
    made = adapters.read_file(rounds.current)
    assert set(made.factors) == {module.name for module in rounds.facts.modules}
    # The lowest block is the mean of its holders' local models, undamped by the device that did not tune it.
    before = adapters.read_file(tmp_path / "round-1.adapter")
    name = "bert.encoder.layer.0.attention.self.query"
    holders = [device for device, depth in depths.items() if depth == BLOCKS]
    assert 1 <= len(holders) < len(CORES)
    local = []
    for device in holders:
        part = adapters.read_file(tmp_path / f"{device}-2.update").factors[name]
        b, a = lora.product(before.factors[name], part.trained)
        local.append(product(part) + b @ a)
    assert product(made.factors[name]) == pytest.approx(np.mean(local, axis=0), abs=1e-4)
