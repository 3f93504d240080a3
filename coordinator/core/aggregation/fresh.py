"""`fresh`: every device trains a new LoRA beside the whole, frozen global adapter. The reference for `fsr`.

G' = G + sum_i p_i s_i B_i A_i: the fold of `fsr` where no direction was trained (q = 0). It equals FLoRA with its
stacked adapters merged into the base, but bounds the rank by recompression.
"""

from __future__ import annotations

from coordinator.core.aggregation import admission
from coordinator.core.aggregation.base import Expectation
from coordinator.core.aggregation.fsr import FoldStackRecompress
from shared.adapter import Adapter
from shared.starts import Start


class Fresh(FoldStackRecompress):
    """The aggregator `fresh`."""

    name = "fresh"
    start: Start = "fresh"

    def admit(self, update: Adapter, expected: Expectation) -> str | None:
        """Why `update` must be refused, or None: it may contain no direction of the global adapter."""
        return admission.refusal(update, expected, trains_directions=False)
