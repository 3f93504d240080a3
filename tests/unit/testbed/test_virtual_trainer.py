"""The agent of a virtual device obeys and answers on the virtual clock as a subprocess does."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from edge_daemon import protocol
from edge_daemon.adapters.trainer import AgentEnded, AgentSpoke
from muster.testbed import device_model as dm
from muster.testbed.gradients import Order
from muster.testbed.simulate import load_steps
from muster.testbed.virtual_device import Base, Clockwork, VirtualDevice
from muster.testbed.virtual_trainer import VirtualTrainer
from shared.jobs import BaseSpec, TaskSpec, TrainingSpec
from shared.messages import Assignment, BlobRef, UpdateFacts, Work
from shared.transport.memory_network import MemoryNetwork

STEPS = load_steps()
LINEARS = {f"layer.{block}.dense": (384, 384, block) for block in range(3)}
CLOCK = Clockwork(
    dm.StepTable(STEPS), dm.MemoryTable.of(STEPS),
    Base(dm.Shape(3, 32, STEPS.linear_params, 12_000_000), LINEARS, 5000, lora=3 * 768),
)  # fmt: skip


@dataclass
class Workers:
    """Notes what is computed, and gives an update that says how many steps it holds."""

    begun: list[int] = field(default_factory=list)
    given: list[Order] = field(default_factory=list)
    forgotten: int = 0

    def begin(self, order: Order) -> None:
        self.begun.append(order.steps)

    def result(self, order: Order) -> protocol.Trained:
        self.given.append(order)
        path = Path(order.train.update_path)
        path.write_bytes(b"update")
        work = order.train.assignment
        batch = order.train.batch_limit or work.work.batch
        facts = UpdateFacts(
            samples=order.steps * batch, steps=order.steps, batch=batch, bits=16, loss_first=2.0, loss_last=1.0,
            step_s=123.0, train_s=456.0,
        )  # fmt: skip
        return protocol.Trained(job=work.job, round=work.round, attempt=work.attempt, sha="a" * 64, size=6, facts=facts)

    def forget(self, device: str) -> None:
        self.forgotten += 1


class Rig:
    """A trainer on a clock; what its agent says is collected."""

    def __init__(self, folder: Path, kind: str = "nx", *, restless: bool = False) -> None:
        self.network = MemoryNetwork(0)
        self.workers = Workers()
        chosen = next(one for one in dm.KINDS if one.name == kind)
        self.device = VirtualDevice(dm.Device("sim-01", chosen, 0, restless), CLOCK)
        self.said: list[tuple[float, Any]] = []
        self.folder = folder
        self.trainer = VirtualTrainer(
            self.device,
            100,
            self.workers,
            folder,
            self._heard,
            self._later,
            lambda: self.network.now,  # type: ignore[arg-type]  # a stand-in
        )
        self.trainer.start(protocol.Probe(datasets={"d": "somewhere"}))
        self.run(60.0)
        assert isinstance(self.said.pop()[1], protocol.Probed)

    def run(self, seconds: float) -> None:
        self.network.run_until(self.network.now + seconds)

    def _later(self, seconds: float, call: Any) -> None:
        self.network.schedule(self.network.now + seconds, call)

    def _heard(self, spoke: AgentSpoke) -> None:
        message = self.trainer.digest(spoke)
        if message is not None and not isinstance(message, protocol.Beat):
            self.said.append((self.network.now, message))

    def train(self, *, batch: int = 8, steps: int = 6, extra: int = 0, **order: Any) -> None:
        work = Work(ranks=dict.fromkeys(LINEARS, 8), batch=batch, bits=16, steps=steps, extra_steps=extra)
        assignment = Assignment(
            job="job-1", round=1, attempt=1, work=work, base=BaseSpec(model="m"), base_digest="d", rounds=3, seed=0,
            task=TaskSpec(kind="classification", dataset="d", labels=["a", "b"], max_tokens=32),
            training=TrainingSpec(checkpoint_every=2), adapter=BlobRef(sha="0" * 64, size=1),
        )  # fmt: skip
        self.trainer.tell(
            protocol.Train(
                assignment=assignment, base_path="b", data_path="d", adapter_path="a", device="sim-01",
                update_path=str(self.folder / "out" / "update"), checkpoint_dir="c", **order,
            )
        )  # fmt: skip

    def last(self, kind: type[Any]) -> Any:
        message = self.said[-1][1]
        assert isinstance(message, kind), self.said
        return message


@pytest.fixture
def rig(tmp_path: Path) -> Rig:
    return Rig(tmp_path)


def test_work_takes_the_models_time_and_the_gradients_are_asked_for_once(rig: Rig) -> None:
    begun = rig.network.now
    rig.train()
    rig.run(100.0)
    trained = rig.last(protocol.Trained)
    assert rig.workers.begun == [6] and [order.steps for order in rig.workers.given] == [6]
    facts = trained.facts
    assert (facts.samples, facts.steps, facts.ended, facts.paused_s) == (48, 6, "complete", 0.0)
    assert facts.train_s == pytest.approx(rig.said[-1][0] - begun - facts.load_s)
    assert facts.step_s == pytest.approx(facts.train_s / 6, rel=0.2)
    assert facts.peak_bytes > facts.base_bytes > 0 and facts.load_s > 0
    assert (rig.folder / "out" / "update").read_bytes() == b"update"
    rig.train()
    rig.run(100.0)
    assert rig.last(protocol.Trained).facts.load_s == 0.0, "the base stayed loaded"


def test_when_the_time_is_up_what_is_done_counts(rig: Rig) -> None:
    rig.train()
    rig.run(100.0)
    whole = rig.last(protocol.Trained).facts.train_s
    rig.train(train_for_s=0.55 * whole)
    rig.run(100.0)
    facts = rig.last(protocol.Trained).facts
    assert facts.ended == "time" and 3 <= facts.steps <= 4
    assert rig.workers.begun[-1] == rig.workers.given[-1].steps == facts.steps, "it was foreseen"


def test_while_there_is_time_it_goes_on(rig: Rig) -> None:
    rig.train()
    rig.run(100.0)
    whole = rig.last(protocol.Trained).facts.train_s
    for share, least, most in ((1.01, 6, 6), (1.25, 7, 8), (9.0, 8, 8)):
        rig.train(extra=2, train_for_s=share * whole)
        rig.run(100.0)
        facts = rig.last(protocol.Trained).facts
        assert facts.ended == "complete" and least <= facts.steps <= most
        assert facts.samples == 8 * facts.steps
        assert rig.workers.begun[-1] == rig.workers.given[-1].steps == facts.steps, "it was foreseen"


def test_a_step_that_is_charged_as_ten_ends_with_its_time(rig: Rig) -> None:
    rig.train()
    rig.run(100.0)
    step_s = rig.last(protocol.Trained).facts.step_s
    steps = set()
    for tenths in range(21, 60, 2):
        begun = rig.network.now
        rig.train(train_for_s=tenths / 10 * step_s)
        rig.run(100.0)
        facts, took = rig.last(protocol.Trained).facts, rig.said[-1][0] - begun
        assert tenths / 10 * step_s <= took <= (tenths + 1.5) / 10 * step_s, "one of the ten is finished"
        assert abs(facts.steps - tenths / 10) < 1.0
        steps.add(facts.steps)
    assert steps == {2, 3, 4, 5, 6}
    begun = rig.network.now
    rig.train(train_for_s=0.01)
    rig.run(100.0)
    assert rig.last(protocol.Trained).facts.steps == 1
    assert rig.said[-1][0] - begun > 0.5 * step_s, "the first is done in any case, all of it"


def test_told_that_its_time_is_over_it_ends_within_the_step(rig: Rig) -> None:
    rig.train()
    rig.run(100.0)
    step_s = rig.last(protocol.Trained).facts.step_s
    for tenths in range(21, 46, 2):
        begun = rig.network.now
        rig.train()
        rig.run(tenths / 10 * step_s)
        rig.trainer.tell(protocol.Stop(after_step=True))
        rig.trainer.tell(protocol.Stop(after_step=True))
        rig.run(100.0)
        facts, took = rig.last(protocol.Trained).facts, rig.said[-1][0] - begun
        assert facts.ended == "time" and abs(facts.steps - tenths / 10) < 1.0
        assert tenths / 10 * step_s <= took <= (tenths + 1.5) / 10 * step_s
        assert facts.step_s == pytest.approx(step_s, rel=0.3), "of whole steps"
    rig.train()
    rig.trainer.tell(protocol.Stop(after_step=True))
    rig.run(100.0)
    assert rig.last(protocol.Trained).facts.steps == 1
    said = len(rig.said)
    rig.trainer.tell(protocol.Stop(after_step=True))
    rig.run(100.0)
    assert len(rig.said) == said, "there is nothing to end"


def test_a_pause_stops_the_clock_between_two_steps(rig: Rig) -> None:
    rig.train()
    rig.run(0.01)
    rig.trainer.tell(protocol.Pause(reason="busy"))
    rig.run(50.0)
    assert not any(isinstance(message, protocol.Trained) for _, message in rig.said)
    rig.trainer.tell(protocol.Resume())
    rig.run(100.0)
    facts = rig.last(protocol.Trained).facts
    assert facts.steps == 6 and 40.0 < facts.paused_s < 50.0


def test_a_pause_that_ends_within_a_step_changes_nothing(rig: Rig) -> None:
    rig.train()
    rig.run(2.55)
    rig.trainer.tell(protocol.Pause())
    rig.run(0.001)
    rig.trainer.tell(protocol.Resume())
    rig.run(100.0)
    facts = rig.last(protocol.Trained).facts
    assert facts.steps == 6 and facts.paused_s == 0.0
    assert sum(isinstance(message, protocol.Trained) for _, message in rig.said) == 1


def test_told_to_stop_it_delivers_or_forgets(rig: Rig) -> None:
    rig.train(steps=50)
    rig.run(5.0)
    rig.trainer.tell(protocol.Stop())
    rig.run(5.0)
    facts = rig.last(protocol.Trained).facts
    assert facts.ended == "drain" and 0 < facts.steps < 50
    rig.train(steps=50)
    rig.run(5.0)
    rig.trainer.tell(protocol.Stop(discard=True))
    rig.run(5.0)
    assert rig.last(protocol.Failed).kind == "stopped"
    assert len(rig.workers.given) == 1


def test_the_kernel_ends_an_agent_that_takes_too_much(rig: Rig) -> None:
    rig.train(batch=4096)
    rig.run(10.0)
    end = rig.last(AgentEnded)
    assert end.out_of_memory and rig.workers.begun == rig.workers.given == []
    rig.trainer.start(protocol.Probe(datasets={}))
    rig.run(60.0)
    rig.train(batch=4096, batch_limit=4)
    rig.run(200.0)
    facts = rig.last(protocol.Trained).facts
    assert (facts.batch, facts.batch_limit, facts.samples) == (4, 4, 24)


def test_a_gpu_halves_its_batch_instead(tmp_path: Path) -> None:
    rig = Rig(tmp_path, "gpu")
    rig.train(batch=4096)
    rig.run(2000.0)
    facts = rig.last(protocol.Trained).facts
    assert 64 <= facts.batch == facts.batch_limit < 4096 and 4096 % facts.batch == 0
    assert rig.device.peak_bytes(rig.workers.given[0].train.assignment.work, 2 * facts.batch) > rig.device.limit * 0.9


def test_work_goes_on_from_its_checkpoint_after_a_kill(rig: Rig) -> None:
    rig.train(steps=9)
    rig.run(100.0)
    whole = rig.last(protocol.Trained).facts
    rig.train(steps=9)
    rig.run(0.7 * whole.train_s)
    rig.trainer.kill("crash")
    rig.trainer.start(protocol.Probe(datasets={}))
    rig.run(60.0)
    begun = rig.network.now
    rig.train(steps=9)
    rig.run(200.0)
    facts = rig.last(protocol.Trained).facts
    assert facts.steps == 9 and rig.said[-1][0] - begun < facts.load_s + 0.5 * whole.train_s
    assert facts.train_s == pytest.approx(whole.train_s, rel=0.1)


def test_telemetry_tells_of_work_heat_and_memory(rig: Rig) -> None:
    idle = rig.device.load(rig.network.now)
    rig.train(steps=100)
    rig.run(40.0)
    busy = rig.device.load(rig.network.now)
    assert idle.own_cores == 0.0 < busy.own_cores <= busy.cores
    assert idle.temperature_c is not None and busy.temperature_c is not None
    assert busy.temperature_c > idle.temperature_c
    assert busy.own_memory > idle.own_memory
    assert busy.memory_available + busy.own_memory <= busy.memory_limit == rig.device.limit
