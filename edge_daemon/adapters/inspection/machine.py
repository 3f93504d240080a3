"""Clock, disk, GPUs and sandbox of this machine."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import threading
from pathlib import Path
from typing import Literal

from edge_daemon.adapters.telemetry import gpus as telemetry_gpus
from edge_daemon.core.diagnosis import confined
from edge_daemon.settings import TelemetrySettings
from shared.messages import Gpu


def synchronized(wait_s: float) -> bool | None:
    """Whether something keeps the clock right, by systemd's word; None: it can't be asked."""
    try:
        command = ["timedatectl", "show", "--property=NTPSynchronized", "--value"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=wait_s, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return {"yes": True, "no": False}.get(done.stdout.strip()) if done.returncode == 0 else None


def disk(state_dir: Path) -> tuple[int | None, str]:
    """(bytes free, why nothing can be written). Nothing stays behind; a folder that is missing is not made."""
    if not state_dir.exists():
        return None, ""
    try:
        with tempfile.NamedTemporaryFile(dir=state_dir, prefix=".doctor-") as file:
            file.write(b"\0" * 4096)
            file.flush()
            os.fsync(file.fileno())
        return shutil.disk_usage(state_dir).free, ""
    except OSError as error:
        return None, f"can't be written: {error.strerror}"


def gpus(settings: TelemetrySettings, wait_s: float) -> list[Gpu] | None:
    """All GPUs by the driver; None: it does not answer within `wait_s`."""
    found: list[list[Gpu]] = []

    def ask() -> None:
        reader = telemetry_gpus.source((), settings)
        found.append(reader.facts() if reader is not None else [])

    # A call into a hung driver never returns: its thread is left behind.
    thread = threading.Thread(target=ask, name="gpus", daemon=True)
    thread.start()
    thread.join(wait_s)
    if found:
        return found[0]
    return None if thread.is_alive() else []


def has_driver(root: Path = Path("/")) -> bool:
    """Whether an NVIDIA driver is on this machine."""
    return any((root / name).exists() for name in ("proc/driver/nvidia/version", "etc/nv_tegra_release"))


def sandbox(root: Path = Path("/")) -> Literal["", "full", "degraded"]:
    """What confines this process."""
    lines = (root / "proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
    status = {key: value.strip() for key, _, value in (line.partition(":") for line in lines)}
    return confined(status, os.environ.get("MUSTER_SANDBOX") == "degraded")
