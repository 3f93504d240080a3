"""Bottleneck adapters on real models: their mathematics, growth, resuming, rounds of the real agent, the export."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from msgspec import structs

from coordinator.core.planning.fedadapter import FedAdapterPlanner, shape_of
from coordinator.core.planning.progressive import Progress
from coordinator.export_bottleneck import export_bottleneck
from coordinator.workers.model_worker import ModelWorker
from coordinator.workers.protocol import Prepare, WorkerFailed
from edge_daemon.protocol import Failed, Probed, Shutdown, Trained
from edge_daemon.training.loop import Loop
from muster.bottleneck import load
from muster.merged import merge
from shared import adapter as adapters
from shared.adapter import Adapter
from shared.errors import UserError
from shared.frames import FrameWriter
from shared.jobs import BaseSpec, Bits, EvaluationSpec, JobSpec, RoundsSpec, StrategySpec, TaskSpec, TrainingSpec
from shared.modeling import base_model, bottleneck, evaluation, lora
from shared.modeling.base_model import Base
from shared.modeling.data import tokenize
from shared.modeling.faults import AdapterFault, ModelFault
from shared.starts import START_NOTE, fixed_rows
from tests.training.agent_rounds import Rounds
from tests.training.test_agent import PATIENCE_S, Agent, probe
from tests.training.test_lora import logits
from tests.training.tiny_models import COLOURS, STORIES, Pipes, assignment, empty_adapter, global_adapter, make_bert

CASES = [("bert", COLOURS), ("gpt2", STORIES), ("llama", STORIES)]
ROUNDS_OF = [CASES[0], *(pytest.param(*case, marks=pytest.mark.slow) for case in CASES[1:])]
"""Whole rounds: those of the further architectures are for `make test-all`."""
SEED = 7


def start(base: Base, dense: dict[str, Any] | None = None) -> Adapter:
    given = empty_adapter(base)
    return replace(given, dense={**given.dense, **(dense or {})}, notes={START_NOTE: "bottleneck"})


def carry(base: Base, given: Adapter, widths: dict[str, int]) -> lora.Carried:
    return lora.carry(base, given, widths, alpha_ratio=2.0, seed=SEED, round=1)


def blocks(base: Base) -> list[str]:
    return sorted(bottleneck.sites(base))


def shaken(base: Base, widths: dict[str, int], size: float = 0.3) -> Adapter:
    """A global adapter of these widths whose numbers are all other than a start's."""
    rng = np.random.default_rng(1)
    sites = bottleneck.sites(base)
    dense = {}
    for block, width in widths.items():
        names = bottleneck.tensor_names(block)
        for part, shape in bottleneck.shapes(sites[block], width).items():
            dense[names[part]] = np.float32(size) * rng.standard_normal(shape, dtype=np.float32)
    return start(base, dense)


# ---- the adapter itself


def test_the_forward_pass_by_hand() -> None:
    layer = torch.nn.Linear(2, 2, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 2.0]]))
    parts = {
        "down.weight": np.array([[1.0, 1.0]], np.float32), "down.bias": np.array([-1.0], np.float32),
        "up.weight": np.array([[2.0], [-1.0]], np.float32), "up.bias": np.array([0.5, 0.0], np.float32),
    }  # fmt: skip
    found = bottleneck.Bottlenecked(layer, parts, "cpu")(torch.tensor([[1.0, 0.5]]))
    # h = (1, 1); down gives 1 + 1 - 1 = 1; gelu(1) = 0.8413447; up gives (2 * 0.8413447 + 0.5, -0.8413447).
    assert torch.allclose(found, torch.tensor([[1 + 1.6826894 + 0.5, 1 - 0.8413447]]), atol=1e-6)


@pytest.mark.parametrize(("name", "task"), CASES)
def test_it_goes_behind_the_feed_forward_part_of_every_block(
    name: str, task: TaskSpec, request: pytest.FixtureRequest
) -> None:
    base = base_model.load(request.getfixturevalue(name), task)
    found = bottleneck.sites(base)
    assert [(one.index, one.hidden) for one in found.values()] == [(0, 32), (1, 32)]
    given = shaken(base, {blocks(base)[1]: 3})
    lora.merge(base, given)
    merged = logits(base)
    # The same by a hook on the plain model.
    plain = base_model.load(request.getfixturevalue(name), task)
    lora.merge(plain, start(plain))
    names = bottleneck.tensor_names(blocks(base)[1])
    down, down_bias, up, up_bias = (torch.from_numpy(given.dense[names[part]]) for part in bottleneck.TENSORS)
    last = plain.model.get_submodule(found[blocks(base)[1]].linear)
    last.register_forward_hook(
        lambda _layer, _args, h: h + torch.nn.functional.gelu(h @ down.T + down_bias) @ up.T + up_bias
    )
    assert torch.allclose(logits(plain), merged, atol=1e-5)
    assert not torch.allclose(merged, logits(base_model.load(request.getfixturevalue(name), task)), atol=1e-2)


@pytest.mark.parametrize("bits", [32, 16, 8, 4])
@pytest.mark.parametrize(("name", "task"), CASES)
def test_a_new_adapter_and_every_growth_leave_the_function_as_it_is(
    name: str, task: TaskSpec, bits: Bits, request: pytest.FixtureRequest
) -> None:
    base = base_model.load(request.getfixturevalue(name), task, bits)
    low, top = blocks(base)
    base.set_dense(start(base).dense)
    plain = logits(base)
    carry(base, start(base), {top: 4})
    assert torch.equal(logits(base), plain), "round 0 is the base"
    small = shaken(base, {top: 4})
    carry(base, small, {top: 4})
    wanted = logits(base)
    assert not torch.allclose(wanted, plain, atol=1e-2)
    for grown in ({top: 8}, {top: 4, low: 4}, {top: 16, low: 8}):
        carried = carry(base, small, grown)
        # bf16 rounds a sum of more terms otherwise.
        assert torch.allclose(logits(base), wanted, atol=1e-6 if bits == 32 else 0.05)
        shapes = {name: tuple(tensor.shape) for name, tensor in carried.dense.items()}
        assert shapes[f"{top}.bottleneck.down.weight"] == (grown[top], 32)
        rows = carried.dense[f"{top}.bottleneck.down.weight"].detach().numpy()
        assert np.array_equal(rows[4:], fixed_rows(SEED, top, grown[top], 32)[4:])
        assert not carried.dense[f"{top}.bottleneck.up.weight"][:, 4:].detach().any()
    trainable = {id(parameter) for parameter in base.model.parameters() if parameter.requires_grad}
    assert trainable == {id(tensor) for tensor in carried.parameters()}
    # A smaller configuration begins with the first rows and columns.
    part = carry(base, small, {top: 2}).dense[f"{top}.bottleneck.up.weight"].detach().numpy()
    assert np.array_equal(part, small.dense[f"{top}.bottleneck.up.weight"][:, :2])


def test_what_is_evaluated_is_what_devices_begin_with(bert: Path) -> None:
    base = base_model.load(bert, COLOURS)
    low, top = blocks(base)
    given = shaken(base, {low: 2, top: 5})
    lora.merge(base, given)
    merged = logits(base)
    carried = carry(base, given, {low: 2, top: 5})
    assert torch.equal(logits(base), merged)
    update = lora.read_update(carried, job="j", round=1, attempt=1, base_digest="d")
    assert update.dense.keys() == given.dense.keys()
    assert all(np.array_equal(update.dense[name], given.dense[name]) for name in given.dense)


def test_the_next_work_finds_the_plain_base(bert: Path) -> None:
    base = base_model.load(bert, COLOURS)
    layers = {name: base.model.get_submodule(name) for name in base.linears}
    lora.merge(base, empty_adapter(base))
    plain = logits(base)
    low, top = blocks(base)
    carry(base, shaken(base, {low: 2, top: 2}), {low: 2, top: 2})
    carry(base, global_adapter(base, 3), dict.fromkeys(base.linears, 1))
    carry(base, shaken(base, {top: 2}), {top: 3})
    lora.merge(base, empty_adapter(base))
    assert torch.equal(logits(base), plain)
    assert all(base.model.get_submodule(name) is layer for name, layer in layers.items())


def test_what_does_not_fit_is_refused(bert: Path) -> None:
    base = base_model.load(bert, COLOURS)
    low, top = blocks(base)
    with pytest.raises(AdapterFault, match="ranks name nowhere, a block that the base does not have"):
        carry(base, start(base), {"nowhere": 2})
    given = shaken(base, {top: 2})
    with pytest.raises(AdapterFault, match="up.bias is None, the base wants"):
        carry(base, replace(given, dense={k: v for k, v in given.dense.items() if "up.bias" not in k}), {top: 2})
    with pytest.raises(AdapterFault, match="down.weight is no matrix or is missing"):
        carry(base, replace(given, dense={k: v for k, v in given.dense.items() if "down.weight" not in k}), {top: 2})
    with pytest.raises(AdapterFault, match="the base wants None"):
        carry(base, start(base, {"bert.encoder.layer.9.bottleneck.down.weight": np.zeros((2, 32), np.float32)}), {})
    base.model.config.model_type = "mamba"
    with pytest.raises(ModelFault, match="bottleneck adapters fit blocks of bert, gpt2, llama, not of mamba"):
        bottleneck.sites(base)


# ---- training


def trained(folder: Path, source: Path, task: TaskSpec, checkpoints: Path, bits: Bits, stop_at: int = 6) -> Loop:
    base = base_model.load(folder, task, bits)
    widths = dict.fromkeys(blocks(base), 4)
    work = assignment(base, ranks=widths, task=task, bits=bits, training=TrainingSpec(lr=1e-2, checkpoint_every=2))
    pipes = Pipes()
    data = tokenize(str(source), task, base.tokenizer)
    given = shaken(base, {blocks(base)[1]: 2}, 0.1)
    made = Loop(base, carry(base, given, widths), data, work, pipes.control, checkpoints)
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


@pytest.mark.parametrize("bits", [32, 4])
@pytest.mark.parametrize(("name", "task"), CASES)
def test_it_resumes_to_the_same_update(
    name: str, task: TaskSpec, bits: Bits, tmp_path: Path, colours: Path, stories: Path, request: pytest.FixtureRequest
) -> None:
    folder: Path = request.getfixturevalue(name)
    source = colours if name == "bert" else stories
    calm = trained(folder, source, task, tmp_path / "calm", bits)
    trained(folder, source, task, tmp_path / "cut", bits, stop_at=5)
    again = trained(folder, source, task, tmp_path / "cut", bits)
    first, second = (
        adapters.write(lora.read_update(one.carried, job="j", round=1, attempt=1, base_digest="d"))
        for one in (calm, again)
    )
    assert first == second
    for tensor_name, tensor in calm.carried.dense.items():
        if tensor_name.endswith("up.weight"):
            assert bool(tensor.detach()[:, 2:].abs().sum() > 0), "what was zero has been trained"


# ---- rounds of the real agent


@pytest.fixture(scope="module")
def agent(colours: Path, stories: Path) -> Iterator[Agent]:
    running = Agent()
    running.ask(probe(colours, stories=str(stories)), Probed)
    yield running
    running.say(Shutdown())
    assert running.process.wait(timeout=PATIENCE_S) == 0


def spec(task: TaskSpec, held_out: Path) -> JobSpec:
    return JobSpec(
        name="bottles", base=BaseSpec(model="tiny"), task=task, seed=3, rounds=RoundsSpec(count=4, local_steps=12),
        strategy=StrategySpec(name="fedadapter", rank=4, batch=8, batch_max=8, bits=32),
        training=TrainingSpec(lr=1e-2, checkpoint_every=5), evaluation=EvaluationSpec(data=str(held_out)),
    )  # fmt: skip


@pytest.mark.parametrize(("name", "task"), ROUNDS_OF)
def test_rounds_with_a_trial_teach_the_model_and_the_export_is_what_was_evaluated(
    name: str, task: TaskSpec, tmp_path: Path, colours: Path, stories: Path, agent: Agent,
    request: pytest.FixtureRequest,
) -> None:  # fmt: skip
    source, folder = (colours if name == "bert" else stories), request.getfixturevalue(name)
    rounds = Rounds(tmp_path, agent, spec(task, source), folder, dict.fromkeys("abc", source))
    assert [(one.out, one.inp, one.block) for one in rounds.facts.modules] == [(32, 32, 0), (32, 32, 1)]
    base = base_model.load(folder, task)
    assert set(rounds.facts.dense) == set(base.head)
    losses = [rounds.metrics().loss]
    assert isinstance(rounds.planner, FedAdapterPlanner)
    # As if three rounds had brought nothing: the first one is a trial of two groups, since all two blocks are tuned.
    rounds.planner = structs.replace(rounds.planner, progress=Progress(losses=[1.0] * 4))
    found = []
    for round in (1, 2):
        plan = rounds.run(round)
        found.append({shape_of(work.ranks).width for work in plan.participants.values()})
        losses.append(rounds.metrics().loss)
    assert losses[2] < losses[1] < losses[0]
    assert found[0] == {4, 8} and len(found[1]) == 1
    after = [adapters.read_file(tmp_path / f"round-{round}.adapter") for round in (1, 2)]
    widths = [bottleneck.width_of(one.dense, blocks(base)[0]) for one in after]
    assert widths == [8, found[1].pop()]

    told = rounds.metrics()
    export_bottleneck(after[1], tmp_path / "out", spec=rounds.job, base=str(folder), metrics=told)
    factory: Any = (
        transformers.AutoModelForSequenceClassification if name == "bert" else transformers.AutoModelForCausalLM
    )
    given = {"num_labels": 3} if name == "bert" else {}
    base.model = load(factory.from_pretrained(str(folder), **given), tmp_path / "out")
    again = evaluation.evaluate(base, tokenize(str(source), task, base.tokenizer))
    assert again.loss == pytest.approx(told.loss, abs=1e-5) and again.accuracy == told.accuracy
    with pytest.raises(UserError, match="are not linear and can't be merged into the base: leave out --merged"):
        merge(tmp_path / "out", tmp_path / "merged")


def test_a_trial_of_three_groups_deeper_and_wider_on_four_blocks(tmp_path: Path, colours: Path, agent: Agent) -> None:
    folder = make_bert(tmp_path / "four", layers=4)
    rounds = Rounds(tmp_path, agent, spec(COLOURS, colours), folder, dict.fromkeys("abc", colours))
    before = rounds.metrics().loss
    assert isinstance(rounds.planner, FedAdapterPlanner)
    rounds.planner = structs.replace(rounds.planner, progress=Progress(losses=[1.0] * 4))
    plan = rounds.run(1)
    shapes = {name: (len(work.ranks), max(work.ranks.values())) for name, work in plan.participants.items()}
    assert shapes == {"a": (2, 4), "b": (3, 4), "c": (2, 8)}
    updates = {name: adapters.read_file(tmp_path / f"{name}-1.update") for name in shapes}
    made = adapters.read_file(rounds.current).dense
    low, top = "bert.encoder.layer.1.bottleneck.up.weight", "bert.encoder.layer.3.bottleneck.up.weight"
    assert np.array_equal(made[low], updates["b"].dense[low]), "one holder"
    mean = np.mean([one.dense[top][:, :4] for one in updates.values()], axis=0)
    np.testing.assert_allclose(made[top][:, :4], mean, atol=1e-6)
    assert np.array_equal(made[top][:, 4:], updates["c"].dense[top][:, 4:])
    assert rounds.metrics().loss < before
    plan = rounds.plan(2)
    assert len({tuple(work.ranks.items()) for work in plan.participants.values()}) == 1
    assert len(plan.participants["a"].ranks) in (2, 3)


def test_the_usage_in_the_readme_runs_and_other_folders_are_named(tmp_path: Path, bert: Path) -> None:
    base = base_model.load(bert, COLOURS)
    given = shaken(base, {blocks(base)[1]: 3})
    export_bottleneck(given, tmp_path / "out", spec=spec(COLOURS, tmp_path), base=str(bert))
    code = (tmp_path / "out" / "README.md").read_text().split("```python\n")[1].split("```")[0]
    scope: dict[str, Any] = {}
    exec(code.replace("path/of/this/folder", str(tmp_path / "out")), scope)
    lora.merge(base, given)
    wanted = logits(base)
    base.model = scope["model"]
    assert torch.allclose(logits(base), wanted, atol=1e-5)
    with pytest.raises(UserError, match="no exported bottleneck adapters"):
        load(scope["model"], tmp_path)
    gpt2 = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=40, n_embd=16, n_layer=1, n_head=2))
    with pytest.raises(UserError, match="the adapters do not fit the model"):
        load(gpt2, tmp_path / "out")


def test_another_architecture_is_refused_by_name_before_anything_starts(tmp_path: Path, bert: Path) -> None:
    folder = tmp_path / "roberta"
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(bert))
    tokenizer.save_pretrained(str(folder))
    config = transformers.RobertaConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=40,
    )  # fmt: skip
    transformers.RobertaModel(config).save_pretrained(str(folder))
    job = structs.replace(spec(COLOURS, tmp_path), evaluation=EvaluationSpec())
    answer = ModelWorker(FrameWriter(io.BytesIO())).answer(
        Prepare(job=job, base_path=str(folder), adapter_path=str(tmp_path / "g0"))
    )
    assert isinstance(answer, WorkerFailed) and answer.operator
    assert answer.reason.endswith("bottleneck adapters fit blocks of bert, gpt2, llama, not of roberta")


def test_the_agent_takes_it_at_fewer_bits_and_refuses_a_foreign_block(
    tmp_path: Path, bert: Path, colours: Path, agent: Agent
) -> None:
    rounds = Rounds(tmp_path, agent, spec(COLOURS, colours), bert, {"a": colours})
    order = rounds.order(rounds.plan(1), 1, "a")
    for bits in (16, 8, 4):
        work = structs.replace(order.assignment.work, bits=bits)
        facts = agent.ask(
            structs.replace(order, assignment=structs.replace(order.assignment, work=work)), Trained
        ).facts
        assert facts.loss_last < facts.loss_first
    work = structs.replace(order.assignment.work, ranks={"nowhere": 2})
    failed = agent.ask(structs.replace(order, assignment=structs.replace(order.assignment, work=work)), Failed)
    assert failed.kind == "adapter" and "nowhere" in failed.reason
