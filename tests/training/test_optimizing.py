"""The optimizer where memory runs out, by a real limit: what is trained is as it was, or the work ends."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from shared.allocator import give_back
from shared.jobs import TrainingSpec
from shared.modeling.faults import OutOfMemory, is_out_of_memory
from shared.modeling.lora import Carried
from shared.modeling.optimizing import advance, begin_moments, optimizer_of, restore, state_of
from shared.pruning_order import Pruning
from tests.training.test_loop import Rig, same
from tests.training.test_pruner import Work
from tests.training.tiny_models import COLOURS

MIB = 1 << 20
COUNT, SIZE = 2, 64 * MIB
TRAINING = TrainingSpec(lr=0.1, weight_decay=0.01)


def trained(size: int = SIZE) -> Carried:
    dense = {f"layer.{number}": nn.Parameter(torch.full((size // 4,), 1.0 + number)) for number in range(COUNT)}
    return Carried(factors={}, trained={}, scaling=1.0, dense=dense)


def with_gradients(carried: Carried, step: int = 0) -> Carried:
    for number, tensor in enumerate(carried.parameters()):
        tensor.grad = torch.linspace(-1.0 - step, 1.0 + number, tensor.numel())
    return carried


@contextmanager
def at_most(more: int) -> Iterator[None]:
    """This process gets so many bytes more than it has, and has none to spare of what other tests freed."""
    give_back()
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + more, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@pytest.mark.parametrize("moments", [0, 1, 2, 3])
def test_a_step_whose_moments_do_not_fit_can_be_done_again(moments: int) -> None:
    carried, undisturbed = with_gradients(trained()), with_gradients(trained())
    optimizer = optimizer_of(carried, TRAINING)
    advance(other := optimizer_of(undisturbed, TRAINING), undisturbed, TRAINING, 0.1)
    with at_most(moments * SIZE + SIZE // 8), pytest.raises((MemoryError, RuntimeError)) as error:
        advance(optimizer, carried, TRAINING, 0.1)
    assert is_out_of_memory(error.value)
    assert all(bool((tensor == 1.0 + number).all()) for number, tensor in enumerate(carried.parameters()))
    with_gradients(carried)
    advance(optimizer, carried, TRAINING, 0.1)
    found, wanted = state_of(optimizer, carried), state_of(other, undisturbed)
    assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_a_step_takes_no_memory_of_its_own() -> None:
    carried = with_gradients(trained())
    optimizer = optimizer_of(carried, TRAINING)
    begin_moments(optimizer)
    with at_most(SIZE // 8):
        advance(optimizer, carried, TRAINING, 0.1)


def test_gradients_of_another_layout_are_taken_by_their_places() -> None:
    values = torch.linspace(-1.0, 1.0, 12).reshape(3, 4)
    found = []
    for grad in (values.clone(), values.t().contiguous().t()):
        tensor = nn.Parameter(torch.ones(3, 4))
        tensor.grad = grad
        carried = Carried(factors={}, trained={}, scaling=1.0, dense={"layer": tensor})
        advance(optimizer_of(carried, TRAINING), carried, TRAINING, 0.1)
        found.append(tensor.detach().clone())
    assert torch.equal(found[0], found[1]) and len(found[0].unique()) > 1


def test_a_step_that_breaks_off_is_not_taken_for_one_that_can_be_done_again() -> None:
    carried = with_gradients(trained())
    optimizer = optimizer_of(carried, TRAINING)
    for group in optimizer.param_groups:
        group["fused"] = None  # as on a GPU, where a step takes memory
    begin_moments(optimizer)
    with at_most(SIZE // 8), pytest.raises(OutOfMemory, match="optimizer"):
        advance(optimizer, carried, TRAINING, 0.1)


def test_moments_begin_as_torch_begins_them() -> None:
    carried, plain = with_gradients(trained(64)), with_gradients(trained(64))
    carried.dense["unused"], plain.dense["unused"] = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4))
    ours, theirs = optimizer_of(carried, TRAINING), optimizer_of(plain, TRAINING)
    for step in range(4):
        with_gradients(carried, step), with_gradients(plain, step)
        carried.dense["unused"].grad = plain.dense["unused"].grad = None
        begin_moments(ours)
        ours.step()
        theirs.step()
    found, wanted = state_of(ours, carried), state_of(theirs, plain)
    assert list(found) == list(wanted)
    for name, tensor in wanted.items():
        assert torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype, name


def test_a_state_without_moments_is_taken() -> None:
    """Of before the first step, or of a tensor that no gradient reached."""
    carried = with_gradients(trained(64))
    optimizer = optimizer_of(carried, TRAINING)
    first = {name: tensor.detach().clone() for name, tensor in state_of(optimizer, carried).items()}
    assert set(first) == {f"value/layer.{number}" for number in range(COUNT)}
    advance(optimizer, carried, TRAINING, 0.1)
    once = {name: tensor.detach().clone() for name, tensor in state_of(optimizer, carried).items()}
    assert restore(optimizer, carried, first)
    with_gradients(carried)
    advance(optimizer, carried, TRAINING, 0.1)
    assert all(torch.equal(tensor, once[name]) for name, tensor in state_of(optimizer, carried).items())


def lack_room_for_moments(carried: Carried, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Have torch find no room for the fourth moment it allocates; the list fills with those it was asked for."""
    own, real, asked = {id(tensor) for tensor in carried.parameters()}, torch.zeros_like, list[int]()

    def zeros_like(tensor: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        if id(tensor) in own:
            asked.append(id(tensor))
            if len(asked) == 4:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB")
        return real(tensor, **kwargs)

    monkeypatch.setattr(torch, "zeros_like", zeros_like)
    return asked


def test_work_without_room_for_its_moments_goes_on_with_half_the_batch(
    bert: Path, colours: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    half = Rig(bert, colours, tmp_path / "half", batch=6)
    half.loop.run()
    rig = Rig(bert, colours, tmp_path / "whole", batch=12)
    asked = lack_room_for_moments(rig.carried, monkeypatch)
    assert rig.loop.run() == "complete"
    assert len(asked) == 2 * len(rig.carried.parameters()) + 2, "the tensor whose second found no room is done again"
    assert rig.loop.position.batch_limit == 6 and rig.loop.position.losses == half.loop.position.losses
    assert same(rig.weights(), half.weights())


def test_a_pruner_learns_once_from_a_step_that_is_done_again(
    bert: Path, colours: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pruning = Pruning(ratio=0.5)
    half, work = (
        Work(bert, colours, tmp_path / str(batch), pruning, COLOURS, steps=4, batch=batch) for batch in (4, 8)
    )
    lack_room_for_moments(work.loop.carried, monkeypatch)
    half.loop._advance()
    work.loop._advance()
    assert work.loop.position.batch == 4
    assert all((work.pruner.scores[name] == found).all() for name, found in half.pruner.scores.items())


def test_work_whose_optimizer_breaks_off_fails_for_memory(bert: Path, colours: Path, tmp_path: Path) -> None:
    rig, tries = Rig(bert, colours, tmp_path, batch=8), []

    def run_out(*_: object) -> None:
        tries.append(rig.loop.position.batch)
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB")

    rig.loop._optimizer.register_step_pre_hook(run_out)
    with pytest.raises(OutOfMemory, match="optimizer"):
        rig.loop.run()
    assert tries == [8]
