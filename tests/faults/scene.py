"""One job on a small fleet of real processes in which something is killed."""

from __future__ import annotations

import hashlib
import os
import re
import sqlite3
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from coordinator.adapters.event_log import SqliteEventLog
from coordinator.core import records as rec
from coordinator.core.planning.digest import plan_digest
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
    """A fleet, its one job, and what became of it.

    `first`: settings of the first device; `cores`: its quota. `wipes`: a broker that died comes back without its disk.
    """

    folder: Path
    commands: Mapping[str, Sequence[str]] = field(default_factory=dict)
    settings: Mapping[str, object] = field(default_factory=dict)
    first: Mapping[str, object] = field(default_factory=dict)
    cores: float | None = None
    wipes: bool = False
    lr: float = 0.05
    worse_by: float = 0.5
    rounds: int = ROUNDS
    step_s: float = 0.02
    job: str = ""
    planned: list[str] | None = None
    """Digests of the plans that the log held when something was killed."""
    wiped: list[str] = field(default_factory=list)
    """Files of the broker that were gone when it came back."""

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.marker = self.folder / "killed"
        self.victim = self.folder / "victim"
        self.marker.touch()  # no trap springs while the fleet starts
        os.environ["MUSTER_TEST_STEP_S"] = str(self.step_s)
        least_squares.write_rows(self.folder / "held.jsonl", least_squares.make_rows("12x6", 64, seed=99))
        devices = []
        for number, name in enumerate(DEVICES):
            path = self.folder / f"{name}.jsonl"
            least_squares.write_rows(path, least_squares.make_rows("12x6", 64, seed=number))
            settings = {"policy": {"foreign_limit": 100.0}, **self.settings, **(self.first if number == 0 else {})}
            devices.append(
                DeviceSpec(name, self.cores if number == 0 else None, data={"points": path}, settings=settings)
            )
        self.fleet = Fleet(
            self.folder / "fleet",
            devices,
            {"12x6": "12x6"},
            agent="numpy",
            limits=self.cores is not None,
            commands={name: [part.format(scene=self) for part in command] for name, command in self.commands.items()},
            coordinator={"api": {"port": free_port()}, "waits": {"gather_s": 0.3, "retry_s": 1.0}},
        )

    def run(
        self,
        act: Callable[[Scene, JobView | None], None] | None = None,
        *,
        before: Callable[[Scene], None] | None = None,
        seconds: float = 60.0,
    ) -> JobView:
        """Start, submit, restart whatever dies, until the job has ended. `act` is called at every look, `before` once
        the fleet stands, before anything can be trapped."""
        with self.fleet:
            self.victim.write_text(str(self.fleet.broker.pid), encoding="ascii")
            if before is not None:
                before(self)
            self.marker.unlink(missing_ok=True)
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
            # The last step of a job may be the one that kills: its end is seen a moment before.
            killed = self.planned is not None or not self.commands
            if killed and view is not None and view.state in ENDED and not self.dead():
                return view
            time.sleep(0.05)
        met = self.met() or "no kill"
        raise AssertionError(f"no end after {seconds} s, {met}: {self.look()}; {self.log('coordinator')[-3000:]}")

    def dead(self) -> list[str]:
        """Programs that do not run."""
        programs = {"coordinator": self.fleet.coordinator, "broker": self.fleet.broker, **self.fleet.edges}
        return [name for name, program in programs.items() if not program.pid]

    def revive(self) -> None:
        """Start again what has died, as systemd does. What the log held at the kill is noted before."""
        if self.planned is None and self.marker.exists():
            self.planned = self.digests()
        for program in (self.fleet.coordinator, *self.fleet.edges.values()):
            if not program.pid:
                program.start()
        if not self.fleet.broker.pid:
            if self.wipes:
                self._wipe()
            self.fleet.broker.restart()

    def _wipe(self) -> None:
        """Take the dead broker's disk from it."""
        for path in self.fleet.broker.folder.glob("**/*.db"):
            path.unlink()
            self.wiped.append(path.name)

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

    # ---- what the disk says

    def met(self) -> str:
        """The phase and the point at which the trap sprang; "" where it never did."""
        return self.marker.read_text(encoding="ascii") if self.marker.exists() else ""

    def digests(self) -> list[str]:
        """The digest of every plan in the log as it lies there: a dead coordinator's files are not touched."""
        path = self.folder / "fleet" / "coordinator" / "events.sqlite"
        reader = sqlite3.connect(f"file:{path}?mode=ro", uri=True)
        try:
            rows = reader.execute("SELECT body FROM records WHERE kind = ? ORDER BY seq", (rec.RoundPlanned.__name__,))
            return [msgspec.msgpack.decode(body, type=rec.RoundPlanned).digest for (body,) in rows]
        finally:
            reader.close()

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
    assert [r.plan_digest for r in view.rounds] == check_plans(scene), "the coordinator tells of other plans"
    assert scene.exported() == reference, "other bytes than the undisturbed run's"


def check_plans(scene: Scene) -> list[str]:
    """The digests of all plans. Those that the log held at the kill are still the first, and each is its plan's own."""
    assert scene.planned is not None, "nothing was killed"
    plans = [r for r in scene.records() if isinstance(r, rec.RoundPlanned)]
    digests = [r.digest for r in plans]
    assert digests[: len(scene.planned)] == scene.planned, "a plan changed"
    assert digests == [plan_digest(r.plan) for r in plans]
    return digests


def check_counted(scene: Scene, view: JobView) -> None:
    """Each round folds one update of each device."""
    assert view.state == "finished", view.reason
    check_plans(scene)
    closed = [(r.round, r.devices) for r in scene.records() if isinstance(r, rec.RoundClosed)]
    assert closed == [(number, list(DEVICES)) for number in range(1, ROUNDS + 1)]
