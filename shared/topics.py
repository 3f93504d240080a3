"""The topics, each declared once: pattern, message type, QoS, retain, publisher. The broker's ACL comes from here.

Levels: `muster/v1/{fleet}/...`. A device subscribes to its own `state`, `down/#`, `fleet/#` and `coord/+/state`; these
four do not overlap, because mosquitto delivers one copy per overlapping subscription.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from shared import messages, release_messages

PREFIX = "muster/v1"


@dataclass(frozen=True)
class Topic:
    """A kind of topic. `message` None: the payload is raw bytes (a chunk)."""

    pattern: str
    """After `muster/v1/{fleet}/`, with `{device}` or `{coordinator}`, and for chunks `{sha}/{index}`."""
    message: object
    qos: Literal[0, 1]
    retain: bool
    publisher: Literal["device", "coordinator"]
    expiry_s: int = 0
    """Message expiry; 0: none."""

    def name(self, fleet: str, **parts: object) -> str:
        """The full topic name; every placeholder of the pattern must be given."""
        return f"{PREFIX}/{fleet}/{self.pattern.format(**parts)}"


STATE = Topic("device/{device}/state", messages.DeviceState, 1, True, "device")
INFO = Topic("device/{device}/info", messages.DeviceInfo, 1, True, "device")
LOAD = Topic("device/{device}/up/load", messages.Load, 0, False, "device", expiry_s=30)
ACK = Topic("device/{device}/up/ack", messages.Ack, 1, False, "device")
PROGRESS = Topic("device/{device}/up/progress", messages.Progress, 0, False, "device")
UP_BLOB = Topic("device/{device}/up/blob", messages.BlobMessage, 1, False, "device")
UP_CHUNK = Topic("device/{device}/up/chunk/{sha}/{index}", None, 1, False, "device")
UP_STEP = Topic("device/{device}/up/step", None, 0, False, "device")
DOWN_STEP = Topic("device/{device}/down/step", None, 0, False, "coordinator")
ASSIGN = Topic("device/{device}/down/assign", messages.Assign, 1, True, "coordinator")
COMMAND = Topic("device/{device}/down/cmd", messages.Command, 1, False, "coordinator", expiry_s=60)
DOWN_BLOB = Topic("device/{device}/down/blob", messages.BlobMessage, 1, False, "coordinator")
DOWN_CHUNK = Topic("device/{device}/down/chunk/{sha}/{index}", None, 1, False, "coordinator")
RELEASE = Topic("device/{device}/down/release", release_messages.Release, 1, True, "coordinator")
RELEASE_STATE = Topic("device/{device}/up/release", release_messages.ReleaseState, 1, False, "device")
ROUND = Topic("fleet/round", messages.RoundInfo, 1, True, "coordinator")
COORD_STATE = Topic("coord/{coordinator}/state", messages.CoordState, 1, True, "coordinator")

ALL = (
    STATE, INFO, LOAD, ACK, PROGRESS, UP_BLOB, UP_CHUNK,
    ASSIGN, COMMAND, DOWN_BLOB, DOWN_CHUNK, ROUND, COORD_STATE,
    RELEASE, RELEASE_STATE, UP_STEP, DOWN_STEP,
)  # fmt: skip


@dataclass(frozen=True)
class Parsed:
    """A topic name taken apart."""

    topic: Topic
    fleet: str
    device: str = ""
    coordinator: str = ""
    sha: str = ""
    index: int = 0


_BY_SHAPE = {tuple("" if part.startswith("{") else part for part in topic.pattern.split("/")): topic for topic in ALL}


def parse(name: str) -> Parsed | None:
    """What `name` means, or None for a name that no topic has."""
    parts = name.split("/")
    if len(parts) < 4 or f"{parts[0]}/{parts[1]}" != PREFIX:
        return None
    fleet, rest = parts[2], parts[3:]
    match rest:
        case ["fleet", "round"]:
            return Parsed(ROUND, fleet)
        case ["coord", coordinator, "state"]:
            return Parsed(COORD_STATE, fleet, coordinator=coordinator)
        case ["device", device, direction, "chunk", sha, index] if index.isdecimal() and len(index) <= 9:
            topic = _BY_SHAPE.get(("device", "", direction, "chunk", "", ""))
            return Parsed(topic, fleet, device=device, sha=sha, index=int(index)) if topic else None
        case ["device", device, *tail]:
            topic = _BY_SHAPE.get(("device", "", *tail))
            return Parsed(topic, fleet, device=device) if topic else None
        case _:
            return None


def device_filters(fleet: str, device: str) -> list[tuple[str, int]]:
    """What a device subscribes to: (filter, QoS)."""
    root = f"{PREFIX}/{fleet}"
    own = f"{root}/device/{device}"
    return [(f"{own}/state", 1), (f"{own}/down/#", 1), (f"{root}/fleet/#", 1), (f"{root}/coord/+/state", 1)]


def coordinator_filters(fleet: str) -> list[tuple[str, int]]:
    """What the coordinator subscribes to: (filter, QoS)."""
    own = (topic for topic in ALL if topic.publisher == "device" and topic is not UP_STEP)
    return [(_filter(fleet, topic, "+"), topic.qos) for topic in own]


def top_filters(fleet: str) -> list[tuple[str, int]]:
    """What the top worker of split learning subscribes to: (filter, QoS)."""
    return [(_filter(fleet, UP_STEP, "+"), UP_STEP.qos)]


def top_name(coordinator: str) -> str:
    """The name under which a coordinator's top worker connects, which its certificate bears."""
    return f"{coordinator}-top"


GATE_READS = (STATE, INFO, LOAD)
"""What a health gate looks at: presence, and that telemetry flows."""


def acl(fleet: str, coordinators: Sequence[str], *, readers: Sequence[str] = (), gates: Sequence[str] = ()) -> str:
    """The text of mosquitto's `acl_file` for a fleet: nobody may do more than the declarations above need.

    `pattern` lines hold for every user, `%u` is the certificate's CN. A coordinator may also write `state` and `info`:
    an empty retained payload there takes a device out of the fleet. Its top worker has the steps alone. `readers`
    (dashboards) only read, `gates` only presence. By the `deny` lines none of these is also a device of its own name,
    which the patterns alone would allow.
    """
    root = f"{PREFIX}/{fleet}"
    lines = [f"# Fleet {fleet}. Made from shared/topics.py; don't edit.", ""]
    lines += [f"pattern write {_filter(fleet, topic, '%u')}" for topic in ALL if topic.publisher == "device"]
    lines += [f"pattern read {name}" for name, _ in device_filters(fleet, "%u")]
    coordinators_own = (topic for topic in ALL if topic.publisher == "coordinator" and topic is not DOWN_STEP)
    written = [*coordinators_own, STATE, INFO]
    for name in coordinators:
        lines += ["", f"user {name}", f"topic deny {root}/device/{name}/#", f"topic read {root}/#", "topic read $SYS/#"]
        lines += [f"topic write {_filter(fleet, topic, '+', name)}" for topic in written]
        top = top_name(name)
        lines += ["", f"user {top}", f"topic deny {root}/device/{top}/#"]
        lines += [f"topic read {_filter(fleet, UP_STEP, '+')}", f"topic write {_filter(fleet, DOWN_STEP, '+')}"]
    for name in readers:
        lines += ["", f"user {name}", f"topic deny {root}/device/{name}/#", f"topic read {root}/#"]
        # Features and labels are for the top worker alone.
        lines += [f"topic deny {_filter(fleet, topic, '+')}" for topic in (UP_STEP, DOWN_STEP)]
    for name in gates:
        lines += ["", f"user {name}", f"topic deny {root}/device/{name}/#"]
        lines += [f"topic read {_filter(fleet, topic, '+')}" for topic in GATE_READS]
    return "\n".join(lines) + "\n"


def _filter(fleet: str, topic: Topic, device: str, coordinator: str = "") -> str:
    return topic.name(fleet, device=device, coordinator=coordinator, sha="+", index="+")
