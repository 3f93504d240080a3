"""A fleet on a table: devices of unequal nature answer the coordinator's machine, whose records go to SQLite.

Their times and memory follow laws of their own, with noise, so that nothing they tell is what a planner assumed.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from coordinator.adapters.event_log import SqliteEventLog
from coordinator.core import commands as cmd
from coordinator.core import events as ev
from coordinator.core.facts import ModelFacts
from shared.jobs import Bits, JobSpec
from shared.messages import (
    Ack,
    BlobRef,
    DatasetFacts,
    DeviceInfo,
    DeviceState,
    Gpu,
    GpuLoad,
    Load,
    Manifest,
    UpdateFacts,
    Work,
)
from tests.unit.machine_rig import Rig

MIB = 2**20
BEAT_S = 8.0


@dataclass
class Edge:
    """One device. `flops`: per core; `fits`: largest batch at which its memory holds what is asked."""

    name: str
    cores: float = 1.0
    memory: int = 4096 * MIB
    bits: tuple[Bits, ...] = (4, 8, 16, 32)
    rows: int = 5000
    data: str = "news"
    agents: int = 1
    gpu: bool = False
    flops: float = 1e10
    probed: bool = False
    """Whether it tells them."""
    overhead_s: float = 0.02
    link: float = 1e6
    base: int = 330 * MIB
    resident: int = 200 * MIB
    """What an agent holds now."""
    fits: int = 10**9
    foreign_cores: float = 0.0
    foreign: int = 0
    mute: bool = False
    """It lives, but no reading of it arrives."""
    unheard: bool = False
    """No reading ever did."""
    fails: bool = False

    def info(self) -> DeviceInfo:
        gpus = [Gpu(uuid=f"GPU-{n}", memory_bytes=self.memory) for n in range(self.agents)] if self.gpu else []
        return DeviceInfo(
            epoch=1, cores=self.cores, memory_bytes=self.memory, bits=list(self.bits), agent_bytes=200 * MIB,
            agents=self.agents, gpus=gpus, datasets={self.data: DatasetFacts(rows=self.rows)},
            flops=self.flops if self.probed else 0.0,
        )  # fmt: skip

    def load(self, seq: int) -> Load:
        ours = 0 if self.gpu else 48 * MIB + self.resident * min(self.agents, math.ceil(self.cores))
        gpus = [
            GpuLoad(uuid=f"GPU-{n}", utilization=self.foreign_cores, foreign_memory=self.foreign)
            for n in range(self.agents if self.gpu else 0)
        ]
        return Load(
            epoch=1, seq=seq, cores=self.cores, foreign_cores=self.foreign_cores, memory_limit=self.memory,
            memory_available=max(1, self.memory - ours - self.foreign), gpus=gpus,
        )  # fmt: skip


@dataclass
class Table:
    """The machine, the log on disk, and the devices."""

    path: Path
    edges: Sequence[Edge]
    facts: ModelFacts
    job: JobSpec
    seed: int
    rig: Rig = field(default_factory=Rig)
    written: int = 0
    seq: int = 0

    def __post_init__(self) -> None:
        self.rng = random.Random(self.seed)
        self.log = SqliteEventLog(self.path, fsync=False)
        # What the matrices matter, each device with a view of its own.
        self.matters = {one.name: self.rng.expovariate(1.0) ** 2 for one in self.facts.modules}

    def feed(self, kind: type[ev.Event], **values: object) -> list[cmd.Command]:
        commands = self.rig.feed(kind, **values)
        self.log.append(self.rig.log[self.written :])
        self.written = len(self.rig.log)
        return commands

    def open(self) -> None:
        """All devices appear, and the first round is planned."""
        for edge in self.edges:
            self.feed(ev.FromDevice, device=edge.name, message=DeviceState(s="ready", epoch=1))
            self.feed(ev.FromDevice, device=edge.name, message=edge.info())
        self.rest(1)
        self.feed(ev.JobRequested, job="job-1", spec=self.job)
        self.feed(ev.BasePrepared, job="job-1", facts=self.facts, adapter=BlobRef(sha="0" * 64, size=400_000))

    def rest(self, beats: int) -> None:
        """Time passes; who is not mute sends readings."""
        for _ in range(beats):
            self.rig.now += BEAT_S
            self.seq += 1
            for edge in self.edges:
                self.feed(ev.Heard, device=edge.name)
            for edge in self.edges:
                if not edge.mute and not edge.unheard:
                    self.feed(ev.FromDevice, device=edge.name, message=edge.load(self.seq))

    def round(self, beats: int = 2) -> None:
        """The open round to its end: all answer, and the next one is planned on what was read meanwhile."""
        self.rest(beats)
        current = self.rig.job.round
        assert current is not None, self.rig.state.notices
        edges = {edge.name: edge for edge in self.edges}
        for device, work in sorted(current.plan.participants.items()):
            self._answer(edges[device], work)
        if self.rig.job.phase == "folding":
            number = current.number
            adapter = BlobRef(sha=f"{number % 16:x}" * 64, size=400_000 + 90_000 * number)
            self.feed(
                ev.Folded, job="job-1", round=number, adapter=adapter, residual=None, ranks={}, lost_energy=0.0,
                norm=1.0,
            )  # fmt: skip
        else:
            assert self.rig.job.phase == "waiting"
            self.rest(1)

    def _answer(self, edge: Edge, work: Work) -> None:
        current = self.rig.job.round
        assert current is not None
        ids = {"job": "job-1", "round": current.number, "attempt": current.attempt}
        if edge.fails:
            ran_out = work.batch > edge.fits
            answer = Ack(
                epoch=1, **ids, verdict="failed", reason="no more", out_of_memory=ran_out,  # type: ignore[arg-type]  # as in ids
                batch_limit=edge.fits if ran_out else 0,
            )  # fmt: skip
            self.feed(ev.FromDevice, device=edge.name, message=answer)
            return
        sha = self.rng.randbytes(32).hex()
        told = Manifest(sha=sha, size=1000, chunk=1000, kind="update", facts=self._facts(edge, work), **ids)  # type: ignore[arg-type]  # as in ids
        self.feed(ev.FromDevice, device=edge.name, message=told)
        self.feed(ev.UpdateStored, device=edge.name, sha=sha)
        self.feed(ev.UpdateChecked, device=edge.name, sha=sha, **ids)

    def _facts(self, edge: Edge, work: Work) -> UpdateFacts:
        """What the device measured: half of a busy device's cores are the agents'."""
        rng, batch = self.rng, min(work.batch, edge.fits)
        used = 1.0 if edge.gpu else edge.cores / edge.agents / (2 if edge.foreign_cores > 0.1 * edge.cores else 1)
        params = sum(work.ranks[one.name] * (one.out + one.inp) for one in self.facts.modules if one.name in work.ranks)
        whole = f"{self.facts.modules[0].name}.weight" in self.facts.dense
        tuned = [one.block for one in self.facts.modules if one.name in work.ranks or whole]
        depth = (self.facts.blocks - min(tuned, default=self.facts.blocks)) / self.facts.blocks
        flop = 64 * (self.facts.linear_params * (1.6 + 2.3 * depth) + 6 * params)
        step_s = (edge.overhead_s + batch * flop * (1.2 if work.bits == 4 else 1.0) / edge.flops) / used
        step_s *= rng.uniform(0.93, 1.07)
        base = edge.base - (0 if work.bits == 32 else 8 * MIB)
        peak = base + int(rng.uniform(0.9, 1.1) * (16 * params + batch * depth * 2 * MIB)) + MIB
        edge.resident = peak
        told: dict[str, float] = {}
        if work.score:
            own = {name: self.matters[name] * rng.uniform(0.8, 1.2) for name in work.ranks}
            told = {name: value / sum(own.values()) for name, value in own.items()}
        adapter = self.rig.job.adapter
        assert adapter is not None
        return UpdateFacts(
            samples=work.steps * batch * work.agents, steps=work.steps, batch=batch, agents=work.agents, bits=work.bits,
            loss_first=1.0, loss_last=0.9, step_s=step_s, train_s=step_s * work.steps,
            load_s=3.0 if self.rig.job.committed == 0 else 0.0, fetch_s=adapter.size / edge.link,
            peak_bytes=peak, base_bytes=base, cores_used=0.0 if edge.gpu else used * rng.uniform(0.97, 1.0),
            batch_limit=batch if batch < work.batch else 0, importance=told,
        )  # fmt: skip

    def close(self) -> Path:
        """The log's file, closed."""
        self.log.close()
        return self.path
