"""What both services share as processes: exit codes, systemd, the flag of what can't be mended."""

from __future__ import annotations

import faulthandler
import logging
import queue
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from shared import logs
from shared.errors import Occupied, UserError
from shared.lifeline import Lifeline
from shared.notify import notifier, reloading, watchdog_s
from shared.settings import HealthSettings

log = logging.getLogger(__name__)
EX_LOST = 1
"""Something in the process is beyond repair: start it again."""
EX_TEMPFAIL = 75
EX_CONFIG = 78
"""From sysexits.h. The units tell systemd not to start a service again that ended with it."""


@dataclass(frozen=True)
class Reload:
    """Someone wants the settings read again."""


class Process:
    """This process, as systemd sees it. `begin` first; then `running`, `status`, `reload` as the service goes on.

    `examine` says what is wrong with the service ("": nothing); it is called from a thread of its own once the service
    runs or stops.
    """

    def __init__(self, program: str) -> None:
        self.program = program
        self.fatal = ""
        """What can't be mended here; the service should leave, and systemd is told nothing more."""
        self.examine: Callable[[], str] = lambda: ""
        self._notify = notifier()
        self._lifeline: Lifeline | None = None
        self._status = ""
        self._refused = ""

    def begin(self, health: HealthSettings) -> None:
        """From here on a signal that kills leaves a traceback, and systemd is asked for time to start."""
        # SIGABRT is what the watchdog kills with.
        faulthandler.enable()
        threading.excepthook = self._on_thread_death
        self._lifeline = Lifeline(self._notify, watchdog_s(), self._complaint, health)
        self._lifeline.start()

    def running(self) -> None:
        """The service has started."""
        assert self._lifeline is not None
        self._notify("READY=1")
        self._lifeline.running()

    def status(self, text: str) -> None:
        """One line on what the service does."""
        text = f"{text}; {self._refused}" if self._refused else text
        if text != self._status:
            self._status = text
            self._notify(f"STATUS={text}")

    def turn(
        self, events: queue.SimpleQueue[object], tick_s: float, *,
        tick: Callable[[], None], handle: Callable[[object], None], reload: Callable[[], str],
    ) -> None:  # fmt: skip
        """One turn of the service's loop: the next event, or `tick` where none comes within `tick_s`. `reload`: as the
        `apply` of `Process.reload`."""
        try:
            event = events.get(timeout=tick_s)
        except queue.Empty:
            tick()
            return
        if isinstance(event, Reload):
            self.reload(time.monotonic(), reload)
        else:
            handle(event)

    def reload(self, now_monotonic_s: float, apply: Callable[[], str]) -> None:
        """Take over new settings. `apply` says what it changed; it raises `UserError` with nothing changed."""
        self._notify(reloading(now_monotonic_s))
        try:
            done = apply()
        except UserError as error:
            self._refused = f"reload refused: {error}"
            log.error("reload refused, the old settings stay: %s", error, extra=logs.event("reload-refused"))
        else:
            self._refused = ""
            log.info("reloaded, %s", done, extra=logs.event("reloaded"))
        self._notify("READY=1")

    def new_health(self, health: HealthSettings) -> None:
        """Other bounds from now on."""
        assert self._lifeline is not None
        self._lifeline.health = health

    def stopping(self) -> None:
        """The service has begun to stop, and does what it owes to the fleet."""
        assert self._lifeline is not None
        self._notify("STOPPING=1")
        self._lifeline.stopping()

    def end(self) -> None:
        """Say nothing more."""
        if self._lifeline is not None:
            self._lifeline.stop()

    def _complaint(self) -> str:
        return self.fatal or self.examine()

    def _on_thread_death(self, args: threading.ExceptHookArgs) -> None:
        name = args.thread.name if args.thread else "?"
        self.fatal = f"thread {name} died of {args.exc_type.__name__}: {args.exc_value}"
        told = (args.exc_type, args.exc_value or args.exc_type(), args.exc_traceback)
        log.error("thread %s died", name, exc_info=told, extra=logs.event("thread-died"))


def guarded(program: str, run: Callable[[], int]) -> int:
    """The exit code of `run`; what is the operator's to mend is one line on standard error."""
    try:
        return run()
    except UserError as error:
        print(f"{program}: {error}", file=sys.stderr)  # noqa: T201 - the one line the owner sees
        return EX_TEMPFAIL if isinstance(error, Occupied) else EX_CONFIG
