"""The training loop: steps, schedule, resuming, partial work, halving the batch, divergence."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from edge_daemon.protocol import Pause, Progressed, Resume, Stop
from edge_daemon.training import loop
from edge_daemon.training.control import PipeClosed, Stopped
from edge_daemon.training.loop import Loop
from shared.jobs import Bits, TaskSpec, TrainingSpec
from shared.messages import Assignment
from shared.modeling import base_model, checkpoint, evaluation, lora
from shared.modeling.data import tokenize
from shared.modeling.faults import OutOfMemory
from shared.modeling.optimizing import learning_rate
from tests.training.tiny_models import COLOURS, STORIES, Pipes, assignment, global_adapter

Weights = dict[str, np.ndarray]  # type: ignore[type-arg]  # the tests need no precision here


class Rig:
    """One piece of work on a fresh carrier, with the daemon's end of the pipe at hand."""

    def __init__(
        self, folder: Path, source: Path, checkpoints: Path, task: TaskSpec = COLOURS, bits: Bits = 32, **work: Any
    ) -> None:
        self.base = base_model.load(folder, task, bits)
        self.data = tokenize(str(source), task, self.base.tokenizer)
        self.assignment: Assignment = assignment(self.base, task=task, bits=bits, **work)
        self.pipes = Pipes()
        self.carried = lora.carry(
            self.base,
            global_adapter(self.base, 3),
            self.assignment.work.ranks,
            alpha_ratio=2.0,
            seed=7,
            round=self.assignment.round,
        )
        self.loop = Loop(self.base, self.carried, self.data, self.assignment, self.pipes.control, checkpoints)

    def weights(self) -> Weights:
        return {name: tensor.detach().numpy().copy() for name, tensor in self.carried.named().items()}

    def before_step(self, step: int, act: Callable[[], None]) -> None:
        """Run `act` in the working thread when step `step` (from 1) is about to begin."""
        inner = self.loop._loss_of_step

        def stepping(batch: int) -> float:
            if self.loop.position.step + 1 == step:
                act()
            return inner(batch)

        self.loop._loss_of_step = stepping


def same(one: Weights, other: Weights) -> bool:
    return one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("bits", [32, 16, 8, 4])
def test_training_learns(bert: Path, colours: Path, tmp_path: Path, bits: Bits) -> None:
    training = TrainingSpec(lr=2e-2, checkpoint_every=100)
    rig = Rig(bert, colours, tmp_path, bits=bits, steps=30, batch=16, training=training)
    before = evaluation.evaluate(rig.base, rig.data)
    assert rig.loop.run() == "complete"
    after = evaluation.evaluate(rig.base, rig.data)
    assert after.accuracy is not None and before.accuracy is not None
    assert after.accuracy > max(0.8, before.accuracy)
    assert (rig.loop.position.step, rig.loop.position.samples) == (30, 480)
    assert len(rig.loop.position.losses) == len(rig.loop.position.step_seconds) == 30


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_causal_training_learns(name: str, stories: Path, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    training = TrainingSpec(lr=1e-2, checkpoint_every=100)
    rig = Rig(request.getfixturevalue(name), stories, tmp_path, task=STORIES, steps=25, batch=8, training=training)
    before = evaluation.evaluate(rig.base, rig.data)
    rig.loop.run()
    after = evaluation.evaluate(rig.base, rig.data)
    assert after.loss < 0.8 * before.loss
    assert after.perplexity == pytest.approx(math.exp(after.loss))
    assert after.accuracy is None


@pytest.mark.parametrize("at", [3, 5, 6])
def test_a_resumed_run_gives_the_same_bytes(bert: Path, colours: Path, tmp_path: Path, at: int) -> None:
    whole = Rig(bert, colours, tmp_path / "whole")
    whole.loop.run()
    cut = Rig(bert, colours, tmp_path / "cut")

    def die() -> None:
        raise KeyboardInterrupt

    cut.before_step(at, die)
    with pytest.raises(KeyboardInterrupt):
        cut.loop.run()
    resumed = Rig(bert, colours, tmp_path / "cut")
    steps: list[int] = []
    for step in range(1, 7):
        resumed.before_step(step, lambda step=step: steps.append(step))  # type: ignore[misc]  # binds the step
    assert resumed.loop.run() == "complete"
    assert steps == list(range((at - 1) // 2 * 2 + 1, 7))
    assert same(resumed.weights(), whole.weights())
    assert resumed.loop.position.losses == whole.loop.position.losses
    assert resumed.loop.position.samples == whole.loop.position.samples


def test_the_daemons_end_saves_a_checkpoint_of_the_last_step(bert: Path, colours: Path, tmp_path: Path) -> None:
    training = TrainingSpec(lr=1e-2, checkpoint_every=100, accumulation=2)
    whole = Rig(bert, colours, tmp_path / "whole", training=training)
    whole.loop.run()
    cut = Rig(bert, colours, tmp_path / "cut", training=training)
    cut.before_step(4, lambda: cut.pipes.control._inbox.put(None))
    with pytest.raises(PipeClosed):
        cut.loop.run()
    resumed = Rig(bert, colours, tmp_path / "cut", training=training)
    resumed.before_step(3, pytest.fail)
    resumed.loop.run()
    assert same(resumed.weights(), whole.weights())


def test_a_checkpoint_of_other_work_is_not_taken(bert: Path, colours: Path, tmp_path: Path) -> None:
    first = Rig(bert, colours, tmp_path, round=1)
    first.loop.run()
    other = Rig(bert, colours, tmp_path, round=2)
    fresh = Rig(bert, colours, tmp_path / "empty", round=2)
    other.loop.run()
    fresh.loop.run()
    assert same(other.weights(), fresh.weights())


def test_a_damaged_checkpoint_costs_only_time(bert: Path, colours: Path, tmp_path: Path) -> None:
    first = Rig(bert, colours, tmp_path)
    first.loop.run()
    file = tmp_path / checkpoint.NAME
    file.write_bytes(file.read_bytes()[:100])
    again = Rig(bert, colours, tmp_path)
    assert again.loop.run() == "complete"
    assert same(again.weights(), first.weights())


def test_accumulation_gives_the_gradient_of_the_whole_batch(gpt2: Path, stories: Path, tmp_path: Path) -> None:
    found = []
    for parts in (1, 3):
        training = TrainingSpec(lr=1e-2, accumulation=parts)
        rig = Rig(gpt2, stories, tmp_path / str(parts), task=STORIES, steps=1, batch=7, training=training)
        rig.base.model.config.attn_pdrop = 0.0
        for module in rig.base.model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        rig.loop.run()
        found.append((rig.loop.position.losses[0], rig.weights()))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    for name, tensor in found[0][1].items():
        assert np.allclose(tensor, found[1][1][name], atol=2e-4), name


@pytest.mark.parametrize(("discard", "steps"), [(False, 3), (True, None)])
def test_a_stop_counts_what_is_done_or_forgets_it(
    bert: Path, colours: Path, tmp_path: Path, discard: bool, steps: int | None
) -> None:
    training = TrainingSpec(lr=1e-2, accumulation=2)
    rig = Rig(bert, colours, tmp_path, steps=50, training=training)
    rig.before_step(4, lambda: rig.pipes.control._inbox.put(Stop(discard=discard)))
    if discard:
        with pytest.raises(Stopped):
            rig.loop.run()
    else:
        assert rig.loop.run() == "drain"
        assert (rig.loop.position.step, rig.loop.position.samples) == (steps, 12)


def test_partial_work_is_a_prefix_of_the_whole(bert: Path, colours: Path, tmp_path: Path) -> None:
    rig = Rig(bert, colours, tmp_path / "a", steps=50)

    def time_is_up() -> None:
        rig.pipes.control.deadline = 0.0

    rig.before_step(3, time_is_up)
    assert rig.loop.run() == "time"
    assert rig.loop.position.step == 3
    prefix = Rig(bert, colours, tmp_path / "b", steps=50)
    prefix.before_step(3, lambda: prefix.pipes.control._inbox.put(Stop()))
    prefix.loop.run()
    assert same(rig.weights(), prefix.weights())


def test_pausing_changes_nothing_but_the_clock(bert: Path, colours: Path, tmp_path: Path) -> None:
    plain = Rig(bert, colours, tmp_path / "a")
    plain.loop.run()
    rig = Rig(bert, colours, tmp_path / "b")

    def pause() -> None:
        for message in (Pause(reason="foreign load"), Pause(reason="heat"), Resume()):
            rig.pipes.control._inbox.put(message)

    rig.before_step(3, pause)
    assert rig.loop.run() == "complete"
    assert same(rig.weights(), plain.weights())
    assert rig.loop.position.paused_s > 0


def test_a_batch_that_does_not_fit_is_halved_until_it_does(bert: Path, colours: Path, tmp_path: Path) -> None:
    rig = Rig(bert, colours, tmp_path, steps=4, batch=12)
    tried = limit_batch(rig, 3, MemoryError())
    assert rig.loop.run() == "complete"
    assert tried == [12, 6, 3, 3, 3, 3]
    assert (rig.loop.position.batch, rig.loop.position.batch_limit, rig.loop.position.samples) == (3, 3, 12)


@pytest.mark.parametrize("text", ["DefaultCPUAllocator: not enough memory: you tried", "CUDA out of memory. Tried"])
def test_where_not_even_one_sample_fits_it_says_so(bert: Path, colours: Path, tmp_path: Path, text: str) -> None:
    rig = Rig(bert, colours, tmp_path, batch=5)
    tried = limit_batch(rig, 0, RuntimeError(text))
    with pytest.raises(OutOfMemory):
        rig.loop.run()
    assert tried == [5, 2, 1]


def limit_batch(rig: Rig, limit: int, error: Exception) -> list[int]:
    """Let every step of more than `limit` samples fail; the list fills with the batches tried."""
    inner, tried = rig.loop._loss_of_step, []

    def stepping(batch: int) -> float:
        tried.append(batch)
        if batch > limit:
            raise error
        return inner(batch)

    rig.loop._loss_of_step = stepping
    return tried


def test_other_errors_are_not_taken_for_memory(bert: Path, colours: Path, tmp_path: Path) -> None:
    rig = Rig(bert, colours, tmp_path)
    limit_batch(rig, 0, RuntimeError("shapes do not match"))
    with pytest.raises(RuntimeError, match="shapes do not match"):
        rig.loop.run()


def test_a_known_limit_is_heeded_from_the_start(bert: Path, colours: Path, tmp_path: Path) -> None:
    rig = Rig(bert, colours, tmp_path, batch=8)
    rig.loop.batch_limit = 5
    rig.loop.run()
    assert (rig.loop.position.batch, rig.loop.position.batch_limit, rig.loop.position.samples) == (5, 5, 30)


def test_a_loss_that_is_no_number_ends_the_work(bert: Path, colours: Path, tmp_path: Path) -> None:
    rig = Rig(bert, colours, tmp_path)
    with torch.no_grad():
        rig.carried.dense["classifier.bias"].fill_(math.nan)
    with pytest.raises(loop.Diverged, match="the loss became nan at step 1"):
        rig.loop.run()


def test_decay_touches_the_head_alone(bert: Path, colours: Path, tmp_path: Path) -> None:
    rig = Rig(bert, colours, tmp_path, training=TrainingSpec(lr=1e-2, weight_decay=0.5))
    *factors, head = rig.loop._optimizer.param_groups
    assert ([group["weight_decay"] for group in factors], head["weight_decay"]) == ([0.0, 0.0], 0.5)
    assert {id(t) for t in head["params"]} == {id(t) for t in rig.carried.dense.values()}


def test_factors_a_learn_slower_by_the_ratio(bert: Path, colours: Path, tmp_path: Path) -> None:
    rig = Rig(bert, colours, tmp_path, training=TrainingSpec(lr=1e-2, lora_plus=8.0))
    rig.loop.run()
    rates = {id(tensor): group["lr"] for group in rig.loop._optimizer.param_groups for tensor in group["params"]}
    told = {name: rates[id(tensor)] for name, tensor in rig.carried.named().items()}
    assert told == {name: 1e-2 / (8 if name.endswith("lora_a") else 1) for name in told}
    assert any(name.endswith("lora_a") for name in told)


def test_progress_is_told(bert: Path, colours: Path, tmp_path: Path) -> None:
    rig = Rig(bert, colours, tmp_path)
    rig.loop.run()
    rig.pipes.close()
    progress = [message for message in rig.pipes.said if isinstance(message, Progressed)]
    assert progress[0].step == 1
    assert (progress[0].steps, progress[0].samples) == (6, 4)


def test_work_without_factors_trains_the_head(bert: Path, colours: Path, tmp_path: Path) -> None:
    rig = Rig(bert, colours, tmp_path, ranks={})
    before = rig.weights()
    rig.loop.run()
    assert sorted(before) == ["classifier.bias", "classifier.weight"]
    assert not same(rig.weights(), before)


@pytest.mark.parametrize(
    ("schedule", "rates"),
    [
        ("constant", [0.5, 1.0, 1.0, 1.0, 1.0]),
        ("linear", [0.5, 1.0, 1.0, 0.5, 0.0]),
        ("cosine", [0.5, 1.0, 1.0, 0.5, 0.0]),
    ],
)
def test_rates_follow_the_schedule_over_the_whole_job(schedule: Any, rates: list[float]) -> None:
    training = TrainingSpec(lr=2.0, schedule=schedule, warmup_steps=2)
    found = [learning_rate(training, step, 12) for step in (0, 1, 2, 7, 12)]
    assert found == pytest.approx([2.0 * rate for rate in rates])


def test_rates_go_on_over_the_rounds(bert: Path, colours: Path, tmp_path: Path) -> None:
    training = TrainingSpec(lr=1.0, schedule="linear")
    rig = Rig(bert, colours, tmp_path, round=3, steps=4, training=training)
    assert rig.loop._rate() == pytest.approx(1 - 8 / 12)


def test_extra_steps_have_the_rate_of_the_last(
    bert: Path, colours: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = TrainingSpec(lr=1.0, schedule="linear")
    rig = Rig(bert, colours, tmp_path, round=3, steps=4, extra_steps=3, training=training)
    rates: list[float] = []
    monkeypatch.setattr(rig.loop.control, "progress", lambda _make: rates.append(rig.loop._rate()))
    assert rig.loop.run() == "complete" and rig.loop.position.step == 7
    assert rates == pytest.approx([1 - (8 + step) / 12 for step in (1, 2, 3, 3, 3, 3, 3)])


def test_scores_are_told_where_they_are_asked_for(bert: Path, colours: Path, tmp_path: Path) -> None:
    plain = Rig(bert, colours, tmp_path / "a")
    plain.loop.run()
    assert plain.loop.importance == {}
    rig = Rig(bert, colours, tmp_path / "b", score=True)
    rig.loop.run()
    assert set(rig.loop.importance) == set(rig.base.linears)
    assert sum(rig.loop.importance.values()) == pytest.approx(1.0)
    assert same(rig.weights(), plain.weights()), "scoring changes nothing"


@pytest.mark.parametrize("at", [3, 6])
def test_a_resumed_run_gives_the_same_scores(bert: Path, colours: Path, tmp_path: Path, at: int) -> None:
    whole = Rig(bert, colours, tmp_path / "whole", score=True)
    whole.loop.run()
    cut = Rig(bert, colours, tmp_path / "cut", score=True)

    def die() -> None:
        raise KeyboardInterrupt

    cut.before_step(at, die)
    with pytest.raises(KeyboardInterrupt):
        cut.loop.run()
    resumed = Rig(bert, colours, tmp_path / "cut", score=True)
    resumed.before_step(1, pytest.fail)
    resumed.loop.run()
    assert resumed.loop.importance == whole.loop.importance


def test_scores_see_the_gradient_of_the_whole_step_before_it_is_clipped(
    gpt2: Path, stories: Path, tmp_path: Path
) -> None:
    found = {}
    for parts, norm in ((1, 0.0), (3, 0.0), (1, 1e-3)):
        training = TrainingSpec(lr=1e-2, accumulation=parts, max_grad_norm=norm)
        rig = Rig(gpt2, stories, tmp_path / f"{parts}-{norm}", STORIES, steps=1, batch=7, training=training, score=True)
        for module in rig.base.model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        rig.loop.run()
        assert rig.loop._scorer is not None
        found[parts, norm] = {name: state[1].item() for name, state in rig.loop._scorer.save().items()}
    assert found[3, 0.0] == pytest.approx(found[1, 0.0], rel=1e-3)
    assert found[1, 1e-3] == pytest.approx(found[1, 0.0], rel=1e-6)


def test_a_step_that_is_done_again_for_memory_is_scored_once(bert: Path, colours: Path, tmp_path: Path) -> None:
    rig = Rig(bert, colours, tmp_path, steps=4, batch=12, score=True)
    limit_batch(rig, 3, MemoryError())
    rig.loop.run()
    assert rig.loop._scorer is not None
    assert {int(state[0]) for state in rig.loop._scorer.save().values()} == {4}
