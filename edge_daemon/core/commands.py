"""What the session machine asks of its runtime. Data only; each is safe to repeat after a crash."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from edge_daemon import protocol
from edge_daemon.core.state import Identity
from shared.jobs import Bits
from shared.messages import Ack, Assignment, BaseSource, BlobRef, DeviceInfo, DeviceState, Load, Manifest, Progress
from shared.release_messages import ReleaseSpec, ReleaseState


@dataclass(frozen=True)
class Publish:
    """Send a message on the topic that its type has."""

    message: DeviceState | DeviceInfo | Load | Ack | Progress | Manifest | ReleaseState


@dataclass(frozen=True)
class StartAgent:
    """Start the training subprocess and probe it, or one for each of `gpus`; answers with `AgentProbed` or
    `AgentGone`."""

    probe: protocol.Probe
    gpus: tuple[str, ...] = ()


@dataclass(frozen=True)
class KillAgent:
    """End the subprocess at once; answers with `AgentGone`."""

    reason: str
    hung: bool = False
    """It hangs: have it say where, if it still can."""


@dataclass(frozen=True)
class Tell:
    """Send the agent a word."""

    message: protocol.Pause | protocol.Resume | protocol.Stop | protocol.Shutdown


@dataclass(frozen=True)
class Train:
    """Have the agent do the work; answers with `AgentTrained`, `AgentFailed` or `AgentGone`."""

    assignment: Assignment
    base_path: str
    data_path: str
    train_for_s: float
    batch_limit: int
    fetch_s: float


@dataclass(frozen=True)
class Fetch:
    """Pull a global adapter; answers with `AdapterStored` or `AdapterLost`."""

    ref: BlobRef
    chunk: int


@dataclass(frozen=True)
class Adopt:
    """Move a finished update from its work folder among the blobs; answers with `OfferLost` only if it is not there."""

    identity: Identity
    sha: str


@dataclass(frozen=True)
class DropBlob:
    """Nothing refers to this content any more."""

    sha: str


@dataclass(frozen=True)
class DropWork:
    """Forget the work folder (checkpoints) of this identity."""

    identity: Identity


@dataclass(frozen=True)
class Tidy:
    """Remove every work folder and blob but these: leftovers of a crash."""

    identities: tuple[Identity, ...]
    shas: tuple[str, ...]


@dataclass(frozen=True)
class CheckRelease:
    """Look at every file in a fetched release; answers with `ReleaseChecked` or `ReleaseProblem`."""

    release: str
    sha: str


@dataclass(frozen=True)
class StageRelease:
    """Put its files into a folder of their own; answers with `ReleaseStaged` or `ReleaseProblem`."""

    release: str
    sha: str


@dataclass(frozen=True)
class Evaluate:
    """Have the agent measure a staged release; answers with `AgentEvaluated`, `AgentUnfit` or `AgentGone`."""

    release: ReleaseSpec
    previous: str
    """Id of the release to compare with; "": the untuned base."""
    bits: Bits
    base_path: str
    source: BaseSource | None
    """With no `base_path` either, the base can't be had."""
    data_path: str
    """"": there is no data for it here, it is only loaded."""
    hold_out: float
    share: float
    trained_on: bool
    rows: int


@dataclass(frozen=True)
class ActivateRelease:
    """Have `current` point to this release ("": to none), at once; answers with `ReleaseActivated` or
    `ReleaseProblem`."""

    release: str


@dataclass(frozen=True)
class DropRelease:
    """Remove the folder of a release."""

    release: str


@dataclass(frozen=True)
class TidyReleases:
    """Remove every release but these: leftovers of a crash."""

    releases: tuple[str, ...]


@dataclass(frozen=True)
class Sample:
    """Read the load every so many seconds from now on."""

    seconds: float


@dataclass(frozen=True)
class Note:
    """Say something to the owner."""

    level: Literal["info", "warning", "error"]
    text: str


@dataclass(frozen=True)
class RaiseEpoch:
    """Number the next connection higher than this."""

    epoch: int


@dataclass(frozen=True)
class Leave:
    """Say goodbye to the broker and end the process."""


Command = (
    Publish
    | StartAgent
    | KillAgent
    | Tell
    | Train
    | Fetch
    | Adopt
    | DropBlob
    | DropWork
    | Tidy
    | Sample
    | Note
    | RaiseEpoch
    | Leave
    | CheckRelease
    | StageRelease
    | Evaluate
    | ActivateRelease
    | DropRelease
    | TidyReleases
)
