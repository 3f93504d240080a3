"""When to connect again, the same for every transport."""

from __future__ import annotations

import random

from shared.backoff import delay
from shared.settings import BrokerSettings

SPREAD = 6.0
"""The wait after a lost session is uniform in at least [0, SPREAD * reconnect_min_s]: a broker that restarts at once
would else meet its whole fleet within a second."""
BRIEF = 15.0
"""A session that lasted less than BRIEF * reconnect_min_s counts as a failed attempt: the waits go on growing."""
FLAPS = 4
"""So many brief sessions in a row are an alarm. mosquitto 2.0 says nothing to a client whose session is taken over, so
this is how two processes with one client id show."""


class Retry:
    """Waits between attempts to connect: full jitter, doubling up to `reconnect_max_s`."""

    def __init__(self, settings: BrokerSettings, rng: random.Random) -> None:
        self._min = settings.reconnect_min_s
        self._max = settings.reconnect_max_s
        self._rng = rng
        self._attempt = 0
        self._brief = 0

    @property
    def flapping(self) -> bool:
        """Whether the last sessions all ended as soon as they stood."""
        return self._brief >= FLAPS

    def after(self, lived_s: float | None, *, refused: bool) -> float:
        """Seconds to wait after an attempt whose session lasted `lived_s` (None: there was none).

        `refused`: only an operator can help, so the wait is the longest at once.
        """
        draw = self._rng.random()
        if lived_s is not None:
            self._brief = self._brief + 1 if lived_s < BRIEF * self._min else 0
            self._attempt = self._attempt if self._brief else 0
        if refused:
            return self._max * (0.5 + 0.5 * draw)
        wait = delay(self._attempt, draw, base_s=self._min, cap_s=self._max)
        self._attempt += 1
        return wait if lived_s is None else max(wait, draw * min(self._max, SPREAD * self._min))
