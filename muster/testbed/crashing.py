"""Runs a service that kills something, once, at a chosen point of its state machine. For fault tests.

    python -m muster.testbed.crashing coordinator --at folding --point written --once MARKER -- ARGUMENTS
    python -m muster.testbed.crashing edge --at training --point done --once MARKER --victim agent -- ARGUMENTS

The service itself is the ordinary one and knows nothing of this. Points: `decided`: nothing of the step is on disk;
`written`: records or journal are, nothing that follows from them was done; `done`: the step is performed. The marker
file keeps a restarted service from dying again, and tells the phase that was met. The victim is this process unless
another is named, by its PID file or as `agent`.

`--at release:canary` (of the coordinator's) and `--at release:staged` (of a device's) name the phases of a release.

A daemon is born in `probing`, no step leads there: that trap springs after the first step within it that left an agent
running.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import coordinator.service
import edge_daemon.service
from coordinator.core import events as coordinator_events
from coordinator.core.records import AnyRecord
from coordinator.core.round_machine import step as coordinator_step
from coordinator.core.turn import State as CoordinatorState
from coordinator.runtime import Runtime as CoordinatorRuntime
from edge_daemon.core import events as edge_events
from edge_daemon.core.session_machine import step as edge_step
from edge_daemon.core.state import Journal
from edge_daemon.core.state import State as EdgeState
from edge_daemon.core.transitions import FIRST
from edge_daemon.runtime import Runtime as EdgeRuntime

RELEASE = "release:"


class Trap:
    """Kills the victim when the machine enters `phase`, the first time it does so with this marker."""

    def __init__(self, phase: str, point: str, marker: Path, victim: str) -> None:
        self.phase = phase
        self.point = point
        self._marker = marker
        self._victim = victim

    def spring(self, point: str, agent: int | None = None) -> None:
        """The machine is entering the phase, or is in it for the first time, and stands at `point`."""
        if point != self.point or self._marker.exists():
            return
        victim = os.getpid() if self._victim == "self" else agent if self._victim == "agent" else self._named()
        if victim is None:
            return
        self._marker.write_text(f"{self.phase} {point}", encoding="ascii")
        os.kill(victim, signal.SIGKILL)

    def _named(self) -> int:
        """The process whose number is in the victim file."""
        return int(Path(self._victim).read_text(encoding="ascii"))


def coordinator_runtime(trap: Trap) -> type[CoordinatorRuntime]:
    """The coordinator's runtime with the trap in it."""

    class Trapped(CoordinatorRuntime):
        def step(self, event: coordinator_events.AnyEvent) -> bool:
            before, after = phases(self.state), phases(coordinator_step(self.state, event).state)
            if not any(phase == trap.phase != before.get(name) for name, phase in after.items()):
                return super().step(event)
            trap.spring("decided")
            log, append = self.ports.log, self.ports.log.append

            def append_and_spring(records: Sequence[AnyRecord]) -> None:
                append(records)
                trap.spring("written")

            log.append = append_and_spring  # type: ignore[method-assign]  # that is what a trap does
            try:
                return super().step(event)
            finally:
                log.append = append  # type: ignore[method-assign]  # see above
                trap.spring("done")

    return Trapped


def phases(state: CoordinatorState) -> dict[str, str]:
    """Job or release -> its phase; those of releases begin with `release:`."""
    jobs = {job.id: str(job.phase) for job in state.jobs.values()}
    return jobs | {one.id: f"{RELEASE}{one.phase}" for one in state.releases.values()}


def device_phases(state: EdgeState) -> set[str]:
    """The phase of the session, and that of its release."""
    return {state.phase, f"{RELEASE}{state.journal.rollout.stage}"}


def edge_runtime(trap: Trap) -> type[EdgeRuntime]:
    """The daemon's runtime with the trap in it."""

    class Trapped(EdgeRuntime):
        def step(self, event: edge_events.AnyEvent) -> None:
            state = edge_step(self.state, event)[0]
            if state.phase == trap.phase == FIRST:
                super().step(event)
                if self._agent() is not None:
                    trap.spring("done", self._agent())
                return
            if trap.phase not in device_phases(state) - device_phases(self.state):
                super().step(event)
                return
            trap.spring("decided", self._agent())
            store, save = self.ports.store, self.ports.store.save

            def save_and_spring(journal: Journal) -> None:
                save(journal)
                trap.spring("written", self._agent())

            store.save = save_and_spring  # type: ignore[method-assign]  # that is what a trap does
            try:
                super().step(event)
            finally:
                store.save = save  # type: ignore[method-assign]  # see above
                trap.spring("done", self._agent())

        def _agent(self) -> int | None:
            process: Any = next((getattr(one, "_process", None) for one in self.ports.trainer.trainers), None)
            return None if process is None else int(process.pid)

    return Trapped


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; the service's own arguments come after `--`."""
    parser = argparse.ArgumentParser(prog="crashing")
    parser.add_argument("service", choices=["coordinator", "edge"])
    parser.add_argument("--at", required=True)
    parser.add_argument("--point", choices=["decided", "written", "done"], default="done")
    parser.add_argument("--once", type=Path, required=True)
    parser.add_argument("--victim", default="self")
    words = list(sys.argv[1:] if argv is None else argv)
    cut = words.index("--") if "--" in words else len(words)
    options = parser.parse_args(words[:cut])
    trap = Trap(options.at, options.point, options.once, options.victim)
    arguments = words[cut + 1 :]
    if options.service == "coordinator":
        return coordinator.service.main(arguments, runtime=coordinator_runtime(trap))
    return edge_daemon.service.main(arguments, runtime=edge_runtime(trap))


if __name__ == "__main__":
    sys.exit(main())
