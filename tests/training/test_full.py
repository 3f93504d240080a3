"""Full fine-tuning on real models: the start, what is trained, the way back to the frozen base, rounds, the export."""

from __future__ import annotations

import math
import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from msgspec import structs

from coordinator.export_whole import export_whole
from coordinator.workers import model_worker
from coordinator.workers.protocol import Prepare, Prepared
from edge_daemon.protocol import Failed, Probed, Progressed, Shutdown, Trained
from edge_daemon.training.loop import Loop
from muster.merged import merge
from shared import adapter as adapters
from shared.adapter import Adapter
from shared.errors import UserError
from shared.jobs import BaseSpec, EvaluationSpec, JobSpec, RoundsSpec, SplitSpec, StrategySpec, TaskSpec, TrainingSpec
from shared.messages import Work
from shared.modeling import base_model, checkpoint, evaluation, lora
from shared.modeling.base_model import Base
from shared.modeling.data import tokenize
from shared.modeling.faults import AdapterFault, ModelFault
from shared.starts import START_NOTE
from tests.training.agent_rounds import Rounds
from tests.training.test_agent import PATIENCE_S, Agent, probe
from tests.training.test_lora import logits
from tests.training.tiny_models import COLOURS, STORIES, Pipes, assignment, empty_adapter, global_adapter

CASES = [("bert", COLOURS), ("gpt2", STORIES), ("llama", STORIES)]
ROUNDS_OF = [CASES[0], *(pytest.param(*case, marks=pytest.mark.slow) for case in CASES[1:])]
"""Whole rounds: those of the further architectures are for `make test-all`."""


def whole_adapter(base: Base, seed: int = 0, size: float = 0.0) -> Adapter:
    """The base's own values and a fresh head, all of them shaken by `size`."""
    rng = np.random.default_rng(seed)
    dense = {name: base.model.get_parameter(name).detach().numpy().copy() for name in base.shapes}
    dense |= base_model.fresh_head(base, 0)
    dense = {name: one + np.float32(size) * rng.standard_normal(one.shape, dtype=np.float32)
             for name, one in dense.items()}  # fmt: skip
    return replace(empty_adapter(base), dense=dense, notes={START_NOTE: "dense"})


def carry(base: Base, given: Adapter, ranks: dict[str, int] | None = None) -> lora.Carried:
    return lora.carry(base, given, ranks or {}, alpha_ratio=2.0, seed=0, round=1)


def values(base: Base) -> dict[str, bytes]:
    return {name: base.model.get_parameter(name).detach().numpy().tobytes() for name in base.shapes}


@pytest.mark.parametrize(("name", "task"), CASES)
def test_it_begins_as_the_base_and_trains_every_parameter_once(
    name: str, task: TaskSpec, request: pytest.FixtureRequest
) -> None:
    base = base_model.load(request.getfixturevalue(name), task)
    lora.merge(base, empty_adapter(base))
    plain = logits(base)
    given = whole_adapter(base)
    lora.merge(base, given)
    assert torch.equal(logits(base), plain)
    carried = carry(base, given)
    assert torch.equal(logits(base), plain)
    assert carried.factors == {} and carried.named().keys() == given.dense.keys()
    trained = {id(parameter) for parameter in base.model.parameters() if parameter.requires_grad}
    assert trained == {id(tensor) for tensor in carried.parameters()} == {id(one) for one in base.model.parameters()}
    # GPT-2's token matrix is its output matrix: one tensor.
    assert len(carried.dense) == len(list(base.model.parameters()))
    assert ("lm_head.weight" in given.dense) == (name == "llama")
    assert sum(one.size for one in given.dense.values()) == sum(base_model.count_parameters(base))


@pytest.mark.parametrize(("name", "task"), CASES)
def test_the_next_work_finds_the_stored_base(name: str, task: TaskSpec, request: pytest.FixtureRequest) -> None:
    folder: Path = request.getfixturevalue(name)
    base = base_model.load(folder, task)
    lora.merge(base, empty_adapter(base))
    stored = values(base)
    for seed in (1, 2):
        carried = carry(base, whole_adapter(base, seed, 0.3))
        assert all(one != values(base)[key] for key, one in stored.items() if key not in base.head)
        with torch.no_grad():
            for tensor in carried.parameters():
                tensor.add_(1.0)
        carried = carry(base, empty_adapter(base), dict.fromkeys(base.linears, 2))
        lora.detach(base)
        assert values(base) == stored
        assert not any(parameter.requires_grad for parameter in base.model.parameters())
        assert carried.dense.keys() == base.head.keys()
        carry(base, global_adapter(base, 3), dict.fromkeys(base.linears, 1))
        carry(base, whole_adapter(base, seed, 0.3))
        lora.detach(base)
        base.restore()
        assert {k: v for k, v in values(base).items() if k not in base.head} == {
            k: v for k, v in stored.items() if k not in base.head
        }


def test_what_can_not_be_tuned_is_refused(bert: Path) -> None:
    full = base_model.load(bert, COLOURS)
    given = whole_adapter(full)
    half = base_model.load(bert, COLOURS, 16)
    with pytest.raises(AdapterFault, match="it is the whole model, for a base of 32 bits only"):
        carry(half, given)
    with pytest.raises(ModelFault, match="only an fp32 base can be tuned itself"):
        half.tune_densely(given.dense)
    with pytest.raises(ModelFault, match="the base has no parameter nowhere"):
        full.tune_densely(["nowhere"])
    less = {name: one for name, one in given.dense.items() if name != "bert.pooler.dense.bias"}
    with pytest.raises(AdapterFault, match=r"bert\.pooler\.dense\.bias is None, the base wants \(32,\)"):
        carry(full, replace(given, dense=less))
    with pytest.raises(AdapterFault, match="the base wants None"):
        carry(full, replace(given, notes={}))


def test_a_base_that_no_blob_holds_is_refused_before_it_is_read() -> None:
    large = SimpleNamespace(folder="/bases/large", shapes={"w": (12_000, 12_000)})
    asked = JobSpec(
        name="t", base=BaseSpec(model="large"), task=COLOURS, strategy=StrategySpec(name="full"), rounds=RoundsSpec()
    )
    with pytest.raises(UserError, match="strategy.name full: /bases/large has 549 MiB .* a device can send 512"):
        model_worker._trained(large, asked, "dense")
    half = structs.replace(asked, strategy=StrategySpec(name="mergesfl", split=SplitSpec(tuning="full")))
    with pytest.raises(UserError, match=r"strategy\.split\.tuning full: /bases/large has 549 MiB"):
        model_worker._trained(large, half, "dense")


def test_of_a_split_base_the_side_that_is_trained_itself_alone_is_counted(
    bert: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = base_model.load(bert, COLOURS)
    job = JobSpec(
        name="t", base=BaseSpec(model="bert"), task=COLOURS, rounds=RoundsSpec(),
        strategy=StrategySpec(name="mergesfl", split=SplitSpec(block=1, top_tuning="full")),
    )  # fmt: skip
    names = model_worker._trained(base, job, "sides")
    assert names and all(".layer.0." not in name and ".embeddings." not in name for name in names)
    size = 4 * sum(math.prod(base.shapes[name]) for name in names)
    monkeypatch.setattr(model_worker, "MAX_BLOB_BYTES", size)
    assert model_worker._trained(base, job, "sides") == names
    monkeypatch.setattr(model_worker, "MAX_BLOB_BYTES", size - 1)
    with pytest.raises(
        UserError, match=r"strategy\.split\.top_tuning full: .* on that side in fp32, an adapter can hold"
    ):
        model_worker._trained(base, job, "sides")


def trained(folder: Path, source: Path, task: TaskSpec, checkpoints: Path, stop_at: int = 6) -> Loop:
    base = base_model.load(folder, task)
    training = TrainingSpec(lr=1e-2, checkpoint_every=2, weight_decay=0.01)
    work = assignment(base, ranks={}, training=training, task=task)
    pipes = Pipes()
    data = tokenize(str(source), task, base.tokenizer)
    made = Loop(base, carry(base, whole_adapter(base)), data, work, pipes.control, checkpoints)
    inner = made._loss_of_step

    def stepping(batch: int) -> float:
        if made.position.step == stop_at:
            raise KeyboardInterrupt
        return inner(batch)

    made._loss_of_step = stepping
    if stop_at < 6:
        with pytest.raises(KeyboardInterrupt):
            made.run()
    else:
        assert made.run() == "complete"
    pipes.close()
    return made


@pytest.mark.parametrize(("name", "task"), CASES)
def test_it_resumes_to_the_same_update(
    name: str, task: TaskSpec, tmp_path: Path, colours: Path, stories: Path, request: pytest.FixtureRequest
) -> None:
    folder: Path = request.getfixturevalue(name)
    source = colours if name == "bert" else stories
    calm = trained(folder, source, task, tmp_path / "calm")
    trained(folder, source, task, tmp_path / "cut", stop_at=5)
    again = trained(folder, source, task, tmp_path / "cut")
    first, second = (
        adapters.write(lora.read_update(one.carried, job="j", round=1, attempt=1, base_digest="d"))
        for one in (calm, again)
    )
    assert first == second
    before = whole_adapter(base_model.load(folder, task)).dense
    moved = [name for name, one in before.items() if not np.array_equal(one, calm.carried.dense[name].detach().numpy())]
    assert moved == list(before)


# ---- rounds of the real agent, and the export


@pytest.fixture(scope="module")
def agent(colours: Path, stories: Path) -> Iterator[Agent]:
    running = Agent()
    running.ask(probe(colours, stories=str(stories)), Probed)
    yield running
    running.say(Shutdown())
    assert running.process.wait(timeout=PATIENCE_S) == 0


def spec(task: TaskSpec, held_out: Path) -> JobSpec:
    return JobSpec(
        name="whole", base=BaseSpec(model="tiny"), task=task, seed=3, rounds=RoundsSpec(count=2, local_steps=12),
        strategy=StrategySpec(name="full", batch=8, batch_max=8), training=TrainingSpec(lr=2e-3, checkpoint_every=5),
        evaluation=EvaluationSpec(data=str(held_out)),
    )  # fmt: skip


@pytest.mark.parametrize(("name", "task"), ROUNDS_OF)
def test_rounds_teach_the_whole_model_and_its_export_is_an_ordinary_folder(
    name: str, task: TaskSpec, tmp_path: Path, colours: Path, stories: Path, agent: Agent,
    request: pytest.FixtureRequest,
) -> None:  # fmt: skip
    source, folder = (colours if name == "bert" else stories), request.getfixturevalue(name)
    rounds = Rounds(tmp_path, agent, spec(task, source), folder, {"a": source, "b": source})
    assert sum(math.prod(shape) for shape in rounds.facts.dense.values()) == (
        rounds.facts.linear_params + rounds.facts.other_params
    )
    losses = [rounds.metrics().loss]
    for round in (1, 2):
        plan = rounds.run(round)
        assert all((work.bits, work.ranks) == (32, {}) for work in plan.participants.values())
        losses.append(rounds.metrics().loss)
    assert losses[2] < losses[1] < losses[0]
    told = rounds.metrics()
    made = adapters.read_file(rounds.current)
    export_whole(made, tmp_path / "out", spec=rounds.job, facts=rounds.facts, base=str(folder), metrics=told)
    factory: Any = (
        transformers.AutoModelForSequenceClassification if name == "bert" else transformers.AutoModelForCausalLM
    )
    model, info = factory.from_pretrained(str(tmp_path / "out"), output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert model.config.architectures == [type(model).__name__]
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(tmp_path / "out"))
    ours = base_model.load(folder, task)
    ours.model = model.eval()
    found = evaluation.evaluate(ours, tokenize(str(source), task, tokenizer))
    assert found.loss == pytest.approx(told.loss, abs=1e-5) and found.accuracy == told.accuracy
    if name == "bert":
        assert model.config.id2label == {0: "red", 1: "green", 2: "blue"}
    assert "(aggregator `dense`)" in (tmp_path / "out" / "README.md").read_text()
    with pytest.raises(UserError, match="its export is one already, leave out --merged"):
        merge(tmp_path / "out", tmp_path / "merged")
    # Prepared again after all that by the same worker, round 0 is still the stored base.
    again = tmp_path / "again.adapter"
    assert isinstance(
        rounds.worker.answer(Prepare(job=rounds.job, base_path=str(folder), adapter_path=str(again))), Prepared
    )
    assert again.read_bytes() == (tmp_path / "round-0.adapter").read_bytes()


def test_killed_in_the_middle_it_resumes_to_the_same_bytes(
    tmp_path: Path, bert: Path, colours: Path, agent: Agent
) -> None:
    job = structs.replace(spec(COLOURS, colours), rounds=RoundsSpec(local_steps=300))
    rounds = Rounds(tmp_path, agent, job, bert, {"a": colours})
    plan = rounds.plan(1)
    whole = agent.ask(rounds.order(plan, 1, "a"), Trained)
    cut = structs.replace(rounds.order(plan, 1, "a"), checkpoint_dir=str(tmp_path / "cut"))
    first = Agent()
    first.ask(probe(colours), Probed)
    first.say(cut)
    first.hear(Progressed, lambda progress: progress.step > 10)
    os.kill(first.process.pid, signal.SIGKILL)
    first.process.wait()
    done = checkpoint.load_checkpoint(tmp_path / "cut", checkpoint.identity(cut.assignment))
    assert done is not None and 5 <= done[0].step < 300
    assert agent.ask(cut, Trained).sha == whole.sha


def test_the_agent_goes_from_the_whole_model_to_lora_and_back(
    tmp_path: Path, bert: Path, colours: Path, agent: Agent
) -> None:
    rounds = Rounds(tmp_path, agent, spec(COLOURS, colours), bert, {"a": colours})
    order = rounds.order(rounds.plan(1), 1, "a")
    first = agent.ask(order, Trained)
    base = base_model.load(bert, COLOURS)
    start = replace(empty_adapter(base, rounds.facts.base_digest), base_digest=rounds.facts.base_digest)
    (tmp_path / "lora.adapter").write_bytes(adapters.write(start))
    work = Work(ranks=dict.fromkeys(base.linears, 2), batch=4, bits=32, steps=3)
    by_lora = structs.replace(
        order, assignment=structs.replace(order.assignment, work=work), adapter_path=str(tmp_path / "lora.adapter"),
        update_path=str(tmp_path / "lora.update"),
    )  # fmt: skip
    after_full = agent.ask(by_lora, Trained)
    assert after_full.facts.load_s == 0, "the base stayed loaded"
    fresh = Agent()
    fresh.ask(probe(colours), Probed)
    assert fresh.ask(by_lora, Trained).sha == after_full.sha
    fresh.kill()
    assert agent.ask(order, Trained).sha == first.sha
    half = structs.replace(order.assignment, work=Work(ranks={}, batch=4, bits=16, steps=3))
    failed = agent.ask(structs.replace(order, assignment=half), Failed)
    assert (failed.kind, "32 bits only" in failed.reason) == ("adapter", True)
