"""The coordinator's state after a round in which every device of a drawn fleet delivered: what it plans the next from.

The devices are those of `muster simulate --profile jetson`: step times, memory, links and other programs come from
`muster.testbed.device_model`, which is another model than the planners'. Importances are exponential over the modules,
and each device tells them with a disturbance of its own. Of a base that is pruned, each device tells which units are
left, by its order and by chance; two such rounds went before, since in the first one nobody's units were gone yet.
Everything is drawn by hashes of the seed.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from msgspec.structs import replace

from coordinator.core import events as ev
from coordinator.core.aggregation.registry import PRUNING
from coordinator.core.commands import PublishAssign
from coordinator.core.facts import ModelFacts, ModuleSpec
from coordinator.core.fleet import Presence
from coordinator.core.job import Participant
from coordinator.core.planning.base import Candidate, FleetView
from coordinator.core.planning.demand import tunes_base
from coordinator.core.round_machine import step
from coordinator.core.turn import State, Step, Waits
from muster.testbed import device_model as dm
from muster.testbed.simulate import load_steps
from muster.testbed.virtual_device import Base, Clockwork, VirtualDevice
from shared.jobs import BaseSpec, JobSpec, RoundsSpec, StrategySpec, TaskSpec
from shared.messages import Assignment, BlobRef, DatasetFacts, DeviceInfo, DeviceState, UpdateFacts
from shared.pruning_order import Pruning
from shared.units import Group, Slice, count_left, pack

DATASET, CLASSES, ROWS, TOKENS = "texts", 20, 2000, 32
LOCAL_STEPS = 8
WARM_AT, NOW = 60.0, 600.0
"""Seconds: when the loads before the warm round were read, and those before the round to plan."""
ADAPTER = BlobRef(sha="a" * 64, size=3_000_000)
IMPORTANCE_NOISE = 0.3
TIGHT = (4, 16)
"""Samples that the memory of a device has room for beside the base at 4 bits."""
HEAD = "classifier"
_LINEARS = (("query", 1, 1), ("key", 1, 1), ("value", 1, 1), ("attention", 1, 1), ("up", 4, 1), ("down", 1, 4))
"""Of a block: name, and sides in widths of the model (out, in)."""


def transformer(blocks: int, hidden: int, strategy: str = "uniform") -> ModelFacts:
    """A BERT of `blocks` blocks of width `hidden` with a vocabulary of 30,522, as the model worker describes it."""
    modules = [
        ModuleSpec(name=f"layer.{block}.{name}", out=out * hidden, inp=inp * hidden, block=block)
        for block in range(blocks)
        for name, out, inp in _LINEARS
    ]
    head = {f"{HEAD}.weight": [CLASSES, hidden], f"{HEAD}.bias": [CLASSES]}
    facts = ModelFacts(
        modules=modules, dense=head, base_digest="b" * 64, linear_params=sum(m.out * m.inp for m in modules),
        other_params=31_100 * hidden, blocks=blocks, hidden=hidden, heads=hidden // 32, intermediate=4 * hidden,
    )  # fmt: skip
    if strategy in PRUNING:
        return replace(facts, groups=_groups(blocks, hidden))
    if strategy == "full":
        whole = {f"{module.name}.weight": [module.out, module.inp] for module in modules}
        return replace(facts, dense={**head, **whole, "others": [facts.other_params]})
    if strategy == "fedadapter":
        places = [ModuleSpec(name=f"layer.{block}", out=hidden, inp=hidden, block=block) for block in range(blocks)]
        return replace(facts, modules=places, largest=4 * hidden * hidden)
    return facts


def _groups(blocks: int, hidden: int) -> tuple[Group, ...]:
    """Heads of 32 and FFN channels of each block."""
    found: list[Group] = []
    for block in range(blocks):
        of_heads = [(name, "out") for name in ("query", "key", "value")] + [("attention", "in")]
        for kind, width, count, sides in (
            ("heads", 32, hidden // 32, of_heads),
            ("channels", 1, 4 * hidden, [("up", "out"), ("down", "in")]),
        ):
            slices = tuple(Slice(module=f"layer.{block}.{name}", side=side, width=width) for name, side in sides)
            found.append(Group(name=f"{block}.{kind}", block=block, kind=kind, count=count, slices=slices))
    return tuple(found)


def job(strategy: StrategySpec) -> JobSpec:
    """A classification job of many rounds over all devices; the warm-up of `fedpipe` is its first one."""
    return JobSpec(
        name="warm", base=BaseSpec(model="bert"),
        task=TaskSpec(
            kind="classification", dataset=DATASET, labels=[str(i) for i in range(CLASSES)], max_tokens=TOKENS
        ),
        rounds=RoundsSpec(count=100, local_steps=LOCAL_STEPS, deadline_s=3600.0),
        strategy=replace(strategy, warm_up_steps=LOCAL_STEPS),
    )  # fmt: skip


def warmed(spec: JobSpec, facts: ModelFacts, count: int, seed: int, *, tight: bool = False) -> State:
    """`count` devices delivered a round; the next tick commits it, the one after that plans the next.

    `tight`: their memory holds the base at 4 bits and `TIGHT` samples only.
    """
    devices = _devices(facts, count, seed, tight=tight)
    state = State(waits=Waits(gather_s=0.0), fleet=_fleet(devices, WARM_AT))
    events: list[ev.AnyEvent] = [
        ev.JobRequested(job="warm-1", spec=spec, now=WARM_AT, ts=WARM_AT),
        ev.Tick(now=WARM_AT, ts=WARM_AT),
        ev.BasePrepared(job="warm-1", facts=facts, adapter=ADAPTER, now=WARM_AT, ts=WARM_AT),
        ev.Tick(now=WARM_AT, ts=WARM_AT),
    ]
    state = _delivered(state, events, devices, facts.groups)
    if facts.groups:
        commit_and_plan = [ev.Tick(now=WARM_AT, ts=WARM_AT)] * 2
        state = _delivered(state, commit_and_plan, devices, facts.groups)
    return dataclasses.replace(state, fleet=_fleet(devices, NOW))


def _delivered(
    state: State, events: Sequence[ev.AnyEvent], devices: dict[str, VirtualDevice], groups: Sequence[Group]
) -> State:
    """After `events`, the last of which plans a round, and that round: to be committed."""
    asked: dict[str, Assignment] = {}
    for event in events:
        state, _, commands = step(state, event)
        found = {one.device: one.assign.assignment for one in commands if isinstance(one, PublishAssign)}
        asked.update({device: assignment for device, assignment in found.items() if assignment is not None})
    job = state.jobs["warm-1"]
    assert job.round is not None, state.notices
    parts = {
        name: Participant(outcome="done", blob=ADAPTER, facts=_facts(devices[name], asked[name], groups))
        for name in asked
    }
    closed = replace(job.round, participants=parts, counted=tuple(sorted(parts)), folded=ADAPTER)
    return dataclasses.replace(state, jobs={job.id: replace(job, phase="evaluating", round=closed)})


def tick(state: State) -> Step:
    """One decision of the coordinator."""
    return step(state, ev.Tick(now=NOW, ts=NOW))


def view(state: State) -> FleetView:
    """What the planner sees of `state` for its next round."""
    (job,) = state.jobs.values()
    assert job.facts is not None
    seen = sorted(state.fleet.values(), key=lambda known: known.device)
    return FleetView(
        round=job.committed + 1, facts=job.facts, adapter_bytes=ADAPTER.size,
        candidates=tuple(Candidate(device=one.device, info=one.info, load=one.load) for one in seen if one.info),
    )  # fmt: skip


def _devices(facts: ModelFacts, count: int, seed: int, *, tight: bool) -> dict[str, VirtualDevice]:
    steps = load_steps()
    base = Base(
        dm.Shape(facts.blocks, TOKENS, facts.linear_params, facts.other_params),
        {module.name: (module.out, module.inp, module.block) for module in facts.modules},
        sum(math.prod(shape) for name, shape in facts.dense.items() if name.startswith(HEAD)),
        lora=facts.blocks * facts.hidden * sum(out + inp for _, out, inp in _LINEARS), whole=tunes_base(facts),
        groups=facts.groups,
    )  # fmt: skip
    clock = Clockwork(dm.StepTable(steps), dm.MemoryTable.of(steps), base, round=1)
    drawn = dm.fleet("jetson", count, seed)
    if tight:
        drawn = [dataclasses.replace(one, kind=_tight(one)) for one in drawn]
    return {device.name: VirtualDevice(device, clock) for device in drawn}


def _tight(device: dm.Device) -> dm.Kind:
    low, high = TIGHT
    room = low + int((high + 1 - low) * dm.draw(device.seed, device.name, "room"))
    return dataclasses.replace(device.kind, holds=4, room=room)


def _fleet(devices: dict[str, VirtualDevice], now: float) -> dict[str, Presence]:
    return {name: _presence(device, now) for name, device in devices.items()}


def _presence(device: VirtualDevice, now: float) -> Presence:
    machine = device.machine()
    info = DeviceInfo(
        epoch=1, cores=machine.cores, memory_bytes=machine.memory_bytes, bits=[4, 8, 16, 32],
        agent_bytes=device.idle_bytes, datasets={DATASET: DatasetFacts(rows=ROWS)},
    )  # fmt: skip
    return Presence(
        device=device.model.name, epoch=1, state=DeviceState(s="ready", epoch=1), info=info,
        load=replace(device.load(now), epoch=1, seq=1), load_at=now, heard_at=now,
    )  # fmt: skip


def _facts(device: VirtualDevice, asked: Assignment, groups: Sequence[Group]) -> UpdateFacts:
    """What the device measured; where memory ran out, at half the batch."""
    work = asked.work
    batch = work.batch
    while batch > 1 and not device.would_fit(work, batch, WARM_AT):
        batch //= 2
    step_s = device.step_s(asked, batch, 1, WARM_AT, 0.0)
    return UpdateFacts(
        samples=work.steps * batch, steps=work.steps, batch=batch, bits=work.bits, loss_first=3.0, loss_last=2.5,
        batch_limit=batch if batch < work.batch else 0, step_s=step_s, train_s=work.steps * step_s,
        fetch_s=ADAPTER.size / device.bandwidth(WARM_AT), peak_bytes=device.peak_bytes(work, batch),
        base_bytes=device.base_bytes(work.bits), cores_used=device.cores_used(WARM_AT),
        importance=_importance(device, asked) if work.score else {},
        change=dm.draw(device.model.seed, device.model.name, "change"),
        kept=_kept(device, work.prune, groups) if work.prune is not None else {},
    )  # fmt: skip


def _kept(device: VirtualDevice, order: Pruning, groups: Sequence[Group]) -> dict[str, bytes]:
    """What pruning to the order's ratio left, by chance."""
    chance = np.random.default_rng([device.model.seed, *device.model.name.encode()])
    found = {}
    for group in groups:
        before = np.frombuffer(order.kept.get(group.name, b"\xff" * -(-group.count // 8)), np.uint8)
        there = np.flatnonzero(np.unpackbits(before, bitorder="little")[: group.count])
        found[group.name] = chance.permutation(there)[: count_left(group, order.ratio, len(there))].tolist()
    return pack(groups, found)


def _importance(device: VirtualDevice, asked: Assignment) -> dict[str, float]:
    seed, name = device.model.seed, device.model.name
    scores = {
        module: -math.log(dm.draw(seed, "importance", module))
        * math.exp(IMPORTANCE_NOISE * dm.normal(seed, name, "importance", module))
        for module in asked.work.ranks
    }
    total = math.fsum(scores.values())
    return {module: score / total for module, score in scores.items()}
