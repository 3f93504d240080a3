"""What the daemon knows. `Journal` is on disk before anything that follows from it is done; the rest is volatile."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import msgspec

from edge_daemon import protocol
from edge_daemon.core.rollout import Rollout
from edge_daemon.settings import EdgeSettings
from shared.fields import MAX_CHUNK_BYTES
from shared.jobs import Bits
from shared.messages import Assignment, CoordState, DatasetFacts, DeviceInfo, Gpu, Load, UpdateFacts
from shared.release_messages import ReleaseState

Phase = Literal["probing", "idle", "fetching", "training", "paused", "offering", "draining", "stopped"]
WORKING: frozenset[Phase] = frozenset({"fetching", "training", "paused"})
"""The device is at work on its assignment."""
AgentStatus = Literal["absent", "starting", "ready", "busy", "stopping", "evaluating"]
"""`stopping`: told to discard its work, and has not answered yet. `evaluating`: a release, between two works."""
Verdict = Literal["stored", "refused", "late", "rejected", "failed"]
KEPT_FINISHED = 64


class Identity(NamedTuple):
    """Of one piece of work on this device. Higher is newer within a job."""

    job: str
    round: int
    attempt: int

    def __str__(self) -> str:
        return f"{self.job} round {self.round} attempt {self.attempt}"


def identity_of(assignment: Assignment) -> Identity:
    """The identity of an assignment's work."""
    return Identity(assignment.job, assignment.round, assignment.attempt)


class Offer(msgspec.Struct, frozen=True, kw_only=True):
    """An update in the outbox: trained, on disk, not yet settled by the coordinator."""

    job: str
    round: int
    attempt: int
    sha: str
    size: int
    facts: UpdateFacts
    chunk: int = MAX_CHUNK_BYTES
    """Upper bound of the chunks, by its assignment."""

    @property
    def identity(self) -> Identity:
        """Of the work it came from."""
        return Identity(self.job, self.round, self.attempt)


class Finished(msgspec.Struct, frozen=True, kw_only=True):
    """Work that is never done again."""

    job: str
    round: int
    attempt: int
    verdict: Verdict
    reason: str = ""
    out_of_memory: bool = False
    """It failed because memory ran out."""
    batch_limit: int = 0
    """Largest batch that fits then; 0: none does."""

    @property
    def identity(self) -> Identity:
        """Of the work."""
        return Identity(self.job, self.round, self.attempt)


class Journal(msgspec.Struct, frozen=True, kw_only=True):
    """What survives the process. `received_*`: when the assignment came, by three clocks."""

    term: int = 0
    """Highest term of an assignment seen; a lower one comes from an old coordinator."""
    assignment: Assignment | None = None
    """The desired state as last received."""
    boot_id: str = ""
    received_at: float = 0.0
    """Monotonic seconds, of boot `boot_id`."""
    received_wall: float = 0.0
    deaths: int = 0
    """Times an agent died of this assignment, out of memory not counted."""
    batch_limit: int = 0
    """Largest batch that may fit, after agents were killed for memory; 0: not known."""
    given_up: str = ""
    """Why the work is not tried any more: the agent is only asked for what its checkpoint holds."""
    given_up_memory: bool = False
    """Memory was the reason."""
    checkpointed: bool = False
    """An agent got as far as a first checkpoint."""
    fetch_s: float = 0.0
    outbox: tuple[Offer, ...] = ()
    finished: tuple[Finished, ...] = ()
    """The latest `KEPT_FINISHED`, oldest first."""
    rollout: Rollout = Rollout()


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What changes by the boot only, as telemetry found it."""

    hardware: str = ""
    cores: float = 1.0
    memory_bytes: int = 0
    gpus: tuple[Gpu, ...] = ()
    driver: str = ""
    jetpack: str = ""
    sandbox: Literal["", "full", "degraded"] = ""

    @property
    def unified(self) -> bool:
        """Whether a GPU that trains shares the machine's memory."""
        return any(gpu.integrated for gpu in self.gpus)


@dataclass(frozen=True, kw_only=True)
class Capability:
    """What the agent proved. `problem`: why there is no agent; then nothing was proven."""

    bits: tuple[Bits, ...] = ()
    datasets: dict[str, DatasetFacts] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    agents: int = 1
    agent_bytes: int = 0
    flops: float = 0.0
    hardware: str = ""
    problem: str = ""


@dataclass(frozen=True, kw_only=True)
class Agent:
    """The training subprocess as the machine sees it; several, one a GPU, are one to it (`core.team`)."""

    status: AgentStatus = "absent"
    heard_at: float = 0.0
    """Of its last message, or of the last order to it."""
    start_at: float = 0.0
    """While absent: when it may start."""
    failures: int = 0
    """Deaths in a row without an answer to a probe."""
    identity: Identity | None = None
    """Of the work it was last told to do."""
    killed_at: float = -1e9
    """When it was last told to die for its silence."""
    gpus: tuple[str, ...] = ()
    """The GPUs it was started for; none: the CPU."""
    held_bytes: int = 0
    """Of the machine's memory, through a GPU which shares it, as it last told."""


@dataclass(frozen=True, kw_only=True)
class Announcing:
    """When an offer is announced next, and the wait after that."""

    next_at: float
    wait_s: float


@dataclass(frozen=True, kw_only=True)
class State:
    """All of the daemon's knowledge; every step makes a new one."""

    settings: EdgeSettings
    journal: Journal = Journal()
    phase: Phase = "probing"
    machine: Machine | None = None
    """None: not yet read; the agent waits for it for some seconds."""
    capability: Capability | None = None
    agent: Agent = Agent()
    agent_outdated: bool = False
    """The agent knows settings that are no longer those."""
    now: float = 0.0
    """Of the last event; no event goes back in time."""
    started_at: float = 0.0
    boot_id: str = ""
    version: str = ""
    minute: int = 0
    """Local minute of the day."""
    disk_free: int = 2**62
    """Bytes free where the state is kept."""
    wall: float = 0.0
    """Unix seconds, for people and for the journal only."""
    received_at: float = 0.0
    """When the assignment came, on this process's monotonic clock."""
    resumed: bool = False
    """The assignment came to a process before this one."""
    accepted: bool = False
    """The owner's policy took the assignment."""
    adapter_there: bool = False
    """The assignment's global adapter is complete on disk."""
    fetch_since: float = 0.0
    fetch_asked_at: float = 0.0
    """When what is being fetched was last asked for once more."""
    paused: str = ""
    """Reason of the pause under way."""
    progressed: protocol.Progressed | None = None
    """How far the work under way is; None: not yet told."""
    connected: bool = False
    no_broker: str = ""
    """Why there is no session, as last noted."""
    epoch: int = 0
    max_chunk: int = MAX_CHUNK_BYTES
    coordinators: dict[str, CoordState] = field(default_factory=dict)
    announcing: dict[str, Announcing] = field(default_factory=dict)
    """sha of an offer -> its next announcement; none: at once."""
    load: Load | None = None
    load_sent: Load | None = None
    load_sent_at: float = 0.0
    load_seq: int = 0
    progress_at: float = -1e9
    word: str = ""
    """The lifecycle word last published in this connection."""
    info_sent: DeviceInfo | None = None
    """The capability last published in this connection."""
    said_at: float = 0.0
    """When lifecycle and capability were last said without need."""
    sampling_s: float = 0.0
    """Seconds between readings, as last asked for."""
    drain_until: float = 0.0
    release_task: str = ""
    """What the runtime was last asked to do for the wanted release; it is not asked twice."""
    release_retry_at: float = 0.0
    """When a release that met a full disk goes on at the earliest."""
    release_paused: str = ""
    """Why its evaluation rests."""
    release_sent: ReleaseState | None = None
    """How far it is, as last published in this connection; epoch and seq are left out."""
    release_seq: int = 0
    settled: dict[str, int] = field(default_factory=dict)
    """Verdict of the coordinator -> how many updates of this process got it."""

    @property
    def work(self) -> Assignment | None:
        """The assignment that is still to be done, None where it is done, settled or absent."""
        wanted = self.journal.assignment
        if wanted is None or offered(self.journal, identity_of(wanted)) or finished(self.journal, identity_of(wanted)):
            return None
        return wanted

    @property
    def assigned(self) -> bool:
        """Whether the coordinator waits for this device: work to do, or its update not yet settled."""
        wanted = self.journal.assignment
        return wanted is not None and finished(self.journal, identity_of(wanted)) is None

    @property
    def coordinator_online(self) -> bool:
        """Whether any coordinator is there to take updates."""
        return any(seen.online for seen in self.coordinators.values())


def offered(journal: Journal, identity: Identity) -> Offer | None:
    """The update of `identity` in the outbox."""
    return next((offer for offer in journal.outbox if offer.identity == identity), None)


def finished(journal: Journal, identity: Identity) -> Finished | None:
    """How the work `identity` ended."""
    return next((done for done in reversed(journal.finished) if done.identity == identity), None)
