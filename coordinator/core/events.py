"""What the coordinator's machine is told. `now` is monotonic seconds; `ts` is wall-clock seconds, for reports only."""

from __future__ import annotations

from dataclasses import dataclass

from coordinator.core.facts import Metrics, ModelFacts
from coordinator.core.release_records import Canaries
from coordinator.core.turn import Waits
from shared.jobs import Bits, JobSpec
from shared.messages import Ack, BlobRef, DeviceInfo, DeviceState, Load, Manifest, Progress
from shared.release_messages import ReleaseKind, ReleaseState


@dataclass(frozen=True, kw_only=True)
class Event:
    """Base of all events."""

    now: float
    ts: float


@dataclass(frozen=True, kw_only=True)
class Started(Event):
    """The log was replayed; take up what was under way."""


@dataclass(frozen=True, kw_only=True)
class Tick(Event):
    """Time passed."""


@dataclass(frozen=True, kw_only=True)
class Reconfigured(Event):
    """The operator changed his settings (SIGHUP)."""

    waits: Waits


@dataclass(frozen=True, kw_only=True)
class BrokerFound(Event):
    """The session with the broker stands. `chunk`: bytes of the largest chunk that fits its packets."""

    chunk: int


@dataclass(frozen=True, kw_only=True)
class BrokerLost(Event):
    """We hear nobody: silence says nothing about the devices."""


@dataclass(frozen=True, kw_only=True)
class FromDevice(Event):
    """A decoded message of a device."""

    device: str
    message: DeviceState | DeviceInfo | Load | Ack | Progress | Manifest | ReleaseState


@dataclass(frozen=True, kw_only=True)
class Heard(Event):
    """Anything else came from a device (a chunk, a want): it is alive."""

    device: str


@dataclass(frozen=True, kw_only=True)
class Decommissioned(Event):
    """A device's retained state was cleared: it has left the fleet."""

    device: str


@dataclass(frozen=True, kw_only=True)
class UpdateStored(Event):
    """The wanted blob is complete on disk, its digest verified."""

    device: str
    sha: str


@dataclass(frozen=True, kw_only=True)
class UpdateLost(Event):
    """The wanted blob can't be had: the sender lacks it or it arrives corrupt."""

    device: str
    sha: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class UpdateChecked(Event):
    """Admission looked at the stored update. `reason`: why it is refused; empty: admitted."""

    job: str
    round: int
    attempt: int
    device: str
    sha: str
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class JobRequested(Event):
    """An operator submits a checked job under a fresh id."""

    job: str
    spec: JobSpec


@dataclass(frozen=True, kw_only=True)
class CancelRequested(Event):
    """An operator cancels a job."""

    job: str


@dataclass(frozen=True, kw_only=True)
class ResumeRequested(Event):
    """An operator resumes a paused job."""

    job: str


@dataclass(frozen=True, kw_only=True)
class BasePrepared(Event):
    """The worker inspected the base and wrote the first global adapter."""

    job: str
    facts: ModelFacts
    adapter: BlobRef
    lower: BlobRef | None = None
    """What of it devices of a split model need; None: all."""


@dataclass(frozen=True, kw_only=True)
class Evaluated(Event):
    """The worker evaluated `round` (0: the base with the fresh head)."""

    job: str
    round: int
    metrics: Metrics


@dataclass(frozen=True, kw_only=True)
class TopDone(Event):
    """The top worker's part of a round is on disk: (whose top it is, "" for that of all; update; samples)."""

    job: str
    round: int
    attempt: int
    updates: tuple[tuple[str, BlobRef, int], ...]
    steps: int
    loss: float
    dropped: int
    waited_s: float


@dataclass(frozen=True, kw_only=True)
class TopFailed(Event):
    """The top worker can't do its part of a round; one line."""

    job: str
    round: int
    attempt: int
    reason: str


@dataclass(frozen=True, kw_only=True)
class Folded(Event):
    """The aggregate of the round is on disk."""

    job: str
    round: int
    adapter: BlobRef
    lower: BlobRef | None = None
    residual: BlobRef | None
    ranks: dict[str, int]
    lost_energy: float
    norm: float


@dataclass(frozen=True, kw_only=True)
class Exported(Event):
    """The PEFT folder is complete."""

    job: str
    path: str


@dataclass(frozen=True, kw_only=True)
class WorkFailed(Event):
    """Preparing, evaluating, folding or exporting failed for good; one line."""

    job: str
    what: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class ReleaseRequested(Event):
    """An operator wants a trained adapter on the devices, under a fresh number."""

    release: str
    number: int
    job: str
    round: int
    adapter: BlobRef
    canaries: Canaries
    worse_by: float
    deadline_s: float
    bits: dict[str, Bits]


@dataclass(frozen=True, kw_only=True)
class RollbackRequested(Event):
    """An operator wants the devices to have what they had before a release."""

    release: str


@dataclass(frozen=True, kw_only=True)
class Packed(Event):
    """The files of a release are one blob."""

    release: str
    blob: BlobRef
    kind: ReleaseKind


@dataclass(frozen=True, kw_only=True)
class PackingFailed(Event):
    """A release can't be made; one line."""

    release: str
    reason: str


ReleaseEvent = ReleaseRequested | RollbackRequested | Packed | PackingFailed
Request = JobRequested | CancelRequested | ResumeRequested | ReleaseRequested | RollbackRequested
"""What an operator asks for; he waits for the answer."""
JobEvent = JobRequested | CancelRequested | ResumeRequested | BasePrepared | Evaluated | Folded | Exported | WorkFailed
DeviceEvent = FromDevice | Heard | Decommissioned | UpdateStored | UpdateLost | UpdateChecked
TopEvent = TopDone | TopFailed
AnyEvent = Started | Tick | Reconfigured | BrokerFound | BrokerLost | DeviceEvent | JobEvent | TopEvent | ReleaseEvent
