"""Errors that the driver reports of its cards (XID), as events of NVML: asked for, never waited for.

Numbers and what to do about them: https://docs.nvidia.com/deploy/xid-errors.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from edge_daemon.adapters.telemetry.nvml import GpuLost, Session

_ANY_INSTANCE = 0xFFFFFFFF
_AT_ONCE = 32


class Event(NamedTuple):
    """One error; `instance`: the MIG instance it is of, None for the whole card."""

    xid: int
    instance: int | None


class XidWatch:
    """One event set a card, so that an event needs no telling whose it is: a card that fell off the bus answers no
    more questions."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._of = -1
        """The session that the sets belong to."""
        self._sets: dict[int, Any] = {}
        """Index of a card -> its event set; None: it has no such events."""

    def poll(self, index: int, card: Any) -> list[Event]:
        """The errors of card number `index` since the last poll."""
        if self._of != self._session.number:
            self._of, self._sets = self._session.number, {}
        if index not in self._sets:
            self._sets[index] = self._registered(card)
        return self._waiting(self._sets[index]) if self._sets[index] is not None else []

    def _registered(self, card: Any) -> Any:
        kind = self._session.constant("nvmlEventTypeXidCriticalError")
        supported = self._session.call("nvmlDeviceGetSupportedEventTypes", card)
        if kind is None or supported is None or not supported & kind:
            return None
        events = self._session.call("nvmlEventSetCreate")
        if events is None:
            return None
        # It answers None by its nature: whether it worked, only the events tell.
        self._session.call("nvmlDeviceRegisterEvents", card, kind, events)
        return events

    def _waiting(self, events: Any) -> list[Event]:
        found: list[Event] = []
        while len(found) < _AT_ONCE:
            try:
                data = self._session.call("nvmlEventSetWait_v2", events, 0)
            except GpuLost:
                break  # whoever reads the card says so
            if data is None:
                break  # timeout: none is waiting
            instance = int(data.gpuInstanceId)
            found.append(Event(int(data.eventData), None if instance == _ANY_INSTANCE else instance))
        return found
