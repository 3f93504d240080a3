"""A base cut in two: the parts compute what the whole does, and their gradients are those of one graph."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from shared import tensors
from shared.adapter import Adapter
from shared.jobs import Bits, Codec, TaskSpec
from shared.modeling import base_model, lora, split
from shared.modeling.base_model import Base
from shared.modeling.data import IGNORED, Batch, TokenData, tokenize
from shared.modeling.faults import AdapterFault, ModelFault
from shared.modeling.objective import loss_sum
from shared.modeling.split import Part
from shared.starts import START_NOTE
from tests.training.test_full import whole_adapter
from tests.training.tiny_models import COLOURS, STORIES, global_adapter

CASES = [("bert", COLOURS), ("gpt2", COLOURS), ("gpt2", STORIES), ("llama", COLOURS), ("llama", STORIES)]
Each = pytest.mark.parametrize(("name", "task"), CASES)


class Halves:
    """The whole model and its two parts, with the same adapter on all of them."""

    def __init__(
        self, folder: Path, task: TaskSpec, data: Path, bits: Bits = 32, *, dense: bool = False, rank: int = 2
    ) -> None:
        self.whole, self.bottom, self.top = (base_model.load(folder, task, bits) for _ in range(3))
        self.given = whole_adapter(self.whole, 3, 0.05) if dense else global_adapter(self.whole, 3)
        if dense and task.kind == "causal" and "lm_head.weight" not in self.whole.shapes:
            # The tied table, which a job under split learning leaves as it is.
            self.given.dense["transformer.wte.weight"] = self.whole.model.lm_head.weight.detach().numpy().copy()
        self.ranks = {} if dense else dict.fromkeys(self.whole.linears, rank)
        self.of_whole = self._carry(self.whole, self.given)
        split.lower(self.bottom, 1)
        split.upper(self.top, 1)
        self.of_bottom = self._carry(self.bottom, split.part_of(self.given, self.bottom))
        self.of_top = self._carry(self.top, split.part_of(self.given, self.top))
        self.data: TokenData = tokenize(str(data), task, self.whole.tokenizer)

    def _carry(self, base: Base, given: Adapter) -> lora.Carried:
        ranks = {name: rank for name, rank in self.ranks.items() if name in base.linears}
        return lora.carry(base, given, ranks, alpha_ratio=2.0, seed=0, round=1)

    def batch(self, *rows: int) -> Batch:
        return self.data.batch(np.array(rows))

    def part(self, batch: Batch) -> Part:
        return Part(split.features(self.bottom, batch), batch.targets, batch.mask)


@pytest.fixture(scope="module")
def halves(request: pytest.FixtureRequest) -> Any:
    """Made once for all tests that want the same; nothing but gradients is changed in them."""
    made: dict[Any, Halves] = {}

    def make(name: str, task: TaskSpec, bits: Bits = 32, **kwargs: Any) -> Halves:
        key = (name, task.kind, bits, *kwargs.items())
        if key not in made:
            data = request.getfixturevalue("colours" if task is COLOURS else "stories")
            made[key] = Halves(request.getfixturevalue(name), task, data, bits, **kwargs)
        for tensor in made[key].of_bottom.parameters() + made[key].of_top.parameters():
            tensor.grad = None
        return made[key]

    return make


def sample_losses(base: Base, data: TokenData, rows: tuple[int, ...]) -> torch.Tensor:
    """Each sample alone and unpadded but for eight tokens: the mean loss of the whole model."""
    found = []
    for row in rows:
        batch = data.batch(np.array([row]))
        loss, _ = loss_sum(base.model, batch, data.kind)
        found.append(loss / batch.weight)
    return torch.stack(found)


@Each
@pytest.mark.parametrize("bits", [32, 16, 8, pytest.param(4, marks=pytest.mark.slow)])
def test_the_parts_compute_what_the_whole_does(name: str, task: TaskSpec, bits: Bits, halves: Any) -> None:
    both = halves(name, task, bits)
    rows = tuple(range(9))
    with torch.no_grad():
        wanted = sample_losses(both.whole, both.data, rows)
        batch = both.batch(*rows)
        total, right = loss_sum(both.whole.model, batch, both.data.kind)
        found, hits = split.losses(both.top, *both.part(batch))
    assert found.shape == (9,) and found.dtype is torch.float32
    assert hits == right
    close = 1e-5 if bits == 32 else 4e-2
    assert torch.allclose(found, wanted, rtol=0, atol=close)
    if task.kind == "classification":
        assert float(found.sum()) == pytest.approx(float(total), abs=1e-6 if bits == 32 else 2e-2)


@Each
def test_what_is_left_has_its_own_name_and_value_and_the_rest_is_gone(
    name: str, task: TaskSpec, request: pytest.FixtureRequest
) -> None:
    whole, bottom, top = (base_model.load(request.getfixturevalue(name), task) for _ in range(3))
    split.lower(bottom, 1)
    split.upper(top, 1)
    assert (bottom.half, top.half) == (("lower", 1), ("upper", 1))
    of_whole = dict(whole.model.named_parameters(remove_duplicate=False))
    parts = [dict(part.model.named_parameters(remove_duplicate=False)) for part in (bottom, top)]
    for part in parts:
        for key, value in part.items():
            assert torch.equal(value, of_whole[key]), key
    # The table that is the output matrix, too, is on both sides.
    shared = {"transformer.wte.weight"} if (name, task.kind) == ("gpt2", "causal") else set()
    assert parts[0].keys() | parts[1].keys() == of_whole.keys()
    assert not parts[0].keys() & parts[1].keys()
    count = [sum(p.numel() for p in part.model.parameters()) for part in (whole, bottom, top)]
    assert count[1] + count[2] == count[0] + sum(of_whole[key].numel() for key in shared)
    assert bottom.linears | top.linears == whole.linears and not bottom.linears.keys() & top.linears.keys()
    assert {linear.block for linear in bottom.linears.values()} == {0}
    assert bottom.head == {} and top.head.keys() == whole.head.keys()
    assert bottom.shapes.keys() | top.shapes.keys() == whole.shapes.keys() - shared
    assert not bottom.shapes.keys() & top.shapes.keys()
    with pytest.raises(ModelFault, match="load it again to cut it"):
        split.upper(bottom, 1)


def own_mean(both: Halves, rows: tuple[int, ...]) -> torch.Tensor:
    return sample_losses(both.whole, both.data, rows).mean()


def gradients(tensors: dict[str, Any]) -> dict[str, torch.Tensor]:
    return {key: torch.zeros_like(one) if one.grad is None else one.grad.clone() for key, one in tensors.items()}


def graph_gradients(both: Halves, loss: torch.Tensor, names: Any) -> dict[str, torch.Tensor]:
    tensors = {key: one for key, one in both.of_whole.named().items() if key in names}
    found = torch.autograd.grad(loss, list(tensors.values()), allow_unused=True)
    return {
        key: torch.zeros_like(one) if grad is None else grad
        for (key, one), grad in zip(tensors.items(), found, strict=True)
    }


def assert_close(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], atol: float = 1e-6) -> None:
    assert found.keys() == wanted.keys() and found
    assert any(float(one.abs().max()) > 1e-4 for one in wanted.values())
    for key, one in wanted.items():
        size = max(1.0, float(one.abs().max()))
        assert torch.allclose(found[key], one, rtol=0, atol=atol * size), key


DEVICES = [(0, 1, 2, 3, 4), (5, 6), (7,)]


@Each
@pytest.mark.parametrize("most", [0, 3])
@pytest.mark.parametrize("dense", [False, True])
def test_every_device_gets_the_gradient_of_its_own_mean_and_the_top_that_of_all(
    name: str, task: TaskSpec, dense: bool, most: int, halves: Any
) -> None:
    both = halves(name, task, dense=dense)
    batches = [both.batch(*rows) for rows in DEVICES]
    parts = [both.part(batch) for batch in batches]
    answers = split.merged_step(both.top, parts, most)
    everyone = sample_losses(both.whole, both.data, tuple(row for rows in DEVICES for row in rows)).mean()
    wanted = graph_gradients(both, everyone, both.of_top.named())
    assert_close(gradients(both.of_top.named()), wanted)
    for rows, part, answer in zip(DEVICES, parts, answers, strict=True):
        assert answer.loss == pytest.approx(float(own_mean(both, rows).detach()), abs=1e-5)
        assert answer.gradient.shape == part.hidden.shape
        for tensor in both.of_bottom.parameters():
            tensor.grad = None
        part.hidden.backward(answer.gradient)
        assert_close(
            gradients(both.of_bottom.named()), graph_gradients(both, own_mean(both, rows), both.of_bottom.named())
        )
    with torch.no_grad():
        hits = [split.losses(both.top, *part)[1] for part in parts]
    assert [answer.right for answer in answers] == hits


@Each
def test_without_merging_the_top_follows_one_device(name: str, task: TaskSpec, halves: Any) -> None:
    both = halves(name, task)
    answer = split.separate_step(both.top, both.part(both.batch(*DEVICES[0])))
    assert_close(gradients(both.of_top.named()), graph_gradients(both, own_mean(both, DEVICES[0]), both.of_top.named()))
    assert answer.loss == pytest.approx(float(own_mean(both, DEVICES[0]).detach()), abs=1e-5)


@Each
def test_padding_changes_nothing(name: str, task: TaskSpec, halves: Any) -> None:
    both = halves(name, task)
    batch = both.batch(0, 1)
    wide = Batch(
        ids=torch.nn.functional.pad(batch.ids, (0, 8), value=both.data.pad_id),
        mask=torch.nn.functional.pad(batch.mask, (0, 8)),
        targets=torch.nn.functional.pad(batch.targets, (0, 8), value=IGNORED) if task is STORIES else batch.targets,
        weight=batch.weight,
    )
    narrow, other = (split.merged_step(both.top, [both.part(one)])[0] for one in (batch, wide))
    assert other.loss == pytest.approx(narrow.loss, abs=1e-6)
    width = batch.ids.shape[1]
    assert torch.allclose(other.gradient[:, :width], narrow.gradient, atol=1e-6)
    assert torch.equal(other.gradient[:, width:], torch.zeros_like(other.gradient[:, width:]))


def test_a_sample_without_learned_tokens_weighs_nothing(halves: Any) -> None:
    both = halves("gpt2", STORIES)
    part = both.part(both.batch(0, 1))
    part.targets[1] = IGNORED
    with torch.no_grad():
        found, _ = split.losses(both.top, *part)
    assert float(found[1]) == 0.0 and float(found[0]) > 0.0
    answer = split.separate_step(both.top, part)
    assert torch.isfinite(answer.gradient).all() and not answer.gradient[1].any()


def test_the_tied_table_stays_as_stored_under_full_tuning(gpt2: Path, stories: Path) -> None:
    both = Halves(gpt2, STORIES, stories, dense=True)
    tables = [both.bottom.model.transformer.wte.weight, both.top.model.lm_head.weight]
    stored = base_model.load(both.whole.folder, STORIES).model.lm_head.weight
    assert all(torch.equal(table, stored) and not table.requires_grad for table in tables)
    both.top.restore()
    both.bottom.restore()


def test_training_mode_drops_as_often_as_the_whole(halves: Any, gpt2: Path) -> None:
    top = base_model.load(gpt2, COLOURS)
    split.upper(top, 2)  # nothing but the last norm and the head
    hidden = torch.ones(2, 8, 32)
    top.model.train()
    found = {float(split.losses(top, hidden, torch.zeros(2, dtype=torch.long), torch.ones(2, 8).long())[0][0])
             for _ in range(4)}  # fmt: skip
    assert len(found) == 1


def test_other_models_and_cuts_are_refused(bert: Path, gpt2: Path) -> None:
    base = base_model.load(bert, COLOURS)
    for block in (0, 3):
        with pytest.raises(ModelFault, match=f"split.block {block}: the model can be cut after block 1 to 2"):
            split.lower(base, block)
    base.model.config.model_type = "falcon"
    with pytest.raises(ModelFault, match="for falcon models; it is, for classification, for bert, gpt2, llama, mis"):
        split.lower(base, 1)
    assert split.blocks(base_model.load(gpt2, STORIES)) == 2
    adapter = replace(global_adapter(base, 1), notes={START_NOTE: "bottleneck"})
    with pytest.raises(AdapterFault, match="not written for bottleneck adapters"):
        split.part_of(adapter, base)


@pytest.mark.parametrize(("codec", "error"), [("bf16", 2.0**-7), ("int8", 1.0 / 127)])
def test_the_wire_costs_features_little(codec: Codec, error: float, halves: Any) -> None:
    both = halves("bert", COLOURS)
    hidden = split.features(both.bottom, both.batch(0, 1, 2)).detach()
    back = torch.from_numpy(np.array(tensors.decode(tensors.encode(hidden.numpy(), codec))))
    largest = hidden.abs() if codec == "bf16" else hidden.abs().amax(dim=-1, keepdim=True)
    assert ((back - hidden).abs() <= largest * error * 0.5 + 1e-7).all()


def test_clip_bounds_every_token_and_its_gradient_is_exact() -> None:
    hidden = torch.randn(3, 5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    hidden[0, 0] = 0.0
    found = split.clipped(hidden, 2.0, 0.0, torch.Generator())
    norms = hidden.norm(dim=-1)
    assert float(norms.min()) < 2.0 < float(norms.max())
    assert (found.norm(dim=-1) <= 2.0 + 1e-5).all()
    assert torch.equal(found[norms <= 2.0], hidden[norms <= 2.0])
    assert torch.allclose(found / found.norm(dim=-1, keepdim=True).clamp_min(1e-9),
                          hidden / norms[..., None].clamp_min(1e-9))  # fmt: skip
    hidden.requires_grad_()
    split.clipped(hidden, 2.0, 0.5, torch.Generator().manual_seed(2)).pow(2).sum().backward()
    assert hidden.grad is not None and torch.isfinite(hidden.grad).all()
    noise = split.clipped(hidden, 2.0, 0.5, torch.Generator().manual_seed(2)) - found
    plain = torch.where(norms[..., None] > 2.0, hidden / norms[..., None] * 2.0, hidden).detach() + noise.detach()
    inside = norms <= 2.0
    assert torch.allclose(hidden.grad[inside], 2 * plain[inside])
    # Beyond the clip: of 2 x / |x|, so without what lies along x.
    along = (hidden.grad * hidden.detach()).sum(dim=-1)[~inside]
    assert along.abs().max() < 1e-5


def test_noise_has_the_size_asked_for_and_comes_from_the_generator() -> None:
    hidden = torch.zeros(100, 10, 100)
    for clip, size in ((0.0, 0.3), (4.0, 1.2)):
        found = [split.clipped(hidden, clip, 0.3, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
        assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])
        assert float(found[0].std()) == pytest.approx(size, rel=0.02)
        assert abs(float(found[0].mean())) < size / 100
    assert split.clipped(hidden, 0.0, 0.0, torch.Generator()) is hidden


def test_a_transformer_has_no_buffers_to_average(bert: Path) -> None:
    base = base_model.load(bert, COLOURS)
    assert split.buffers(base) == {}
    split.set_buffers(base, {})
    with pytest.raises(ModelFault, match="buffer one does not fit the model"):
        split.set_buffers(base, {"one": np.zeros(3, np.float32)})


@pytest.mark.parametrize(("name", "task"), CASES[1:3])
def test_foreign_features_are_checked(name: str, task: TaskSpec, halves: Any) -> None:
    both = halves(name, task)
    hidden, targets, mask = both.part(both.batch(0, 1))
    hidden = hidden.detach()
    assert split.fault(both.top, Part(hidden, targets, mask)) == ""
    last = torch.full_like(targets, 10_000)
    holes = torch.cat([mask[:, :1] * 0, mask[:, 1:]], dim=1)
    for odd, reason in [
        (Part(hidden[:, :, :5], targets, mask), "features of shape"),
        (Part(hidden[:0], targets[:0], mask[:0]), "features of shape"),
        (Part(hidden.repeat(1, 9, 1), targets, mask), "features of shape"),
        (Part(hidden, targets[:1], mask), "not of the features' shape"),
        (Part(hidden, targets, None), "not of the features' shape"),
        (Part(hidden, targets, holes), "not ones, then zeros"),
        (Part(hidden, last, mask), "targets beyond"),
        (Part(hidden, -1 - targets.abs(), mask), "targets beyond"),
        (Part(hidden * float("nan"), targets, mask), "not finite"),
    ]:
        assert reason in split.fault(both.top, odd)
