"""What the session machine is told. `now`: monotonic seconds. An event's class name is its name in the table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from edge_daemon import protocol
from edge_daemon.core.state import Machine
from edge_daemon.settings import EdgeSettings
from shared.messages import Assign, Command, CoordState, DeviceState, Done, Load
from shared.release_messages import Release


@dataclass(frozen=True, kw_only=True)
class Event:
    """Base of all events."""

    now: float


@dataclass(frozen=True, kw_only=True)
class Started(Event):
    """The process begins, with the journal it found. `minute`: local minute of the day; `wall`: Unix seconds."""

    boot_id: str
    minute: int = 0
    wall: float = 0.0
    releases: frozenset[str] | None = None
    """Ids of the releases whose folders are there; None: not looked at."""
    active: str = ""
    """Id of the release that `current` points to; "": none."""


@dataclass(frozen=True, kw_only=True)
class Tick(Event):
    """Time passed; about once a second."""

    minute: int = 0
    wall: float = 0.0
    disk_free: int = 2**62
    behind: bool = False
    """Events wait for room on the disk, perhaps the agent's words among them."""


@dataclass(frozen=True, kw_only=True)
class Drain(Event):
    """Asked to leave (SIGTERM)."""


@dataclass(frozen=True, kw_only=True)
class Reconfigured(Event):
    """The owner changed his settings (SIGHUP)."""

    settings: EdgeSettings


@dataclass(frozen=True, kw_only=True)
class MachineRead(Event):
    """The facts of the machine are known."""

    machine: Machine


@dataclass(frozen=True, kw_only=True)
class LoadRead(Event):
    """A reading of the load; epoch, seq, phase, job, round, attempt and paused are the machine's to fill in."""

    reading: Load


# ---- broker and coordinator


@dataclass(frozen=True, kw_only=True)
class Linked(Event):
    """The session with the broker stands. `max_chunk`: bytes of the largest chunk that fits its packets."""

    epoch: int
    max_chunk: int


@dataclass(frozen=True, kw_only=True)
class Unlinked(Event):
    """The session with the broker is down."""

    reason: str


@dataclass(frozen=True, kw_only=True)
class OwnStateSeen(Event):
    """The device's own retained state arrived: perhaps a will of a former connection."""

    state: DeviceState


@dataclass(frozen=True, kw_only=True)
class CoordinatorSeen(Event):
    """A coordinator's presence."""

    coordinator: str
    state: CoordState


@dataclass(frozen=True, kw_only=True)
class AssignReceived(Event):
    """The desired state of this device."""

    assign: Assign


@dataclass(frozen=True, kw_only=True)
class CommandReceived(Event):
    """The coordinator asks for something at once."""

    command: Command


@dataclass(frozen=True, kw_only=True)
class Wanted(Event):
    """The coordinator pulls an offer."""

    sha: str


@dataclass(frozen=True, kw_only=True)
class WantUnfit(Event):
    """The coordinator asks for an offer, which is here, in pieces that can't be sent; `reason`: why not."""

    sha: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class Settled(Event):
    """The coordinator has decided on an offer."""

    done: Done


@dataclass(frozen=True, kw_only=True)
class AdapterStored(Event):
    """A fetched content (a global adapter, a release) is complete on disk."""

    sha: str


@dataclass(frozen=True, kw_only=True)
class AdapterLost(Event):
    """A content can't be had: the coordinator lacks it, or it can't be stored."""

    sha: str
    reason: str
    room: bool = False
    """There is no room for it now."""


@dataclass(frozen=True, kw_only=True)
class OfferLost(Event):
    """The file of an offer is gone or damaged."""

    sha: str
    reason: str


# ---- releases


@dataclass(frozen=True, kw_only=True)
class ReleaseReceived(Event):
    """The release that this device is to have."""

    message: Release


@dataclass(frozen=True, kw_only=True)
class ReleaseChecked(Event):
    """Every file in the fetched content is what its list says."""

    release: str


@dataclass(frozen=True, kw_only=True)
class ReleaseStaged(Event):
    """Its files are in a folder of their own."""

    release: str


@dataclass(frozen=True, kw_only=True)
class ReleaseActivated(Event):
    """`current` points to this release now; "": it is gone."""

    release: str


@dataclass(frozen=True, kw_only=True)
class ReleaseProblem(Event):
    """What was asked for the release can't be done: it is `broken`, its content is `gone`, or the `disk` is full."""

    release: str
    reason: str
    fault: Literal["broken", "gone", "disk"]


# ---- agent


@dataclass(frozen=True, kw_only=True)
class AgentProbed(Event):
    """The agent is there and proved what it can do."""

    probed: protocol.Probed


@dataclass(frozen=True, kw_only=True)
class AgentBeat(Event):
    """The agent is alive; perhaps a step further."""

    progressed: protocol.Progressed | None = None


@dataclass(frozen=True, kw_only=True)
class AgentTrained(Event):
    """An update is on disk."""

    trained: protocol.Trained


@dataclass(frozen=True, kw_only=True)
class AgentFailed(Event):
    """The agent lives, but can't do the work."""

    failed: protocol.Failed


@dataclass(frozen=True, kw_only=True)
class AgentGone(Event):
    """The agent's process ended, or could not be started. `out_of_memory`: killed while its cgroup's kills rose."""

    reason: str
    out_of_memory: bool = False


@dataclass(frozen=True, kw_only=True)
class AgentEvaluated(Event):
    """A release was measured."""

    evaluated: protocol.Evaluated


@dataclass(frozen=True, kw_only=True)
class AgentUnfit(Event):
    """A release could not be measured here."""

    unfit: protocol.Unfit


AnyEvent = (
    Started
    | Tick
    | Drain
    | Reconfigured
    | MachineRead
    | LoadRead
    | Linked
    | Unlinked
    | OwnStateSeen
    | CoordinatorSeen
    | AssignReceived
    | CommandReceived
    | Wanted
    | WantUnfit
    | Settled
    | AdapterStored
    | AdapterLost
    | OfferLost
    | AgentProbed
    | AgentBeat
    | AgentTrained
    | AgentFailed
    | AgentGone
    | ReleaseReceived
    | ReleaseChecked
    | ReleaseStaged
    | ReleaseActivated
    | ReleaseProblem
    | AgentEvaluated
    | AgentUnfit
)
