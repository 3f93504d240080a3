"""Iterative prune and tune: importance by hand, smaller matrices within a round, a resume to the same bytes."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from msgspec.structs import replace

from coordinator.core.planning.pruned import fault
from edge_daemon.training import loop
from edge_daemon.training import pruner as pruning_loop
from edge_daemon.training.control import PipeClosed, Stopped
from edge_daemon.training.loop import Loop
from edge_daemon.training.merging import norm
from edge_daemon.training.pruner import Pruner, gradient_scores, magnitude_scores, points, ratio_after
from shared import adapter, units
from shared.errors import DecodeError
from shared.jobs import Bits, TaskSpec
from shared.messages import UpdateFacts
from shared.modeling import base_model, lora, pruning
from shared.modeling.checkpoint import load_checkpoint
from shared.modeling.data import tokenize
from shared.norms import change_norm
from shared.pruning_order import Pruning
from tests.training.tiny_models import COLOURS, STORIES, Pipes, assignment, global_adapter


class Work:
    """One piece of work that prunes."""

    def __init__(
        self, folder: Path, source: Path, checkpoints: Path, order: Pruning, task: TaskSpec = COLOURS, bits: Bits = 32,
        scores: dict[str, bytes] | None = None, **work: Any,
    ) -> None:  # fmt: skip
        self.base = base_model.load(folder, task, bits)
        made: Any = assignment(self.base, task=task, bits=bits, **work)
        self.assignment = replace(made, work=replace(made.work, prune=order))
        self.known = pruning.groups_of(self.base)
        self.given = dataclasses.replace(global_adapter(self.base, 3), scores=scores or {})
        self.pruner = Pruner(self.base, self.known, order, self.given, self.assignment)
        data = tokenize(str(source), task, self.base.tokenizer)
        self.pipes = Pipes()
        self.loop = Loop(
            self.base, self.pruner.carry(), data, self.assignment, self.pipes.control, checkpoints, pruner=self.pruner
        )

    def update(self) -> bytes:
        update = lora.read_update(self.loop.carried, job="j", round=1, attempt=1, base_digest="d" * 64)
        return adapter.write(update)


def test_points_leave_steps_after_each_pruning() -> None:
    assert points(40, 20) == (13, 27)
    assert points(20, 20) == points(25, 20) == (10,) or points(25, 20) == (12,)
    assert points(8, 20) == (4,)
    assert points(1, 20) == (1,)
    assert [round(ratio_after(0.1, 0.5, done, 2), 3) for done in (1, 2)] == [0.45, 0.5]


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
def test_importance_by_hand(name: str, colours: Path, stories: Path, tmp_path: Path, request: Any) -> None:
    task, source = (COLOURS, colours) if name == "bert" else (STORIES, stories)
    work = Work(request.getfixturevalue(name), source, tmp_path, Pruning(ratio=0.5), task, steps=2)
    carried, lr = work.loop.carried, 0.01
    rng = np.random.default_rng(5)
    for b, a in carried.factors.values():
        for tensor in (b, a):
            tensor.grad = torch.from_numpy(rng.normal(size=tuple(tensor.shape)).astype(np.float32))
    found = gradient_scores(work.base, work.known, work.pruner.kept, carried, lr)
    for group in work.known:
        by_hand = np.zeros(group.count)
        for one in group.slices:
            b, a = carried.factors[one.module]
            layer = work.base.model.get_submodule(one.module)
            b_, a_, gb, ga = (t.detach().double().numpy() for t in (b, a, b.grad, a.grad))
            weight = layer.get_base_layer().weight.detach().double().numpy() + carried.scaling * b_ @ a_
            product = np.abs((gb @ a_ + b_ @ ga - lr * gb @ ga) * weight)
            of_unit = []
            for unit in range(group.count):
                rows = one.places([unit])
                of_unit.append((product[rows] if one.side == "out" else product[:, rows]).sum())
            by_hand += np.array(of_unit) / np.linalg.norm(of_unit)
        assert found[group.name] == pytest.approx(by_hand, rel=1e-4)


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
def test_what_is_cut_in_a_round_is_the_masked_model(
    name: str, colours: Path, stories: Path, tmp_path: Path, request: Any
) -> None:
    task, source = (COLOURS, colours) if name == "bert" else (STORIES, stories)
    folder = request.getfixturevalue(name)
    work = Work(folder, source, tmp_path, Pruning(ratio=0.5), task, steps=4)
    whole = Work(folder, source, tmp_path / "w", Pruning(ratio=0.0), task, steps=4)
    for one in (work, whole):
        while one.loop.position.step < 1:
            one.loop._advance()
    before = sum(p.numel() for p in work.base.model.parameters())
    moments = {n: work.loop._optimizer.state[t] for n, t in work.loop.carried.named().items()}
    work.loop.carried, left = work.pruner.prune(work.loop.carried, moments)
    assert sum(p.numel() for p in work.base.model.parameters()) < 0.85 * before
    assert units.ratio_of(work.known, work.pruner.kept) == pytest.approx(0.5)
    _mask(whole, work.pruner.kept)
    assert _logits(work) == pytest.approx(_logits(whole), abs=2e-5)
    for tensor_name, tensor in work.loop.carried.named().items():
        assert left[tensor_name]["exp_avg"].shape == tensor.shape
    module = next(one.module for group in work.known for one in group.slices if one.side == "out")
    rows = work.loop.carried.cuts[module][0]
    assert rows is not None
    old = moments[f"{module}.lora_b"]["exp_avg"]
    assert torch.equal(left[f"{module}.lora_b"]["exp_avg"], old[torch.from_numpy(rows)])


def _mask(whole: Work, kept: units.Kept) -> None:
    """Zero what reads the units that are gone, in the frozen weights and in the factors."""
    for group in whole.known:
        gone = sorted(set(range(group.count)) - set(kept[group.name]))
        for one in group.slices:
            if one.side == "in":
                layer = whole.base.model.get_submodule(one.module)
                where = torch.from_numpy(one.places(gone))
                with torch.no_grad():
                    layer.get_base_layer().weight[:, where] = 0.0
                    whole.loop.carried.factors[one.module][1][:, where] = 0.0


def _logits(work: Work) -> torch.Tensor:
    work.base.model.eval()
    tokens = torch.tensor([[5, 6, 7, 8, 9, 10], [9, 4, 4, 6, 5, 8]])
    with torch.no_grad():
        found: torch.Tensor = work.base.model(input_ids=tokens).logits
    return found


@pytest.mark.parametrize("bits", [32, 8, 4])
def test_a_round_prunes_and_tunes(bits: Bits, bert: Path, colours: Path, tmp_path: Path) -> None:
    order = Pruning(ratio=0.5, every=4)
    work = Work(bert, colours, tmp_path, order, bits=bits, steps=12)
    assert work.loop.run() == "complete"
    kept = work.pruner.kept
    assert {name: len(there) for name, there in kept.items()} == {
        group.name: group.count - group.count // 2 for group in work.known
    }
    update = adapter.read(work.update())
    for name, part in update.factors.items():
        linear = work.base.linears[name]
        assert (part.b.shape[0], part.a.shape[1]) == (linear.out, linear.inp)
        out, inp = work.base.whole_size(name)
        spread = units.expanded(part, out, inp)
        assert (spread.b.shape[0], spread.a.shape[1]) == (out, inp)
        assert np.count_nonzero(np.abs(spread.b).sum(1)) <= linear.out
    assert (work.pruner.requantized > 0) == (bits < 16)
    # The next round begins where this one ended, and goes no way back.
    packed = units.pack(work.known, kept)
    assert units.unpack(work.known, packed) == kept
    scores = units.unpack_scores(units.pack_scores(work.pruner.scores))
    again = Work(bert, colours, tmp_path / "2", replace(order, ratio=0.25, kept=packed), bits=bits, steps=4)
    again.loop.run()
    assert again.pruner.kept == kept
    for name, found in scores.items():
        top = work.pruner.scores[name].max()
        seen = work.pruner.scores[name] / top
        assert found == pytest.approx(seen, rel=0.03, abs=1.1e-4)


def test_killed_after_a_pruning_it_resumes_to_the_same_bytes(bert: Path, colours: Path, tmp_path: Path) -> None:
    order = Pruning(ratio=0.5, every=5)
    calm = Work(bert, colours, tmp_path / "calm", order, steps=10)
    calm.loop.run()
    killed = Work(bert, colours, tmp_path / "killed", order, steps=10)
    killed.base.model.train()
    while killed.loop.position.step < 8:
        killed.loop._advance()
    killed.loop.save()
    resumed = Work(bert, colours, tmp_path / "killed", order, steps=10)
    resumed.loop.run()
    assert resumed.loop.position.step == 10
    assert resumed.pruner.kept == calm.pruner.kept
    assert resumed.update() == calm.update()


def test_by_magnitude(bert: Path, colours: Path, tmp_path: Path) -> None:
    work = Work(bert, colours, tmp_path, Pruning(ratio=0.5, criterion="magnitude"), steps=2)
    scores = magnitude_scores(work.base, work.known, work.pruner.kept)
    work.loop.run()
    for group in work.known:
        best = np.argsort(-scores[group.name], kind="stable")[: group.count - group.count // 2]
        assert work.pruner.kept[group.name] == sorted(best.tolist())


def test_at_least_one_unit_stays(bert: Path, colours: Path, tmp_path: Path) -> None:
    work = Work(bert, colours, tmp_path, Pruning(ratio=0.99), steps=2)
    work.loop.run()
    assert min(len(there) for there in work.pruner.kept.values()) == 1


def test_the_fleet_counts_as_much_as_the_device(bert: Path, colours: Path, tmp_path: Path) -> None:
    work = Work(bert, colours, tmp_path, Pruning(ratio=0.5), steps=2)
    group = work.known[1]
    top = np.zeros(group.count)
    top[-1] = 1.0
    work.pruner._fleet[group.name] = top
    work.pruner.scores[group.name] = np.arange(group.count, 0.0, -1.0)
    judged = work.pruner._judged()[group.name]
    assert judged.argmax() == group.count - 1
    assert pruning_loop.SMOOTHING == 0.9


def test_an_order_for_another_model_is_refused(bert: Path, colours: Path, tmp_path: Path) -> None:
    with pytest.raises(Exception, match="bytes for the units of 'x'"):
        Work(bert, colours, tmp_path, Pruning(ratio=0.5, kept={"x": b"\1"}), steps=2)


def test_the_fleets_scores_come_with_the_adapter_and_bring_a_late_device_to_its_class(
    bert: Path, colours: Path, tmp_path: Path
) -> None:
    whole = Work(bert, colours, tmp_path, Pruning(ratio=0.0), steps=2)
    rising = {group.name: np.linspace(0.1, 1.0, group.count) for group in whole.known}
    packed = units.pack_scores(rising)
    late = Work(bert, colours, tmp_path, Pruning(ratio=0.5, begin=0.25), steps=2, scores=packed)
    assert late.pruner.kept == units.best(whole.known, rising, 0.25)
    late.loop.run()
    assert units.ratio_of(late.known, late.pruner.kept) == 0.5
    told = UpdateFacts(
        samples=4, steps=2, batch=2, bits=32, loss_first=1.0, loss_last=1.0, step_s=1.0, train_s=2.0, cores_used=1.0,
        kept=units.pack(late.known, late.pruner.kept),
    )  # fmt: skip
    assert not fault(late.known, late.pruner.order, told)
    with pytest.raises(DecodeError, match="3 scores for the units of '0.heads'"):
        Work(bert, colours, tmp_path, Pruning(ratio=0.5), steps=2, scores={"0.heads": b"abc"})


def test_a_stop_at_the_step_of_a_pruning_loses_none(bert: Path, colours: Path, tmp_path: Path) -> None:
    work = Work(bert, colours, tmp_path, Pruning(ratio=0.5), steps=2)
    work.loop.base.model.train()
    poll, step = work.loop.control.poll, work.loop._loss_of_step

    def stopping(what: str) -> None:
        if work.loop.position.step:
            raise Stopped("drain")
        poll(what)

    work.loop.control.poll = stopping  # type: ignore[method-assign]  # a stop that came while the step was under way
    work.loop._loss_of_step = lambda batch: step(batch)
    assert work.loop.run() == "drain"
    assert work.loop.position.step == 1
    assert units.ratio_of(work.known, work.pruner.kept) == 0.5


def test_a_daemon_gone_between_a_step_and_its_pruning_loses_none(bert: Path, colours: Path, tmp_path: Path) -> None:
    order = Pruning(ratio=0.5, every=5)
    calm = Work(bert, colours, tmp_path / "calm", order, steps=10)
    calm.loop.run()
    cut = Work(bert, colours, tmp_path / "cut", order, steps=10)

    def gone(what: str) -> None:
        if what == "pruning":
            raise PipeClosed

    cut.loop.control.beat = gone  # type: ignore[method-assign]  # as where the pipe is broken
    with pytest.raises(PipeClosed):
        cut.loop.run()
    assert not cut.pruner.done and cut.loop.position.step == 3
    resumed = Work(bert, colours, tmp_path / "cut", order, steps=10)
    resumed.loop.run()
    assert resumed.pruner.kept == calm.pruner.kept
    assert resumed.update() == calm.update()


@pytest.mark.parametrize("lost", ["value/", "unit_kept/"])
def test_a_checkpoint_that_lacks_tensors_leaves_the_model_as_it_was(
    lost: str, bert: Path, colours: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order = Pruning(ratio=0.5, every=5)
    killed = Work(bert, colours, tmp_path, order, steps=10)
    killed.base.model.train()
    while killed.loop.position.step < 8:
        killed.loop._advance()
    killed.loop.save()
    found = load_checkpoint(tmp_path, killed.loop._work)
    assert found is not None
    position, tensors = found
    name = next(name for name in tensors if name.startswith(lost))
    del tensors[name]
    monkeypatch.setattr(loop, "load_checkpoint", lambda *_: (position, tensors))
    again = Work(bert, colours, tmp_path, order, steps=10)
    whole = dict(again.base.linears)
    again.loop._resume()
    assert again.loop.position.step == 0 and again.pruner.done == 0
    assert again.base.linears == whole and units.ratio_of(again.known, again.pruner.kept) == 0.0


def test_the_change_does_not_grow_with_the_rank_as_the_factors_do(bert: Path, colours: Path, tmp_path: Path) -> None:
    def norms(rank: int) -> tuple[float, float]:
        base = base_model.load(bert, COLOURS)
        given = assignment(base, ranks=dict.fromkeys(base.linears, rank), steps=1)
        made: Any = replace(given, work=replace(given.work, prune=Pruning(ratio=0.0)))
        adapters = global_adapter(base, 1)
        one = Pruner(base, pruning.groups_of(base), Pruning(ratio=0.0), adapters, made)
        update = lora.read_update(one.carry(), job="j", round=1, attempt=1, base_digest="d" * 64)
        return change_norm(update, adapters, dense=False), norm(update)

    (still, small), (_, large) = norms(2), norms(8)
    assert still < 1e-4, "nothing was trained, so nothing changed"
    assert large > 1.2 * small
