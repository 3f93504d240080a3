"""Small convolutional models: as a base, cut in two, and rounds of an ordinary job on real pictures."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from msgspec import structs

from coordinator.core import strategies
from coordinator.export_whole import export_whole
from edge_daemon.protocol import Probed, Shutdown
from muster.testbed import digits
from shared import adapter as adapters
from shared.errors import UserError
from shared.jobs import BaseSpec, EvaluationSpec, JobSpec, RoundsSpec, StrategySpec, TaskSpec, TrainingSpec
from shared.modeling import activations, base_model, convolutional, evaluation, lora, split, weights
from shared.modeling.base_model import Base
from shared.modeling.data import Batch, TokenData, tokenize
from shared.modeling.faults import DataFault, ModelFault
from shared.modeling.objective import loss_sum
from shared.modeling.remembered import REMEMBERED, remembering
from shared.modeling.split import Part
from tests.training.agent_rounds import Rounds
from tests.training.test_agent import PATIENCE_S, Agent, probe
from tests.training.test_full import carry, whole_adapter
from tests.training.test_split import assert_close, gradients
from tests.training.tiny_models import COLOURS, empty_adapter, write_jsonl

DIGITS = TaskSpec(kind="image", dataset="digits", labels=digits.LABELS)
BLOCKS = 3


@pytest.fixture(scope="module")
def cnn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convolutional.write(tmp_path_factory.mktemp("cnn"), channels=[8, 16, 16], pools=[1])


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two devices that each have most of one half of the digits, and what is held out."""
    found, folder = digits.rows(), tmp_path_factory.mktemp("digits")
    assert len(found) == 1797
    held_out, rest = found[:400], found[400:]
    mine = [[row for row in rest if (row["label"] < 5) == first] for first in (True, False)]
    return {
        "a": write_jsonl(folder / "a.jsonl", mine[0] + mine[1][:50]),
        "b": write_jsonl(folder / "b.jsonl", mine[1] + mine[0][:50]),
        "held out": write_jsonl(folder / "held_out.jsonl", held_out),
    }


@pytest.fixture(scope="module")
def data(pictures: dict[str, Path]) -> TokenData:
    return tokenize(str(pictures["held out"]), DIGITS, convolutional.Pixels(64))


def test_a_folder_is_the_same_for_the_same_seed(tmp_path: Path, cnn: Path) -> None:
    same = convolutional.write(tmp_path / "same", channels=[8, 16, 16], pools=[1])
    other = convolutional.write(tmp_path / "other", channels=[8, 16, 16], pools=[1], seed=1)
    assert weights.base_digest(same) == weights.base_digest(cnn) != weights.base_digest(other)
    assert convolutional.main([str(tmp_path / "cli"), "--channels", "8,16,16", "--pools", "1"]) == 0
    assert weights.base_digest(tmp_path / "cli") == weights.base_digest(cnn)


def test_sizes_that_make_no_model_are_refused(tmp_path: Path) -> None:
    for given, reason in [
        ({"channels": []}, "needs channels"), ({"channels": [4], "pools": [1]}, "blocks 0 to 0"),
        ({"channels": [4] * 4, "pools": [0, 1, 2, 3]}, "halved away"),
    ]:  # fmt: skip
        with pytest.raises(UserError, match=reason):
            convolutional.write(tmp_path / "x", **given)  # type: ignore[arg-type]  # on purpose


def test_it_normalises_as_torch_does() -> None:
    ours, theirs = convolutional._Norm(3), torch.nn.BatchNorm2d(3)
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        x = torch.randn(4, 3, 5, 5, generator=generator) * 2 + 1
        assert torch.allclose(ours(x), theirs(x), atol=1e-6)
    assert torch.allclose(ours.running_mean, theirs.running_mean, atol=1e-6)
    assert torch.allclose(ours.running_var, theirs.running_var, atol=1e-6)
    assert torch.allclose(ours.eval()(x), theirs.eval()(x), atol=1e-6)


def test_it_is_a_base_for_pictures_alone(cnn: Path, bert: Path) -> None:
    base = base_model.load(cnn, DIGITS)
    assert sorted(base.head) == ["classifier.bias", "classifier.weight"]
    assert {one.block for one in base.linears.values()} == {0, 1, 2}
    assert base.linears["cnn.blocks.1.conv"].inp == 72
    assert activations.count(cnn, DIGITS, 32) == activations.count(cnn, DIGITS, 16)
    assert activations.count(cnn, DIGITS, 32).fixed > 4 * (8 + 16) * 64
    with pytest.raises(ModelFault, match="32 bits only"):
        base_model.load(cnn, DIGITS, 16)
    with pytest.raises(ModelFault, match="a bert model; task.kind image takes muster-cnn alone"):
        base_model.load(bert, DIGITS)
    with pytest.raises(ModelFault):
        base_model.load(cnn, COLOURS)


@pytest.mark.parametrize("row", [{"label": 1}, {"image": [1.0] * 63, "label": 1}, {"image": "x", "label": 1},
                                 {"image": [float("inf")] * 64, "label": 1}])  # fmt: skip
def test_a_row_that_is_no_picture_is_named(row: dict[str, object], tmp_path: Path) -> None:
    good = {"image": [[0.5] * 8] * 8, "label": 1}
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(good) + "\n" + json.dumps(row).replace("Infinity", "1e99") + "\n")
    with pytest.raises(DataFault, match="row 2 has no 64 numbers in field 'image'"):
        tokenize(str(path), DIGITS, convolutional.Pixels(64))
    found = tokenize(str(write_jsonl(path, [good])), DIGITS, convolutional.Pixels(64))
    assert found.rows == 1 and found.batch(np.array([0])).ids.tolist() == [[0.5] * 64]


def test_the_strategy_must_train_all_of_it() -> None:
    job = JobSpec(name="digits", base=BaseSpec(model="cnn"), task=DIGITS, strategy=StrategySpec(name="full"))
    assert strategies.job_faults(job) == []
    odd = structs.replace(job, strategy=StrategySpec(name="uniform"), task=structs.replace(DIGITS, labels=[]))
    assert [fault.partition(":")[0] for fault in strategies.job_faults(odd)] == ["strategy.name", "task.labels"]


# ---- cut in two


def parts(cnn: Path, block: int) -> tuple[Base, Base, Base, list[lora.Carried]]:
    """The whole and its two parts, shaken alike."""
    bases = [base_model.load(cnn, DIGITS) for _ in range(3)]
    given = whole_adapter(bases[0], 3, 0.05)
    split.lower(bases[1], block)
    split.upper(bases[2], block)
    carried = [carry(bases[0], given), *(carry(base, split.part_of(given, base)) for base in bases[1:])]
    return bases[0], bases[1], bases[2], carried


def part(bottom: Base, batch: Batch) -> Part:
    return Part(split.features(bottom, batch), batch.targets, batch.mask)


@pytest.mark.parametrize("block", [1, 2, 3])
@pytest.mark.parametrize("training", [False, True])
def test_the_parts_compute_and_remember_what_the_whole_does(
    block: int, training: bool, cnn: Path, data: TokenData
) -> None:
    whole, bottom, top, carried = parts(cnn, block)
    for base in (whole, bottom, top):
        base.model.train(training)
    for rows in (np.arange(9), np.arange(9, 20)):
        batch = data.batch(rows)
        with torch.no_grad():
            wanted, right = loss_sum(whole.model, batch, "image")
            given = part(bottom, batch)
            assert given.hidden.shape == (len(rows), *whole.model.config.shape_after(block))
            found, hits = split.losses(top, *given)
        assert torch.allclose(found.sum(), wanted, atol=1e-5) and hits == right
    joined = carried[1].dense | carried[2].dense
    assert joined.keys() == carried[0].dense.keys()
    moved = 0
    for name, tensor in joined.items():
        assert torch.allclose(tensor, carried[0].dense[name], atol=1e-6), name
        moved += training and ".running_" in name
    assert moved == (2 * BLOCKS if training else 0)
    again = whole_adapter(base_model.load(cnn, DIGITS), 3, 0.05).dense
    assert all(
        np.array_equal(again[name], tensor.detach().numpy()) != (training and ".running_" in name)
        for name, tensor in joined.items()
    )


@pytest.mark.parametrize("block", [1, 3])
@pytest.mark.parametrize("training", [False, True])
def test_gradients_are_those_of_one_graph(block: int, training: bool, cnn: Path, data: TokenData) -> None:
    whole, bottom, top, carried = parts(cnn, block)
    for base in (whole, bottom, top):
        base.model.train(training)
    batches = [data.batch(rows) for rows in (np.arange(6), np.arange(6, 9), np.arange(9, 10))]
    inner = whole.model.cnn
    # One graph: each device's own blocks (and batch statistics), then one merged upper part.
    hidden = []
    for batch in batches:
        x = batch.ids.reshape(-1, 1, 8, 8)
        for one in inner.blocks[:block]:
            x = one(x)
        hidden.append(x)
    merged = torch.cat(hidden)
    for one in inner.blocks[block:]:
        merged = one(merged)
    logits = whole.model.classifier(inner.last(merged))
    each = torch.nn.functional.cross_entropy(logits, torch.cat([b.targets for b in batches]), reduction="none")
    total = len(each)
    given = [part(bottom, batch) for batch in batches]
    answers = split.merged_step(top, given, most=2)
    statistics = {name for name in carried[0].dense if ".running_" in name}
    names = carried[2].dense.keys() - statistics
    wanted = torch.autograd.grad(each.mean(), [carried[0].dense[n] for n in names], retain_graph=True)
    assert_close(gradients({n: carried[2].dense[n] for n in names}), dict(zip(names, wanted, strict=True)))
    names = carried[1].dense.keys() - statistics
    own = each.split([len(b.targets) for b in batches])
    for index, (batch, sent, answer) in enumerate(zip(batches, given, answers, strict=True)):
        assert answer.loss == pytest.approx(float(own[index].detach().mean()), abs=1e-5)
        for tensor in carried[1].parameters():
            tensor.grad = None
        sent.hidden.backward(answer.gradient)
        # Of the loss of all by what this device sent, scaled; without statistics of the batch that is its own mean's.
        slope = torch.autograd.grad(each.mean(), hidden[index], retain_graph=True)[0] * (total / len(batch.targets))
        if not training or block == BLOCKS:
            mean = torch.autograd.grad(own[index].mean(), hidden[index], retain_graph=True)[0]
            assert torch.allclose(answer.gradient, mean, atol=1e-6)
        assert torch.allclose(answer.gradient, slope, atol=1e-6)
        found = torch.autograd.grad(hidden[index], [carried[0].dense[n] for n in names], slope, retain_graph=True)
        assert_close(gradients({n: carried[1].dense[n] for n in names}), dict(zip(names, found, strict=True)))
    assert all(carried[2].dense[name].grad is None for name in statistics & carried[2].dense.keys())


def test_foreign_features_and_their_clip(cnn: Path, data: TokenData) -> None:
    _, bottom, top, _ = parts(cnn, 2)
    hidden, targets, mask = part(bottom, data.batch(np.arange(4)))
    hidden = hidden.detach()
    assert split.fault(top, Part(hidden, targets, mask)) == ""
    for odd, reason in [
        (Part(hidden[:, :3], targets), "features of shape"), (Part(hidden[0], targets), "features of shape"),
        (Part(hidden, targets[:2]), "not of the features' shape"), (Part(hidden, targets + 10), "targets beyond"),
        (Part(hidden / 0, targets), "not finite"),
    ]:  # fmt: skip
        assert reason in split.fault(top, odd)
    norms = split.clipped(hidden, 0.5, 0.0, torch.Generator()).norm(dim=1)
    assert float(hidden.norm(dim=1).max()) > 0.6
    assert float(norms.max()) == pytest.approx(0.5, abs=1e-5)


# ---- rounds of the real agent, and the export


@pytest.fixture(scope="module")
def agent(pictures: dict[str, Path]) -> Iterator[Agent]:
    running = Agent()
    running.ask(probe(pictures["a"], digits=str(pictures["a"])), Probed)
    yield running
    running.say(Shutdown())
    assert running.process.wait(timeout=PATIENCE_S) == 0


def test_rounds_teach_digits_and_the_export_is_a_model_of_transformers(
    tmp_path: Path, cnn: Path, pictures: dict[str, Path], agent: Agent
) -> None:
    job = JobSpec(
        name="digits", base=BaseSpec(model="cnn"), task=DIGITS, seed=3, rounds=RoundsSpec(count=3, local_steps=30),
        strategy=StrategySpec(name="full", batch=16, batch_max=16), training=TrainingSpec(lr=3e-3),
        evaluation=EvaluationSpec(data=str(pictures["held out"])),
    )  # fmt: skip
    rounds = Rounds(tmp_path, agent, job, cnn, {"a": pictures["a"], "b": pictures["b"]})
    assert rounds.facts.blocks == BLOCKS and rounds.facts.activations["32"].fixed > 0
    before = rounds.metrics()
    assert before.accuracy is not None and before.accuracy < 0.3
    start = adapters.read_file(rounds.current).dense
    for round in (1, 2, 3):
        rounds.run(round)
    told = rounds.metrics()
    assert told.accuracy is not None and told.accuracy > 0.85
    made = adapters.read_file(rounds.current)
    assert all(not np.array_equal(made.dense[name], value) for name, value in start.items()), "statistics, too"
    export_whole(made, tmp_path / "out", spec=job, facts=rounds.facts, base=str(cnn), metrics=told)
    model, info = transformers.AutoModelForImageClassification.from_pretrained(
        str(tmp_path / "out"), output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    ours = base_model.load(cnn, DIGITS)
    ours.model = model.eval()
    found = evaluation.evaluate(ours, tokenize(str(pictures["held out"]), DIGITS, ours.tokenizer))
    assert found.loss == pytest.approx(told.loss, abs=1e-5) and found.accuracy == told.accuracy
    assert "shared.modeling.convolutional" in (tmp_path / "out" / "README.md").read_text()


def test_the_base_is_as_stored_after_it_was_trained(cnn: Path) -> None:
    base = base_model.load(cnn, DIGITS)
    stored = {name: base.model.get_parameter(name).detach().clone() for name in base.shapes}
    carried = carry(base, whole_adapter(base, 1, 0.3))
    base.model.train()
    base.model(pixel_values=torch.rand(8, 64))
    assert any(not torch.equal(carried.dense[name], stored[name]) for name in stored)
    lora.detach(base)
    base.restore()
    assert all(torch.equal(base.model.get_parameter(n), stored[n]) for n in stored if n not in base.head)
    lora.merge(base, replace(empty_adapter(base)))


def test_a_step_that_is_given_up_is_not_remembered(cnn: Path, data: TokenData) -> None:
    """Batch normalisation remembers in the forward pass; a resumed run must do what the undisturbed one does."""
    base = base_model.load(cnn, DIGITS)
    named = carry(base, whole_adapter(base)).dense
    own = [name for name in named if name.endswith(REMEMBERED)]
    assert len(own) == 2 * BLOCKS
    before = {name: named[name].detach().clone() for name in own}
    base.model.train()
    with pytest.raises(KeyboardInterrupt), remembering(named):
        loss_sum(base.model, data.batch(list(range(8))), "image")
        assert not any(torch.equal(named[name], before[name]) for name in own)
        raise KeyboardInterrupt
    assert all(torch.equal(named[name], before[name]) for name in own)
    with remembering(named):
        loss_sum(base.model, data.batch(list(range(8))), "image")
    assert not any(torch.equal(named[name], before[name]) for name in own)


def test_one_picture_of_which_one_value_is_left_trains(tmp_path: Path, data: TokenData) -> None:
    """Its channels have no variance: what was remembered takes the place of it, and stays."""
    base = base_model.load(convolutional.write(tmp_path / "deep", channels=[4, 4, 4, 4], pools=[0, 1, 2]), DIGITS)
    named = carry(base, whole_adapter(base)).dense
    last = [name for name in named if ".3." in name and name.endswith(REMEMBERED)]
    before = {name: named[name].detach().clone() for name in last}
    base.model.train()
    loss = loss_sum(base.model, data.batch([0]), "image")[0]
    loss.backward()
    assert torch.isfinite(loss) and all(torch.equal(named[name], before[name]) for name in last) and last
    loss_sum(base.model, data.batch([0, 1]), "image")[0].backward()
    assert not any(torch.equal(named[name], before[name]) for name in last)
