"""Memory of a work on a device by its batch: as estimated, or from a measured peak (the formulas: `cost_model`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, Protocol, cast

import msgspec

from coordinator.core.planning.demand import BYTES_TRAINED, Demand
from coordinator.core.planning.readings import MIB, has_gpu_memory
from coordinator.core.planning.reasons import mebibytes
from shared.jobs import Bits
from shared.messages import DeviceInfo, Load, UpdateFacts

WORKING_BYTES = 68 * MIB
"""What an agent's first work adds for good: the model's classes, the kernels' scratch, the allocator's slack."""
LOADING_BYTES = 32 * MIB
ERROR_BYTES = 16 * MIB
"""By which a reading may be off that has nothing to do with the work."""
LEAST, SURE = 0.1, 0.5
"""How far a round has to rest on the activations themselves to tell of the device's, and of the fleet's."""


class Measured(msgspec.Struct, frozen=True, kw_only=True):
    """Peak of the agent's memory with this work, in bytes."""

    peak: int
    micro: int
    adapter_params: int
    limit: int = 0
    """The limit it ran under; 0: not known."""
    activations: float = 0.0
    """Estimated bytes per sample of that work at fp32, whatever it ran at: they follow its depth; 0: not known."""
    kept: float = 0.0
    """The same at its own bits, on the kind of device that it ran on."""
    moving: float = 0.0
    """What of the peak came and went in a round that loaded the base: that, or activations; 0: it did not."""


class Footprint(Protocol):
    """Memory of a work on a device by its batch."""

    def bytes(self, batch: int) -> float:
        """At the worst moment of a round; never falling with the batch."""

    def words(self, batch: int) -> str:
        """The readings used."""


def loading_bytes(need: Demand) -> float:
    """What lies beside the base while it is loaded."""
    return LOADING_BYTES + 8 * need.largest


class Estimated(NamedTuple):
    """The sum of what is known of the base and the work."""

    need: Demand
    bits: Bits
    per_sample: float
    agent: int

    @property
    def _held(self) -> int:
        return self.agent + (0 if self.need.kind == "least_squares" else WORKING_BYTES)

    def bytes(self, batch: int) -> float:
        """See `Footprint`."""
        # The worst moment is loading or training, never both.
        moving = max(self.need.micro(batch) * self.per_sample, loading_bytes(self.need))
        return self._held + self.need.fixed_bytes(self.bits) + moving

    def words(self, batch: int) -> str:
        """See `Footprint`."""
        need, activations = self.need, self.need.micro(batch) * self.per_sample
        parts = f"agent {mebibytes(self._held)} at work, base {mebibytes(need.weight_bytes(self.bits))}"
        if not need.linear_params:
            parts += f" frozen, {mebibytes(BYTES_TRAINED * need.adapter_params)} tuned itself"
        return f"{parts}, activations {mebibytes(activations)} or loading {mebibytes(loading_bytes(need))}"


class FromPeak(NamedTuple):
    """A measured `peak`, moved by what differs from the work it was measured with; bytes."""

    need: Demand
    per_sample: float
    peak: int
    activations: float
    """Of that work."""
    loading: float
    """What of the peak loading may have been: activations up to there are not seen in it."""
    weights: float
    old_weights: float
    adapter: int
    """By which the trained part grew."""
    least: float
    told: str

    def bytes(self, batch: int) -> float:
        """See `Footprint`."""
        moving = max(self.need.micro(batch) * self.per_sample, self.loading) - max(self.activations, self.loading)
        return max(self.peak + (moving + self.weights - self.old_weights + self.adapter), self.least)

    def words(self, batch: int) -> str:  # noqa: ARG002 - the peak is one reading for all batches
        """See `Footprint`."""
        return f"measured {mebibytes(self.peak)}{self.told} samples at once"


def footprint_of(
    peaks: Mapping[str, Measured], need: Demand, bits: Bits, scale: float, context: int, agent: int, *, gpu: bool
) -> Footprint:
    """Memory by the peak at these bits, or at the nearest ones that were measured; where none was, estimated.

    `scale`: measured against estimated activations. `agent`: with the `context` of its GPU, which no measured peak
    contains. `gpu`: whether it trains on one.
    """
    per_sample = scale * need.activation_bytes(bits, gpu=gpu)
    if not peaks:
        return Estimated(need, bits, per_sample, agent)
    weights = need.weight_bytes(bits)
    met, at, old_weights = peaks.get(str(bits)), "", weights
    if met is None:
        found = min(peaks, key=lambda key: (abs(int(key) - bits), key))
        met, at = peaks[found], f" at {found} bits"
        old_weights = need.weight_bytes(cast(Bits, int(found)))
    peak, before = context + met.peak, met.micro * scale * met.kept
    # Less work can't free the base itself, however large the estimate of its activations.
    least = min(peak, agent + weights)
    adapter = BYTES_TRAINED * (need.adapter_params - met.adapter_params)
    loading = min(max(met.moving, 0.0), loading_bytes(need))
    told = f"{at} with {met.micro}"
    return FromPeak(need, per_sample, peak, before, loading, weights, old_weights, adapter, least, told)


def scratch(need: Demand, load: Load | None, info: DeviceInfo | None, agent: int) -> int:
    """What work adds for good to an agent that is of `agent` bytes but for the base that it holds."""
    own_memory = has_gpu_memory(info) if info is not None else load is not None and bool(load.gpus)
    if need.kind == "least_squares" or own_memory:
        return 0
    # Where it had worked before it loaded the base, that is there already.
    fresh = info.agent_bytes if info is not None else 0
    return 0 if fresh and agent > fresh + WORKING_BYTES / 2 else WORKING_BYTES


def activations(
    before: tuple[float, float], fleet: float, need: Demand, result: UpdateFacts, moving: float, working: int,
    *, gpu: bool = False,
) -> tuple[float, float]:  # fmt: skip
    """(measured against estimated activations, how far that rests on the activations themselves), after a round.

    `fleet`: of the others. What came and went (`moving`) holds the activations, and the error of `working`, bytes that
    work adds for good. That is known to about half of itself (`ERROR_BYTES` at least), the estimate of the activations
    to about its size: what differs from the fleet's is theirs by their share of both variances (the most likely values;
    our reading). Where that share is small a round says less than the fleet, or than one of a larger batch before it;
    in a round that loaded the base, what loading took may hide them all. More is believed at once, unless the base was
    loaded: then that may have made the peak. Less is believed half, and only beyond what `working` may be wrong by.
    """
    scale, held = before
    error = max(working / 2, ERROR_BYTES)
    estimate = need.micro(result.batch) * need.activation_bytes(result.bits, gpu=gpu)
    if estimate <= 0:
        return before
    share = estimate**2 / (estimate**2 + error**2)
    if share < max(held / 2, LEAST):
        return before
    seen, most = (
        min(20.0, max(0.05, fleet + share * (one / estimate - fleet))) for one in (moving, moving + working / 2)
    )
    loading = loading_bytes(need) if result.load_s > 0 else 0.0
    if seen * estimate <= loading:
        return (scale + min(scale, loading / estimate)) / 2, held
    if seen > scale:
        return (seen if result.load_s == 0 else (scale + seen) / 2), share
    return (scale + min(scale, most)) / 2, share
