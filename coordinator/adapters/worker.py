"""The model worker's supervisor: one subprocess that needs torch, asked one thing at a time, replaced when it dies."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from coordinator.workers import protocol as wire
from shared.frames import FrameWriter
from shared.subprocess_pipe import start_piped

log = logging.getLogger(__name__)
TRIES = 3
Question = wire.Prepare | wire.Evaluate | wire.TopRound
Answer = wire.Prepared | wire.Evaluated | wire.TopTrained | wire.WorkerFailed
Reply = Callable[[Answer], None]


@dataclass(frozen=True)
class WorkerSpoke:
    """A message, or the end (None), of worker process number `run`; an event for the owner's queue."""

    run: int
    message: wire.FromWorker | None
    top: bool = False
    """It is the top worker's."""


class Supervised(Protocol):
    """A worker process that is replaced when it dies."""

    def on_spoke(self, event: WorkerSpoke) -> None:
        """Take what the subprocess said."""

    def tick(self, now: float) -> None:
        """Let time pass."""

    def limit_silence(self, silence_s: float) -> None:
        """From now on it may be silent for so long."""

    def stop(self) -> None:
        """End the subprocess."""


class Worker(Supervised, Protocol):
    """Answers questions about models."""

    def ask(self, question: wire.Prepare | wire.Evaluate, reply: Reply) -> None:
        """Queue `question`; `reply` gets the answer on the owner's thread."""


class Top(Supervised, Protocol):
    """Conducts rounds of split learning."""

    def ask(self, question: wire.TopRound, reply: Reply) -> None:
        """Queue `question`; `reply` gets the answer on the owner's thread."""

    def tell(self, message: wire.TopWithout | wire.TopFinish) -> None:
        """Say something about the question under way, if there is one."""

    def drop(self) -> None:
        """Forget every question; nothing is replied."""


@dataclass
class _Asked:
    question: Question
    reply: Reply
    tries: int = 0
    told: list[wire.TopWithout | wire.TopFinish] = field(default_factory=list)
    """What was said about it since; a new process must hear it, too."""


class SubprocessWorker:
    """`Worker` and `Top` over a pipe. All methods run on the owner's thread; one that reads posts `WorkerSpoke`."""

    def __init__(
        self,
        command: Sequence[str],
        post: Callable[[WorkerSpoke], None],
        clock: Callable[[], float],
        silence_s: float,
        *,
        top: bool = False,
    ) -> None:
        self._command = list(command)
        self._post = post
        self._clock = clock
        self._silence_s = silence_s
        self._top = top
        self._queue: deque[_Asked] = deque()
        self._current: _Asked | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._writer: FrameWriter | None = None
        self._run = 0
        self._heard_at = 0.0

    def tell(self, message: wire.TopWithout | wire.TopFinish) -> None:
        """Say something about the question under way, if there is one."""
        if self._current is None:
            return
        self._current.told.append(message)
        if self._writer is not None:
            try:
                self._writer.write(message)
            except OSError as error:
                log.warning("the worker can't be reached: %s", error)

    def drop(self) -> None:
        """Forget every question; a worker that is at one is ended."""
        busy, self._current = self._current is not None, None
        self._queue.clear()
        if busy:
            self.stop()

    def ask(self, question: Question, reply: Reply) -> None:
        """Queue `question`; `reply` gets the answer on the owner's thread."""
        self._queue.append(_Asked(question, reply))
        self._next()

    def on_spoke(self, event: WorkerSpoke) -> None:
        """Take what the reader thread posted."""
        if event.run != self._run:
            return
        self._heard_at = self._clock()
        match event.message:
            case None:
                self._on_death()
            case wire.WorkerBeat():
                return
            case answer:
                asked, self._current = self._current, None
                if asked is not None:
                    asked.reply(answer)
                self._next()

    def tick(self, now: float) -> None:
        """Kill a worker that has been silent for too long; its death is handled like any other."""
        if self._current is not None and self._process is not None and now - self._heard_at > self._silence_s:
            log.error("the worker said nothing for %.0f s: killed", self._silence_s)
            self._heard_at = now
            self._process.kill()

    def limit_silence(self, silence_s: float) -> None:
        """From now on it may be silent for so long."""
        self._silence_s = silence_s

    def stop(self) -> None:
        """End the subprocess."""
        self._run += 1
        if self._process is not None:
            self._process.send_signal(signal.SIGKILL)
            self._process.wait()
            self._process = None

    def _next(self) -> None:
        if self._current is not None or not self._queue:
            return
        self._current = self._queue.popleft()
        self._send()

    def _send(self) -> None:
        assert self._current is not None
        self._current.tries += 1
        try:
            if self._process is None:
                self._start()
            assert self._writer is not None
            for message in (self._current.question, *self._current.told):
                self._writer.write(message)
        except OSError as error:
            log.warning("the worker can't be reached: %s", error)
            self._post(WorkerSpoke(self._run, None, self._top))

    def _on_death(self) -> None:
        code = None
        if self._process is not None:
            self._process.kill()
            code = self._process.wait()
        self._process = None
        self._run += 1
        if self._current is None:
            return
        if self._current.tries < TRIES:
            log.warning("the worker ended (%s), started again", code)
            self._send()
            return
        asked, self._current = self._current, None
        asked.reply(wire.WorkerFailed(reason=f"the worker ended {TRIES} times (exit status {code}); see its log"))
        self._next()

    def _start(self) -> None:
        self._run += 1
        self._heard_at = self._clock()
        run = self._run

        def heard(message: wire.FromWorker | None) -> None:
            self._post(WorkerSpoke(run, message, self._top))

        def ended(_problem: str) -> None:
            heard(None)

        self._process, self._writer = start_piped(
            self._command, wire.FromWorker, heard, ended, name="worker", env=_worker_environment()
        )


def _worker_environment() -> dict[str, str]:
    """Ours without the service's limits on threads, which are for its own folds."""
    return {name: value for name, value in os.environ.items() if not name.endswith("_NUM_THREADS")}
