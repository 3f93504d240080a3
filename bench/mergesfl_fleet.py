"""Split learning on a virtual fleet: real gradients, the real planner, top model and aggregator, a clock of its own.

80 devices of three classes (TX2, NX, AGX: 30, 40, 10; speeds 1 : 2 : 4, power modes and links as in the testbed's
`jetson` profile). What a round takes follows the paper's cost of a sample: with mu_i and beta_i the seconds to compute
and to transmit one, a device needs d_i (mu_i + beta_i) for a step, one thing at a time: a third of mu_i forward, its
features up, their gradient down, the rest of mu_i backward. Merged features wait for the last device; with
`split.overlap` a device computes and sends its next batch while it waits, with weights that are one step old. Where
nothing is merged nobody waits for another before the round's end. Models travel before and after. The server's compute
and its link count nothing, which favours splitting.
Whole models (`fedavg`) are trained with the job's batch on devices drawn at random.
"""

from __future__ import annotations

import dataclasses
import math
import tempfile
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
import torch
from torch import nn

from bench.mergesfl_clock import Timing, World, merged_seconds
from coordinator.core.aggregation import registry as aggregation
from coordinator.core.aggregation.registry import merges
from coordinator.core.draw import Draw, drawn
from coordinator.core.facts import ModelFacts
from coordinator.core.planning import registry as planning
from coordinator.core.planning import split_control as control
from coordinator.core.planning.base import Candidate, FleetView, Planner, RoundReport
from coordinator.core.planning.cost_model import measures_link
from coordinator.core.planning.regulation import again
from coordinator.fold import Reported, fold_round
from coordinator.workers.protocol import Prepare, Prepared, TopRound
from coordinator.workers.top_model import TopModel
from muster.testbed import device_model as dm
from muster.testbed.virtual_nodes import evaluator
from shared import adapter
from shared.adapter import Adapter
from shared.messages import DatasetFacts, DeviceInfo, Load, UpdateFacts, Work
from shared.modeling import base_model, evaluation, lora, split
from shared.modeling.base_model import Base
from shared.modeling.data import Batch, SampleOrder
from shared.modeling.lora import Carried
from shared.modeling.lower import Lower
from shared.modeling.objective import loss_sum
from shared.modeling.optimizing import advance, optimizer_of, rate_of
from shared.modeling.remembered import REMEMBERED
from shared.settings import BrokerSettings

FEDAVG = "fedavg"
WIRE = 2
"""Bytes of a feature: bf16."""
MIB = 2**20


class RoundOutcome(msgspec.Struct, frozen=True, kw_only=True):
    """One round; seconds are virtual."""

    round: int
    seconds: float
    at: float
    accuracy: float
    loss: float
    kl: float
    """Of the merged label mix to the fleet's."""
    waiting: float
    """Mean share of a round that its devices wait for the slowest."""
    samples: int
    bytes_moved: int


class Method:
    """A strategy from its first round on. `rows`: of the held-out data that a round is evaluated on; 0: all."""

    def __init__(self, world: World, name: str, lr: float, rows: int = 0) -> None:
        self.world, self.name, self.rows = world, name, rows
        strategy = msgspec.structs.replace(world.job.strategy, name="mergesfl" if name == FEDAVG else name)
        training = msgspec.structs.replace(world.job.training, lr=lr)
        self.job = msgspec.structs.replace(world.job, strategy=strategy, training=training)
        self._scratch = tempfile.TemporaryDirectory(dir=world.folder)
        self.place = Path(self._scratch.name)
        given = self.place / "global"
        prepared = evaluator().answer(Prepare(job=self.job, base_path=str(world.model), adapter_path=str(given)))
        if not isinstance(prepared, Prepared):
            raise RuntimeError(prepared.reason if hasattr(prepared, "reason") else str(prepared))
        self.facts: ModelFacts = prepared.facts
        self.current: Adapter = adapter.read_file(given)
        self.residual: Adapter | None = None
        self.planner: Planner = planning.create(strategy)
        self.aggregator = aggregation.create(strategy)
        self.whole = base_model.load(world.model, self.job.task, 32)
        self.lower: Base | None = None
        self.upper: Base | None = None
        self.now = 0.0
        self.rounds: list[RoundOutcome] = []

    # ---- a round

    def run(self) -> RoundOutcome:
        """The next round."""
        number = len(self.rounds) + 1
        works = self._whole_works(number) if self.name == FEDAVG else self._plan(number)
        done = self._train_whole(works, number) if self.name == FEDAVG else self._train_split(works, number)
        self._fold(done.reported, number)
        self.now += done.seconds
        found = self._evaluate()
        outcome = RoundOutcome(
            round=number, seconds=done.seconds, at=self.now, accuracy=found.accuracy or 0.0, loss=found.loss,
            kl=self.divergence({device: work.batch for device, work in works.items()}), waiting=done.waiting,
            samples=sum(one.samples for one in done.reported if "/" not in one.device), bytes_moved=done.moved,
        )  # fmt: skip
        self.rounds.append(outcome)
        return outcome

    def divergence(self, batches: Mapping[str, int]) -> float:
        """KL of the label mix of these batches to the fleet's mean mix."""
        names = sorted(self.world.labels)
        mixes, goal, _ = control.mixes_of([self.world.labels[name] for name in names])
        weights = np.array([batches.get(name, 0) for name in names], float)
        return float(control.divergence(weights @ mixes, goal))

    def _plan(self, number: int) -> dict[str, Work]:
        view = FleetView(
            round=number, candidates=tuple(self._candidate(name, number) for name in sorted(self.world.shares)),
            facts=self.facts, adapter_bytes=self._size(),
        )  # fmt: skip
        plan = self.planner.plan(view, self.job)
        self._view = view
        works = plan.participants
        if plan.regulation is not None:
            # As the top worker does, once the devices have fetched the model.
            size, links = self._size(), {name: self.world.link(name, number) for name in works}
            links = {name: link for name, link in links.items() if measures_link(size, size / link)}
            found = again(plan.regulation, {name: work.batch for name, work in works.items()}, links)
            works = {name: msgspec.structs.replace(work, batch=found[name]) for name, work in works.items()}
        return works

    def _whole_works(self, number: int) -> dict[str, Work]:
        rounds = self.job.rounds
        names = drawn(sorted(self.world.shares), rounds.sample, Draw(self.job.seed, number, 1))
        ranks = {} if self._full else {one.name: self.job.strategy.rank for one in self.facts.modules}
        batch = {name: min(self.job.strategy.batch, self.world.shares[name].rows) for name in names}
        return {name: Work(ranks=ranks, batch=batch[name], bits=32, steps=rounds.local_steps) for name in names}

    @property
    def _full(self) -> bool:
        return self.job.strategy.split.tuning == "full"

    def _candidate(self, name: str, number: int) -> Candidate:
        one, world = self.world.devices[name], self.world
        info = DeviceInfo(
            epoch=1, cores=one.kind.cores, memory_bytes=8192 * MIB, bits=[32], flops=one.probed(number),
            agent_bytes=300 * MIB,
            datasets={self.job.task.dataset: DatasetFacts(rows=world.shares[name].rows, labels=world.labels[name])},
        )  # fmt: skip
        load = Load(
            epoch=1, seq=1, cores=one.kind.cores, memory_limit=8192 * MIB, memory_available=8192 * MIB, own_memory=1
        )
        return Candidate(device=name, info=info, load=load)

    # ---- training

    def _train_split(self, works: Mapping[str, Work], number: int) -> Done:
        world, first = self.world, next(iter(works.values()))
        assert first.split is not None
        block = first.split.block
        lower, upper = self._parts(block)
        top = TopModel(upper, self._order(works, number, block))
        given = split.part_of(self.current, lower)
        training = self.job.training
        carried = lora.carry(
            lower, given, first.ranks, alpha_ratio=training.alpha_ratio, seed=self.job.seed, round=number
        )
        of_values = Lower(lower, carried)
        copies = {name: _copied(carried) for name in works}
        optimizers = {name: optimizer_of(copies[name], training) for name in works}
        orders = {name: SampleOrder(world.shares[name].rows, self.job.seed, number) for name in works}
        lower.model.train()
        under_way: deque[dict[str, Sent]] = deque()
        for step in range(first.steps):
            while len(under_way) < self._depth and step + len(under_way) < first.steps:
                ahead = step + len(under_way)
                sent: dict[str, Sent] = {}
                for name, work in sorted(works.items()):
                    batch = world.shares[name].batch(orders[name].take(ahead * work.batch, work.batch))
                    torch.manual_seed(int(dm.draw(self.job.seed, name, number, ahead) * 2**40))
                    values = self._values(copies[name])
                    sent[name] = Sent(of_values.features(values, batch), values, batch)
                under_way.append(sent)
            sent = under_way.popleft()
            parts = {
                name: split.Part(
                    _on_the_wire(one.hidden), one.batch.targets, None if lower.kind == "image" else one.batch.mask
                )
                for name, one in sent.items()
            }
            for name, answer in top.take(parts, step).items():
                sent[name].hidden.backward(_on_the_wire(answer.gradient))
                for own, parameter in copies[name].named().items():
                    parameter.grad = sent[name].values[own].grad
                advance(optimizers[name], copies[name], training, self._rate(number, step))
        hidden = {name: one.hidden for name, one in sent.items()}
        reported = [self._reported(copies[name], name, number, work.batch * work.steps) for name, work in works.items()]
        reported += [Reported(f"top/{one.of}", one.samples, Path(one.path)) for one in top.updates()]
        return self._timed(works, number, hidden, carried, reported)

    @property
    def _depth(self) -> int:
        """Batches that a device has under way."""
        return 2 if self.job.strategy.split.overlap else 1

    def _values(self, carried: Carried) -> dict[str, torch.Tensor]:
        """What is trained, as it is now: a step that is taken before its gradient comes changes the rest."""
        named = carried.named()
        return {
            own: (value.detach().clone() if not own.endswith(REMEMBERED) else value.detach()).requires_grad_(
                value.requires_grad
            )
            for own, value in named.items()
        }

    def _timed(
        self, works: Mapping[str, Work], number: int, hidden: Mapping[str, torch.Tensor], carried: Carried,
        reported: list[Reported],
    ) -> Done:  # fmt: skip
        """What the round took, and what the planner learns of it."""
        world = self.world
        size = 4 * sum(tensor.numel() for tensor in carried.parameters())
        one = next(iter(hidden.values()))
        feature = WIRE * one[0].numel()
        timing, steps = {}, next(iter(works.values())).steps
        for name in works:
            compute = world.lower_share * world.sample_s / world.speed(name, number)
            timing[name] = Timing(compute, 2 * feature / world.link(name, number))
        parts = {
            name: [
                (
                    work.batch * timing[name].compute * world.noise(name, number, step),
                    work.batch * timing[name].transmit,
                )
                for step in range(steps)
            ]
            for name, work in works.items()
        }
        took = {name: [compute + transmit for compute, transmit in one] for name, one in parts.items()}
        links = {name: 2 * size / world.link(name, number) for name in works}
        if merges(self.name):
            trained = merged_seconds(parts, self._depth)
            seconds = trained + max(links.values())
        else:  # nobody waits for another before the round's end
            trained = max(sum(one) for one in took.values())
            seconds = max(sum(took[name]) + links[name] for name in works)
        waiting = float(np.mean([1.0 - sum(one) / trained for one in took.values()]))
        self._learn(works, number, timing, took, size)
        moved = sum(2 * size + 2 * feature * work.batch * steps for work in works.values())
        return Done(reported, seconds, waiting, moved)

    def _learn(
        self, works: Mapping[str, Work], number: int, timing: Mapping[str, Timing], took: Mapping[str, list[float]],
        size: int,
    ) -> None:  # fmt: skip
        results = {}
        for name, work in works.items():
            noise = np.median([self.world.noise(name, number, step) for step in range(work.steps)])
            compute = work.batch * timing[name].compute * float(noise)
            results[name] = UpdateFacts(
                samples=work.batch * work.steps, steps=work.steps, batch=work.batch, bits=32, loss_first=1.0,
                loss_last=1.0, step_s=compute, train_s=compute * work.steps, wait_s=max(0.0, took[name][0] - compute),
                fetch_s=size / self.world.link(name, number), cores_used=self.world.devices[name].kind.cores,
            )  # fmt: skip
        candidates = {one.device: one for one in self._view.candidates}
        self.planner = self.planner.learn(
            RoundReport(
                round=number, works=dict(works), results=results, facts=self.facts, job=self.job, adapter_bytes=size,
                infos={name: candidates[name].info for name in works},
                loads={name: load for name in works if (load := candidates[name].load) is not None},
            )
        )  # fmt: skip

    def _train_whole(self, works: Mapping[str, Work], number: int) -> Done:
        world, training = self.world, self.job.training
        reported, took = [], {}
        for name, work in sorted(works.items()):
            carried = lora.carry(
                self.whole, self.current, work.ranks, alpha_ratio=training.alpha_ratio, seed=self.job.seed, round=number
            )
            optimizer, data = optimizer_of(carried, training), world.shares[name]
            order = SampleOrder(data.rows, self.job.seed, number)
            self.whole.model.train()
            for step in range(work.steps):
                torch.manual_seed(int(dm.draw(self.job.seed, name, number, step) * 2**40))
                batch = data.batch(order.take(step * work.batch, work.batch))
                (loss_sum(self.whole.model, batch, data.kind)[0] / batch.weight).backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
                advance(optimizer, carried, training, self._rate(number, step))
            reported.append(self._reported(carried, name, number, work.batch * work.steps))
            size = 4 * sum(tensor.numel() for tensor in carried.parameters())
            sample_s = world.sample_s / world.speed(name, number)
            noise = sum(world.noise(name, number, step) for step in range(work.steps))
            took[name] = work.batch * sample_s * noise
        seconds = max(took[name] + 2 * size / world.link(name, number) for name in works)
        waiting = float(np.mean([1.0 - one / max(took.values()) for one in took.values()]))
        return Done(reported, seconds, waiting, 2 * size * len(works))

    def _rate(self, number: int, step: int) -> float:
        rounds = self.job.rounds
        return rate_of(self.job.training, number, rounds.count, rounds.local_steps, step)

    def _parts(self, block: int) -> tuple[Base, Base]:
        if self.lower is None or self.upper is None:
            self.lower, self.upper = (base_model.load(self.world.model, self.job.task, 32) for _ in range(2))
            split.lower(self.lower, block)
            split.upper(self.upper, block)
        return self.lower, self.upper

    def _order(self, works: Mapping[str, Work], number: int, block: int) -> TopRound:
        path = self.place / f"given-{number}"
        path.write_bytes(adapter.write(self.current))
        return TopRound(
            job=self.job, job_id="bench", round=number, attempt=1, fleet="f", name="coord-1-top",
            broker=BrokerSettings(), base_path=str(self.world.model), base_digest=self.facts.base_digest,
            adapter_path=str(path), update_path=str(self.place / f"top-{number}"), folder=str(self.place),
            batches={name: work.batch for name, work in works.items()}, steps=self.job.rounds.local_steps,
            split=msgspec.structs.replace(self.job.strategy.split, block=block), merges=merges(self.name),
        )  # fmt: skip

    # ---- the end of a round

    def _reported(self, carried: Carried, name: str, number: int, samples: int) -> Reported:
        update = lora.read_update(
            carried, job="bench", round=number, attempt=1, base_digest=self.facts.base_digest, device=name
        )
        path = self.place / f"{name}.update"
        path.write_bytes(adapter.write(update))
        return Reported(name, samples, path)

    def _fold(self, reported: list[Reported], number: int) -> None:
        folded = fold_round(self.aggregator, self.facts.modules, self.current, self.residual, reported, round=number)
        self.current, self.residual = folded.adapter, folded.residual
        path = self.place / "global"
        path.write_bytes(adapter.write(self.current))
        self.current = adapter.read_file(path)
        for one in reported:
            one.path.unlink(missing_ok=True)

    def _size(self) -> int:
        return (self.place / "global").stat().st_size

    def _evaluate(self) -> Any:
        lora.merge(self.whole, self.current)
        data = self.world.held_out
        found = evaluation.evaluate(self.whole, data.some(1.0, self.rows) if self.rows else data, 128)
        if not math.isfinite(found.loss):
            raise ArithmeticError(f"{self.name}: the loss is {found.loss}")
        return found


class Sent(NamedTuple):
    """A batch whose features are under way. `values`: of what is trained, as they were."""

    hidden: torch.Tensor
    values: dict[str, torch.Tensor]
    batch: Batch


class Done(NamedTuple):
    """A round that was trained."""

    reported: list[Reported]
    seconds: float
    waiting: float
    moved: int


def _copied(carried: Carried) -> Carried:
    """The same values as tensors of their own."""

    def own(tensor: torch.Tensor) -> nn.Parameter:
        return nn.Parameter(tensor.detach().clone(), requires_grad=tensor.requires_grad)

    factors = {name: (own(b), own(a)) for name, (b, a) in carried.factors.items()}
    return dataclasses.replace(
        carried, factors=factors, dense={name: own(tensor) for name, tensor in carried.dense.items()}
    )


def _on_the_wire(tensor: torch.Tensor) -> torch.Tensor:
    """Rounded to bf16, as it travels."""
    return tensor.detach().bfloat16().float()
