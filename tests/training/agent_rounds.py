"""Rounds with the real worker and the real agent, without a broker between: prepare, plan, train, fold."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path

from msgspec.structs import replace

from coordinator.core.aggregation import registry as aggregation
from coordinator.core.aggregation.base import Expectation
from coordinator.core.facts import Metrics, ModelFacts
from coordinator.core.planning import registry as planning
from coordinator.core.planning.base import Candidate, FleetView, Plan, RoundReport
from coordinator.fold import Reported, fold_round
from coordinator.workers.model_worker import ModelWorker
from coordinator.workers.protocol import Evaluate, Evaluated, Prepare, Prepared
from edge_daemon.protocol import Train, Trained
from shared import adapter as adapters
from shared.frames import FrameWriter
from shared.jobs import JobSpec
from shared.messages import Assignment, BlobRef, DatasetFacts, DeviceInfo, Load
from tests.training.test_agent import Agent

MIB = 2**20


class Rounds:
    """`data`: device -> its file. All agents are one process here."""

    def __init__(self, folder: Path, agent: Agent, job: JobSpec, model: Path, data: dict[str, Path]) -> None:
        self.folder, self.agent, self.job, self.model, self.data = folder, agent, job, model, data
        self.worker = ModelWorker(FrameWriter(io.BytesIO()))
        self.current = folder / "round-0.adapter"
        prepared = self.worker.answer(Prepare(job=job, base_path=str(model), adapter_path=str(self.current)))
        assert isinstance(prepared, Prepared), prepared
        self.facts: ModelFacts = prepared.facts
        self.planner = planning.create(job.strategy)
        self.aggregator = aggregation.create(job.strategy)

    def plan(self, round: int) -> Plan:
        size = self.current.stat().st_size
        fleet = tuple(self._candidate(name) for name in sorted(self.data))
        return self.planner.plan(
            FleetView(round=round, candidates=fleet, facts=self.facts, adapter_bytes=size), self.job
        )

    def order(self, plan: Plan, round: int, name: str) -> Train:
        content = self.current.read_bytes()
        assignment = Assignment(
            job="whole", round=round, attempt=1, work=plan.participants[name], base=self.job.base,
            base_digest=self.facts.base_digest, task=self.job.task, training=self.job.training,
            rounds=self.job.rounds.count, seed=self.job.seed,
            adapter=BlobRef(sha=hashlib.sha256(content).hexdigest(), size=len(content)),
        )  # fmt: skip
        return Train(
            assignment=assignment, base_path=str(self.model), data_path=str(self.data[name]),
            adapter_path=str(self.current), update_path=str(self.folder / f"{name}-{round}.update"), device=name,
            checkpoint_dir=str(self.folder / "work" / f"{name}-{round}"),
        )  # fmt: skip

    def run(self, round: int) -> Plan:
        plan = self.plan(round)
        before = adapters.read_file(self.current)
        reported, results = [], {}
        for name, work in sorted(plan.participants.items()):
            order = self.order(plan, round, name)
            facts = self.agent.ask(order, Trained).facts
            expected = Expectation(
                job="whole", round=round, attempt=1, device=name, base_digest=self.facts.base_digest,
                ranks=work.ranks, modules={module.name: module for module in self.facts.modules},
                alpha_ratio=self.job.training.alpha_ratio, before=before, seed=self.job.seed,
            )  # fmt: skip
            assert self.aggregator.admit(adapters.read_file(Path(order.update_path)), expected) is None
            reported.append(Reported(name, facts.samples, Path(order.update_path)))
            results[name] = replace(facts, cores_used=1.0)
        folded = fold_round(self.aggregator, self.facts.modules, before, None, reported, round=round)
        self.current = self.folder / f"round-{round}.adapter"
        self.current.write_bytes(adapters.write(folded.adapter))
        loads = {name: load for name in self.data if (load := self._candidate(name).load) is not None}
        self.planner = self.planner.learn(
            RoundReport(
                round=round, works=plan.participants, results=results, loads=loads, facts=self.facts, job=self.job,
                adapter_bytes=self.current.stat().st_size,
            )
        )  # fmt: skip
        return plan

    def metrics(self) -> Metrics:
        answer = self.worker.answer(Evaluate(job=self.job, base_path=str(self.model), adapter_path=str(self.current)))
        assert isinstance(answer, Evaluated), answer
        return answer.metrics

    def _candidate(self, name: str) -> Candidate:
        info = DeviceInfo(
            epoch=1, cores=1.0, memory_bytes=4096 * MIB, bits=[16, 32],
            datasets={self.job.task.dataset: DatasetFacts(rows=30)},
        )  # fmt: skip
        load = Load(epoch=1, seq=1, cores=1.0, memory_limit=4096 * MIB, memory_available=4096 * MIB)
        return Candidate(device=name, info=info, load=load)
