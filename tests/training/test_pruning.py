"""Structured pruning: the smaller model says what the masked one says, for each architecture."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from shared import units
from shared.modeling import base_model, packing, pruning
from shared.modeling.base_model import Base
from shared.modeling.faults import ModelFault
from shared.units import Group
from tests.training.tiny_models import COLOURS, STORIES

ARCHITECTURES = ["bert", "gpt2", "llama"]


def loaded(name: str, request: pytest.FixtureRequest, bits: int = 32) -> Base:
    task = COLOURS if name == "bert" else STORIES
    base = base_model.load(request.getfixturevalue(name), task, bits=bits)  # type: ignore[arg-type]  # one of `Bits`
    base.set_dense(base_model.fresh_head(base, 1))
    return base


def logits(base: Base) -> torch.Tensor:
    tokens = torch.tensor([[5, 6, 7, 8, 9, 10], [9, 4, 4, 6, 5, 8]])
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
    with torch.no_grad():
        found: torch.Tensor = base.model(input_ids=tokens, attention_mask=mask).logits
    return found


def some(known: list[Group], seed: int) -> dict[str, list[int]]:
    """Of every group a draw of its units, another number in each block."""
    rng = random.Random(seed)
    return {g.name: sorted(rng.sample(range(g.count), rng.randint(1, g.count))) for g in known}


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_the_pruned_model_says_what_the_masked_one_says(name: str, seed: int, request: pytest.FixtureRequest) -> None:
    whole, masked, pruned = (loaded(name, request) for _ in range(3))
    known = pruning.groups(whole.model)
    kept = some(known, seed)
    pruning.masked(masked.model, known, kept)
    pruning.prune(pruned, kept)
    assert logits(pruned) == pytest.approx(logits(masked), abs=1e-5)
    assert not torch.allclose(logits(pruned), logits(whole), atol=1e-3)
    before, after = (sum(p.numel() for p in base.model.parameters()) for base in (whole, pruned))
    assert after < before, "matrices are physically smaller"
    for linear in pruned.linears.values():
        assert tuple(pruned.model.get_submodule(linear.name).weight.shape) == (linear.out, linear.inp)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_groups_by_hand(name: str, request: pytest.FixtureRequest) -> None:
    found = {group.name: group for group in pruning.groups(loaded(name, request).model)}
    assert sorted(found) == ["0.channels", "0.heads", "1.channels", "1.heads"]
    heads, channels = found["0.heads"], found["0.channels"]
    slices = {one.module.rpartition(".")[2]: (one.side, one.width, one.starts) for one in heads.slices}
    if name == "bert":
        assert (heads.count, channels.count) == (2, 64)
        assert slices == dict.fromkeys(("query", "key", "value"), ("out", 16, (0,))) | {"dense": ("in", 16, (0,))}
    elif name == "gpt2":
        assert (heads.count, channels.count) == (2, 128)
        assert slices == {"c_attn": ("out", 16, (0, 32, 64)), "c_proj": ("in", 16, (0,))}
    else:
        shared = slices["q_proj"][1] // slices["k_proj"][1]
        assert shared > 1, "query heads share a key and value head"
        assert [one.module.rpartition(".")[2] for one in channels.slices] == ["gate_proj", "up_proj", "down_proj"]
        assert slices["o_proj"] == ("in", slices["q_proj"][1], (0,))


def test_places_by_hand() -> None:
    one = units.Slice(module="c_attn", side="out", width=2, starts=(0, 6, 12))
    assert one.places([0, 2]).tolist() == [0, 1, 4, 5, 6, 7, 10, 11, 12, 13, 16, 17]


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_at_fewer_bits_the_stored_values_are_cut_and_quantized_again(bits: int, request: pytest.FixtureRequest) -> None:
    exact, base = loaded("llama", request), loaded("llama", request, bits)

    def error() -> float:
        return float((logits(base).float() - logits(exact)).square().mean() / logits(exact).square().mean())

    whole = error()
    assert whole < {16: 1e-3, 8: 2e-3, 4: 0.6}[bits]
    kept = {"0.heads": [0], "1.channels": list(range(0, exact.linears["model.layers.1.mlp.up_proj"].out, 2))}
    pruning.prune(exact, kept)
    pruning.prune(base, kept)
    # What 4-bit kernels make of so small a model differs by processor: the whole one's own error is the measure.
    assert error() < 1.5 * whole


def test_pruning_in_steps_gives_the_same_as_at_once(request: pytest.FixtureRequest) -> None:
    steps, once = loaded("bert", request), loaded("bert", request)
    last = {"0.heads": [1], "1.channels": list(range(8))}
    pruning.prune(steps, {"1.channels": list(range(32))})
    pruning.prune(steps, last)
    pruning.prune(once, last)
    assert torch.equal(logits(steps), logits(once))


def test_the_share_that_is_gone(request: pytest.FixtureRequest) -> None:
    base = loaded("bert", request)
    known = pruning.groups(base.model)
    sizes = {name: (linear.out, linear.inp) for name, linear in base.linears.items()}
    assert units.share(known, {}, sizes) == 0.0
    half = {g.name: list(range(g.count // 2)) for g in known}
    assert units.share(known, half, sizes) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("kept", "reason"),
    [
        ({"0.heads": []}, "at least one unit"),
        ({"7.heads": [0]}, "no group 7.heads"),
        ({"0.heads": [1, 0]}, "rise"),
        ({"0.heads": [2]}, "rise"),
    ],
)
def test_what_can_not_be_kept_is_refused(
    kept: dict[str, list[int]], reason: str, request: pytest.FixtureRequest
) -> None:
    with pytest.raises(ModelFault, match=reason):
        pruning.prune(loaded("bert", request), kept)


def test_other_architectures_are_refused_by_name(tmp_path: Path) -> None:
    from transformers import OPTConfig, OPTModel

    config = OPTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, ffn_dim=16, vocab_size=20)
    with pytest.raises(ModelFault, match="not written for opt models; it is for bert, gpt2, llama"):
        pruning.groups(OPTModel(config))


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_a_served_base_is_pruned_from_what_it_says(bits: int, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """A device that fetched a quantized base has no other values; quantizing again adds little to that."""
    exact = loaded("llama", request)
    folder: Path = request.getfixturevalue("llama")
    packing.pack(folder, STORIES, bits, tmp_path)  # type: ignore[arg-type]  # one of `Bits`
    (packed,) = [path for path in tmp_path.iterdir() if path.is_dir()]
    base = base_model.load(packed, STORIES, bits=bits)  # type: ignore[arg-type]  # one of `Bits`
    kept = {"0.heads": [0], "1.channels": list(range(0, exact.linears["model.layers.1.mlp.up_proj"].out, 2))}
    pruning.prune(exact, kept)
    pruning.prune(base, kept)
    error = (logits(base).float() - logits(exact)).square().mean() / logits(exact).square().mean()
    assert float(error) < {16: 1e-3, 8: 4e-3, 4: 0.3}[bits]
    pruning.prune(base, {})
    assert base.cuts == {} and base.linears == base_model.load(packed, STORIES, bits=bits).linears  # type: ignore[arg-type]  # one of `Bits`


@pytest.mark.parametrize("bits", [32, 8, 4])
def test_memory_that_runs_out_within_a_cut_leaves_a_base_that_can_be_cut_again(
    bits: int, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, calm = (loaded("bert", request, bits) for _ in range(2))
    kept = {group.name: list(range(group.count // 2)) for group in pruning.groups_of(base)}
    value, calls = type(base).value, 0

    def tight(self: Any, *given: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise MemoryError
        found: torch.Tensor = value(self, *given)
        return found

    monkeypatch.setattr(type(base), "value", tight)
    with pytest.raises(MemoryError):
        pruning.prune(base, kept)
    for name, linear in base.linears.items():
        weight = pruning.frozen(base, name)
        assert tuple(weight.shape) == (linear.out, linear.inp), "what is told of a layer is what it is"
    pruning.prune(base, kept)
    pruning.prune(calm, kept)
    for name in base.cuts:
        assert torch.equal(pruning.frozen(base, name), pruning.frozen(calm, name))
    pruning.prune(base, {})
    assert not base.cuts
