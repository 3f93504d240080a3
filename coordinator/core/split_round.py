"""The steps of a round of split learning, as the top worker conducts them: whom a step waits for, and where all go back
to after one of them died. Pure: messages in with the time, what to do out; tensors are the worker's business.

A *seat* is a device that takes part. Three rules:
1. A step is taken once the features of every seat that is waited for are there, or `step_s` after the first of them.
   Who is late then is not waited for any more, until it speaks again: it is told which step is next. Who is late twice
   in a row takes part where it is in time, and is not waited for.
2. After a death all go back to the highest checkpoint that all hold, under a new run. A seat that comes back so late
   that this would cost more than `REACH` checkpoints goes on with its own latest one instead, and the others go on.
3. What the top worker says may be lost: devices ask again, and are answered again, by as many gradients back as a
   device can miss: a broker that dies takes along those of all steps under way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from shared.steps import UNDER_WAY, Begin, Down, End, Features, Hello, Query, Skip

QUERY_S = 1.0
GATHER_STEPS = 4.0
"""A run begins so many times `step_s` after the first hello without those who are not there: they may load a model."""
REACH = 2
PATIENCE = 2
"""Misses in a row after which a seat is not waited for, and times that it may take all others back."""


@dataclass(frozen=True)
class Say:
    """Send a message to a device."""

    device: str
    message: Down


@dataclass(frozen=True)
class Again:
    """Send the device its gradient of that step again."""

    device: str
    step: int


@dataclass(frozen=True)
class GoTo:
    """Load the own checkpoint of that step; those of later steps are void."""

    step: int


@dataclass(frozen=True)
class Take:
    """Do step `step` with the features of these devices, then call `taken`."""

    step: int
    devices: tuple[str, ...]


@dataclass(frozen=True)
class Note:
    """For the log."""

    text: str


Action = Say | Again | GoTo | Take | Note


@dataclass
class _Seat:
    held: frozenset[int] | None = None
    """Checkpoints told in this run; None: it has not spoken yet."""
    waited: bool = False
    ready: set[int] = field(default_factory=set)
    """Steps whose features are there."""
    answered: tuple[int, ...] = ()
    """The last steps of this run that it took part in: their gradients are kept."""
    misses: int = 0
    """Steps in a row that went on without it."""
    returns: int = 0
    """How often it took all others back."""
    fetch_s: float = 0.0
    """Of its download, as told."""
    gone: bool = False
    """The coordinator says that it will not come."""


class SplitRound:
    """Conducts the steps of `work`. `held`: the worker's own checkpoints; `run`: the number of its first run.

    `every`: steps between checkpoints. Times are seconds of one clock, given with each call. `regulate`: the batches of
    the devices that may come, by the seconds that each one's download took (0: not told); called where a run begins.
    """

    def __init__(
        self, work: str, devices: Iterable[str], *, steps: int, every: int, held: Iterable[int], run: int,
        step_s: float, regulate: Callable[[Mapping[str, float]], dict[str, int]] | None = None,
    ) -> None:  # fmt: skip
        self.work = work
        self.steps = steps
        self.run = run
        self.done = 0
        self.phase: Literal["gathering", "stepping", "over"] = "gathering"
        self.dropped = 0
        """How often a step went on without a seat."""
        self.held = {0, *held}
        self._every = every
        self._step_s = step_s
        self._regulate = regulate
        self.batches: dict[str, int] = {}
        """As they were regulated last; who is not in it keeps that of its work."""
        self._seats = {device: _Seat() for device in sorted(devices)}
        self._query_at = self._gather_until = self._step_until = self._ahead_until = float("inf")
        self._refused = 0
        """How often in a row all features of the step were refused."""
        self._load = 0
        self._taking = False

    # ---- in

    def start(self, now: float) -> list[Action]:
        """Begin a run: ask all what they hold."""
        self.phase, self._taking = "gathering", False
        self._gather_until, self._query_at = float("inf"), now + QUERY_S
        for seat in self._seats.values():
            seat.held, seat.waited, seat.ready, seat.answered = None, False, set(), ()
        return [Say(device, Query(work=self.work, run=self.run)) for device in self._there()]

    def on_hello(self, device: str, hello: Hello, now: float) -> list[Action]:
        """A device is ready to begin."""
        seat = self._seats.get(device)
        if seat is None or self.phase == "over":
            return [Say(device, End(work=self.work, run=self.run))]
        seat.gone, seat.fetch_s = False, hello.fetch_s
        if self.phase == "stepping":
            return self._late(device, seat, hello, now)
        if hello.run != self.run:
            return [Say(device, Query(work=self.work, run=self.run))]
        seat.held = frozenset(hello.held) | {0}
        self._gather_until = min(self._gather_until, now + GATHER_STEPS * self._step_s)
        return self._begin_if_due(now)

    def on_features(self, device: str, features: Features, now: float) -> list[Action]:
        """Features came; the worker keeps them by (device, step) until the step is taken or the run ends."""
        seat = self._seats.get(device)
        if seat is None or self.phase == "over":
            if seat is not None and features.run == self.run and features.step in seat.answered:
                return [Again(device, features.step)]
            return [Say(device, End(work=self.work, run=self.run))]
        if features.run != self.run:
            return [Say(device, Query(work=self.work, run=self.run))]
        if self.phase != "stepping":
            return []
        if features.step <= self.done:
            if features.step in seat.answered:
                return [Again(device, features.step)]
            seat.waited = seat.misses < PATIENCE
            return [Say(device, Skip(work=self.work, run=self.run, step=self.done))]
        if features.step > self.done + UNDER_WAY:
            return []
        seat.waited = seat.misses < PATIENCE
        seat.ready.add(features.step)
        return self._take_if_due(now)

    def wants(self, device: str, features: Features) -> bool:
        """Whether the features are worth keeping."""
        stepping = self.phase == "stepping" and device in self._seats and features.run == self.run
        return stepping and self.done < features.step <= self.done + UNDER_WAY

    def refuse(self, device: str, step: int) -> None:
        """The features of that step are no good: as if they had not come, and nobody waits for the device."""
        seat = self._seats[device]
        seat.ready.discard(step)
        seat.waited = False

    def without(self, devices: Iterable[str], now: float) -> list[Action]:
        """These will not come (any more)."""
        for device in devices:
            if device in self._seats:
                self._seats[device].gone, self._seats[device].waited = True, False
        return self._begin_if_due(now) if self.phase == "gathering" else self._take_if_due(now)

    def tick(self, now: float) -> list[Action]:
        """Let time pass."""
        if self.phase == "gathering":
            actions = self._begin_if_due(now)
            if not actions and now >= self._query_at:
                self._query_at = now + QUERY_S
                silent = (device for device in self._there() if self._seats[device].held is None)
                actions = [Say(device, Query(work=self.work, run=self.run)) for device in silent]
            return actions
        return self._take_if_due(now)

    def taken(self, now: float) -> list[Action]:
        """The step of the last `Take` is done, and its gradients are sent."""
        self._taking = False
        self.done += 1
        for seat in self._seats.values():
            if self.done in seat.ready:
                seat.answered, seat.misses = (*seat.answered, self.done)[-UNDER_WAY:], 0
            seat.ready = {step for step in seat.ready if step > self.done}
        self._step_until, self._refused = float("inf"), 0
        if self.done >= self.steps:
            return self.end()
        return self._take_if_due(now)

    def untaken(self, now: float) -> list[Action]:
        """Nobody's features of the last `Take` were any good: the step is still to be done. Devices send the same
        again: after `PATIENCE` times the round ends with what it has."""
        self._taking, self._step_until = False, float("inf")
        self._refused += 1
        if self._refused > PATIENCE:
            return [Note(f"the features of step {self.done + 1} are refused again and again: the end"), *self.end()]
        return self._take_if_due(now)

    def saved(self, held: Iterable[int]) -> None:
        """The worker has a checkpoint of the steps done; `held`: all that it has now."""
        self.held = {0, *held}

    def end(self) -> list[Action]:
        """No step follows. A worker that has only just begun ends with what it holds."""
        latest: list[Action] = []
        if self.phase == "gathering" and self.done < max(self.held):
            self.done = max(self.held)
            latest = [GoTo(self.done)]
        self.phase = "over"
        return latest + [Say(device, End(work=self.work, run=self.run)) for device in self._seats]

    @property
    def due_save(self) -> bool:
        """Whether a checkpoint is due after the step that was just done."""
        return (self.done % self._every == 0 or self.done >= self.steps) and self.done not in self.held

    # ---- decisions

    def _there(self) -> list[str]:
        return [device for device, seat in self._seats.items() if not seat.gone]

    def _begin_if_due(self, now: float) -> list[Action]:
        here = {device: seat.held for device, seat in self._seats.items() if seat.held is not None and not seat.gone}
        if not here or (len(here) < len(self._there()) and now < self._gather_until):
            return []
        # One that is far behind does not take the others with it.
        reach = max(self.held) - REACH * self._every
        near = [held for held in here.values() if max(self.held & held) >= reach]
        common = min(max(self.held & held) for held in (near or here.values()))
        self.phase, self.done, self._load = "stepping", common, common
        self._step_until = float("inf")
        self.held = {step for step in self.held if step <= common}
        for device in here:
            self._seats[device].waited, self._seats[device].misses = True, 0
        loads = {device: max(step for step in held if step <= common) for device, held in here.items()}
        missing = [device for device in self._there() if device not in here]
        told = f"run {self.run} begins at step {common} with {len(here)} devices"
        note = Note(f"{told}, without {', '.join(missing)}" if missing else told)
        if self._regulate is not None:
            # Over those who may still come too: their batches are part of the step.
            self.batches = self._regulate({device: self._seats[device].fetch_s for device in self._there()})
        return [note, GoTo(common), *(self._begun(device, load) for device, load in loads.items())]

    def _begun(self, device: str, load: int) -> Say:
        batch = self.batches.get(device, 0)
        return Say(device, Begin(work=self.work, run=self.run, load=load, step=self.done, batch=batch))

    def _late(self, device: str, seat: _Seat, hello: Hello, now: float) -> list[Action]:
        """A device says hello while the others are at it: it missed `Begin`, or it is a new process."""
        told = {0, *hello.held}
        best = max(step for step in told if step <= self.done)
        if hello.run == self.run and self.done == self._load and self._load in told:
            best = self._load
        elif hello.run != self.run:
            common = max(self.held & told)
            near = common != self.done and self.done - common <= REACH * self._every
            if near and seat.returns < PATIENCE:
                seat.returns += 1
                self.run += 1
                return [Note(f"{device} came back: all go back to step {common} or before"), *self.start(now)]
        seat.held, seat.waited, seat.ready = frozenset(told), seat.misses < PATIENCE, set()
        return [self._begun(device, best)]

    def _take_if_due(self, now: float) -> list[Action]:
        if self.phase != "stepping" or self._taking:
            return []
        step = self.done + 1
        ready = tuple(device for device, seat in self._seats.items() if step in seat.ready)
        if not ready:
            return self._without_any(step, now)
        self._ahead_until = float("inf")
        if self._step_until == float("inf"):
            self._step_until = now + self._step_s
        late = [device for device, seat in self._seats.items() if seat.waited and step not in seat.ready]
        if late and now < self._step_until:
            return []
        notes: list[Action] = [Note(f"step {step} goes on without {', '.join(late)}")] if late else []
        self.dropped += len(late)
        for device in late:
            self._seats[device].waited = False
            self._seats[device].misses += 1
        self._taking = True
        return [*notes, Take(step, ready)]

    def _without_any(self, step: int, now: float) -> list[Action]:
        """Nobody's features of `step` are here. Where those of a later one are, who sent them may have forgotten its
        own: after the time of a step all begin again, with a checkpoint."""
        if not any(seat.ready for seat in self._seats.values()):
            return []
        if self._ahead_until == float("inf"):
            self._ahead_until = now + self._step_s
        if now < self._ahead_until:
            return []
        self._ahead_until = float("inf")
        self.run += 1
        return [Note(f"nobody sends the features of step {step}: all begin again"), *self.start(now)]
