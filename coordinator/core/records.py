"""What the coordinator writes down. A job's durable state is the fold of its records (`coordinator.core.job.apply`);
those of releases stand in `coordinator.core.release_records`.

Wall-clock seconds (`ts`) are for reports only; no decision reads them.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from coordinator.core.facts import Metrics, ModelFacts
from coordinator.core.planning.base import Plan
from coordinator.core.release_records import AnyReleaseRecord, ReleaseRecord
from shared.jobs import JobSpec
from shared.messages import BlobRef, DeviceInfo, Load, UpdateFacts

Ending = Literal["finished", "cancelled", "failed", "paused"]


class Record(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """One line of the event log."""

    job: str


class JobSubmitted(Record, frozen=True, kw_only=True):
    """A job was accepted into the queue."""

    spec: JobSpec
    ts: float


class JobStarted(Record, frozen=True, kw_only=True):
    """The job left the queue."""


class JobPrepared(Record, frozen=True, kw_only=True):
    """The base was inspected; `adapter` is the global adapter of round 0."""

    facts: ModelFacts
    adapter: BlobRef
    lower: BlobRef | None = None
    """What of it devices of a split model need; None: all."""


class BaselineEvaluated(Record, frozen=True, kw_only=True):
    """The base with the fresh head on the held-out data."""

    metrics: Metrics


class RoundPlanned(Record, frozen=True, kw_only=True):
    """The plan of a round; from here on the round is never planned again unless it is repeated.

    With the records before it, it holds all that the planner saw: from the log alone the plan can be made again.
    """

    round: int
    attempt: int
    plan: Plan
    digest: str
    loads: dict[str, Load]
    """The load of each candidate that was heard, as the planner saw it, so that a replay learns the same."""
    load_ages: dict[str, float] = {}
    """Seconds since that load arrived."""
    infos: dict[str, DeviceInfo] = {}
    """Of the candidates (the plan's participants and those it leaves out, but for those not drawn) each whose
    capabilities are not as the job's plans before told them: all of 10,000 devices would be megabytes a round."""
    fresh_s: float = 0.0
    """A load older than this was stale."""
    ts: float


class DeviceAnswered(Record, frozen=True, kw_only=True):
    """A participant will not deliver in this round, and says why."""

    round: int
    attempt: int
    device: str
    verdict: Literal["refused", "failed"]
    reason: str
    out_of_memory: bool = False
    batch_limit: int = 0
    """Largest batch that fits, where memory ran out; 0: none did."""


class UpdateAdmitted(Record, frozen=True, kw_only=True):
    """An update is on disk, passed admission and counts."""

    round: int
    attempt: int
    device: str
    blob: BlobRef
    facts: UpdateFacts


class UpdateRefused(Record, frozen=True, kw_only=True):
    """An update did not pass admission; the device is not waited for any more."""

    round: int
    attempt: int
    device: str
    sha: str
    reason: str


class TopUpdate(msgspec.Struct, frozen=True, kw_only=True):
    """An update of the top worker. `of`: the device whose top it is; "": that of all."""

    blob: BlobRef
    samples: int
    of: str = ""


class TopTrained(Record, frozen=True, kw_only=True):
    """The top worker's part of a round of split learning is on disk, and counts."""

    round: int
    attempt: int
    updates: list[TopUpdate]
    steps: int
    loss: float
    dropped: int = 0
    """How often a step went on without a device."""
    waited_s: float = 0.0
    """Seconds in which the top worker waited for features."""


class RoundClosed(Record, frozen=True, kw_only=True):
    """Nothing more is taken for this round; these devices' updates are folded."""

    round: int
    devices: list[str]
    reason: str


class RoundRepeated(Record, frozen=True, kw_only=True):
    """The round could not close; it is planned again with the next attempt number."""

    round: int
    attempt: int
    reason: str


class RoundFolded(Record, frozen=True, kw_only=True):
    """The aggregate exists on disk."""

    round: int
    adapter: BlobRef
    lower: BlobRef | None = None
    """As in `JobPrepared`."""
    residual: BlobRef | None = None
    ranks: dict[str, int] = {}
    lost_energy: float = 0.0
    norm: float = 0.0


class RoundCommitted(Record, frozen=True, kw_only=True):
    """The round's end. Accepted: the aggregate is the new global adapter; else the old one stays, with the reason."""

    round: int
    accepted: bool
    reason: str
    metrics: Metrics | None
    ts: float


class JobExported(Record, frozen=True, kw_only=True):
    """The PEFT folder is complete on disk."""

    path: str


class JobEnded(Record, frozen=True, kw_only=True):
    """The job stopped, for good or (paused) until it is resumed."""

    state: Ending
    reason: str
    ts: float


class JobResumed(Record, frozen=True, kw_only=True):
    """An operator resumed a paused job; the gate's count of refusals starts anew."""


JobRecord = (
    JobSubmitted
    | JobStarted
    | JobPrepared
    | BaselineEvaluated
    | RoundPlanned
    | DeviceAnswered
    | UpdateAdmitted
    | UpdateRefused
    | TopTrained
    | RoundClosed
    | RoundRepeated
    | RoundFolded
    | RoundCommitted
    | JobExported
    | JobEnded
    | JobResumed
)
AnyRecord = JobRecord | AnyReleaseRecord


def subject(record: AnyRecord) -> str:
    """The job or release that `record` is of; the ids of the two never meet, since only a release's holds a dot."""
    return record.release if isinstance(record, ReleaseRecord) else record.job
