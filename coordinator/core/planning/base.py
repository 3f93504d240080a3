"""What a planner sees and returns: `plan(view, job) -> Plan`, `learn(report) -> Planner`; pure, without a clock.

A restart replays the recorded reports through `learn`, so no learning is lost; a round that has a recorded plan is
never planned again.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol, runtime_checkable

import msgspec

from coordinator.core.facts import ModelFacts
from coordinator.core.planning.regulation import Regulation
from shared.jobs import JobSpec
from shared.messages import DeviceInfo, Load, UpdateFacts, Work


class Candidate(msgspec.Struct, frozen=True, kw_only=True):
    """A device that is ready, as seen when the round is planned."""

    device: str
    info: DeviceInfo
    load: Load | None = None
    load_age_s: float = 0.0
    """Seconds since `load` arrived; meaningless without one."""


class FleetView(msgspec.Struct, frozen=True, kw_only=True):
    """All a planner may know. Candidates are sorted by device id."""

    round: int
    candidates: tuple[Candidate, ...]
    facts: ModelFacts
    adapter_bytes: int = 0
    """Size of what every participant fetches of the global adapter; 0: not known."""
    fresh_s: float = 30.0
    """A load older than this is stale: plan cautiously and say so."""


class Weights(msgspec.Struct, frozen=True, kw_only=True):
    """Which modules a plan tunes by their importance."""

    scores: dict[str, float] = {}
    """Module -> its share of the score, with sum 1; empty: not yet known."""
    selected: list[str] = []
    scored: int = 0
    """The round in which the scores were measured; 0: none."""


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """What a round asks of the fleet. `predicted_s`: seconds of training expected, per device."""

    participants: dict[str, Work]
    deadline_s: float
    reason: str
    predicted_s: dict[str, float] = {}
    left_out: dict[str, str] = {}
    """Candidate -> why it takes no part."""
    weights: Weights | None = None
    """Where the planner chooses among the modules."""
    regulation: Regulation | None = None
    """By what the batches of split learning follow this round's links; None: they stay."""
    together: bool = False
    """Whether the works are to end together where no time is known yet that could end them: once half of the devices
    delivered, the others deliver what they have done."""


class RoundReport(msgspec.Struct, frozen=True, kw_only=True):
    """A committed round: what was asked and what came of it."""

    round: int
    works: dict[str, Work]
    results: dict[str, UpdateFacts]
    batch_limits: dict[str, int] = {}
    """Device -> largest batch that fits, as met by running out of memory (0: none at those bits)."""
    infos: dict[str, DeviceInfo] = {}
    """The participants' capabilities, as the planner saw them."""
    loads: dict[str, Load] = {}
    """The last load of each participant before the plan, as the planner saw it."""
    facts: ModelFacts | None = None
    """The base that was tuned; without it and `job` speed and memory can't be learned."""
    job: JobSpec | None = None
    adapter_bytes: int = 0
    """Size of what the participants fetched of the global adapter."""
    accepted: bool = True
    """Whether the aggregate passed the gate; else the global adapter stays what it was."""


class Planner(Protocol):
    """A planning method; a state that is passed on from round to round."""

    @property
    def name(self) -> str:
        """As in `strategy.name`."""

    def plan(self, view: FleetView, job: JobSpec) -> Plan:
        """Raises `shared.errors.UserError` where no candidate can do the job at all, with the reason per device."""

    def learn(self, report: RoundReport) -> Planner:
        """The planner that also knows this round."""


@runtime_checkable
class Shrinking(Protocol):
    """A planner of jobs that prune."""

    @property
    def ratios(self) -> Mapping[str, float]:
        """Class of devices -> the share of the units that is gone there."""
