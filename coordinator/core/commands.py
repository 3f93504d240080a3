"""What the coordinator's machine asks of its runtime. Data only; each command is safe to repeat after a crash."""

from __future__ import annotations

from dataclasses import dataclass

from coordinator.core.job import Job
from coordinator.core.releases import Release
from shared import messages, release_messages
from shared.messages import Assign, BlobRef, RoundInfo, UpdateFacts


@dataclass(frozen=True)
class PublishAssign:
    """Set the retained desired state of a device."""

    device: str
    assign: Assign


@dataclass(frozen=True)
class PublishRound:
    """Set the retained description of what the fleet works on."""

    info: RoundInfo


@dataclass(frozen=True)
class AskRebirth:
    """Ask a device for its state and info: its load came, but no birth of the same epoch."""

    device: str
    reason: str

    @property
    def message(self) -> messages.Command:
        """What it is told."""
        return messages.Command(kind="rebirth", reason=self.reason)


@dataclass(frozen=True)
class AskDelivery:
    """Ask a device for what it has done of its work."""

    device: str
    job: str
    round: int
    attempt: int
    reason: str

    @property
    def message(self) -> messages.Command:
        """What it is told."""
        return messages.Command(
            kind="deliver", reason=self.reason, job=self.job, round=self.round, attempt=self.attempt
        )


@dataclass(frozen=True)
class Pull:
    """Fetch an announced update from its device."""

    device: str
    ref: BlobRef
    chunk: int


@dataclass(frozen=True)
class StopPull:
    """Ask a device for no more of an update, and give up what has come of it; where all has come, nothing happens."""

    device: str
    sha: str


@dataclass(frozen=True)
class Settle:
    """Tell a device that its update is settled, so that it may forget it."""

    device: str
    sha: str
    verdict: str
    reason: str = ""


@dataclass(frozen=True)
class CheckUpdate:
    """Run admission on a stored update; answers with `UpdateChecked`. `facts`: what its device tells of it."""

    job: Job
    device: str
    ref: BlobRef
    facts: UpdateFacts


@dataclass(frozen=True)
class PrepareBase:
    """Have the worker inspect the base; answers with `BasePrepared` or `WorkFailed`."""

    job: Job


@dataclass(frozen=True)
class EvaluateAdapter:
    """Have the worker evaluate an adapter; answers with `Evaluated` or `WorkFailed`."""

    job: Job
    round: int
    adapter: BlobRef


@dataclass(frozen=True)
class FoldRound:
    """Fold the counted updates of the job's current round; answers with `Folded` or `WorkFailed`."""

    job: Job


@dataclass(frozen=True)
class ExportJob:
    """Write the PEFT folder; answers with `Exported` or `WorkFailed`."""

    job: Job


@dataclass(frozen=True)
class RunTop:
    """Have the top worker conduct the steps of the job's current round; answers with `TopDone` or `TopFailed`."""

    job: Job


@dataclass(frozen=True)
class TellTop:
    """These devices will not come to the steps (any more)."""

    devices: tuple[str, ...]


@dataclass(frozen=True)
class FinishTop:
    """Have the top worker end the round with the steps that are done."""


@dataclass(frozen=True)
class StopTop:
    """What the top worker is at is not wanted any more."""


@dataclass(frozen=True)
class PublishRelease:
    """Set the retained release of a device; None: take it from the broker, the device left."""

    device: str
    message: release_messages.Release | None


@dataclass(frozen=True)
class PackRelease:
    """Export the adapter of a release and make one blob of it; answers with `Packed` or `PackingFailed`."""

    release: Release
    job: Job


Command = (
    PublishAssign
    | PublishRound
    | AskRebirth
    | AskDelivery
    | Pull
    | StopPull
    | Settle
    | CheckUpdate
    | PrepareBase
    | EvaluateAdapter
    | FoldRound
    | ExportJob
    | RunTop
    | TellTop
    | FinishTop
    | StopTop
    | PublishRelease
    | PackRelease
)
