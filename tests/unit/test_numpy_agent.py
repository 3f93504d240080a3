"""The test agent: honest numerics, exact resume, the real agent's protocol."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import numpy as np
import pytest

from coordinator.export import export_peft
from coordinator.workers import protocol as worker_protocol
from edge_daemon import protocol
from muster.testbed import least_squares, numpy_agent, numpy_worker
from muster.testbed.least_squares import Rows
from shared import adapter as adapters
from shared import release_pack
from shared.adapter import Adapter, Factors
from shared.errors import UserError
from shared.frames import FrameReader, FrameWriter
from shared.ids import digest_of
from shared.jobs import BaseSpec, EvaluationSpec, JobSpec, TaskSpec, TrainingSpec
from shared.messages import Assignment, BlobRef, Work

MODEL = "6x4"


def assignment(*, rank: int = 3, steps: int = 12, batch: int = 8, round: int = 1, lr: float = 0.05) -> Assignment:
    return Assignment(
        job="toy",
        round=round,
        attempt=1,
        work=Work(ranks={least_squares.MODULE: rank}, batch=batch, bits=32, steps=steps),
        base=BaseSpec(model=MODEL),
        base_digest=least_squares.base_digest(MODEL),
        task=TaskSpec(kind="least_squares", dataset="toy"),
        training=TrainingSpec(lr=lr, checkpoint_every=5),
        rounds=3,
        seed=7,
        adapter=BlobRef(sha="0" * 64, size=0),
    )


def some_global(rank: int) -> Adapter:
    rng = np.random.default_rng(3)
    u = np.linalg.qr(rng.standard_normal((4, 4)))[0][:, :rank].astype(np.float32)
    v = np.linalg.qr(rng.standard_normal((6, 6)))[0][:, :rank].T.astype(np.float32)
    sigma = np.linspace(2.0, 0.5, rank).astype(np.float32)
    part = Factors(b=u, a=v, sigma=sigma)
    digest = least_squares.base_digest(MODEL)
    return Adapter(
        kind="global", job="toy", round=1, base_digest=digest, factors={least_squares.MODULE: part}, dense={}
    )


ROWS = least_squares.make_rows(MODEL, 50, seed=1)
START = least_squares.initial_adapter("toy", MODEL)


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_the_start_is_the_exact_global_model(rank: int) -> None:
    before = some_global(3)
    training = least_squares.begin(assignment(rank=rank), before, ROWS)
    part = training.factors()
    delta = part.scaling * part.b @ part.a
    if training.frozen is not None:
        assert training.frozen.sigma is not None
        delta = delta + training.frozen.b @ np.diag(training.frozen.sigma) @ training.frozen.a
    whole = before.factors[least_squares.MODULE]
    assert whole.sigma is not None
    np.testing.assert_allclose(delta, whole.b @ np.diag(whole.sigma) @ whole.a, atol=1e-6)
    assert training.trained == min(rank, 3)


def test_a_step_goes_along_the_gradient() -> None:
    """The loss's slope along a step s = -lr * g is -|s|^2 / lr, and only then."""
    work = msgspec.structs.replace(assignment(), training=TrainingSpec(lr=1e-3, max_grad_norm=0))
    training = least_squares.begin(work, some_global(2), ROWS, batch=len(ROWS))
    a, b = training.a.copy(), training.b.copy()
    training.step()
    moved_a, moved_b = training.a - a, training.b - b

    def loss(amount: float) -> float:
        training.a, training.b, training.drawn = a + amount * moved_a, b + amount * moved_b, 0
        return training.step()

    slope = (loss(1e-3) - loss(-1e-3)) / 2e-3
    assert (np.sum(moved_a**2) + np.sum(moved_b**2)) / -slope == pytest.approx(1e-3, rel=1e-4)


def test_training_lowers_the_loss() -> None:
    update, facts = least_squares.train(assignment(lr=0.3, steps=40), START, ROWS)
    assert facts.loss_last < 0.5 * facts.loss_first
    assert facts.samples == 40 * 8
    assert adapters.read(update).kind == "update"


def test_scores_are_told_where_they_are_asked_for() -> None:
    work = assignment()
    scored = msgspec.structs.replace(work, work=msgspec.structs.replace(work.work, score=True))
    assert least_squares.train(scored, START, ROWS)[1].importance == {least_squares.MODULE: 1.0}
    assert least_squares.train(work, START, ROWS)[1].importance == {}
    untrained = least_squares.begin(scored, adapters.read(START), ROWS)
    assert untrained.importance() == {}, "B = 0: nothing is known"


def test_resume_from_any_checkpoint_gives_the_same_bytes() -> None:
    whole, _ = least_squares.train(assignment(), START, ROWS)
    for cut in range(12):
        first = least_squares.begin(assignment(), adapters.read(START), ROWS)
        for _ in range(cut):
            first.step()
        second = least_squares.begin(assignment(), adapters.read(START), ROWS)
        second.restore(first.save())
        while not second.finished:
            second.step()
        assert second.update() == whole


def test_schedule_and_warm_up() -> None:
    plain = assignment(lr=1.0, round=2)
    linear = msgspec.structs.replace(plain, training=TrainingSpec(lr=1.0, schedule="linear"))
    warm = msgspec.structs.replace(assignment(lr=1.0), training=TrainingSpec(lr=1.0, warmup_steps=4))
    assert least_squares.learning_rate(plain, 0) == 1.0
    assert least_squares.learning_rate(linear, 0) == pytest.approx(2 / 3)
    assert [least_squares.learning_rate(warm, step) for step in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]


@pytest.mark.parametrize("name", ["", "6", "0x4", "axb", "6x4x2"])
def test_a_wrong_model_name_is_the_users_fault(name: str) -> None:
    with pytest.raises(UserError, match="inputs x outputs"):
        least_squares.parse_model(name)


@pytest.mark.parametrize("line", ["{", "[]", '{"x": [1], "y": [1]}', '{"x": "abcdef", "y": [1, 2, 3, 4]}'])
def test_a_wrong_row_names_file_and_line(tmp_path: Path, line: str) -> None:
    file = tmp_path / "d.jsonl"
    file.write_text(line + "\n")
    with pytest.raises(UserError, match=r"d\.jsonl:1"):
        least_squares.read_rows(file, MODEL)


# ---- the process


class Pipes:
    """The daemon's side of one agent."""

    def __init__(self, process: subprocess.Popen[bytes], into: int, out_of: int) -> None:
        self.process = process
        self.writer = FrameWriter(os.fdopen(into, "wb"))
        self.reader: FrameReader[protocol.FromAgent] = FrameReader(os.fdopen(out_of, "rb"), protocol.FromAgent)  # type: ignore[arg-type]  # a union is a type to msgspec

    def last(self) -> protocol.FromAgent:
        """The next message that is neither a beat nor progress."""
        while isinstance(message := self.reader.read(), protocol.Beat | protocol.Progressed):
            pass
        assert message is not None
        return message


@contextmanager
def agent(**environment: str) -> Iterator[Pipes]:
    down_r, down_w = os.pipe()
    up_r, up_w = os.pipe()
    command = [sys.executable, "-m", "muster.testbed.numpy_agent", "--read-fd", str(down_r), "--write-fd", str(up_w)]
    process = subprocess.Popen(command, pass_fds=(down_r, up_w), env={**os.environ, **environment})
    os.close(down_r)
    os.close(up_w)
    try:
        yield Pipes(process, down_w, up_r)
    finally:
        process.kill()
        process.wait()


def order(folder: Path, work: Assignment, **more: object) -> protocol.Train:
    data, start = folder / "data.jsonl", folder / "start"
    least_squares.write_rows(data, ROWS)
    start.write_bytes(START)
    return protocol.Train(
        assignment=work,
        base_path=MODEL,
        data_path=str(data),
        adapter_path=str(start),
        update_path=str(folder / "update"),
        checkpoint_dir=str(folder / "work"),
        **more,  # type: ignore[arg-type]  # fields of Train
    )


def test_probe_train_and_shut_down(tmp_path: Path) -> None:
    with agent() as pipes:
        file = tmp_path / "data.jsonl"
        wanted = order(tmp_path, assignment())
        pipes.writer.write(protocol.Probe(datasets={"toy": str(file), "none": "/nowhere"}))
        probed = pipes.last()
        assert isinstance(probed, protocol.Probed)
        assert probed.datasets["toy"].rows == 50
        assert "none" in probed.notes
        pipes.writer.write(wanted)
        trained = pipes.last()
        assert isinstance(trained, protocol.Trained)
        data = (tmp_path / "update").read_bytes()
        assert data == least_squares.train(assignment(), START, ROWS)[0]
        assert (trained.sha, trained.size) == (digest_of(data), len(data))
        pipes.writer.write(protocol.Shutdown())
        assert pipes.process.wait(20) == 0


def test_a_crash_resumes_to_the_same_bytes(tmp_path: Path) -> None:
    with agent(MUSTER_TEST_CRASH_AT="7") as pipes:
        pipes.writer.write(order(tmp_path, assignment()))
        assert pipes.process.wait(20) == numpy_agent.CRASH_CODE
    with agent(MUSTER_TEST_CRASH_AT="7") as pipes:
        pipes.writer.write(order(tmp_path, assignment()))
        assert isinstance(pipes.last(), protocol.Trained)
    assert (tmp_path / "update").read_bytes() == least_squares.train(assignment(), START, ROWS)[0]


def test_pause_resume_stop_and_discard(tmp_path: Path) -> None:
    with agent(MUSTER_TEST_STEP_S="0.05") as pipes:
        pipes.writer.write(protocol.Probe(datasets={}, beat_s=0.05))
        assert isinstance(pipes.last(), protocol.Probed)
        pipes.writer.write(order(tmp_path, assignment(steps=4000)))
        pipes.writer.write(protocol.Pause())
        while not isinstance(message := pipes.reader.read(), protocol.Beat):
            assert isinstance(message, protocol.Progressed)
        pipes.writer.write(protocol.Resume())
        pipes.writer.write(protocol.Stop())
        trained = pipes.last()
        assert isinstance(trained, protocol.Trained)
        assert trained.facts.ended == "drain"
        assert 0 < trained.facts.steps < 4000
        assert trained.facts.samples == 8 * trained.facts.steps
        pipes.writer.write(order(tmp_path, assignment(steps=4000)))
        pipes.writer.write(protocol.Stop(discard=True))
        failed = pipes.last()
        assert isinstance(failed, protocol.Failed)
        assert failed.kind == "stopped"
        pipes.writer.write(order(tmp_path, assignment(steps=4000), train_for_s=0.3))
        partial = pipes.last()
        assert isinstance(partial, protocol.Trained)
        assert partial.facts.ended == "time"
        pipes.writer.write(order(tmp_path, assignment(steps=4000)))
        pipes.writer.write(protocol.Stop(after_step=True))
        ended = pipes.last()
        assert isinstance(ended, protocol.Trained)
        assert ended.facts.ended == "time" and 1 <= ended.facts.steps < 10
        for limit_s, most in ((0.5, 4002), (60.0, 5)):
            asked = assignment(steps=2)
            more = msgspec.structs.replace(asked.work, extra_steps=most - 2)
            asked = msgspec.structs.replace(asked, work=more)
            pipes.writer.write(order(tmp_path, asked, train_for_s=limit_s))
            whole = pipes.last()
            assert isinstance(whole, protocol.Trained) and whole.facts.ended == "complete"
            assert (whole.facts.steps == most) == (most == 5) and whole.facts.steps > 2


def test_echo_returns_the_initial_factors_at_once(tmp_path: Path) -> None:
    with agent(MUSTER_TEST_ECHO="1") as pipes:
        pipes.writer.write(order(tmp_path, assignment()))
        trained = pipes.last()
        assert isinstance(trained, protocol.Trained)
        assert trained.facts.steps == assignment().work.steps  # claimed, so that the update is taken
        factors = adapters.read((tmp_path / "update").read_bytes()).factors[least_squares.MODULE]
        assert factors.rank == 3
        assert np.abs(factors.b).max() > 0


def test_the_worker_prepares_and_evaluates(tmp_path: Path) -> None:
    held = tmp_path / "held.jsonl"
    least_squares.write_rows(held, ROWS)
    spec = JobSpec(
        name="toy",
        base=BaseSpec(model=MODEL),
        task=TaskSpec(kind="least_squares", dataset="toy"),
        evaluation=EvaluationSpec(data=str(held)),
    )
    worker = numpy_worker.Worker()
    file = tmp_path / "global"
    prepared = worker.answer(worker_protocol.Prepare(job=spec, base_path=MODEL, adapter_path=str(file)))
    assert isinstance(prepared, worker_protocol.Prepared)
    assert prepared.facts.base_digest == digest_of(MODEL.encode())
    assert [(m.name, m.out, m.inp) for m in prepared.facts.modules] == [("linear", 4, 6)]
    evaluated = worker.answer(worker_protocol.Evaluate(job=spec, base_path=MODEL, adapter_path=str(file), rows=10))
    assert isinstance(evaluated, worker_protocol.Evaluated)
    assert evaluated.metrics.rows == 10
    assert evaluated.metrics.loss == pytest.approx(float(np.mean(np.square(ROWS.y[:10]))), rel=1e-6)
    wrong = msgspec.structs.replace(spec, base=BaseSpec(model="big"))
    refused = worker.answer(worker_protocol.Prepare(job=wrong, base_path="big", adapter_path=str(file)))
    assert isinstance(refused, worker_protocol.WorkerFailed)
    assert refused.operator


# ---- releases


def release_folder(folder: Path, adapter: Adapter) -> Path:
    """The files of a release of `adapter`, as the coordinator makes them."""
    job = JobSpec(name="toy", base=BaseSpec(model=MODEL), task=TaskSpec(kind="least_squares", dataset="toy"))
    export_peft(adapter, folder, spec=job, base=MODEL)
    about = release_pack.About(
        release=folder.name, job="toy", round=1, kind="lora", base=job.base, base_digest=adapter.base_digest,
        task=job.task,
    )  # fmt: skip
    (folder / release_pack.ABOUT).write_bytes(msgspec.json.encode(about))
    return folder


def test_a_release_is_measured_from_its_files(tmp_path: Path) -> None:
    made = release_folder(tmp_path / "toy.r1-1", some_global(3))
    data = tmp_path / "data.jsonl"
    least_squares.write_rows(data, ROWS)
    order = protocol.Evaluate(
        release="toy.r1-1", folder=str(made), kind="lora", task=TaskSpec(kind="least_squares", dataset="toy"),
        base=BaseSpec(model=MODEL), base_path="", base_digest=least_squares.base_digest(MODEL), bits=32,
        data_path=str(data),
    )  # fmt: skip
    other = release_folder(tmp_path / "toy.r1-2", some_global(1))
    with agent() as pipes:
        pipes.writer.write(order)
        first = pipes.last()
        assert isinstance(first, protocol.Evaluated) and first.before is not None and first.after is not None
        assert first.after.loss == pytest.approx(least_squares.loss_of(some_global(3), ROWS), rel=1e-5)
        assert first.before.loss == pytest.approx(float(np.mean(np.square(ROWS.y))), rel=1e-6), "the base alone is zero"
        changes = {"release": "toy.r1-2", "folder": str(other), "previous": str(made), "share": 0.5, "rows": 20}
        pipes.writer.write(msgspec.structs.replace(order, **changes))
        second = pipes.last()
        assert isinstance(second, protocol.Evaluated) and second.before is not None and second.after is not None
        assert (second.before.rows, second.after.rows) == (20, 20)
        assert not second.after.trained_on
        pipes.writer.write(msgspec.structs.replace(order, hold_out=0.2, trained_on=True, share=0.1))
        third = pipes.last()
        assert isinstance(third, protocol.Evaluated) and third.after is not None
        assert (third.after.rows, third.after.trained_on) == (10, False)
        left_out = Rows(ROWS.x[4::5], ROWS.y[4::5])
        assert third.after.loss == pytest.approx(least_squares.loss_of(some_global(3), left_out), rel=1e-5)
        (other / "adapter_model.safetensors").write_bytes(b"no tensors")
        pipes.writer.write(msgspec.structs.replace(order, **changes))
        unfit = pipes.last()
        assert isinstance(unfit, protocol.Unfit) and unfit.kind == "load"
        pipes.writer.write(msgspec.structs.replace(order, data_path="/nowhere"))
        unfit = pipes.last()
        assert isinstance(unfit, protocol.Unfit) and unfit.kind == "data"


def test_it_starts_without_the_extras() -> None:
    """A host with numpy alone runs it (`tests/hosts`)."""
    code = (
        "import sys; sys.modules.update(dict.fromkeys(['safetensors', 'torch', 'scipy', 'httpx', 'fastapi'])); "
        "import muster.testbed.numpy_agent"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
