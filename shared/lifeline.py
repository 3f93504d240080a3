"""The thread that tells systemd that a service lives, only as long as it really is well.

While the service starts or stops it asks for time instead: a log to replay, or a model that must be loaded before its
work can be saved, may take longer than the unit allows.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Literal

from shared.logs import event
from shared.notify import Notify
from shared.settings import HealthSettings

log = logging.getLogger(__name__)


class Lifeline:
    """`examine` says what is wrong with the service ("": nothing); it is called on the thread of this object.

    `watchdog_s`: within which systemd must hear of us; None: it does not watch.
    """

    def __init__(
        self,
        notify: Notify,
        watchdog_s: float | None,
        examine: Callable[[], str],
        health: HealthSettings,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.health = health
        self._notify = notify
        self._watchdog_s = watchdog_s
        self._examine = examine
        self._clock = clock
        self._stage: Literal["starting", "running", "stopping"] = "starting"
        self._since = clock()
        self._said = ""
        self._wake = threading.Event()
        self._ended = False
        self._thread = threading.Thread(target=self._run, name="lifeline", daemon=True)

    def start(self) -> None:
        """Begin: the service is starting."""
        self._thread.start()

    def running(self) -> None:
        """The service has started."""
        self._enter("running")

    def stopping(self) -> None:
        """The service has begun to stop."""
        self._enter("stopping")

    def stop(self) -> None:
        """Say nothing more."""
        self._ended = True
        self._wake.set()
        self._thread.join(self.health.extend_s)

    def _enter(self, stage: Literal["running", "stopping"]) -> None:
        self._since = self._clock()
        self._stage = stage
        self._wake.set()

    def _run(self) -> None:
        while not self._ended:
            self.speak()
            self._wake.wait(self._period())
            self._wake.clear()

    def _period(self) -> float:
        if self._stage == "running" and self._watchdog_s is not None:
            return self._watchdog_s / 3
        return self.health.extend_s

    def speak(self) -> None:
        """Say once what is to be said now."""
        if self._stage == "starting":
            if self._clock() - self._since < self.health.start_s:
                self._extend()
            return
        complaint = self._examine()
        if complaint and not self._said:
            end = "systemd is told nothing more, and will end this process" if self._watchdog_s else "nobody watches"
            log.error("not well: %s; %s", complaint, end, extra=event("not-well"))
            self._notify(f"STATUS=not well: {complaint}")
        elif self._said and not complaint:
            log.warning("well again, after: %s", self._said)
        self._said = complaint
        if complaint:
            return
        if self._stage == "running":
            self._notify("WATCHDOG=1")
        else:
            self._extend()

    def _extend(self) -> None:
        self._notify(f"EXTEND_TIMEOUT_USEC={2e6 * self.health.extend_s:.0f}")
