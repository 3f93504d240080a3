"""What each start of the aggregators is on a real model: the device's first model, what is trained, what it returns."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers

from coordinator import export
from coordinator.core.aggregation import registry
from coordinator.core.aggregation.base import Aggregator, Expectation
from coordinator.core.facts import ModuleSpec
from coordinator.fold import Reported, fold_round
from edge_daemon.training.loop import Loop
from shared import adapter as adapters
from shared.adapter import Adapter, Factors
from shared.jobs import BaseSpec, Bits, JobSpec, StrategySpec, TrainingSpec
from shared.modeling import base_model, lora
from shared.modeling.base_model import Base
from shared.modeling.data import tokenize
from shared.modeling.lora import Carried
from shared.starts import START_NOTE, Start, fixed_rows
from tests.training.test_lora import IDS, logits, uneven
from tests.training.tiny_models import COLOURS, Pipes, assignment, empty_adapter, global_adapter

SEED = 7


def noted(adapter: Adapter, start: Start) -> Adapter:
    return replace(adapter, notes={START_NOTE: start})


def carry(base: Base, adapter: Adapter, ranks: dict[str, int], round: int = 2) -> Carried:
    return lora.carry(base, adapter, ranks, alpha_ratio=2.0, seed=SEED, round=round)


def first(part: Factors, count: int) -> Factors:
    sigma = None if part.sigma is None else part.sigma[:count]
    return replace(part, b=part.b[:, :count], a=part.a[:count], sigma=sigma)


def update_of(carried: Carried, round: int = 2, device: str = "edge-1") -> Adapter:
    return lora.read_update(carried, job="test", round=round, attempt=1, base_digest="d", device=device)


def fixed_adapter(base: Base, rank: int) -> Adapter:
    """What `ffa` makes: a trained B over the job's own A."""
    given = global_adapter(base, rank, triplets=False)
    factors = {
        name: replace(part, a=fixed_rows(SEED, name, rank, part.a.shape[1]), scaling=2.0)
        for name, part in given.factors.items()
    }
    return noted(replace(given, factors=factors), "frozen_a")


# ---- the model a device begins with


@pytest.mark.parametrize("bits", [32, 16])
@pytest.mark.parametrize(("start", "triplets"), [("cut_factors", False), ("cut_directions", True)])
def test_a_cut_start_is_the_first_directions_and_nothing_else(
    bert: Path, start: Start, triplets: bool, bits: Bits
) -> None:
    full = base_model.load(bert, COLOURS)
    given, ranks = noted(global_adapter(full, 4, triplets=triplets, size=3.0), start), uneven(full)
    # A module that is not tuned keeps all of the global adapter.
    kept = {name: first(part, min(ranks.get(name) or 4, 4)) for name, part in given.factors.items()}
    lora.merge(full, replace(given, factors=kept))
    wanted = logits(full)
    lora.merge(full, given)
    assert not torch.allclose(logits(full), wanted, atol=1e-2)
    base = base_model.load(bert, COLOURS, bits)
    carried = carry(base, given, ranks)
    error = float((logits(base) - wanted).norm() / wanted.norm())
    assert error < (1e-5 if bits == 32 else 0.03)
    assert carried.trained == {name: min(rank, 4) for name, rank in ranks.items() if rank}


def test_plain_factors_are_trained_as_they_are(bert: Path) -> None:
    base = base_model.load(bert, COLOURS)
    given = noted(global_adapter(base, 4, triplets=False), "cut_factors")
    given = replace(given, factors={name: replace(part, scaling=2.0) for name, part in given.factors.items()})
    carried = carry(base, given, dict.fromkeys(base.linears, 3))
    for name, (b, a) in carried.factors.items():
        assert np.array_equal(b.detach().numpy(), given.factors[name].b[:, :3])
        assert np.array_equal(a.detach().numpy(), given.factors[name].a[:3])


@pytest.mark.parametrize("bits", [32, 8])
def test_a_frozen_a_starts_at_the_exact_global_model(bert: Path, bits: Bits) -> None:
    base = base_model.load(bert, COLOURS)
    given = fixed_adapter(base, 4)
    lora.merge(base, given)
    wanted = logits(base)
    base = base_model.load(bert, COLOURS, bits)
    carry(base, given, uneven(base))
    assert float((logits(base) - wanted).norm() / wanted.norm()) < (1e-5 if bits == 32 else 0.1)


# ---- what is trained


def trained(bert: Path, colours: Path, checkpoints: Path, given: Adapter | None, rank: int, stop_at: int = 6) -> Loop:
    """Six steps (or fewer) of training from `given`, or from round 0's adapter under `frozen_a`."""
    base = base_model.load(bert, COLOURS)
    start = given if given is not None else noted(empty_adapter(base), "frozen_a")
    work = assignment(base, ranks=dict.fromkeys(base.linears, rank), training=TrainingSpec(lr=1e-2, checkpoint_every=2))
    carried = carry(base, start, work.work.ranks, round=1)
    pipes = Pipes()
    data = tokenize(str(colours), COLOURS, base.tokenizer)
    made = Loop(base, carried, data, work, pipes.control, checkpoints)
    if stop_at < 6:
        inner = made._loss_of_step

        def stepping(batch: int) -> float:
            if made.position.step == stop_at:
                raise KeyboardInterrupt
            return inner(batch)

        made._loss_of_step = stepping
        with pytest.raises(KeyboardInterrupt):
            made.run()
    else:
        assert made.run() == "complete"
    pipes.close()
    return made


@pytest.mark.parametrize("known", [0, 2, 4])
def test_a_frozen_a_is_not_trained_and_has_no_optimizer_state(
    bert: Path, colours: Path, tmp_path: Path, known: int
) -> None:
    given = fixed_adapter(base_model.load(bert, COLOURS), known) if known else None
    done = trained(bert, colours, tmp_path, given, 4)
    held = {id(tensor) for tensor in done._optimizer.state}
    update = update_of(done.carried, round=1)
    for name, (b, a) in done.carried.factors.items():
        assert np.array_equal(a.detach().numpy(), fixed_rows(SEED, name, 4, a.shape[1]))
        assert not a.requires_grad and a.grad is None and id(a) not in held
        assert b.requires_grad and id(b) in held and bool(b.detach().abs().sum() > 0)
        assert update.factors[name].a.shape == ((4, 0) if known == 4 else tuple(a.shape))
    assert len(done.carried.parameters()) == len(done.carried.factors) + len(done.carried.dense)
    assert not any(name.endswith("lora_a") for name in done.carried.named())


def test_a_frozen_a_resumes_to_the_same_update(bert: Path, colours: Path, tmp_path: Path) -> None:
    calm = trained(bert, colours, tmp_path / "calm", None, 2)
    trained(bert, colours, tmp_path / "cut", None, 2, stop_at=5)
    again = trained(bert, colours, tmp_path / "cut", None, 2)
    assert adapters.write(update_of(again.carried, 1)) == adapters.write(update_of(calm.carried, 1))


def test_all_devices_draw_the_same_a_whatever_their_rank(bert: Path) -> None:
    base = base_model.load(bert, COLOURS)
    drawn = {
        (rank, round): [
            a.detach().clone() for _, a in carry(base, noted(empty_adapter(base), "frozen_a"),
                                                 dict.fromkeys(base.linears, rank), round).factors.values()
        ]
        for rank, round in ((2, 1), (4, 1), (4, 3))
    }  # fmt: skip
    for small, large, later in zip(*drawn.values(), strict=True):
        assert torch.equal(large[:2], small) and torch.equal(large, later)


# ---- admission, fold and export of every aggregator on a real model


def of_name(name: str) -> Aggregator:
    return registry.create(StrategySpec(aggregator=name, rank=4, energy=1.0))


def modules_of(base: Base) -> list[ModuleSpec]:
    return [ModuleSpec(name=one.name, out=one.out, inp=one.inp, block=one.block) for one in base.linears.values()]


def shaken(update: Adapter, rng: np.random.Generator, *, trains_a: bool) -> Adapter:
    """`update` as if it had been trained: its factors moved a little."""
    factors = {}
    for name, part in update.factors.items():
        b = part.b + np.float32(0.05) * rng.standard_normal(part.b.shape, dtype=np.float32)
        a = part.a + np.float32(0.05 * trains_a) * rng.standard_normal(part.a.shape, dtype=np.float32)
        factors[name] = replace(part, b=b, a=a)
    return replace(update, factors=factors)


def rounds_of(name: str, base: Base, folder: Path) -> Adapter:
    """The global adapter after two rounds of two devices, of unequal ranks where the aggregator takes them."""
    aggregator, rng = of_name(name), np.random.default_rng(3)
    whole = noted(empty_adapter(base), aggregator.start)
    other = 4 if name in registry.EQUAL_RANKS else 2
    modules, residual = modules_of(base), None
    for round in (1, 2):
        reported = []
        for device, rank in (("edge-1", 4), ("edge-2", other)):
            ranks = dict.fromkeys(base.linears, rank)
            update = update_of(carry(base, whole, ranks, round), round, device)
            update = shaken(update, rng, trains_a=aggregator.start != "frozen_a")
            expected = Expectation(
                job="test", round=round, attempt=1, device=device, base_digest="d", ranks=ranks,
                modules={module.name: module for module in modules}, alpha_ratio=2.0, before=whole, seed=SEED,
            )  # fmt: skip
            assert aggregator.admit(update, expected) is None
            path = folder / f"{round}-{device}"
            path.write_bytes(adapters.write(update))
            reported.append(Reported(device, 10 * rank, path))
        made = fold_round(aggregator, modules, whole, residual, reported, round=round)
        whole, residual = adapters.read(adapters.write(made.adapter)), made.residual
    return whole


@pytest.mark.parametrize("name", sorted({*registry.names()} - registry.WITHOUT_LORA))
def test_the_export_of_every_aggregator_reproduces_what_is_evaluated(bert: Path, tmp_path: Path, name: str) -> None:
    base = base_model.load(bert, COLOURS)
    plain = logits(base)
    made = rounds_of(name, base, tmp_path)
    if name == "fedex":
        assert all(part.rank > 4 for part in made.factors.values()), "residuals ride along"
    # As the model worker evaluates it.
    lora.merge(base, made)
    wanted = logits(base)
    assert not torch.allclose(wanted, plain, atol=1e-2)
    spec = JobSpec(name="test", base=BaseSpec(model="tiny"), task=COLOURS, strategy=StrategySpec(aggregator=name))
    export.export_peft(made, tmp_path / "out", spec=spec, base=str(bert))
    model: Any = transformers.AutoModelForSequenceClassification.from_pretrained(str(bert), num_labels=3)
    loaded = peft.PeftModel.from_pretrained(model, str(tmp_path / "out")).eval()
    with torch.no_grad():
        assert torch.allclose(loaded(input_ids=IDS).logits, wanted, atol=1e-5, rtol=1e-5)
    assert f"(aggregator `{name}`)" in (tmp_path / "out" / "README.md").read_text()
