"""The global adapter on a base: the start model is exact, the update holds what was trained."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from shared.adapter import Adapter
from shared.jobs import Bits
from shared.modeling import base_model, lora
from shared.modeling.base_model import Base
from shared.modeling.faults import AdapterFault
from shared.modeling.lora import OWN, REST
from tests.training.tiny_models import COLOURS, STORIES, empty_adapter, global_adapter

IDS = torch.arange(4, 16).reshape(2, 6)


def logits(base: Base) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = base.model(input_ids=IDS).logits.float()
        return found


def uneven(base: Base) -> dict[str, int]:
    """Ranks below, at and above a global rank of 4; none for every fourth module, and some absent."""
    ranks = [0, 1, 4, 6, None]
    pairs = {name: ranks[index % 5] for index, name in enumerate(base.linears)}
    return {name: rank for name, rank in pairs.items() if rank is not None}


def delta(adapter: Adapter, name: str) -> np.ndarray:  # type: ignore[type-arg]  # the tests need no precision here
    b, a = lora.product(adapter.factors[name])
    return b @ a


@pytest.mark.parametrize("triplets", [True, False])
@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
def test_the_start_model_is_the_exact_global_one(name: str, triplets: bool, request: pytest.FixtureRequest) -> None:
    base = base_model.load(request.getfixturevalue(name), COLOURS if name == "bert" else STORIES)
    given = global_adapter(base, 4, triplets=triplets)
    plain = logits(base)
    lora.merge(base, given)
    merged = logits(base)
    lora.carry(base, given, uneven(base), alpha_ratio=2.0, seed=0, round=2)
    assert torch.allclose(logits(base), merged, atol=1e-5)
    assert not torch.allclose(merged, plain, atol=1e-2)


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_with_fewer_bits_the_rest_rides_beside_the_base(bert: Path, bits: Bits) -> None:
    full = base_model.load(bert, COLOURS)
    given = global_adapter(full, 4, size=2.0)
    head = dict(given.dense)
    base = base_model.load(bert, COLOURS, bits)
    base.set_dense(head)
    without = logits(base)
    lora.carry(base, given, uneven(base), alpha_ratio=2.0, seed=0, round=2)
    split = logits(base)
    lora.carry(base, given, dict.fromkeys(base.linears, 4), alpha_ratio=2.0, seed=0, round=2)
    all_trained = logits(base)
    assert float((split - all_trained).norm() / all_trained.norm()) < 0.06
    assert float((split - without).norm() / without.norm()) > 0.3
    layer = base.model.get_submodule("bert.encoder.layer.0.attention.self.query")
    assert REST not in layer.lora_A


def test_what_is_trained_and_what_stays(bert: Path) -> None:
    base = base_model.load(bert, COLOURS, 16)
    carried = lora.carry(base, global_adapter(base, 4), uneven(base), alpha_ratio=2.0, seed=0, round=2)
    for name in base.linears:
        rank = uneven(base).get(name, 0)
        layer = base.model.get_submodule(name)
        assert (OWN in layer.lora_A) == (rank > 0)
        assert (REST in layer.lora_A) == (rank < 4)
        if rank:
            assert (layer.r[OWN], layer.scaling[OWN], carried.trained[name]) == (rank, 2.0, min(rank, 4))
        if rank < 4:
            # Few different ranks: zeros beside the 4 - rank directions that stay.
            assert (layer.r[REST], layer.scaling[REST]) == (16, 1.0)
            assert not layer.lora_A[REST].weight[4 - rank :].any()
            assert layer.lora_A[REST].weight[: 4 - rank].any(dim=1).all()
    trainable = {id(parameter) for parameter in base.model.parameters() if parameter.requires_grad}
    assert trainable == {id(parameter) for parameter in carried.parameters()}
    assert all(parameter.dtype == torch.float32 for parameter in carried.parameters())


@pytest.mark.parametrize("triplets", [True, False])
def test_an_untrained_update_holds_the_first_directions(bert: Path, triplets: bool) -> None:
    base = base_model.load(bert, COLOURS)
    given = global_adapter(base, 4, triplets=triplets)
    carried = lora.carry(base, given, uneven(base), alpha_ratio=2.0, seed=0, round=2)
    update = lora.read_update(carried, job="j", round=2, attempt=1, base_digest="d")
    assert update.kind == "update"
    assert sorted(update.factors) == sorted(name for name, rank in uneven(base).items() if rank)
    for name, part in update.factors.items():
        rest = lora.product(given.factors[name], part.trained)
        assert part.sigma is None
        assert (part.rank, part.scaling) == (uneven(base)[name], 2.0)
        assert np.allclose(delta(update, name) + rest[0] @ rest[1], delta(given, name), atol=1e-5)
    assert np.array_equal(update.dense["classifier.weight"], given.dense["classifier.weight"])


def test_factors_start_in_the_sizes_of_lora(bert: Path) -> None:
    base = base_model.load(bert, COLOURS)
    carried = lora.carry(
        base, global_adapter(base, 4), dict.fromkeys(base.linears, 6), alpha_ratio=2.0, seed=0, round=2
    )
    for b, a in carried.factors.values():
        assert torch.allclose(a[:4].norm(dim=1), torch.full((4,), 3**-0.5), atol=1e-5)
        assert torch.all((a[4:].norm(dim=1) > 0.3) & (a[4:].norm(dim=1) < 0.9))
        assert not b[:, 4:].any()


def test_fresh_directions_follow_seed_round_and_module(bert: Path) -> None:
    base = base_model.load(bert, COLOURS)
    ranks = dict.fromkeys(base.linears, 2)

    def first(seed: int, round: int, module: int = 0) -> torch.Tensor:
        carried = lora.carry(base, empty_adapter(base), ranks, alpha_ratio=2.0, seed=seed, round=round)
        return list(carried.factors.values())[module][1].detach().clone()

    assert torch.equal(first(1, 1), first(1, 1))
    for other in (first(2, 1), first(1, 2), first(1, 1, 1)):
        assert not torch.equal(first(1, 1), other)


def test_adapters_are_swapped_without_loading_the_base_again(bert: Path) -> None:
    base = base_model.load(bert, COLOURS)
    layers = {name: base.model.get_submodule(name) for name in base.linears}
    for round in range(1, 4):
        lora.carry(base, global_adapter(base, 4, seed=round), uneven(base), alpha_ratio=2.0, seed=0, round=round)
    lora.detach(base)
    assert all(base.model.get_submodule(name) is layer for name, layer in layers.items())
    assert not any("lora" in name for name, _ in base.model.named_parameters())
    fresh = base_model.load(bert, COLOURS)
    lora.merge(fresh, empty_adapter(base))
    lora.merge(base, empty_adapter(base))
    assert torch.equal(logits(base), logits(fresh))


def test_ranks_for_unknown_modules_are_refused(bert: Path) -> None:
    base = base_model.load(bert, COLOURS)
    with pytest.raises(AdapterFault, match="ranks name nowhere"):
        lora.carry(base, empty_adapter(base), {"nowhere": 2}, alpha_ratio=2.0, seed=0, round=1)
