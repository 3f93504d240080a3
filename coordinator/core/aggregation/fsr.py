"""`fsr`: fold, stack, recompress. Our own method, the default; exact sum for unequal ranks, without restarts.

G, what the global adapter adds to a module, is kept as U diag(sigma) V^T. A device trains the first `trained` of its
directions (the rest rides along frozen), so its local model is G without those, plus s_i B_i A_i. The mean of the
local models over the devices that reported, p_i their share of the samples, is therefore

    G' = U diag(sigma * (1 - q)) V^T + sum_i p_i s_i B_i A_i,   q_k = sum of p_i over devices that trained direction k.

A device that did not tune the module counts as zero change. G' plus the residual of the last round is exact (float64
products of float32 factors). Recompression keeps the fewest directions that hold `energy` of the squared singular
values, at most `global_rank`, and carries the next `global_rank` directions into the next round as residual. Where the
global adapter is published in less than float32 (`codec`), what rounding takes of the kept directions, up to twice as
many directions of their own, is carried as well: error feedback, so that roundings do not add up.

A device of smaller rank trains the first directions of the published adapter: those of the largest singular values or,
with `sampled`, of a draw without replacement in proportion to them. The draw orders the directions before they are
published and is keyed by the module and the new singular values, so that the same updates give the same bytes.

A server learning rate e other than 1 (as in FedOpt, arXiv 2003.00295) moves G by e times that change: G + e (G' - G).
Devices whose data differ pull in different directions, so that their mean moves less than one of them.

The rank is not capped at out * in / (out + in), above which factors are larger than the matrix itself: a file grows
to twice the dense size at most, whereas a cap would put models of full rank out of reach. `global_rank` is the
operator's bound.
"""

from __future__ import annotations

import hashlib
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from coordinator.core.aggregation import admission
from coordinator.core.aggregation.base import Expectation, Folded, Part, Wide, narrow
from coordinator.core.aggregation.product_sum import NOISE, ProductSum
from coordinator.core.facts import ModuleSpec
from shared.adapter import Adapter, Factors
from shared.jobs import Codec
from shared.norms import column_weights, product_norm
from shared.starts import Start
from shared.tensors import rounded

_UNTRAINED = 1e-12
"""A direction of which less than this share remains was trained by every device, up to rounding of the shares."""


class FoldStackRecompress:
    """The aggregator `fsr`. `energy`: share of the squared singular values kept; `global_rank`: cap per module;
    `server_lr`: how far the global adapter moves, 1: to the mean; `sampled`: the order of directions is drawn; `codec`:
    the precision that the global adapter is published in."""

    name = "fsr"
    start: Start = "directions"

    def __init__(
        self, energy: float, global_rank: int, server_lr: float = 1.0, *, sampled: bool = False, codec: Codec = "fp32"
    ) -> None:
        self.energy = energy
        self.global_rank = global_rank
        self.server_lr = server_lr
        self.sampled = sampled
        self.codec: Codec = codec

    def admit(self, update: Adapter, expected: Expectation) -> str | None:
        """Why `update` must be refused, or None."""
        return admission.refusal(update, expected, trains_directions=True)

    def begin(self, module: ModuleSpec, current: Factors | None, residual: Factors | None) -> StackFold:
        """Open the fold of `module`."""
        return StackFold(module, current, residual, self.recompression)

    @property
    def recompression(self) -> Recompression:
        """The settings of a fold."""
        return Recompression(self.energy, self.global_rank, self.server_lr, self.sampled, self.codec)


class Recompression(NamedTuple):
    """As of `FoldStackRecompress`; `cap`: its `global_rank`."""

    energy: float
    cap: int
    server_lr: float = 1.0
    sampled: bool = False
    codec: Codec = "fp32"


class StackFold:
    """The fold of one module by the formula above."""

    def __init__(
        self, module: ModuleSpec, current: Factors | None, residual: Factors | None, settings: Recompression
    ) -> None:
        self._drawn_for = module.name if settings.sampled else None
        self._sum = ProductSum(module.out, module.inp)
        self._current = current
        self._residual = residual
        self._settings = settings
        self._trained_share: Wide = np.zeros(0 if current is None else current.rank)
        self._touched = False

    def add(self, part: Part) -> None:
        """Take one device's part."""
        if part.weight == 0.0:
            return
        self._touched = True
        self._sum.add(part.factors.b, part.factors.a, part.weight * column_weights(part.factors))
        self._trained_share[: part.factors.trained] += part.weight

    def finish(self) -> Folded:
        """The next state of the module; unchanged where no device tuned it."""
        if not self._touched:
            norm = 0.0 if self._current is None else product_norm(self._current)
            return Folded(factors=self._current, residual=self._residual, norm=norm)
        # The parts are in the sum already: instead of them all else is scaled, and the singular values at the end.
        whole = self._whole() / self._settings.server_lr
        if self._current is not None:
            remains = whole - self._trained_share
            remains[np.abs(remains) < _UNTRAINED * whole] = 0.0
            self._sum.add(self._current.b, self._current.a, remains * column_weights(self._current))
        if self._residual is not None:
            self._sum.add(self._residual.b, self._residual.a, whole * column_weights(self._residual))
        u, sigma, vt = self._sum.svd()
        return self._recompress(u, sigma / whole, vt)

    def _whole(self) -> float:
        """The share of the round that the mean is over: all who reported, also those who did not tune the module."""
        return 1.0

    def _recompress(self, u: Wide, sigma: Wide, vt: Wide) -> Folded:
        """Cut the exact sum in what is kept, what is carried over, and what is forgotten."""
        tails = np.append(np.cumsum(sigma[::-1] ** 2)[::-1], 0.0)
        total = float(tails[0])
        if total == 0.0:
            return Folded(factors=None)
        real = int(np.count_nonzero(sigma > NOISE * sigma[0]))
        enough = int(np.flatnonzero(tails <= (1.0 - self._settings.energy) * total)[0])
        kept = min(enough, real, self._settings.cap)
        carried = min(real, kept + self._settings.cap)
        if self._drawn_for is not None:
            order = drawn_order(sigma[:kept], self._drawn_for)
            # Only those kept: what is carried over stays behind them.
            order = np.append(order, np.arange(kept, len(sigma)))
            u, sigma, vt = u[:, order], sigma[order], vt[order]
        if self._settings.codec != "fp32":
            return self._rounded(u[:, :real], sigma[:real], vt[:real], kept)
        return Folded(
            factors=_triplets(u, sigma, vt, 0, kept),
            residual=_triplets(u, sigma, vt, kept, carried),
            lost_energy=float(tails[kept]) / total,
            forgotten_energy=float(tails[carried]) / total,
            norm=float(np.sqrt(total - tails[kept])),
        )

    def _rounded(self, u: Wide, sigma: Wide, vt: Wide, kept: int) -> Folded:
        """The first `kept` directions as they are published; the rest is what the sum has beyond these."""
        b, a = (rounded(narrow(part), self._settings.codec) for part in (u[:, :kept], vt[:kept]))
        published = Factors(b=b, a=a, sigma=narrow(sigma[:kept]))
        beyond = ProductSum(len(u), vt.shape[1])
        beyond.add(narrow(u), narrow(vt), sigma)
        beyond.add(b, a, -column_weights(published))
        left_u, left, left_vt = beyond.svd()
        carried = min(int(np.count_nonzero(left > NOISE * sigma.max())), self._settings.cap + 2 * kept)
        total = float(sigma @ sigma)
        return Folded(
            factors=published,
            residual=_triplets(left_u, left, left_vt, 0, carried),
            lost_energy=float(left @ left) / total,
            forgotten_energy=float(left[carried:] @ left[carried:]) / total,
            norm=product_norm(published),
        )


def drawn_order(sigma: Wide, name: str) -> npt.NDArray[np.intp]:
    """The places of `sigma` (all > 0) in an order drawn without replacement, in proportion to the values.

    Exponential races: the k-th rings after an exponential time of rate sigma_k. `name` and the values key the draw.
    """
    key = hashlib.sha256(name.encode() + narrow(sigma).tobytes()).digest()
    rings = np.random.default_rng(int.from_bytes(key[:8], "little")).exponential(size=len(sigma)) / sigma
    return np.argsort(rings, kind="stable")


def _triplets(u: Wide, sigma: Wide, vt: Wide, first: int, end: int) -> Factors | None:
    if first == end:
        return None
    return Factors(b=narrow(u[:, first:end]), a=narrow(vt[first:end]), sigma=narrow(sigma[first:end]))
