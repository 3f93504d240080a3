"""One job on a small fleet of real processes in which something is killed."""

from __future__ import annotations

import hashlib
import os
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from coordinator.adapters.event_log import SqliteEventLog
from coordinator.core import records as rec
from coordinator.web.views import JobView
from muster.testbed import least_squares
from muster.testbed.broker import free_port
from muster.testbed.fleet import DeviceSpec, Fleet
from shared.errors import UserError

DEVICES = ("edge-01", "edge-02")
ROUNDS = 2
STEPS = 16
ENDED = ("finished", "cancelled", "failed", "paused")
JOB = """
name = "kill"
[base]
model = "12x6"
[task]
kind = "least_squares"
dataset = "points"
[rounds]
count = {rounds}
min_devices = 2
quorum = 1.0
local_steps = {steps}
deadline_s = 60
[strategy]
rank = 3
batch = 4
batch_min = 4
batch_max = 4
bits = 32
[training]
lr = {lr}
checkpoint_every = 4
[evaluation]
data = "{held_out}"
worse_by = {worse_by}
"""


@dataclass
class Scene:
    """A fleet, its one job, and what became of it."""

    folder: Path
    commands: Mapping[str, Sequence[str]] = field(default_factory=dict)
    settings: Mapping[str, object] = field(default_factory=dict)
    lr: float = 0.05
    worse_by: float = 0.5
    rounds: int = ROUNDS
    step_s: float = 0.02
    job: str = ""

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.marker = self.folder / "killed"
        self.victim = self.folder / "victim"
        os.environ["MUSTER_TEST_STEP_S"] = str(self.step_s)
        least_squares.write_rows(self.folder / "held.jsonl", least_squares.make_rows("12x6", 64, seed=99))
        devices = []
        for number, name in enumerate(DEVICES):
            path = self.folder / f"{name}.jsonl"
            least_squares.write_rows(path, least_squares.make_rows("12x6", 64, seed=number))
            devices.append(
                DeviceSpec(name, data={"points": path}, settings={"policy": {"foreign_limit": 100.0}, **self.settings})
            )
        self.fleet = Fleet(
            self.folder / "fleet",
            devices,
            {"12x6": "12x6"},
            agent="numpy",
            limits=False,
            commands={name: [part.format(scene=self) for part in command] for name, command in self.commands.items()},
            coordinator={"api": {"port": free_port()}, "waits": {"gather_s": 0.3, "retry_s": 1.0}},
        )

    def run(self, act: Callable[[Scene, JobView | None], None] | None = None, *, seconds: float = 60.0) -> JobView:
        """Start, submit, restart whatever dies, until the job has ended. `act` is called at every look."""
        with self.fleet:
            self.victim.write_text(str(self.fleet.broker.pid), encoding="ascii")
            self.submit()
            view = self.watch(act, seconds)
            self.fleet.stop()
        return view

    def submit(self) -> None:
        """Submit the job; where the answer is lost with the coordinator, take what is on disk, or submit again."""
        try:
            self.job = self.fleet.client.submit(self.text()).id
            return
        except UserError:
            self.fleet.coordinator.wait()
            self.revive()
        while True:
            try:
                jobs = self.fleet.client.jobs()
                break
            except UserError:
                time.sleep(0.05)
        self.job = jobs[0].id if jobs else self.fleet.client.submit(self.text()).id

    def watch(self, act: Callable[[Scene, JobView | None], None] | None, seconds: float) -> JobView:
        """Keep the fleet alive until the job has ended."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            self.revive()
            view = self.look()
            if act is not None:
                act(self, view)
            if view is not None and view.state in ENDED and not self.dead():
                return view
            time.sleep(0.05)
        raise AssertionError(f"no end after {seconds} s: {self.look()}; {self.log('coordinator')[-3000:]}")

    def dead(self) -> list[str]:
        """Programs that do not run."""
        programs = {"coordinator": self.fleet.coordinator, **self.fleet.edges}
        return [name for name, program in programs.items() if not program.pid]

    def revive(self) -> None:
        """Start again what has died, as systemd does."""
        for program in (self.fleet.coordinator, *self.fleet.edges.values()):
            if not program.pid:
                program.start()
        if not self.fleet.broker.pid:
            self.fleet.broker.restart()

    def look(self) -> JobView | None:
        """The job, or None while the coordinator is away."""
        try:
            return self.fleet.client.job(self.job)
        except UserError:
            return None

    def text(self) -> str:
        """The job file."""
        return JOB.format(
            rounds=self.rounds, steps=STEPS, lr=self.lr, worse_by=self.worse_by, held_out=self.folder / "held.jsonl"
        )

    # ---- what the disk says afterwards

    def records(self) -> list[rec.AnyRecord]:
        """The job's part of the event log."""
        return SqliteEventLog(self.folder / "fleet" / "coordinator" / "events.sqlite").of_job(self.job)

    def exported(self) -> str:
        """Digest of the exported tensors."""
        path = self.folder / "fleet" / "coordinator" / "exports" / self.job / "adapter_model.safetensors"
        return hashlib.sha256(path.read_bytes()).hexdigest()

    def log(self, name: str) -> str:
        """What a program logged."""
        return (self.folder / "fleet" / f"{name}.log").read_text(encoding="utf-8")

    def trainings(self, device: str) -> dict[int, int]:
        """Round -> how often the device finished training for it."""
        found: dict[int, int] = {}
        for number in re.findall(r"round (\d+) attempt \d+: trained", self.log(device)):
            found[int(number)] = found.get(int(number), 0) + 1
        return found


def trap(service: str, phase: str, point: str, victim: str = "self") -> list[str]:
    """The command of a service that kills once when its machine enters `phase`."""
    return [
        sys.executable, "-m", "muster.testbed.crashing", service, "--at", phase, "--point", point,
        "--once", "{scene.marker}", "--victim", victim, "--",
    ]  # fmt: skip


def check_whole(scene: Scene, view: JobView, reference: str) -> None:
    """The run ended as if nothing had happened: the same rounds and plans, each update once, the same bytes."""
    records = scene.records()
    plans = [(r.round, r.attempt) for r in records if isinstance(r, rec.RoundPlanned)]
    assert plans == [(number, 1) for number in range(1, ROUNDS + 1)], "no round was planned again"
    admitted = [(r.round, r.device) for r in records if isinstance(r, rec.UpdateAdmitted)]
    assert sorted(admitted) == [(number, d) for number in range(1, ROUNDS + 1) for d in DEVICES]
    check_counted(scene, view)
    assert scene.exported() == reference, "other bytes than the undisturbed run's"


def check_counted(scene: Scene, view: JobView) -> None:
    """Each round folds one update of each device."""
    assert view.state == "finished", view.reason
    closed = [(r.round, r.devices) for r in scene.records() if isinstance(r, rec.RoundClosed)]
    assert closed == [(number, list(DEVICES)) for number in range(1, ROUNDS + 1)]
