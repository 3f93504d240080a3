"""`legend`: each module is averaged over the devices that tuned it (LEGEND, arXiv 2412.20004).

The paper's: aggregation by layer, over the holders of a layer (public digest), since devices tune different depths. Our
reading: the formula. The mean is over products, exact for any ranks, instead of over A and B apart; with the names of
`fsr`, H the holders of the module and P = sum of p_i over H,

    G' = U diag(sigma * (1 - q / P)) V^T + (1 / P) * sum over H of p_i s_i B_i A_i.

`fsr` counts a device that did not tune the module as zero change (P = 1): with depth counted from the output it would
damp the lower modules by the share of the fleet that reaches them. Here they move at full step, and follow the data of
fewer devices. A module that nobody tuned keeps its value; the head is the plain weighted mean.

P is known once all parts were added, so the fold is that of `fsr` with G and the residual multiplied by P, and the
singular values of the sum divided by it. `max_share` holds per module: where few hold it, P is so large that none of
them has more, and the rest counts as zero change.
"""

from __future__ import annotations

from coordinator.core.aggregation.base import Part
from coordinator.core.aggregation.fsr import FoldStackRecompress, Recompression, StackFold
from coordinator.core.facts import ModuleSpec
from shared.adapter import Factors
from shared.jobs import Codec


class Legend(FoldStackRecompress):
    """The aggregator `legend`. `max_share`: cap of one device's share of a module's mean."""

    name = "legend"

    def __init__(
        self, energy: float, global_rank: int, max_share: float = 1.0, server_lr: float = 1.0, *,
        sampled: bool = False, codec: Codec = "fp32",
    ) -> None:  # fmt: skip
        super().__init__(energy, global_rank, server_lr, sampled=sampled, codec=codec)
        self.max_share = max_share

    def begin(self, module: ModuleSpec, current: Factors | None, residual: Factors | None) -> HoldersFold:
        """Open the fold of `module`."""
        return HoldersFold(module, current, residual, self.recompression, self.max_share)


class HoldersFold(StackFold):
    """The fold of one module over those who tuned it."""

    def __init__(
        self, module: ModuleSpec, current: Factors | None, residual: Factors | None, settings: Recompression,
        max_share: float,
    ) -> None:  # fmt: skip
        super().__init__(module, current, residual, settings)
        self._max_share = max_share
        self._held = 0.0
        self._largest = 0.0

    def add(self, part: Part) -> None:
        """Take one device's part."""
        super().add(part)
        self._held += part.weight
        self._largest = max(self._largest, part.weight)

    def _whole(self) -> float:
        """P: the holders' share of the round, or what keeps the largest of them within its cap."""
        return max(self._held, min(1.0, self._largest / self._max_share))
