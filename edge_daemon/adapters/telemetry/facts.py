"""What changes by the boot only: processors, memory, GPUs, the machine's name for itself."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from pathlib import Path

from edge_daemon.adapters.telemetry.host import HostReader
from edge_daemon.adapters.telemetry.nvidia import NvidiaReader
from shared.messages import Gpu


@dataclass(frozen=True)
class StaticFacts:
    """For `DeviceInfo` and `DeviceState`."""

    hardware: str
    cores: float
    memory_bytes: int
    gpus: list[Gpu]
    boot_id: str


def static_facts(host: HostReader, gpus: NvidiaReader | None = None, *, root: Path = Path("/")) -> StaticFacts:
    """The facts now; asks the GPU driver, so call it where a hang may cost only this thread."""
    return StaticFacts(
        hardware=hardware(root),
        cores=host.cores(),
        memory_bytes=host.memory()[0],
        gpus=gpus.facts() if gpus is not None else [],
        boot_id=_text(root / "proc/sys/kernel/random/boot_id"),
    )


def hardware(root: Path = Path("/")) -> str:
    """The board's name where the firmware tells it (Jetson, other ARM boards), else the processor's; and the system."""
    board = _text(root / "proc/device-tree/model") or _processor(root) or platform.machine()
    tegra = _text(root / "etc/nv_tegra_release").split("\n")[0].lstrip("# ")
    return ", ".join(filter(None, [board, f"L4T {tegra}" if tegra else platform.machine()]))[:200]


def _processor(root: Path) -> str:
    for line in _text(root / "proc/cpuinfo").splitlines():
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            return value.strip()
    return ""


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip().strip("\0")
    except OSError:
        return ""
