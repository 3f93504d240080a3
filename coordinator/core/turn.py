"""The state of the coordinator's machine, and the bookkeeping of one step over it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import NamedTuple

from coordinator.core import releases
from coordinator.core.commands import Command, PublishAssign
from coordinator.core.fleet import Fleet
from coordinator.core.job import IDLE, Job, apply
from coordinator.core.records import AnyRecord, JobRecord
from coordinator.core.release_records import AnyReleaseRecord
from coordinator.core.releases import Release
from shared.messages import Manifest
from shared.release_messages import ReleaseState


@dataclass(frozen=True, kw_only=True)
class Waits:
    """Seconds; from the coordinator's settings."""

    silent_s: float = 12.0
    absent_s: float = 60.0
    fresh_s: float = 30.0
    gather_s: float = 2.0
    repeat_s: float = 2.0
    grace_s: float = 30.0
    remind_s: float = 10.0
    release_look_s: float = 1.0
    release_remind_s: float = 30.0
    patience: float = 5.0
    """Times `gather_s`."""


@dataclass(frozen=True, kw_only=True)
class State:
    """All jobs and devices. Only `jobs` and `releases` are durable; the rest is told again after a restart."""

    waits: Waits = Waits()
    term: int = 1
    chunk: int = 122_880
    """Bytes per chunk that the broker takes."""
    jobs: dict[str, Job] = field(default_factory=dict)
    """In the order of submission."""
    fleet: Fleet = field(default_factory=dict)
    since: float = 0.0
    """When the active job entered its phase (monotonic; after a restart, less the time already spent)."""
    cut_off: bool = False
    """The broker is away."""
    restarted_at: float = 0.0
    """When we last began to hear the devices: silence counts from here at the earliest."""
    settled_at: float = 0.0
    """When the set of able devices last changed."""
    announced: dict[str, Manifest] = field(default_factory=dict)
    """Device -> its update that is being pulled or checked."""
    checking: dict[str, str] = field(default_factory=dict)
    """Device -> digest of its update that is being checked."""
    accepted: frozenset[str] = frozenset()
    """Participants that accepted their assignment."""
    top_told: frozenset[str] = frozenset()
    """Devices of which the top worker knows that they will not come."""
    top_asked_at: float | None = None
    """When it was asked to finish."""
    reminded: dict[str, float] = field(default_factory=dict)
    """Participant -> when its assignment was published again."""
    hurried: dict[str, float] = field(default_factory=dict)
    """Participant -> when it was asked to deliver what it has done."""
    silenced: dict[str, float] = field(default_factory=dict)
    """Device -> when a round closed without a sign of life from it."""
    told: frozenset[str] = frozenset()
    """Devices whose desired state this process has set."""
    assigned: frozenset[str] = frozenset()
    """Devices whose retained desired state holds an assignment."""
    notices: dict[str, str] = field(default_factory=dict)
    """Job -> what it waits for, in words."""
    releases: dict[str, Release] = field(default_factory=dict)
    """In the order of their numbers; durable like the jobs."""
    release_since: float = 0.0
    """When the release under way entered its phase (monotonic)."""
    release_looked_at: float = -1e9
    """When its devices were last looked at."""
    release_reports: dict[str, ReleaseState] = field(default_factory=dict)
    """Device -> what it last said of its release."""
    release_told: dict[str, tuple[tuple[str, bool], float]] = field(default_factory=dict)
    """Device -> the (release, to stay) that this process told it in this connection, and when."""
    release_seq: int = 0
    """Of the last desired release that this process published."""
    counters: dict[str, int] = field(default_factory=dict)
    """Refused, late and foreign messages by kind."""

    @property
    def active(self) -> Job | None:
        """The job that holds the fleet."""
        return next((job for job in self.jobs.values() if job.phase not in IDLE), None)

    def hearing_since(self, now: float) -> float:
        """When the devices could begin to be heard; `now` while the broker is away. No silence counts before."""
        return now if self.cut_off else self.restarted_at


class Step(NamedTuple):
    """What a step decided. Records go to disk before any command is performed."""

    state: State
    records: list[AnyRecord]
    commands: list[Command]


class Turn:
    """Collects the records and commands of one step while the state moves on. Lives no longer than the step."""

    def __init__(self, state: State) -> None:
        self.state = state
        self.records: list[AnyRecord] = []
        self.commands: list[Command] = []

    def record(self, record: JobRecord) -> Job:
        """Write `record` and let it act on its job."""
        job = apply(self.state.jobs.get(record.job), record)
        self.records.append(record)
        self.update(jobs={**self.state.jobs, job.id: job})
        return job

    def record_release(self, record: AnyReleaseRecord) -> Release:
        """Write `record` and let it act on its release."""
        release = releases.apply(self.state.releases.get(record.release), record)
        self.records.append(record)
        self.update(releases={**self.state.releases, release.id: release})
        return release

    def do(self, *commands: Command) -> None:
        """Ask the runtime for these, in order, after the records are on disk."""
        self.commands.extend(commands)
        asks = {one.device: one.assign.assignment is not None for one in commands if isinstance(one, PublishAssign)}
        if asks:
            busy = {device for device, asked in asks.items() if asked}
            self.update(told=self.state.told.union(asks), assigned=self.state.assigned.difference(asks) | busy)

    def update(self, **changes: object) -> None:
        """Change volatile fields of the state."""
        self.state = replace(self.state, **changes)  # type: ignore[arg-type]  # names are checked at run time

    def count(self, what: str) -> None:
        """Count one occurrence of `what`."""
        counters = self.state.counters
        self.update(counters={**counters, what: counters.get(what, 0) + 1})

    def step(self) -> Step:
        """The result."""
        return Step(self.state, self.records, self.commands)
