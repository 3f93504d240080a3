"""A coordinator's machine on a table: feeds it events, keeps its log, checks its invariants after every step."""

from __future__ import annotations

from typing import Any, Literal

from coordinator.core import commands as cmd
from coordinator.core import events as ev
from coordinator.core import records as rec
from coordinator.core import releases
from coordinator.core.facts import Metrics, ModelFacts, ModuleSpec
from coordinator.core.job import IDLE, Job, apply
from coordinator.core.release_records import ReleaseRecord
from coordinator.core.round_machine import step
from coordinator.core.turn import State, Waits
from shared import jobs
from shared.messages import Ack, BlobRef, DatasetFacts, DeviceInfo, DeviceState, Load, Manifest, UpdateFacts

GIB = 1024**3
FACTS = ModelFacts(
    modules=[ModuleSpec(name="linear", out=8, inp=16, block=0)], base_digest="b" * 64, linear_params=128,
    other_params=0, blocks=1, hidden=16,
)  # fmt: skip
ROUND_0 = BlobRef(sha="0" * 64, size=100)
A, B = "a" * 64, "b" * 64
"""Digests of two updates."""
HELD_OUT = jobs.EvaluationSpec(data="held-out.jsonl")


def spec(**changes: Any) -> jobs.JobSpec:
    """A small least-squares job of two rounds over two devices."""
    rounds = {"count": 2, "min_devices": 2, "quorum": 1.0, "deadline_s": 100.0, "local_steps": 4}
    rounds.update(changes.pop("rounds", {}))
    return jobs.JobSpec(
        name="rig",
        base=jobs.BaseSpec(model="16x8"),
        task=jobs.TaskSpec(kind="least_squares", dataset="points"),
        rounds=jobs.RoundsSpec(**rounds),
        strategy=jobs.StrategySpec(rank=2, batch=4, batch_min=4, batch_max=4),
        **changes,
    )


def facts(samples: int = 16, **changes: Any) -> UpdateFacts:
    """Facts of a plausible update."""
    return UpdateFacts(
        **{
            "samples": samples, "steps": 4, "batch": 4, "bits": 32, "loss_first": 2.0, "loss_last": 1.0,
            "step_s": 0.1, "train_s": 0.4, "cores_used": 1.0, **changes,
        }
    )  # fmt: skip


class Rig:
    """The machine with its log. `restart` throws away all but the log, as a kill does."""

    def __init__(self) -> None:
        self.log: list[rec.AnyRecord] = []
        self.now = 1000.0
        self.state = State(waits=Waits(gather_s=0.0))
        self.last: list[cmd.Command] = []

    def feed(self, kind: type[ev.Event], /, **values: Any) -> list[cmd.Command]:
        """One event; returns the commands. A tick follows, as in the runtime."""
        commands = self._step(kind(now=self.now, ts=self.now, **values))
        written = -1
        while written != len(self.log):
            written = len(self.log)
            commands += self._step(ev.Tick(now=self.now, ts=self.now))
        self.last = commands
        return commands

    def _step(self, event: ev.Event) -> list[cmd.Command]:
        result = step(self.state, event)
        self.log += result.records
        self.state = result.state
        check_invariants(self.state, self.log)
        return list(result.commands)

    def restart(self) -> list[cmd.Command]:
        """Kill and replay."""
        replayed: dict[str, Job] = {}
        released: dict[str, releases.Release] = {}
        for record in self.log:
            if isinstance(record, ReleaseRecord):
                released[record.release] = releases.apply(released.get(record.release), record)
            else:
                replayed[record.job] = apply(replayed.get(record.job), record)
        fleet_waits = self.state.waits
        assert replayed == self.state.jobs
        assert released == self.state.releases
        self.state = State(waits=fleet_waits, term=self.state.term + 1, jobs=replayed, releases=released)
        return self.feed(ev.Started)

    # ---- what devices and workers say

    def birth(self, device: str, epoch: int = 1) -> list[cmd.Command]:
        """A device appears, able."""
        info = DeviceInfo(
            epoch=epoch, cores=1.0, memory_bytes=4 * GIB, bits=[32], agent_bytes=GIB // 4,
            datasets={"points": DatasetFacts(rows=100)},
        )  # fmt: skip
        load = Load(epoch=epoch, seq=1, cores=1.0, memory_available=3 * GIB, memory_limit=4 * GIB)
        commands = self.feed(ev.FromDevice, device=device, message=DeviceState(s="ready", epoch=epoch))
        commands += self.feed(ev.FromDevice, device=device, message=load)
        return commands + self.feed(ev.FromDevice, device=device, message=info)

    def submit(self, job_spec: jobs.JobSpec | None = None, job: str = "job-1") -> list[cmd.Command]:
        """A job comes in."""
        return self.feed(ev.JobRequested, job=job, spec=job_spec or spec())

    def prepared(self, job: str = "job-1") -> list[cmd.Command]:
        """The worker inspected the base."""
        return self.feed(ev.BasePrepared, job=job, facts=FACTS, adapter=ROUND_0)

    def open(self, job_spec: jobs.JobSpec | None = None, devices: tuple[str, ...] = ("dev-a", "dev-b")) -> None:
        """Up to an open round 1."""
        for device in devices:
            self.birth(device)
        self.submit(job_spec)
        self.prepared()
        assert self.job.phase == "open", (self.job.phase, self.state.notices)

    @property
    def job(self) -> Job:
        """The first job."""
        return next(iter(self.state.jobs.values()))

    def manifest(self, device: str, sha: str, **changes: Any) -> Manifest:
        """An update of the current round as its device announces it."""
        assert self.job.round is not None
        values = {"round": self.job.round.number, "attempt": self.job.round.attempt, "facts": facts(), **changes}
        return Manifest(sha=sha, size=50, chunk=1000, kind="update", job=self.job.id, **values)

    def deliver(self, device: str, sha: str, refusal: str = "", **changes: Any) -> list[cmd.Command]:
        """Announce, transfer and check one update."""
        manifest = self.manifest(device, sha, **changes)
        commands = self.feed(ev.FromDevice, device=device, message=manifest)
        if not any(isinstance(c, cmd.Pull) for c in commands):
            return commands
        commands += self.feed(ev.UpdateStored, device=device, sha=sha)
        return commands + self.feed(
            ev.UpdateChecked, job=manifest.job, round=manifest.round, attempt=manifest.attempt, device=device, sha=sha,
            reason=refusal,
        )  # fmt: skip

    def ack(self, device: str, verdict: Literal["accept", "reject", "failed"], reason: str = "") -> list[cmd.Command]:
        """A device answers its assignment."""
        round = self.job.round
        assert round is not None
        answer = Ack(
            epoch=1, job=self.job.id, round=round.number, attempt=round.attempt, verdict=verdict, reason=reason
        )
        return self.feed(ev.FromDevice, device=device, message=answer)

    def folded(self) -> list[cmd.Command]:
        """The fold of the current round is done."""
        assert self.job.round is not None
        adapter = BlobRef(sha=f"{self.job.round.number:x}" * 64, size=100)
        return self.feed(
            ev.Folded, job=self.job.id, round=self.job.round.number, adapter=adapter, residual=None,
            ranks={"linear": 2}, lost_energy=0.0, norm=1.0,
        )  # fmt: skip

    def evaluated(self, loss: float, round: int | None = None) -> list[cmd.Command]:
        """The worker measured."""
        number = round if round is not None else (self.job.round.number if self.job.round else 0)
        return self.feed(ev.Evaluated, job=self.job.id, round=number, metrics=Metrics(loss=loss, rows=10))


def check_invariants(state: State, log: list[rec.AnyRecord]) -> None:
    """What must hold after every step."""
    holding = [job for job in state.jobs.values() if job.phase not in IDLE]
    assert len(holding) <= 1, "two jobs hold the fleet"
    for job in state.jobs.values():
        if job.phase in ("open", "folding", "evaluating"):
            assert job.round is not None and job.round.number == job.committed + 1
            counted = [device for device, part in job.round.participants.items() if part.outcome == "done"]
            assert all(job.round.participants[d].blob is not None for d in counted)
            assert set(job.round.counted) <= set(counted)
    seen: set[tuple[object, ...]] = set()
    for record in log:
        if isinstance(record, rec.UpdateAdmitted):
            key = (record.job, record.round, record.attempt, record.device)
            assert key not in seen, f"{key} counted twice"
            seen.add(key)
    plans = [(r.job, r.round, r.attempt) for r in log if isinstance(r, rec.RoundPlanned)]
    assert len(plans) == len(set(plans)), "an attempt was planned twice"


def of(commands: list[cmd.Command], kind: type) -> list[Any]:
    """The commands of one kind."""
    return [command for command in commands if isinstance(command, kind)]


def records(rig: Rig, kind: type) -> list[Any]:
    """The records of one kind in the rig's log."""
    return [record for record in rig.log if isinstance(record, kind)]
