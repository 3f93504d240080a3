"""What the HTTP API answers with (JSON). Part of the versioned API: fields are added, never renamed, within `/v1`."""

from __future__ import annotations

import msgspec

from coordinator.core.facts import Metrics
from coordinator.core.planning.base import Weights
from shared.messages import DeviceInfo, Load, UpdateFacts, Work
from shared.release_messages import Score


class View(msgspec.Struct, frozen=True, kw_only=True):
    """A JSON object of the API."""


class ParticipantView(View, frozen=True, kw_only=True):
    """One device in one round: what was planned, where it stands, what came of it."""

    device: str
    work: Work
    attempt: int = 1
    status: str = "assigned"
    """assigned, accepted, training, done, refused, failed, gone (left, and may be back), silent, late."""
    reason: str = ""
    facts: UpdateFacts | None = None
    predicted_s: float = 0.0
    """Seconds of training the planner expected."""
    update_bytes: int = 0
    adapter_bytes: int = 0
    step: int = 0
    loss: float | None = None
    samples_per_s: float = 0.0


class RoundView(View, frozen=True, kw_only=True):
    """One round."""

    round: int
    phase: str
    plan_digest: str = ""
    plan_reason: str = ""
    weights: Weights | None = None
    """The modules' scores and those the plan tunes, where the planner chooses among them."""
    participants: list[ParticipantView] = []
    refused_updates: list[str] = []
    top: str = ""
    """Of split learning: what the top worker did, in words."""
    closed_reason: str = ""
    adapter: str = ""
    adapter_bytes: int = 0
    metrics: Metrics | None = None
    accepted: bool | None = None
    gate_reason: str = ""
    lost_energy: float = 0.0
    seconds: float = 0.0
    """From the plan to the commit, by the coordinator's clock."""
    overhead_s: float = 0.0
    """`seconds` less the time the slowest counted device trained."""


class JobView(View, frozen=True, kw_only=True):
    """One job. `state`: queued, preparing, waiting, open, folding, evaluating, exporting, paused, finished, ..."""

    id: str
    name: str
    state: str
    reason: str = ""
    strategy: str = ""
    round: int = 0
    rounds_total: int = 0
    submitted: float = 0.0
    best: Metrics | None = None
    baseline: Metrics | None = None
    """Of the base with the fresh head, before round 1."""
    exported: bool = False
    rounds: list[RoundView] = []
    """All rounds in `GET /v1/jobs/{id}`; empty in lists."""


class DeviceView(View, frozen=True, kw_only=True):
    """One device as the coordinator sees it now."""

    device: str
    state: str
    age_s: float
    """Seconds since anything came from it."""
    epoch: int = 0
    info: DeviceInfo | None = None
    load: Load | None = None
    work: str = ""
    """job/round/attempt it works on."""


class ReleasedDevice(View, frozen=True, kw_only=True):
    """One device in a release."""

    device: str
    canary: bool = False
    state: str = "told"
    """told, active (waits for the other canaries), committed, failed, skipped, silent, returned (to what it had)."""
    stage: str = ""
    """How far it last said it is: wanted, received, verified, staged, active, committed, failed, skipped."""
    reason: str = ""
    """Why it failed, was skipped, or what it waits for."""
    active: str = ""
    """Release that it last said is in place."""
    before: Score | None = None
    """On the device's own held-out rows: what was active before, else the untuned base."""
    after: Score | None = None


class ReleaseView(View, frozen=True, kw_only=True):
    """One release. `state`: packing, canary, rest, finished, rolling_back, rolled_back, failed."""

    id: str
    job: str
    round: int
    state: str
    reason: str = ""
    stands: bool = False
    """Whether it is what new devices get."""
    kind: str = ""
    """lora, model, bottleneck."""
    bytes: int = 0
    worse_by: float = 0.0
    deadline_s: float = 0.0
    started: float = 0.0
    devices: list[ReleasedDevice] = []
    """All devices that were told, in `GET /v1/releases/{id}`; empty in lists."""
    left_out: dict[str, str] = {}
    """Devices that could not take it when the canaries were chosen -> why."""
    committed: int = 0
    failed: int = 0
    """Devices where it does not work, or which said nothing."""
    skipped: int = 0


class Problem(View, frozen=True, kw_only=True):
    """Body of every error answer: one line, and for a job file every fault."""

    error: str
    faults: list[str] = []
