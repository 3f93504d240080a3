"""A virtual device as it stands now: heat, what its agent holds, its checkpoint; and its telemetry.

The device model says how long and how large; this remembers what the answer depends on. It outlives its daemon: a
crash ends programs, not the heat of the machine nor what lies on its disk.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from coordinator.core.planning.pruned import begun, middle
from edge_daemon.core.state import Machine
from muster.testbed import device_model as dm
from muster.testbed.replay import Replay
from shared import units
from shared.jobs import Bits, SplitSpec
from shared.messages import Assignment, Load, Work
from shared.units import Group

PROBE_S, LOAD_S = 1.0, 0.25
"""Seconds of a probe, and of loading a base, on one core of the recording machine; slower devices take longer."""
RANK = 8
"""Of the adapter that the memory limits leave room for."""
RESERVE = 66 * dm.MIB
SPARE = 2 * RESERVE
"""Of which other programs hold a share, where limits are made for small bases."""
DAEMON_BYTES = 40 * dm.MIB


@dataclass
class Base:
    """The base that all devices hold. `linears`: what takes an adapter, name -> (out, in, block); `whole`: all of the
    base is tuned instead."""

    shape: dm.Shape
    linears: dict[str, tuple[int, int, int]]
    dense: int
    """Parameters of the head."""
    lora: int
    """Parameters of factors of rank 1 on every linear layer: what memory limits leave room for, whatever is tuned."""
    whole: bool = False
    groups: tuple[Group, ...] = ()
    """What can be pruned of it."""

    def below(self, cut: SplitSpec | None) -> dm.Shape:
        """The part of it that a device runs; None: all."""
        if cut is None or not 0 < cut.block < self.shape.blocks:
            return self.shape
        linear = sum(out * inp for out, inp, block in self.linears.values() if block < cut.block)
        return replace(self.shape, blocks=cut.block, linear_params=linear)

    def left(self, ratio: float) -> float:
        """Share of the parameters in linear layers that stays where `ratio` of each group goes."""
        if not self.groups or ratio <= 0.0:
            return 1.0
        sizes = {name: (out, inp) for name, (out, inp, _) in self.linears.items()}
        left = units.sizes_at(self.groups, ratio, sizes)
        return sum(out * inp for out, inp in left.values()) / sum(out * inp for out, inp in sizes.values())


@dataclass
class Clockwork:
    """What the whole fleet shares: the tables, the base, and the round under way, which sets power and bandwidth."""

    table: dm.StepTable
    memory: dm.MemoryTable
    base: Base
    replay: Replay | None = None
    round: int = 0
    committed: int = 0

    @property
    def coming(self) -> int:
        """The round that is planned next, anew where the last attempt failed."""
        return self.committed + 1


@dataclass
class VirtualDevice:
    """One device. See the module."""

    model: dm.Device
    clock: Clockwork
    heat: float = 0.0
    busy: bool = False
    held: Bits | None = None
    """Bits of the base that its agent holds."""
    peak: int = 0
    _heat_at: float = 0.0
    _agent: bool = False
    _saved: dict[tuple[str, int, int], list[float]] = field(default_factory=dict)

    # ---- nature

    @property
    def bits(self) -> tuple[Bits, ...]:
        """Precisions that its kernels run."""
        return self.model.kind.bits

    @property
    def kernel_kills(self) -> bool:
        """Whether the kernel ends an agent that takes too much; a GPU's allocator says so instead."""
        return not self.model.kind.card

    @property
    def slowness(self) -> float:
        """Seconds here for one of the recording machine, for work that is no step."""
        return 1.0 / max(self.model.kind.quota, 0.1)

    @property
    def probe_s(self) -> float:
        """Seconds from the agent's start to its answer."""
        return PROBE_S * self.slowness

    @property
    def flops(self) -> float:
        """FLOP per second of a core in matrix products, as its agent's probe measures them now."""
        return self.model.probed(self.clock.coming)

    @property
    def limit(self) -> int:
        """Bytes that its programs may use: its class's, or the base at the bits it holds, its room for samples, and a
        reserve."""
        shape, kind = self.clock.base.shape, self.model.kind
        if kind.spare:
            return self.idle_bytes + kind.spare
        tuned = shape.linear_params + shape.other_params if kind.whole else RANK * self.clock.base.lora
        work = dm.StepWork(kind.holds, kind.room, 0, tuned + self.clock.base.dense)
        return int(
            max(
                (self.clock.memory.peak(shape, work) + DAEMON_BYTES) / 0.95,
                self.clock.memory.peak(shape, work) + RESERVE,
            )
        )

    def machine(self) -> Machine:
        """Its static facts."""
        return Machine(hardware=f"virtual {self.model.kind.name}", cores=self.model.kind.cores, memory_bytes=self.limit)

    def bandwidth(self, now: float) -> float:
        """Bytes per second of its link."""
        replay = self.clock.replay
        told = replay.bandwidth(self.model.name, now) if replay else None
        return told or self.model.bandwidth(self.clock.round)

    def foreign(self, now: float) -> dm.Foreign:
        """What other programs use."""
        replay = self.clock.replay
        return replay.foreign(self.model.name, now) if replay else self.model.foreign(now)

    # ---- time

    def step_s(self, work: Assignment, batch: int, step: int, now: float, heat: float) -> float:
        """Seconds of step `step` of `work` if it begins `now`."""
        noise = self.model.noise(work.job, work.round, work.attempt, step)
        return self.model.step_s(
            self.clock.table, self._step(work.work, batch), self.clock.base.below(work.work.split), round=work.round,
            heat=heat, noise=noise, foreign=self.foreign(now).share,
        )  # fmt: skip

    def load_base(self, bits: Bits) -> float:
        """Let the agent hold the base at `bits`; seconds it takes, 0 where it held it already."""
        if self.held == bits:
            return 0.0
        self.held = bits
        return LOAD_S * self.slowness

    def heat_at(self, now: float) -> float:
        """Its heat, brought up to `now`."""
        self.heat = self._heated(self.heat, now - self._heat_at, busy=self.busy)
        self._heat_at = now
        return self.heat

    def heat_after(self, heat: float, seconds: float) -> float:
        """Heat after `seconds` of work."""
        return self._heated(heat, seconds, busy=True)

    def _heated(self, heat: float, seconds: float, *, busy: bool) -> float:
        return dm.heated(heat, seconds, busy=busy) if self.model.kind.heats else 0.0

    def work(self, now: float) -> None:
        """It begins to compute."""
        self.heat_at(now)
        self.busy = True

    def rest(self, now: float) -> None:
        """It stops computing."""
        self.heat_at(now)
        self.busy = False

    def cores_used(self, now: float) -> float:
        """Cores that the agent got."""
        return self.model.kind.cores / (1.0 + dm.CONTENTION * self.foreign(now).share)

    # ---- memory

    @property
    def idle_bytes(self) -> int:
        """Resident bytes of an agent without a base."""
        return self.clock.memory.agent_bytes

    def base_bytes(self, bits: Bits) -> int:
        """Resident bytes of an agent that holds the base."""
        return self.clock.memory.loaded(self.clock.base.shape, bits)

    def peak_bytes(self, work: Work, batch: int) -> int:
        """Resident bytes of the agent at the worst moment of `work`."""
        base = self.clock.base
        left = 1.0 if work.prune is None else base.left(begun(base.groups, work.prune))
        below = base.below(work.split)
        shape = replace(below, linear_params=round(left * below.linear_params))
        return self.clock.memory.peak(shape, self._step(work, batch))

    def would_fit(self, work: Work, batch: int, now: float) -> bool:
        """Whether `work` at `batch` fits beside what others hold."""
        return self.peak_bytes(work, batch) + DAEMON_BYTES + self._foreign_bytes(now) <= self.limit

    def fits(self, work: Work, batch: int, now: float) -> bool:
        """The same for work that begins: its peak is remembered."""
        if not self.would_fit(work, batch, now):
            return False
        self.peak = self.peak_bytes(work, batch)
        return True

    def begin_process(self) -> None:
        """An agent starts with nothing loaded."""
        self._agent, self.held, self.peak = True, None, 0

    def end_process(self, now: float) -> None:
        """The agent is gone."""
        self.rest(now)
        self._agent, self.held, self.peak = False, None, 0

    # ---- disk

    def save(self, work: Assignment, steps: list[float]) -> None:
        """A checkpoint: the seconds of the steps that are done."""
        self._saved = {(work.job, work.round, work.attempt): list(steps)}

    def drop_checkpoint(self) -> None:
        """The work is over: its folder is removed."""
        self._saved = {}

    def resumed(self, work: Assignment) -> list[float]:
        """What a checkpoint of `work` holds."""
        return list(self._saved.get((work.job, work.round, work.attempt), []))

    # ---- telemetry

    def load(self, now: float) -> Load:
        """A reading."""
        foreign, cores = self.foreign(now), self.model.kind.cores
        agent = 0 if not self._agent else self.base_bytes(self.held) if self.held else self.idle_bytes
        own = DAEMON_BYTES + max(agent, self.peak if self.busy else 0)
        heat = self.heat_at(now)
        return Load(
            epoch=0, seq=0, cores=cores, own_cores=self.cores_used(now) if self.busy else 0.0,
            foreign_cores=foreign.share * cores, throttled=dm.throttled(heat),
            memory_available=max(0, self.limit - own - self._foreign_bytes(now)), memory_limit=self.limit,
            own_memory=own, temperature_c=dm.temperature_c(heat),
        )  # fmt: skip

    def _foreign_bytes(self, now: float) -> int:
        return int(self.foreign(now).memory * (self.limit if self.model.kind.real else SPARE))

    def _step(self, work: Work, batch: int) -> dm.StepWork:
        base = self.clock.base
        if base.whole or (work.split is not None and work.split.tuning == "full"):
            shape = base.below(work.split)
            everything = shape.linear_params + shape.other_params + base.dense
            return dm.StepWork(work.bits, batch, 0, everything, whole=True)
        tuned = [(base.linears[name], rank) for name, rank in work.ranks.items() if rank > 0]
        # Below a cut there is no head.
        dense = base.dense if work.split is None else 0
        factors = dense + sum(rank * (out + inp) for (out, inp, _), rank in tuned)
        lowest = min((block for (_, _, block), _ in tuned), default=base.shape.blocks)
        left = 1.0
        if work.prune is not None:
            # As it is in the middle of the round.
            left = base.left(middle(base.groups, work.prune))
        return dm.StepWork(work.bits, batch, lowest, round(left * factors), left=left)
