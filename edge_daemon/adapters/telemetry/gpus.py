"""Which GPU reader this machine needs."""

from __future__ import annotations

from collections.abc import Collection
from functools import partial
from pathlib import Path
from typing import Protocol

from edge_daemon.adapters.telemetry import jetson
from edge_daemon.adapters.telemetry.nvidia import NvidiaReader
from edge_daemon.core.team import CPU
from edge_daemon.settings import TelemetrySettings
from shared.messages import Gpu, GpuLoad


class GpuSource(Protocol):
    """Reads GPUs. Every call may hang with their driver."""

    def facts(self) -> list[Gpu]:
        """What changes by the boot only."""

    def driver(self) -> str:
        """Version of the driver."""

    def read(self, own: Collection[int] = ()) -> list[GpuLoad]:
        """The load of each GPU now; `own`: process ids of the daemon and its agents."""


def source(listed: Collection[str], settings: TelemetrySettings, root: Path = Path("/")) -> GpuSource | None:
    """The reader of the GPUs that the owner listed (none: all there are); None where he wants none."""
    if listed and set(listed) == {CPU}:
        return None
    board = jetson.find(root)
    if board is None:
        return NvidiaReader(listed, retry_s=settings.retry_s)
    return jetson.JetsonReader(
        board, NvidiaReader(retry_s=settings.retry_s), listed, root=root, mode_s=settings.power_mode_s,
        query=partial(jetson.nvpmodel, settings.budget_s),
    )  # fmt: skip
