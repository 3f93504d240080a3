"""Jetsons: their integrated GPU by sysfs, since NVML tells little of it, or zeros where it should tell nothing.

Read: load and clock from devfreq, power from the module's monitors, heat from the thermal zones, the power mode from
`nvpmodel -q`. Memory is the machine's (`host`). Not by way of jetson-stats: it is AGPL, and wants a root daemon.
"""

from __future__ import annotations

import re
import subprocess
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import msgspec

from edge_daemon.adapters.telemetry import jetson_power
from edge_daemon.adapters.telemetry.sysfs import line, number, zones
from edge_daemon.protocol import INTEGRATED
from shared.messages import Gpu, GpuLoad

_NODES = ("gv11b", "ga10b", "gb10b", "gpu")
"""Names of the GPU's node in the device tree; Thor's has none, its devfreq folder is called `gpu-gpc-0`."""
_GPC = "gpu-gpc-"
_COMPUTE = {"tegra194": "7.2", "tegra234": "8.7", "tegra264": "11.0"}
_NVGPU = ("tegra194", "tegra234")
"""Chips whose GPU has a driver of its own (nvgpu): there NVML answers with zeros, or not at all."""
_JETPACK = {35: "5", 36: "6", 38: "7", 39: "7"}
_JETPACK_EXACT = {(36, "5"): "6.2.2", (38, "2"): "7.0", (38, "4"): "7.1", (39, "2"): "7.2"}


@dataclass(frozen=True)
class Board:
    """Which Jetson this is."""

    model: str
    chip: str = ""
    """Such as "tegra234"; "": unknown."""
    release: tuple[int, str] | None = None
    """Of Linux for Tegra: (36, "4.4")."""

    @property
    def jetpack(self) -> str:
        """Such as "7.2 (L4T 39.2.0)"; "" where the release is unknown."""
        if self.release is None:
            return ""
        major, revision = self.release
        name = _JETPACK_EXACT.get((major, revision.split(".")[0]), _JETPACK.get(major, ""))
        return f"{name} (L4T {major}.{revision})" if name else f"L4T {major}.{revision}"


def find(root: Path = Path("/")) -> Board | None:
    """The Jetson under `root`, or None. Never by the architecture alone: GH200, GB10 and Graviton are ARM, too."""
    told = re.match(r"#\s*R(\d+)\s*\(release\),\s*REVISION:\s*([\d.]+)", line(root / "etc/nv_tegra_release"))
    if told is None and "-tegra" not in line(root / "proc/sys/kernel/osrelease"):
        return None
    compatible = line(root / "proc/device-tree/compatible").split("\0")
    chip = next((name.removeprefix("nvidia,") for name in compatible if name.startswith("nvidia,tegra")), "")
    model = line(root / "proc/device-tree/model") or "Jetson"
    return Board(model, chip, (int(told[1]), told[2]) if told else None)


class Nvml(Protocol):
    """What is asked of NVML here."""

    def facts(self) -> list[Gpu]:
        """The GPUs it knows."""

    def driver(self) -> str:
        """Its version."""

    def read(self, own: Collection[int] = ()) -> list[GpuLoad]:
        """Their load."""


class JetsonReader:
    """Reads a Jetson's GPU, and what NVML adds: on Thor more of the same GPU, and cards in a slot.

    `uuids`: as the owner lists them (`INTEGRATED` for the Jetson's own); empty: all. `query`: answers as `nvpmodel -q`
    does, and is asked every `mode_s` seconds.
    """

    def __init__(
        self,
        board: Board,
        nvml: Nvml | None = None,
        uuids: Collection[str] = (),
        *,
        root: Path = Path("/"),
        query: Callable[[], str] | None = None,
        mode_s: float = 60.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._board = board
        self._nvml = nvml
        self._wanted = tuple(uuids)
        self._root = root
        self._query = query or nvpmodel
        self._mode_s = mode_s
        self._clock = clock
        self._mode = ""
        self._mode_until = float("-inf")
        self._cards: list[str] | None = None
        """UUIDs of GPUs with memory of their own; None: not yet asked."""

    def facts(self) -> list[Gpu]:
        """The integrated GPU, and cards in a slot."""
        told = self._nvml.facts() if self._nvml is not None else []
        cards = [gpu for gpu in told if gpu.memory_bytes]
        self._cards = [gpu.uuid for gpu in cards]
        node = self._node()
        top = number(node / "max_freq") if node is not None else None
        own = Gpu(
            uuid=INTEGRATED, name=self._board.model, integrated=True, compute=_COMPUTE.get(self._board.chip, ""),
            clock_max_mhz=None if top is None else top // 1_000_000,
        )  # fmt: skip
        # Where a card is in use the integrated GPU may be switched off (IGX); then it has no node.
        found = {gpu.uuid: gpu for gpu in ([own, *cards] if node is not None or not cards else cards)}
        return [found[uuid] for uuid in self._wanted if uuid in found] if self._wanted else list(found.values())

    def driver(self) -> str:
        """Version of the NVIDIA driver, where NVML is there."""
        return self._nvml.driver() if self._nvml is not None else ""

    def read(self, own: Collection[int] = ()) -> list[GpuLoad]:
        """The load of each GPU now."""
        if self._cards is None:
            self.facts()
        told = self._nvml.read(own) if self._nvml is not None and self._worth_asking() else []
        cards = [load for load in told if load.uuid in (self._cards or ())]
        same = next((load for load in told if load.uuid not in (self._cards or ())), None)
        found = {load.uuid: load for load in cards}
        node = self._node()
        if node is not None or not cards:
            found[INTEGRATED] = self._integrated(node, same)
        return [found[uuid] for uuid in self._wanted if uuid in found] if self._wanted else list(found.values())

    def _worth_asking(self) -> bool:
        return bool(self._cards) or self._board.chip not in _NVGPU

    def _integrated(self, node: Path | None, same: GpuLoad | None) -> GpuLoad:
        """The integrated GPU: sysfs first, then what NVML says of the same one (`same`)."""
        load = number(node / "device/load") if node is not None else None
        hertz = number(node / "cur_freq") if node is not None else None
        heat, power = zones(self._root), jetson_power.read(self._root)
        values = {
            "utilization": None if load is None else min(1.0, load / 1000.0),
            "clock_mhz": None if hertz is None else hertz // 1_000_000,
            # The zone of a GPU that sleeps tells nothing; the junction's is never below it.
            "temperature_c": heat.get("gpu", heat.get("tj")),
            "power_w": power.watts,
            "throttled": power.over_current,
            "throttle": ["over-current"] if power.over_current else [],
            "power_mode": self._power_mode(),
        }
        if same is None:
            return GpuLoad(uuid=INTEGRATED, **values)  # type: ignore[arg-type]  # each of its field's type
        told = {name: value for name, value in values.items() if value not in (None, [], "")}
        reasons = [*same.throttle, *values["throttle"]]  # type: ignore[misc]  # a list
        throttled = True if reasons else same.throttled if same.throttled is not None else power.over_current
        # Memory is the machine's, whatever the driver says.
        return msgspec.structs.replace(
            same, memory_free=None, memory_total=None,
            **{**told, "uuid": INTEGRATED, "throttle": reasons, "throttled": throttled},
        )  # fmt: skip

    def _node(self) -> Path | None:
        """The GPU's devfreq folder, looked for each time: early after the boot it is not there yet."""
        for folder in sorted((self._root / "sys/class/devfreq").glob("*")):
            if folder.name.startswith(_GPC) or line(folder / "device/of_node/name") in _NODES:
                return folder
        return None

    def _power_mode(self) -> str:
        now = self._clock()
        if now >= self._mode_until:
            self._mode_until = now + self._mode_s
            told = re.search(r"NV Power Mode:\s*(\S+)", self._query())
            self._mode = told[1] if told else ""
        return self._mode


def nvpmodel(within_s: float = 2.0) -> str:
    """What `nvpmodel -q` prints; "" where it can't be asked."""
    try:
        done = subprocess.run(["nvpmodel", "-q"], capture_output=True, text=True, timeout=within_s, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout
