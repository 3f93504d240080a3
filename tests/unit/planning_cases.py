"""Models, jobs, devices and their reports for the tests of planners."""

from __future__ import annotations

from coordinator.core.facts import ModelFacts, ModuleSpec
from coordinator.core.planning.base import Candidate, FleetView, RoundReport
from coordinator.core.planning.demand import Demand, demand
from shared.jobs import BaseSpec, Bits, JobSpec, RoundsSpec, StrategySpec, TaskSpec, TrainingSpec
from shared.messages import DatasetFacts, DeviceInfo, Gpu, GpuLoad, Load, UpdateFacts, Work

MIB = 2**20


def minilm() -> ModelFacts:
    """Facts of MiniLM-L6: 6 blocks of 384, q, k, v and o tuned."""
    modules = [
        ModuleSpec(name=f"layer.{block}.{part}", out=384, inp=384, block=block) for block in range(6) for part in "qkvo"
    ]
    return ModelFacts(
        modules=modules, dense={"classifier.weight": [20, 384], "classifier.bias": [20]}, base_digest="d" * 64,
        linear_params=10_616_832, other_params=12_100_000, blocks=6, hidden=384, heads=12, intermediate=1536,
    )  # fmt: skip


RANKS = {module.name: 8 for module in minilm().modules}
"""Rank 8 of every module of MiniLM."""


def job(
    *,
    batch: int = 16,
    batch_min: int = 1,
    batch_max: int = 32,
    bits: Bits | None = None,
    rank: int = 8,
    accumulation: int = 1,
    rounds: RoundsSpec | None = None,
) -> JobSpec:
    """A classification job."""
    return JobSpec(
        name="texts",
        base=BaseSpec(model="minilm"),
        task=TaskSpec(kind="classification", dataset="news", labels=["a", "b"]),
        rounds=rounds or RoundsSpec(local_steps=10),
        strategy=StrategySpec(batch=batch, batch_min=batch_min, batch_max=batch_max, bits=bits or "auto", rank=rank),
        training=TrainingSpec(accumulation=accumulation),
    )


def device(
    name: str,
    *,
    cores: float = 1.0,
    foreign: float = 0.0,
    memory: int = 4096,
    used: int = 0,
    age_s: float = 1.0,
    rows: int = 5000,
    bits: tuple[Bits, ...] = (4, 8, 16, 32),
    heard: bool = True,
    problem: str = "",
) -> Candidate:
    """A CPU device; memory in MiB."""
    info = DeviceInfo(
        epoch=1, cores=cores, memory_bytes=memory * MIB, bits=list(bits), agent_bytes=200 * MIB,
        datasets={"news": DatasetFacts(rows=rows)}, problem=problem,
    )  # fmt: skip
    load = Load(
        epoch=1, seq=1, cores=cores, foreign_cores=foreign, memory_limit=memory * MIB,
        memory_available=(memory - used) * MIB,
    )  # fmt: skip
    return Candidate(device=name, info=info, load=load if heard else None, load_age_s=age_s if heard else 0.0)


def gpu_device(name: str, *, memory: int = 8192, used: float = 0.0, foreign: int = 0, phase: str = "idle") -> Candidate:
    """A device with one GPU; memory in MiB, `used` a share of the GPU."""
    info = DeviceInfo(
        epoch=1, cores=8.0, memory_bytes=16384 * MIB, bits=[4, 8, 16, 32], agent_bytes=500 * MIB,
        gpus=[Gpu(uuid="GPU-1", memory_bytes=memory * MIB)], datasets={"news": DatasetFacts(rows=5000)},
    )  # fmt: skip
    gpu = GpuLoad(uuid="GPU-1", utilization=used, memory_total=memory * MIB, foreign_memory=foreign * MIB)
    load = Load(epoch=1, seq=1, cores=8.0, phase=phase, memory_limit=16384 * MIB, gpus=[gpu])
    return Candidate(device=name, info=info, load=load, load_age_s=1.0)


def view(*candidates: Candidate, round: int = 1) -> FleetView:
    """What the planner sees."""
    return FleetView(round=round, candidates=tuple(candidates), facts=minilm())


def result(
    *,
    batch: int,
    step_s: float,
    bits: Bits = 32,
    cores_used: float = 0.0,
    base: int = 300,
    peak: int = 500,
    load_s: float = 0.0,
    batch_limit: int = 0,
) -> UpdateFacts:
    """What a device measured over ten steps; memory in MiB."""
    return UpdateFacts(
        samples=10 * batch, steps=10, batch=batch, bits=bits, loss_first=1.0, loss_last=0.9, step_s=step_s,
        train_s=10 * step_s, load_s=load_s, peak_bytes=peak * MIB, base_bytes=base * MIB, cores_used=cores_used,
        batch_limit=batch_limit,
    )  # fmt: skip


def needed(ranks: dict[str, int] | None = None, **settings: int) -> Demand:
    """What a step of the job needs with MiniLM."""
    return demand(minilm(), job(**settings), RANKS if ranks is None else ranks)


def reported(measured: UpdateFacts, *, foreign: float = 0.0, cores: float = 1.0, **settings: int) -> RoundReport:
    """A round of one device, and what it measured."""
    load = device("edge-1", cores=cores, foreign=foreign).load
    assert load is not None
    return RoundReport(
        round=1,
        works={"edge-1": Work(ranks=RANKS, batch=measured.batch, bits=measured.bits, steps=10)},
        results={"edge-1": measured},
        loads={"edge-1": load},
        facts=minilm(),
        job=job(**settings),
    )
