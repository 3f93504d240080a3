"""What the HTTP API is asked about releases."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from coordinator.core.release_records import Canaries

WORSE_BY = 0.1


class ReleaseAsk(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Body of `POST /v1/releases`."""

    job: str
    round: Annotated[int, Meta(ge=0)] = 0
    """0: the last one that was accepted."""
    canaries: Canaries = Canaries()
    worse_by: Annotated[float, Meta(ge=0.0)] = WORSE_BY
    """Share by which a device's loss may be above that of what it has now."""
    deadline_s: Annotated[float, Meta(ge=0.0)] = 0.0
    """Seconds for the canaries, and again for the rest; 0: as the coordinator's settings say."""
