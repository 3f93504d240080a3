"""The coordinator's worker on real models, in process and as a subprocess."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
import transformers

from coordinator.workers.model_worker import ModelWorker
from coordinator.workers.protocol import (
    Evaluate,
    Evaluated,
    Exit,
    FromWorker,
    Prepare,
    Prepared,
    WorkerBeat,
    WorkerFailed,
)
from shared import adapter, units
from shared.frames import FrameReader, FrameWriter
from shared.jobs import BaseSpec, EvaluationSpec, JobSpec, TaskSpec
from shared.modeling import base_model, lora, pruning, weights
from shared.modeling.data import tokenize
from tests.training.tiny_models import COLOURS, STORIES, colour_rows, global_adapter, story_rows, write_jsonl


def job(task: TaskSpec, data: Path | str, seed: int = 0, targets: list[str] | None = None) -> JobSpec:
    return JobSpec(
        name="test-job", base=BaseSpec(model="tiny", targets=targets or []), task=task, seed=seed,
        evaluation=EvaluationSpec(data=str(data), batch=7),
    )  # fmt: skip


@pytest.fixture
def worker() -> ModelWorker:
    return ModelWorker(FrameWriter(io.BytesIO()))


def prepare(worker: ModelWorker, spec: JobSpec, base: Path | str, path: Path) -> Prepared:
    answer = worker.answer(Prepare(job=spec, base_path=str(base), adapter_path=str(path)))
    assert isinstance(answer, Prepared), answer
    return answer


def evaluate(worker: ModelWorker, spec: JobSpec, base: Path, path: Path, rows: int = 0) -> Evaluated:
    answer = worker.answer(Evaluate(job=spec, base_path=str(base), adapter_path=str(path), rows=rows))
    assert isinstance(answer, Evaluated), answer
    return answer


def test_preparing_describes_the_base_and_writes_the_first_adapter(
    worker: ModelWorker, bert: Path, colours: Path, tmp_path: Path
) -> None:
    facts = prepare(worker, job(COLOURS, colours), bert, tmp_path / "g0").facts
    assert (facts.blocks, facts.hidden, facts.heads, facts.intermediate) == (2, 32, 2, 64)
    assert len(facts.modules) == 12
    first = facts.modules[0]
    assert (first.name, first.out, first.inp, first.block) == ("bert.encoder.layer.0.attention.self.query", 32, 32, 0)
    assert facts.dense == {"classifier.bias": [3], "classifier.weight": [3, 32]}
    assert facts.base_digest == weights.base_digest(bert)
    whole = transformers.AutoModelForSequenceClassification.from_pretrained(str(bert), num_labels=3)
    assert facts.linear_params + facts.other_params == sum(p.numel() for p in whole.parameters())
    assert facts.linear_params == 2 * (4 * 32 * 32 + 2 * 32 * 64)
    written = adapter.read_file(tmp_path / "g0")
    assert (written.kind, written.round, written.job, written.factors) == ("global", 0, "test-job", {})
    assert written.base_digest == facts.base_digest
    assert {name: list(tensor.shape) for name, tensor in written.dense.items()} == facts.dense


def test_the_first_adapter_follows_the_seed(worker: ModelWorker, bert: Path, colours: Path, tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        prepare(worker, job(COLOURS, colours, seed), bert, tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert (tmp_path / "a").read_bytes() != (tmp_path / "c").read_bytes()


def test_targets_choose_the_modules(worker: ModelWorker, gpt2: Path, stories: Path, tmp_path: Path) -> None:
    facts = prepare(worker, job(STORIES, stories, targets=["c_attn"]), gpt2, tmp_path / "g0").facts
    assert [(m.name, m.out, m.inp, m.block) for m in facts.modules] == [
        (f"transformer.h.{block}.attn.c_attn", 96, 32, block) for block in range(2)
    ]
    assert facts.dense == {}
    assert (facts.blocks, facts.hidden, facts.heads) == (2, 32, 2)


def test_evaluation_is_that_of_plain_transformers(
    worker: ModelWorker, bert: Path, colours: Path, tmp_path: Path
) -> None:
    spec = job(COLOURS, colours)
    digest = prepare(worker, spec, bert, tmp_path / "g0").facts.base_digest
    given = global_adapter(base_model.load(bert, COLOURS), 3)
    given = adapter.Adapter(**{**vars(given), "base_digest": digest})
    (tmp_path / "g1").write_bytes(adapter.write(given))
    metrics = evaluate(worker, spec, bert, tmp_path / "g1").metrics
    model = transformers.AutoModelForSequenceClassification.from_pretrained(str(bert), num_labels=3).eval()
    with torch.no_grad():
        for name, part in given.factors.items():
            b, a = lora.product(part)
            model.get_parameter(f"{name}.weight").add_(torch.from_numpy(b @ a))
        for name, tensor in given.dense.items():
            model.get_parameter(name).copy_(torch.from_numpy(tensor.copy()))
        tokens = tokenize(str(colours), COLOURS, transformers.AutoTokenizer.from_pretrained(str(bert)))
        batch = tokens.batch(np.arange(tokens.rows))
        logits = model(input_ids=batch.ids, attention_mask=batch.mask).logits
    assert metrics.rows == 60
    assert metrics.loss == pytest.approx(float(torch.nn.functional.cross_entropy(logits, batch.targets)), abs=1e-5)
    assert metrics.accuracy == pytest.approx(float((logits.argmax(-1) == batch.targets).double().mean()))
    assert metrics.perplexity is None


def test_evaluation_leaves_nothing_behind_and_ignores_order(worker: ModelWorker, gpt2: Path, tmp_path: Path) -> None:
    rows = story_rows(20)
    spec = job(STORIES, write_jsonl(tmp_path / "a.jsonl", rows))
    turned = job(STORIES, write_jsonl(tmp_path / "b.jsonl", rows[::-1]))
    digest = prepare(worker, spec, gpt2, tmp_path / "g0").facts.base_digest
    given = global_adapter(base_model.load(gpt2, STORIES), 2, size=2.0)
    (tmp_path / "g1").write_bytes(adapter.write(adapter.Adapter(**{**vars(given), "base_digest": digest})))
    first = evaluate(worker, spec, gpt2, tmp_path / "g0").metrics
    tuned = evaluate(worker, spec, gpt2, tmp_path / "g1").metrics
    again = evaluate(worker, turned, gpt2, tmp_path / "g0").metrics
    assert tuned.loss != pytest.approx(first.loss, abs=1e-3)
    assert again.loss == pytest.approx(first.loss, abs=1e-6)
    assert first.perplexity == pytest.approx(float(np.exp(first.loss)))


def test_a_base_that_a_pruned_job_left_small_is_described_whole(
    worker: ModelWorker, bert: Path, colours: Path, tmp_path: Path
) -> None:
    spec = job(COLOURS, colours)
    told = prepare(worker, spec, bert, tmp_path / "g0").facts
    base = base_model.load(bert, COLOURS)
    known = pruning.groups_of(base)
    kept = units.best(known, {group.name: np.arange(group.count) + 1.0 for group in known}, 0.5)
    pruned = replace(global_adapter(base, 3), base_digest=weights.base_digest(bert), kept=units.pack(known, kept))
    (tmp_path / "g1").write_bytes(adapter.write(pruned))
    assert evaluate(worker, spec, bert, tmp_path / "g1").metrics.pruned > 0.4
    assert prepare(worker, spec, bert, tmp_path / "g2").facts == told


def test_rows_takes_the_first_ones(worker: ModelWorker, bert: Path, tmp_path: Path) -> None:
    rows = colour_rows(20)
    spec = job(COLOURS, write_jsonl(tmp_path / "a.jsonl", rows))
    cut = job(COLOURS, write_jsonl(tmp_path / "b.jsonl", rows[:9]))
    prepare(worker, spec, bert, tmp_path / "g0")
    some = evaluate(worker, spec, bert, tmp_path / "g0", rows=9).metrics
    assert some.rows == 9
    assert some.loss == pytest.approx(evaluate(worker, cut, bert, tmp_path / "g0").metrics.loss, abs=1e-6)


def test_faults_of_the_operator_are_one_line(worker: ModelWorker, bert: Path, colours: Path, tmp_path: Path) -> None:
    bad = write_jsonl(tmp_path / "bad.jsonl", [{"text": "sea", "label": 7}])
    empty = write_jsonl(tmp_path / "empty.jsonl", [])
    one = TaskSpec(kind="classification", dataset="d", labels=["only"])
    path = str(tmp_path / "g")
    good = job(COLOURS, colours)
    long = TaskSpec(kind="classification", dataset="d", labels=["a", "b", "c"], max_tokens=33)
    foreign = tmp_path / "foreign"
    foreign.write_bytes(adapter.write(global_adapter(base_model.load(bert, COLOURS), 1)))
    cases: list[tuple[Any, str]] = [
        (Prepare(job=good, base_path="nobody/nothing", adapter_path=path), "no such folder, and not from the hub"),
        (Prepare(job=good, base_path=str(tmp_path / "none"), adapter_path=path), "no such model folder"),
        (Prepare(job=job(COLOURS, "/none.jsonl"), base_path=str(bert), adapter_path=path), "no such data file"),
        (Prepare(job=job(COLOURS, bad), base_path=str(bert), adapter_path=path), "the job has labels 0 to 2"),
        (Prepare(job=job(COLOURS, empty), base_path=str(bert), adapter_path=path), "no rows"),
        (Prepare(job=job(one, colours), base_path=str(bert), adapter_path=path), "needs two labels at least"),
        (Prepare(job=job(long, colours), base_path=str(bert), adapter_path=path), "takes 32 at most"),
        (
            Prepare(job=job(COLOURS, colours, targets=["q_proj"]), base_path=str(bert), adapter_path=path),
            "no such linear layer",
        ),
        (Evaluate(job=job(COLOURS, ""), base_path=str(bert), adapter_path=path), "evaluation.data: not set"),
        (Evaluate(job=good, base_path=str(bert), adapter_path=path), "no such adapter file"),
        (Evaluate(job=good, base_path=str(bert), adapter_path=str(foreign)), "made for another base"),
    ]
    for request, says in cases:
        answer = worker.answer(request)
        assert isinstance(answer, WorkerFailed), answer
        assert answer.operator
        assert says in answer.reason
        assert "\n" not in answer.reason
    assert not Path(path).exists()


def test_as_a_subprocess(bert: Path, colours: Path, tmp_path: Path) -> None:
    worker_reads, writes = os.pipe()
    reads, worker_writes = os.pipe()
    command = [sys.executable, "-m", "coordinator.workers.model_worker"]
    process = subprocess.Popen(
        [*command, "--read-fd", str(worker_reads), "--write-fd", str(worker_writes)],
        pass_fds=(worker_reads, worker_writes),
    )
    os.close(worker_reads)
    os.close(worker_writes)
    writer = FrameWriter(os.fdopen(writes, "wb"))
    # A union of messages is no class to a checker.
    reader: FrameReader[Any] = FrameReader(os.fdopen(reads, "rb"), FromWorker)  # type: ignore[arg-type]

    def ask(request: msgspec.Struct) -> Any:
        writer.write(request)
        while isinstance(answer := reader.read(), WorkerBeat):
            pass
        return answer

    spec, path = job(COLOURS, colours), str(tmp_path / "g0")
    assert isinstance(ask(Prepare(job=spec, base_path=str(bert), adapter_path=path)), Prepared)
    answer = ask(Evaluate(job=spec, base_path=str(bert), adapter_path=path))
    assert isinstance(answer, Evaluated)
    assert answer.metrics.rows == 60
    assert isinstance(ask(Evaluate(job=spec, base_path="/none", adapter_path=path)), WorkerFailed)
    writer.write(Exit())
    assert process.wait(timeout=30) == 0
