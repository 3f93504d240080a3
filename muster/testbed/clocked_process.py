"""The life of an agent's process on a virtual clock: what the virtual agents are to their daemon."""

from __future__ import annotations

from collections.abc import Callable

from edge_daemon import protocol
from edge_daemon.adapters.trainer import AgentEnded, AgentSpoke

Later = Callable[[float, Callable[[], None]], None]
"""Call back after so many virtual seconds, if the daemon still lives then."""


class ClockedProcess:
    """A process that is started, speaks, is killed and dies; what was meant for one run never reaches the next."""

    def __init__(self, post: Callable[[AgentSpoke], None], later: Later) -> None:
        self._post = post
        self._after = later
        self._run = 0
        self._alive = False
        self._end = AgentEnded("", out_of_memory=False)

    def kill(self, reason: str, *, hung: bool = False) -> None:  # noqa: ARG002 - no thread to say where it hangs
        """End it at once."""
        if self._alive:
            self._die(AgentEnded(reason, out_of_memory=False))

    def digest(self, spoke: AgentSpoke) -> protocol.FromAgent | AgentEnded | None:
        """What a report means; None: it comes from a process before the present one."""
        if spoke.run != self._run:
            return None
        return spoke.message if spoke.message is not None else self._end

    def _rise(self) -> None:
        """A new run begins."""
        self._run += 1
        self._alive = True

    def _later(self, seconds: float, call: Callable[[], None]) -> None:
        run = self._run

        def due() -> None:
            if self._alive and run == self._run:
                call()

        self._after(seconds, due)

    def _say(self, message: protocol.FromAgent) -> None:
        self._post(AgentSpoke(self._run, message))

    def _die(self, end: AgentEnded) -> None:
        self._alive, self._end = False, end
        self._gone()
        self._post(AgentSpoke(self._run, None))

    def _gone(self) -> None:
        """Forget what was in the process's memory."""
