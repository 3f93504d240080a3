"""Noticing that a transport's network thread is dead or hangs. Nothing mends that but a new process."""

from __future__ import annotations

from collections.abc import Callable

from shared.transport.base import Transport

SURE_S = 3.0
"""A process that was stopped or starved wakes with its promise overdue; its network thread renews it within this."""


class Watch:
    """Looks at `transport` whenever its owner's loop turns, which must be oftener than every `SURE_S`."""

    def __init__(self, transport: Transport, clock: Callable[[], float]) -> None:
        self._transport = transport
        self._clock = clock
        self._since: float | None = None

    def lost(self) -> bool:
        """Whether the transport was not alive at every look of the last `SURE_S` seconds."""
        if self._transport.alive:
            self._since = None
            return False
        now = self._clock()
        if self._since is None:
            self._since = now
        return now - self._since >= SURE_S
