"""What changes by the boot only: processors, memory, GPUs, the machine's name for itself."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from pathlib import Path

from edge_daemon.adapters.telemetry import jetson
from edge_daemon.adapters.telemetry.gpus import GpuSource
from edge_daemon.adapters.telemetry.host import HostReader
from edge_daemon.adapters.telemetry.sysfs import line
from shared.messages import Gpu


@dataclass(frozen=True)
class StaticFacts:
    """For `DeviceInfo` and `DeviceState`."""

    hardware: str
    cores: float
    memory_bytes: int
    gpus: list[Gpu]
    boot_id: str
    driver: str = ""
    jetpack: str = ""


def static_facts(host: HostReader, gpus: GpuSource | None = None, *, root: Path = Path("/")) -> StaticFacts:
    """The facts now; asks the GPU driver, so call it where a hang may cost only this thread."""
    board = jetson.find(root)
    return StaticFacts(
        hardware=hardware(root),
        cores=host.cores(),
        memory_bytes=host.memory()[0],
        gpus=gpus.facts() if gpus is not None else [],
        boot_id=line(root / "proc/sys/kernel/random/boot_id"),
        driver=gpus.driver() if gpus is not None else "",
        jetpack=board.jetpack if board is not None else "",
    )


def hardware(root: Path = Path("/")) -> str:
    """The board's name where the firmware tells it (Jetson, other ARM boards), else the processor's; and the system."""
    board = line(root / "proc/device-tree/model") or _processor(root) or platform.machine()
    tegra = line(root / "etc/nv_tegra_release").split("\n")[0].lstrip("# ")
    return ", ".join(filter(None, [board, f"L4T {tegra}" if tegra else platform.machine()]))[:200]


def _processor(root: Path) -> str:
    for row in line(root / "proc/cpuinfo").splitlines():
        key, _, value = row.partition(":")
        if key.strip() == "model name":
            return value.strip()
    return ""
