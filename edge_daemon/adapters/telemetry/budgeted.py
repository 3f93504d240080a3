"""Asks a reader that may hang from a thread of its own, and waits for the answer no longer than a budget."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable
from typing import Generic, TypeVar

log = logging.getLogger(__name__)
A = TypeVar("A")
Q = TypeVar("Q")


class Unanswered(Exception):
    """The reader did not answer in time, or still hangs in a question before."""


class Budgeted(Generic[Q, A]):
    """`name`: of the reader. One question at a time; a hang costs the asking thread one budget, then nothing until
    the reader answers. What it answers late is dropped."""

    def __init__(
        self, name: str, ask: Callable[[Q], A], budget_s: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.silent_s = 0.0
        """For how long the reader has not answered; 0: it does."""
        self._name = name
        self._ask = ask
        self._budget_s = budget_s
        self._clock = clock
        self._questions: queue.SimpleQueue[tuple[Q] | None] = queue.SimpleQueue()
        self._answers: queue.SimpleQueue[A | Exception] = queue.SimpleQueue()
        self._hung_since: float | None = None
        self._thread: threading.Thread | None = None

    def read(self, question: Q) -> A:
        """The answer. Raises `Unanswered`, or what the reader raised."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name=f"telemetry-{self._name}", daemon=True)
            self._thread.start()
        if self._hung_since is not None:
            self._look_after_a_hang(self._hung_since)
        asked = self._clock()
        self._questions.put((question,))
        try:
            answer = self._answers.get(timeout=self._budget_s)
        except queue.Empty:
            self._hung_since, self.silent_s = asked, self._clock() - asked
            log.warning("%s: no answer within %g s; going on without its readings", self._name, self._budget_s)
            raise Unanswered(self._name) from None
        if isinstance(answer, Exception):
            raise answer
        return answer

    def stop(self) -> None:
        """End the thread once it is free; a hung one is left behind."""
        self._questions.put(None)

    def _look_after_a_hang(self, since: float) -> None:
        try:
            self._answers.get_nowait()
        except queue.Empty:
            self.silent_s = self._clock() - since
            raise Unanswered(self._name) from None
        log.warning("%s: answers again, after %.0f s", self._name, self._clock() - since)
        self._hung_since, self.silent_s = None, 0.0

    def _run(self) -> None:
        while (asked := self._questions.get()) is not None:
            answer: A | Exception
            try:
                answer = self._ask(asked[0])
            except Exception as error:  # noqa: BLE001 - the loop of a thread: it must answer, or its reader counts as hung
                answer = error
            self._answers.put(answer)
