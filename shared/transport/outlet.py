"""What a program has to say waits here while the transport is full."""

from __future__ import annotations

import logging
from collections import deque

from shared.transport.base import BackPressure, Outgoing, Oversize, Transport

log = logging.getLogger(__name__)


def publish_waiting(transport: Transport, waiting: deque[Outgoing]) -> None:
    """Publish from the front of `waiting` until it is empty or the transport is full; what is too large is dropped."""
    while waiting:
        try:
            transport.publish(waiting[0])
        except BackPressure:
            return
        except Oversize as error:
            log.error("not sent: %s", error)
        waiting.popleft()
