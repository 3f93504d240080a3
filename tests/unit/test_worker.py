"""The model worker's supervisor over real subprocesses."""

from __future__ import annotations

import os
import queue
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from coordinator.adapters.worker import Answer, SubprocessWorker, WorkerSpoke
from coordinator.workers import protocol as wire
from tests.unit.machine_rig import spec


class Loop:
    """The owner's queue."""

    def __init__(self, command: list[str], silence_s: float = 30.0) -> None:
        self.events: queue.SimpleQueue[WorkerSpoke] = queue.SimpleQueue()
        self.worker = SubprocessWorker(command, self.events.put, time.monotonic, silence_s)
        self.answers: list[Answer] = []

    def turn_until(self, answers: int) -> None:
        deadline = time.monotonic() + 30
        while len(self.answers) < answers:
            assert time.monotonic() < deadline, "no answer"
            self.worker.tick(time.monotonic())
            try:
                self.worker.on_spoke(self.events.get(timeout=0.05))
            except queue.Empty:
                continue


@pytest.fixture
def loop() -> Iterator[Loop]:
    made = Loop([sys.executable, "-m", "muster.testbed.numpy_worker"])
    yield made
    made.worker.stop()


def prepare(tmp_path: Path, name: str) -> wire.Prepare:
    return wire.Prepare(job=spec(), base_path="16x8", adapter_path=str(tmp_path / name))


def test_questions_are_answered_in_order(loop: Loop, tmp_path: Path) -> None:
    loop.worker.ask(prepare(tmp_path, "one"), loop.answers.append)
    loop.worker.ask(wire.Evaluate(job=spec(), base_path="16x8", adapter_path="/nowhere"), loop.answers.append)
    loop.turn_until(2)
    assert isinstance(loop.answers[0], wire.Prepared) and isinstance(loop.answers[1], wire.WorkerFailed)
    assert (tmp_path / "one").exists()


def test_a_killed_worker_is_replaced_and_asked_again(loop: Loop, tmp_path: Path) -> None:
    loop.worker.ask(prepare(tmp_path, "one"), loop.answers.append)
    assert loop.worker._process is not None
    os.kill(loop.worker._process.pid, signal.SIGKILL)
    loop.turn_until(1)
    assert isinstance(loop.answers[0], wire.Prepared)


def test_a_worker_that_always_dies_is_given_up(tmp_path: Path) -> None:
    loop = Loop([sys.executable, "-c", "raise SystemExit(3)"])
    loop.worker.ask(prepare(tmp_path, "one"), loop.answers.append)
    loop.turn_until(1)
    assert isinstance(loop.answers[0], wire.WorkerFailed) and "3 times" in loop.answers[0].reason
    loop.worker.stop()


def test_a_silent_worker_is_killed(tmp_path: Path) -> None:
    loop = Loop([sys.executable, "-c", "import time; time.sleep(60)"], silence_s=0.3)
    loop.worker.ask(prepare(tmp_path, "one"), loop.answers.append)
    loop.turn_until(1)
    assert isinstance(loop.answers[0], wire.WorkerFailed)
    loop.worker.stop()


def test_a_worker_that_can_not_start_is_a_failure_not_a_crash(tmp_path: Path) -> None:
    loop = Loop(["/nonexistent/worker"])
    loop.worker.ask(prepare(tmp_path, "one"), loop.answers.append)
    loop.turn_until(1)
    assert isinstance(loop.answers[0], wire.WorkerFailed)
