"""What a fleet says of itself on the broker, read without the coordinator: the health gate of a roll-out.

    watch = Watch(broker, "fleet1", "gate-1")
    verdicts = watch.until({"edge-01": Expected(version="0.2.0", above=17)}, within_s=60)

States are retained, so one look tells the last word of every program, and a program that hangs or never came up is told
from one that runs by its version and its epoch, which rises with every connection.
"""

from __future__ import annotations

import queue
import random
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Literal

import msgspec
from msgspec import structs

from shared import topics
from shared.codec import unpack
from shared.errors import DecodeError, UserError
from shared.messages import CoordState, DeviceState, Load
from shared.settings import BrokerSettings
from shared.transport.base import Connected, Disconnected, Received, TransportEvent, TransportFailed

READY = ("ready", "training")
"""States of a device that can work."""
ONLINE = "online"
"""The state of a coordinator that runs."""


class Presence(msgspec.Struct, frozen=True, kw_only=True):
    """The last word of one device or coordinator."""

    state: str
    epoch: int
    """Of its connection; of a coordinator, its term."""
    version: str = ""
    """Coordinators tell none."""
    load: bool = False
    """Whether a load of that epoch was heard."""


class Expected(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What one of them is to say."""

    version: str = ""
    """Empty: any."""
    above: int = -1
    """The epoch must be higher: a connection made after the one that was known before."""
    states: tuple[str, ...] = (*READY, ONLINE)
    """Any of these."""
    load: bool = False
    """Whether a load must come too: its loop turns, not only its connection."""


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """How one of them stands to what is expected. `fault` empty: as expected."""

    fault: str
    presence: Presence | None


class Board:
    """The last words of all of a fleet, as messages come in."""

    def __init__(self, fleet: str) -> None:
        self._fleet = fleet
        self.known: dict[str, Presence] = {}

    def hear(self, name: str, payload: bytes) -> None:
        """Take one message in; what is none of a fleet's presence, or of another schema, changes nothing."""
        parsed = topics.parse(name)
        if parsed is None or parsed.fleet != self._fleet:
            return
        try:
            if parsed.topic is topics.STATE:
                self._state(parsed.device, unpack(payload, DeviceState) if payload else None)
            elif parsed.topic is topics.LOAD:
                self._load(parsed.device, unpack(payload, Load))
            elif parsed.topic is topics.COORD_STATE and payload:
                word = unpack(payload, CoordState)
                state = ONLINE if word.online else "offline"
                self.known[parsed.coordinator] = Presence(state=state, epoch=word.term)
        except DecodeError:
            return

    def _state(self, device: str, word: DeviceState | None) -> None:
        if word is None:  # it was taken out of the fleet
            self.known.pop(device, None)
            return
        last = self.known.get(device)
        if last is None or word.epoch >= last.epoch:  # a will of an older connection says nothing
            load = last is not None and last.load and last.epoch == word.epoch
            self.known[device] = Presence(state=word.s, epoch=word.epoch, version=word.version, load=load)

    def _load(self, device: str, word: Load) -> None:
        last = self.known.get(device)
        if last is not None and last.epoch == word.epoch:
            self.known[device] = structs.replace(last, load=True)

    def verdict(self, name: str, expected: Expected) -> Verdict:
        """What `name` says, against what is expected of it."""
        found = self.known.get(name)
        if found is None:
            return Verdict(fault="nothing was heard of it", presence=None)
        faults = []
        if found.epoch <= expected.above:
            faults.append(f"no connection since epoch {expected.above}")
        if expected.version and found.version != expected.version:
            faults.append(f"version {found.version or 'not told'}, expected {expected.version}")
        if found.state not in expected.states:
            faults.append(f"state {found.state}, expected {' or '.join(expected.states)}")
        if expected.load and not found.load:
            faults.append("no load was heard")
        return Verdict(fault="; ".join(faults), presence=found)


class Watch:
    """A connection that only listens. `name`: as in its certificate, of which there is one connection at a time.

    A context manager. Raises `UserError` where the broker refuses it, or its files can't be read.
    """

    def __init__(
        self, broker: BrokerSettings, fleet: str, name: str, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.board = Board(fleet)
        self._clock = clock
        self._events: queue.SimpleQueue[TransportEvent] = queue.SimpleQueue()
        self._connected = False
        self._why = "no answer"
        once = structs.replace(broker, session_expiry_s=0)
        from shared.transport.mqtt import MqttTransport  # `muster --help` waits for no library

        self._transport = MqttTransport(once, name, lambda: 0, rng=random.Random(), clean_start=True)
        kinds: Iterable[topics.Topic] = (topics.STATE, topics.LOAD, topics.COORD_STATE)
        self._transport.subscribe([(kind.name(fleet, device="+", coordinator="+"), kind.qos) for kind in kinds])
        self._where = f"{broker.host}:{broker.port}"

    def __enter__(self) -> Watch:
        self._transport.start(self._events.put)
        return self

    def __exit__(self, *_: object) -> Literal[False]:
        self._transport.stop(graceful=True)
        return False

    def until(self, expected: Mapping[str, Expected], within_s: float) -> dict[str, Verdict]:
        """Listen until all is as expected, at most so long; how each stands then. Raises `UserError`: no broker."""
        end = self._clock() + within_s
        while True:
            verdicts = {name: self.board.verdict(name, wanted) for name, wanted in expected.items()}
            if expected and not any(verdict.fault for verdict in verdicts.values()):
                return verdicts
            left = end - self._clock()
            if left <= 0:
                break
            self._turn(left)
        if not self._connected:
            raise UserError(f"no connection to the broker at {self._where} within {within_s:g} s: {self._why}")
        return verdicts

    def _turn(self, left: float) -> None:
        try:
            event = self._events.get(timeout=min(left, 0.5))
        except queue.Empty:
            return
        match event:
            case Connected():
                self._connected = True
            case Received():
                self.board.hear(event.name, event.payload)
                self._transport.ack(event)
            case TransportFailed(reason=reason):
                raise UserError(f"the broker at {self._where} refuses: {reason}")
            case Disconnected(reason=reason):
                self._why = reason
            case _:
                pass
        self._transport.pump()
