"""A whole fleet in one process on a virtual clock: the real runtimes of coordinator and daemons, over a network in
memory with seeded faults, with least squares as the task.

Nothing sleeps: time passes in `MemoryFleet.run`. Every node can be killed (all it had in memory is gone) and started
again on its folder.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import msgspec
from typing_extensions import Self

from coordinator import runtime as coordinator_runtime
from coordinator.adapters.event_log import SqliteEventLog
from coordinator.core import events as ev
from coordinator.core.job import TERMINAL, Job
from coordinator.core.records import AnyRecord
from coordinator.settings import CoordinatorSettings, WaitSettings
from muster.testbed.memory_nodes import COORDINATOR, FLEET, CoordinatorNode, DaemonNode, DeviceNode, Member
from muster.testbed.memory_process import History, World
from shared.errors import MusterError
from shared.jobs import JobSpec
from shared.settings import BrokerSettings
from shared.transport.memory_network import Faults, MemoryNetwork


class TooLate(MusterError):
    """What was waited for did not happen in time."""


class VirtualFleet:
    """A coordinator and its devices on one virtual clock, whatever they train with."""

    def __init__(self, network: MemoryNetwork, coordinator: CoordinatorNode, daemons: Mapping[str, DeviceNode]) -> None:
        self.network = network
        self.coordinator = coordinator
        self.daemons = daemons

    # ---- running

    def start(self) -> None:
        """Start every node."""
        self.coordinator.start()
        for daemon in self.daemons.values():
            daemon.start()

    def close(self) -> None:
        """Release every node's files."""
        for node in (self.coordinator, *self.daemons.values()):
            node.kill()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def run(self, seconds: float) -> None:
        """Let virtual time pass."""
        self.network.run_until(self.network.now + seconds)

    def run_until(self, met: Callable[[], bool], within_s: float, what: str = "the condition") -> None:
        """Let time pass until `met()`. Raises `TooLate` after `within_s` virtual seconds."""
        if not met() and not self.network.run_until(self.network.now + within_s, when=met):
            raise TooLate(f"{what} was not met within {within_s:.0f} virtual seconds")

    def submit(self, spec: JobSpec, job: str = "job-1") -> str:
        """Ask for a job, as the HTTP API does; returns its id."""
        node = self.coordinator
        runtime = node.runtime
        node.post(coordinator_runtime.Call(lambda: _take(runtime, job, spec)))
        return job

    def finish(self, job: str, within_s: float = 600.0) -> Job:
        """Run until `job` has ended (or pauses) and return it."""
        self.run_until(lambda: self._ended(job), within_s, f"the end of {job} (now {self.describe(job)})")
        found = self.job(job)
        assert found is not None
        return found

    # ---- looking

    def job(self, job: str) -> Job | None:
        """The job as the living coordinator has it."""
        return self.coordinator.runtime.state.jobs.get(job) if self.coordinator.alive else None

    def committed(self, job: str) -> int:
        """Rounds committed, as far as the living coordinator knows; 0 while it is down."""
        found = self.job(job)
        return found.committed if found is not None else 0

    def records(self, job: str) -> list[AnyRecord]:
        """The log of `job`."""
        log = SqliteEventLog(self.coordinator.folder / "events.sqlite", fsync=False)
        try:
            return log.of_job(job)
        finally:
            log.close()

    def adapter(self, job: str) -> bytes:
        """The file of the job's global adapter."""
        found = self.job(job)
        assert found is not None and found.adapter is not None
        path = self.coordinator.blobs.path(found.adapter.sha)
        assert path is not None
        return path.read_bytes()

    def describe(self, job: str) -> str:
        """Where the fleet stands, in a line."""
        found = self.job(job)
        if found is None:
            return "the coordinator is down or does not know it"
        phases = {name: node.phase if node.alive else "dead" for name, node in self.daemons.items()}
        notice = self.coordinator.runtime.state.notices.get(job, "")
        return f"{found.phase}, {found.committed} rounds committed, {found.reason} {notice} {phases}"

    def _ended(self, job: str) -> bool:
        found = self.job(job)
        return found is not None and (found.phase in TERMINAL or found.phase == "paused")


class MemoryFleet(VirtualFleet):
    """A fleet that does least squares."""

    daemons: Mapping[str, DaemonNode]

    def __init__(
        self,
        root: Path,
        members: Sequence[Member],
        *,
        seed: int = 0,
        faults: Faults | None = None,
        waits: WaitSettings | None = None,
        broker: BrokerSettings | None = None,
        max_packet: int = 1024 * 1024,
        credit_bytes: int = 16 * 1024 * 1024,
    ) -> None:
        # A lost connection is tried again within seconds: virtual fleets meet many cuts in a short time.
        broker = broker or BrokerSettings(keepalive_s=10, reconnect_max_s=4.0)
        network = MemoryNetwork(seed, faults, max_packet=max_packet)
        self.history = History()
        world = World(network, broker, self.history)
        settings = CoordinatorSettings(
            fleet=FLEET, name=COORDINATOR, state_dir=str(root / "coordinator"), waits=waits or WaitSettings(),
            broker=msgspec.structs.replace(broker, window=32, queue=4096), credit_bytes=credit_bytes,
        )  # fmt: skip
        daemons = {one.device: DaemonNode(world, root / "devices" / one.device, one) for one in members}
        super().__init__(network, CoordinatorNode(world, root / "coordinator", settings), daemons)


def _take(runtime: coordinator_runtime.Runtime, job: str, spec: JobSpec) -> None:
    runtime.step(ev.JobRequested(job=job, spec=spec, **runtime.now()))
