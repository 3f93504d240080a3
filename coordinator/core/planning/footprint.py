"""Memory of a work on a device by its batch: as estimated, or from a measured peak (the formulas: `cost_model`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, Protocol, cast

import msgspec

from coordinator.core.planning.demand import BYTES_TRAINED, Demand
from coordinator.core.planning.readings import MIB
from coordinator.core.planning.reasons import mebibytes
from shared.jobs import Bits

WORKING_BYTES = 68 * MIB
"""What an agent's first work adds for good: the model's classes, the kernels' scratch, the allocator's slack."""
LOADING_BYTES = 32 * MIB


class Measured(msgspec.Struct, frozen=True, kw_only=True):
    """Peak of the agent's memory with this work, in bytes."""

    peak: int
    micro: int
    adapter_params: int
    limit: int = 0
    """The limit it ran under; 0: not known."""
    activations: float = 0.0
    """Estimated bytes per sample of that work at fp32: they follow its depth; 0: not known."""


class Footprint(Protocol):
    """Memory of a work on a device by its batch."""

    def bytes(self, batch: int) -> float:
        """At the worst moment of a round; never falling with the batch."""

    def words(self, batch: int) -> str:
        """The readings used."""


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
        moving = max(self.need.micro(batch) * self.per_sample, LOADING_BYTES + 8 * self.need.largest)
        return self._held + self.need.fixed_bytes(self.bits) + moving

    def words(self, batch: int) -> str:
        """See `Footprint`."""
        need, activations = self.need, self.need.micro(batch) * self.per_sample
        parts = f"agent {mebibytes(self._held)} at work, base {mebibytes(need.weight_bytes(self.bits))}"
        if not need.linear_params:
            parts += f" frozen, {mebibytes(BYTES_TRAINED * need.adapter_params)} tuned itself"
        loading = LOADING_BYTES + 8 * need.largest
        return f"{parts}, activations {mebibytes(activations)} or loading {mebibytes(loading)}"


class FromPeak(NamedTuple):
    """A measured `peak`, moved by what differs from the work it was measured with; bytes."""

    need: Demand
    per_sample: float
    peak: int
    activations: float
    """Of that work."""
    weights: float
    old_weights: float
    adapter: int
    """By which the trained part grew."""
    least: float
    told: str

    def bytes(self, batch: int) -> float:
        """See `Footprint`."""
        changed = self.need.micro(batch) * self.per_sample - self.activations + self.weights - self.old_weights
        return max(self.peak + (changed + self.adapter), self.least)

    def words(self, batch: int) -> str:  # noqa: ARG002 - the peak is one reading for all batches
        """See `Footprint`."""
        return f"measured {mebibytes(self.peak)}{self.told} samples at once"


def from_peak(
    peaks: Mapping[str, Measured], need: Demand, bits: Bits, per_sample: float, context: int, agent: int
) -> FromPeak:
    """Memory by the peak at these bits, or at the nearest ones that were measured."""
    found = str(bits)
    if found not in peaks:
        found = min(peaks, key=lambda key: (abs(int(key) - bits), key))
    other, met = cast(Bits, int(found)), peaks[found]
    peak = context + met.peak
    # Where only the head is tuned nothing is kept for a backward pass.
    scale = per_sample / need.activation_bytes(bits) if need.activations else 0.0
    before = met.micro * scale * need.activation_bytes(other)
    if met.activations and need.activations:
        before *= met.activations / need.activations
    weights = need.weight_bytes(bits)
    # Less work can't free the base itself, however large the estimate of its activations.
    least = min(peak, agent + weights)
    at = "" if other == bits else f" at {other} bits"
    old_weights = weights if other == bits else need.weight_bytes(other)
    adapter = BYTES_TRAINED * (need.adapter_params - met.adapter_params)
    return FromPeak(need, per_sample, peak, before, weights, old_weights, adapter, least, f"{at} with {met.micro}")
