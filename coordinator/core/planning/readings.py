"""What a device has free for training by its telemetry: compute and memory. The one place that interprets a load.

**Compute.** A quota of `cores`, of which something else takes `foreign`. An idle agent sees a foreign process take all
of the quota, and the same process take half of it while the agent trains; the scheduler shares fairly by thread, so the
agent can count on `own threads / all threads`, even where nothing seems left. Both readings then give the same share:
the plan does not depend on the moment of the reading. On a GPU, the share not used by others; time slices leave half.

**Memory.** `limit` is what training may use (cgroup limit or RAM, or the smallest GPU). A reserve of 5 %, at least
64 MiB, stays free. What is used beyond the agent's own last measured size, and beyond what our processes held when it
was read, is foreign: below the reserve it is absorbed by it (so that a jitter of page cache moves nothing), above it is
subtracted.

**Memory that a GPU shares** (Jetson). Its GPU's memory is the machine's and is counted there alone. Whoever runs out of
it runs out for the whole system, so the reserve is 10 %, at least 1 GiB, and absorbs nothing: the budget is what is
available and what the agent holds now, less the reserve. Only the device knows the latter; untold it counts as foreign.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from coordinator.core.planning.reasons import mebibytes
from shared.messages import DeviceInfo, Gpu, Load
from shared.unified_memory import reserve as unified_reserve

MIB = 2**20
DAEMON_BYTES = 48 * MIB
"""Resident memory of the daemon itself: own use that no agent's measurement contains."""
LEAST_FLOPS, MOST_FLOPS = 1e6, 1e15
QUIET_CORES, QUIET_SHARE = 0.05, 0.1
"""Foreign use below so many cores or this share of the device is jitter and counts as none."""


class Capacity(NamedTuple):
    """Compute of a device: `cores` in all (1.0 for a GPU), `foreign` used by others, `free` for the agent.

    `flops`: FLOP per second of one of the cores, or of the GPU, in the device's probe; 0: not told.
    """

    cores: float
    foreign: float
    free: float
    gpu: bool
    flops: float = 0.0

    def undisturbed(self) -> Capacity:
        """The same device with nothing else running on it."""
        return self._replace(foreign=0.0, free=self.cores)

    def __str__(self) -> str:
        if self.gpu:
            return f"{self.free:.2f} of the GPU free (foreign {self.foreign:.2f} of 1.00)"
        return f"{self.free:.2f} free cores (foreign {self.foreign:.2f} of {self.cores:.2f})"


class Budget(NamedTuple):
    """Memory that a plan may fill, in bytes. `limit` 0: the device told none, nothing is bounded."""

    bytes: int
    limit: int
    reserve: int
    foreign: int

    def __str__(self) -> str:
        if not self.limit:
            return "no memory limit (0 MiB reported)"
        parts = f"limit {mebibytes(self.limit)}, reserve {mebibytes(self.reserve)}, foreign {mebibytes(self.foreign)}"
        return f"{mebibytes(self.bytes)} memory budget ({parts})"

    def holds(self, size: float, *, proven: bool = False) -> bool:
        """Whether `size` bytes fit. `proven`: it has run under the limit already.

        Then it needs no reserve for errors, and fits whatever was measured while nobody else takes memory: a peak of
        resident memory contains pages of files, which the system takes back before it runs out.
        """
        if not self.limit or (proven and not self.foreign):
            return True
        return size <= (self.limit - self.foreign if proven else self.bytes)


def capacity(info: DeviceInfo | None, load: Load | None, agents: int = 1) -> Capacity:
    """The compute free for training by the last load, or by the capability alone where there is none.

    Of each agent, where the device has several: they share its cores, but each has a GPU.
    """
    flops = probed_flops(info)
    if (info is not None and info.gpus) or (info is None and load is not None and load.gpus):
        foreign = _quiet(foreign_gpu(load), 1.0)
        return Capacity(1.0, foreign, max(1.0 - foreign, 0.5), True, flops)
    cores = (load.cores if load is not None else 0.0) or (info.cores if info is not None else 0.0) or 1.0
    foreign = _quiet(min(load.foreign_cores, cores) if load is not None else 0.0, cores)
    if foreign == 0.0:
        return Capacity(cores / agents, 0.0, cores / agents, False, flops)
    own_threads, foreign_threads = math.ceil(cores), math.ceil(foreign)
    fair = cores * own_threads / (own_threads + foreign_threads)
    return Capacity(cores / agents, foreign / agents, max(cores - foreign, fair) / agents, False, flops)


def probed_flops(info: DeviceInfo | None) -> float:
    """FLOP per second of the device's probe; 0: it told none, or none that a core or a GPU can have."""
    return info.flops if info is not None and LEAST_FLOPS <= info.flops <= MOST_FLOPS else 0.0


def has_gpu_memory(info: DeviceInfo) -> bool:
    """Whether training fills a GPU's own memory, and no other."""
    return any(_own_memory(gpu) for gpu in info.gpus) and not shares_memory(info)


def shares_memory(info: DeviceInfo) -> bool:
    """Whether training on a GPU fills the machine's memory."""
    return any(gpu.integrated for gpu in info.gpus)


def budget(info: DeviceInfo, load: Load | None, own_bytes: int, agents: int = 1) -> Budget:
    """The memory a plan may fill. `own_bytes`: what an agent holds by its last measurement.

    Of each agent, where the device has several: they share its memory, but each has a GPU's.
    """
    if shares_memory(info):
        return _shared_budget(info, load, agents)
    if has_gpu_memory(info):
        return _budget(*gpu_memory(info, load), 1)
    # An agent at its worst moment holds more than it was last measured with, and none of it is foreign.
    own = max(own_bytes * agents + DAEMON_BYTES, load.own_memory if load is not None else 0)
    return _budget(*host_memory(info, load, own), agents)


def _shared_budget(info: DeviceInfo, load: Load | None, agents: int) -> Budget:
    """Of each agent of a device with an integrated GPU. Where it has cards beside it the tighter of both bounds all,
    for all its agents do the same work."""
    limit, taken = host_memory(info, load, max(0, load.own_memory - DAEMON_BYTES) if load is not None else 0)
    reserve = unified_reserve(limit) if limit else 0
    shared = Budget(max(0, limit - reserve - taken) // agents, limit // agents, reserve // agents, taken // agents)
    if not any(_own_memory(gpu) for gpu in info.gpus):
        return shared
    return min(shared, _budget(*gpu_memory(info, load), 1))


def _budget(limit: int, foreign: int, agents: int) -> Budget:
    reserve = max(limit // 20, 64 * MIB) if limit else 0
    if foreign <= reserve:
        foreign = 0
    free = max(0, limit - reserve - foreign)
    return Budget(free // agents, limit // agents, reserve // agents, foreign // agents)


def _own_memory(gpu: Gpu) -> int:
    return 0 if gpu.integrated else gpu.memory_bytes


def _quiet(foreign: float, cores: float) -> float:
    return foreign if foreign >= max(QUIET_CORES, QUIET_SHARE * cores) else 0.0


def foreign_gpu(load: Load | None) -> float:
    """Share of the busiest GPU that others use: as the driver tells it apart, or all of it while our agents idle."""
    if load is None:
        return 0.0
    idle = load.phase == "idle"
    shares = (
        gpu.foreign_utilization if gpu.foreign_utilization is not None else (gpu.utilization or 0.0) if idle else 0.0
        for gpu in load.gpus
    )
    return min(1.0, max(shares, default=0.0))


def gpu_memory(info: DeviceInfo, load: Load | None) -> tuple[int, int]:
    """(limit, foreign): of the smallest listed GPU, and of the one that others fill most. One agent serves each GPU."""
    limit = min(_own_memory(gpu) for gpu in info.gpus if _own_memory(gpu))
    return limit, max((gpu.foreign_memory or 0 for gpu in load.gpus), default=0) if load is not None else 0


def host_memory(info: DeviceInfo, load: Load | None, own: int) -> tuple[int, int]:
    """(limit, foreign): what is used beyond the `own` bytes. An owner's limit below the machine's bounds us, not the
    others."""
    if load is None or not load.memory_limit:
        return info.memory_bytes, 0
    limit = min(load.memory_limit, info.memory_bytes or load.memory_limit)
    if not load.memory_available:
        return limit, 0
    foreign = max(0, load.memory_limit - load.memory_available - own)
    return limit, max(0, foreign - (load.memory_limit - limit))
