"""The phases of a release as one table; `docs/state-machines.md` is drawn from it, every step is checked against it.

As with jobs, what is decided over several devices is decided on `Tick` alone, so that none of it can wait for an event
that never comes.
"""

from __future__ import annotations

from shared.machines import Transition

FIRST = "packing"

TABLE: tuple[Transition, ...] = (
    Transition("packing", "Packed", ("packing",), "one blob holds its files"),
    Transition("packing", "Tick", ("canary", "failed"), "packed, and the fleet is heard: canaries are chosen, if any"),
    Transition("packing", "PackingFailed", ("failed",), "the adapter can't be exported, or is too large"),
    Transition("packing", "RollbackRequested", ("failed",), "withdrawn before any device had it"),
    Transition(
        "canary", "Tick", ("rest", "rolling_back"), "all canaries took it; or one did not (worse, broken, silent)"
    ),
    Transition("canary", "RollbackRequested", ("rolling_back",), "withdrawn by an operator"),
    Transition("rest", "Tick", ("finished",), "every other device has answered, or the deadline has passed"),
    Transition("rest", "RollbackRequested", ("rolling_back",), "withdrawn by an operator"),
    Transition("finished", "RollbackRequested", ("rolling_back",), "withdrawn by an operator"),
    Transition("rolling_back", "Tick", ("rolled_back",), "the devices have what they had before, or time is up"),
)
