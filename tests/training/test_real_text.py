"""One round of the real loop on a part of the real texts (`MUSTER_DATA`): long posts, odd characters, real labels."""

from __future__ import annotations

from pathlib import Path

import pytest

from edge_daemon.training.loop import Loop
from muster.testbed import inputs
from muster.testbed.models import minilm_folder
from muster.testbed.rows import read_rows, write_rows
from shared.jobs import TaskSpec, TrainingSpec
from shared.modeling import base_model, lora
from shared.modeling.data import describe, tokenize
from shared.modeling.evaluation import Quality, evaluate
from tests.training.tiny_models import Pipes, assignment, empty_adapter

ROWS = 200
pytestmark = pytest.mark.data


def part_of(folder: Path, place: Path) -> tuple[Path, list[str]]:
    """The first `ROWS` training rows of a data folder as a file of their own, and its labels."""
    files = inputs.data_files(str(folder), place, lambda _: None)
    path = place / "part.jsonl.gz"
    write_rows(path, read_rows(files.train)[:ROWS])
    assert describe(str(path), share_labels=False).rows == ROWS
    return path, files.labels


def round_on(source: Path, model: Path, task: TaskSpec, place: Path, *, steps: int, lr: float) -> list[Quality]:
    """Quality on the rows themselves before and after one round from a fresh adapter."""
    base = base_model.load(model, task)
    data = tokenize(str(source), task, base.tokenizer)
    assert data.rows == ROWS
    assert 4 < data.lengths.max() <= task.max_tokens
    work = assignment(
        base, task=task, steps=steps, batch=16, ranks=dict.fromkeys(base.linears, 4),
        training=TrainingSpec(lr=lr, checkpoint_every=1000),
    )  # fmt: skip
    given = empty_adapter(base)
    base.set_dense(given.dense)
    before = evaluate(base, data)
    carried = lora.carry(base, given, work.work.ranks, alpha_ratio=2.0, seed=7, round=1)
    loop = Loop(base, carried, data, work, Pipes().control, place / "checkpoints")
    assert loop.run() == "complete"
    assert (loop.position.step, loop.position.samples) == (steps, steps * 16)
    return [before, evaluate(base, data)]


def test_a_round_on_newsgroup_posts(muster_data: Path, tmp_path: Path) -> None:
    source, labels = part_of(muster_data / "20news", tmp_path)
    assert len(labels) == 20
    task = TaskSpec(kind="classification", dataset="20news", labels=labels, max_tokens=32)
    before, after = round_on(source, minilm_folder(), task, tmp_path, steps=20, lr=5e-3)
    assert before.accuracy is not None and after.accuracy is not None
    assert after.loss < 0.9 * before.loss
    assert after.accuracy > 2 * max(before.accuracy, 1 / 20)


def test_a_round_on_sentences_about_restaurants(muster_data: Path, gpt2: Path, tmp_path: Path) -> None:
    source, _ = part_of(muster_data / "e2e", tmp_path)
    task = TaskSpec(kind="causal", dataset="e2e", max_tokens=64)
    before, after = round_on(source, gpt2, task, tmp_path, steps=20, lr=2e-2)
    assert after.loss < 0.9 * before.loss
