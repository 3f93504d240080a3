"""The phases of a device's session, as one table: what may follow what. Docs are generated from it, every step is
checked against it.

Two rules:
1. What a phase needs done follows from the state alone (`session_machine._advance`), so that a restart, a reconnect and
   an ordinary step take the same path.
2. Being connected is no phase: training goes on while the broker is away.
"""

from __future__ import annotations

from shared.machines import Transition

FIRST = "probing"
_ACTIVE = ("probing", "idle", "fetching", "training", "paused", "offering")
_REST = ("idle", "offering")


def _row(source: str, on: str, targets: tuple[str, ...], meaning: str) -> Transition:
    return Transition(source, on, targets, meaning)


MOVES: tuple[Transition, ...] = (
    _row("probing", "AgentProbed", (*_REST, "fetching"), "capability known; take up what the journal holds"),
    _row("probing", "AgentGone", ("probing", *_REST), "start the agent again; after too many tries say so and rest"),
    *(
        row
        for rest in _REST
        for row in (
            _row(rest, "AssignReceived", (*_REST, "fetching"), "policy decides: reject, or fetch the adapter"),
            _row(rest, "OfferLost", (*_REST, "fetching"), "an update's file is gone: do current work again"),
        )
    ),
    _row("fetching", "AdapterStored", ("fetching", "training", "paused"), "train as soon as the agent is free"),
    _row("fetching", "AdapterLost", ("fetching", *_REST), "report the work as failed; another adapter changes nothing"),
    _row("fetching", "AssignReceived", ("fetching", *_REST), "new desired state; the same one changes nothing"),
    _row("fetching", "AgentProbed", ("fetching", "training", "paused"), "the agent is back"),
    _row("fetching", "AgentTrained", ("fetching", "training", "paused"), "superseded work ended; the agent is free"),
    _row("fetching", "AgentFailed", ("fetching", "training", "paused"), "discarded work ended; the agent is free"),
    _row("fetching", "AgentEvaluated", ("fetching", "training", "paused"), "a release was tried; the agent is free"),
    _row("fetching", "AgentUnfit", ("fetching", "training", "paused"), "a release was tried; the agent is free"),
    _row("fetching", "AgentGone", ("fetching", *_REST), "start the agent again; after too many tries report failure"),
    _row("training", "LoadRead", ("training", "paused"), "rest while the owner needs the device"),
    _row("paused", "LoadRead", ("paused", "training"), "go on once the reading is well below its limit"),
    _row("training", "Reconfigured", ("training", "paused"), "the owner's new limits hold at once"),
    _row("paused", "Reconfigured", ("paused", "training"), "the owner's new limits hold at once"),
    *(
        row
        for source in ("training", "paused")
        for row in (
            _row(source, "AgentTrained", ("offering",), "the update is in the outbox"),
            _row(source, "AgentFailed", _REST, "report the work as failed"),
            _row(source, "AgentGone", ("training", *_REST), "start it again, resume; after too many tries fail"),
            _row(source, "AgentProbed", ("training", "paused"), "the agent is back: resume from its checkpoint"),
            _row(source, "AssignReceived", (source, "fetching", *_REST), "newer work or none: discard; the same: on"),
        )
    ),
    _row("offering", "Settled", _REST, "the coordinator has decided: forget the update"),
    *(_row(source, "Drain", ("draining", "stopped"), "end the work with what is done; leave") for source in _ACTIVE),
    _row("draining", "AgentTrained", ("stopped",), "the partial update is in the outbox"),
    _row("draining", "AgentFailed", ("stopped",), "nothing to keep but the checkpoint"),
    _row("draining", "AgentGone", ("stopped",), "nothing to keep but the checkpoint"),
    _row("draining", "Tick", ("draining", "stopped"), "waited long enough"),
)  # fmt: skip
"""Every row that may change the phase."""

_NAMES = (
    "Started", "Tick", "Drain", "Reconfigured", "MachineRead", "LoadRead", "Linked", "Unlinked", "OwnStateSeen",
    "CoordinatorSeen", "AssignReceived", "CommandReceived", "Wanted", "WantUnfit", "Settled", "AdapterStored",
    "AdapterLost", "OfferLost", "AgentProbed", "AgentBeat", "AgentTrained", "AgentFailed", "AgentGone",
    "ReleaseReceived", "ReleaseChecked", "ReleaseStaged", "ReleaseActivated", "ReleaseProblem", "AgentEvaluated",
    "AgentUnfit",
)  # fmt: skip
_MOVING = {(row.source, row.on) for row in MOVES}
STAYS: tuple[Transition, ...] = tuple(
    Transition(phase, name, (phase,), "changes no phase")
    for phase in (*_ACTIVE, "draining", "stopped")
    for name in _NAMES
    if (phase, name) not in _MOVING
)
TABLE: tuple[Transition, ...] = (*MOVES, *STAYS)
"""All phases by all events: what is not here is a fault."""
