"""A program of blocking calls on a virtual clock: it has a thread of its own, which runs only while its owner waits.

So the real code of an agent, which waits for what it needs, takes part in a simulation of callbacks: never do two of
its threads run at once, and the order in which they do is that of the clock.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from muster.testbed.clocked_process import Later


class Cut(BaseException):
    """The strand ends here: no program handles it."""


class Strand:
    """`program` as a thread. `later`: calls back on the clock. Its owner alone calls `start`, `wake` and `cut`; the
    program alone calls `rest`."""

    def __init__(self, program: Callable[[], None], later: Later) -> None:
        self._program = program
        self._later = later
        self._thread = threading.Thread(target=self._run, name="strand", daemon=True)
        self._go, self._back = threading.Semaphore(0), threading.Semaphore(0)
        self._rests = 0
        self._resting = False
        self._cut = False
        self._fault: BaseException | None = None
        self.started = self.ended = False

    def start(self) -> None:
        """Run to the first rest."""
        self.started = True
        self._thread.start()
        self._turn()

    def wake(self) -> None:
        """End a rest before its time."""
        if self._resting:
            self._turn()

    def cut(self) -> None:
        """End the program where it rests."""
        if self._resting:
            self._cut = True
            self._turn()

    def rest(self, seconds: float) -> None:
        """Let time pass: so many seconds, or until it is woken."""
        self._rests += 1
        number = self._rests

        def over() -> None:
            if number == self._rests:
                self.wake()

        self._later(seconds, over)
        self._resting = True
        self._back.release()
        self._go.acquire()
        self._resting = False
        if self._cut:
            raise Cut

    def _turn(self) -> None:
        """Of the owner: let it run until it rests or ends. Raises what the program raised."""
        self._go.release()
        try:
            self._back.acquire()
        except BaseException:  # Ctrl-C; it still computes, and nothing else may until it rests
            self._back.acquire()
            raise
        if self._fault is not None:
            fault, self._fault = self._fault, None
            raise fault

    def _run(self) -> None:
        self._go.acquire()
        try:
            self._program()
        except Cut:
            pass
        except BaseException as error:  # noqa: BLE001  # it is its owner's to handle
            self._fault = error
        finally:
            self.ended = True
            self._back.release()
