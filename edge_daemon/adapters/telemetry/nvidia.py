"""NVIDIA GPUs through NVML (`nvidia-ml-py`). Every field is optional: what a driver can't tell is absent, never 0.

A call into a hung driver does not return; `sampler.Sampler` therefore reads from a thread of its own with a budget.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable, Collection
from typing import Any

from shared.messages import Gpu, GpuLoad

log = logging.getLogger(__name__)

_LOST = ("NVMLError_GpuIsLost", "NVMLError_DriverNotLoaded", "NVMLError_Uninitialized", "NVMLError_ResetRequired")
_THROTTLING = ("SwPowerCap", "HwSlowdown", "SwThermalSlowdown", "HwThermalSlowdown", "HwPowerBrakeSlowdown")


class _Lost(Exception):
    """The driver's session is gone; begin a new one."""


class NvidiaReader:
    """Reads the GPUs (or MIG instances) of this machine.

    `uuids`: only these, in this order; empty: all. `nvml`: the module `pynvml` (another one in tests).
    A missing driver or library means: no GPUs.
    """

    def __init__(self, uuids: Collection[str] = (), *, nvml: Any = None) -> None:
        self._wanted = tuple(uuids)
        self._nvml = nvml
        self._ready = False
        self._quiet = False
        self._sampled: dict[str, int] = {}
        """UUID -> time stamp of the latest sample of its processes."""

    def facts(self) -> list[Gpu]:
        """What changes by the boot only: identity, memory, compute capability."""
        return self._each(self._fact)

    def read(self, own: Collection[int] = ()) -> list[GpuLoad]:
        """The load of each GPU now. `own`: process ids of the daemon and its agents, whose memory is not foreign."""
        return self._each(lambda uuid, handle: self._load(uuid, handle, own))

    def close(self) -> None:
        """End the session with the driver."""
        if self._ready:
            self._ready = False
            try:
                self._nvml.nvmlShutdown()
            except self._nvml.NVMLError as error:
                log.debug("NVML did not shut down: %s", error)

    def _each(self, ask: Callable[[str, Any], Any]) -> list[Any]:
        """`ask(uuid, handle)` of each GPU; a lost session is begun anew once."""
        for _ in range(2):
            if not self._begin():
                return []
            try:
                return [ask(uuid, handle) for uuid, handle in self._handles()]
            except _Lost as error:
                log.warning("the NVIDIA driver's session is lost (%s); a new one begins", error)
                self.close()
        return []

    def _begin(self) -> bool:
        if self._ready:
            return True
        if self._nvml is None:
            try:
                self._nvml = importlib.import_module("pynvml")
            except ImportError:
                return False
        try:
            self._nvml.nvmlInit()
        except self._nvml.NVMLError as error:
            # A machine without a driver is ordinary; say so once.
            if not self._quiet:
                log.info("no NVIDIA GPUs: %s", error)
            self._quiet = True
            return False
        self._ready = True
        self._quiet = False
        return True

    def _handles(self) -> list[tuple[str, Any]]:
        found: dict[str, Any] = {}
        for index in range(self._call("nvmlDeviceGetCount") or 0):
            card = self._call("nvmlDeviceGetHandleByIndex", index)
            if card is None:
                continue
            for handle in self._instances(card) or [card]:
                uuid = _text(self._call("nvmlDeviceGetUUID", handle))
                if uuid:
                    found[uuid] = handle
        if not self._wanted:
            return list(found.items())
        return [(uuid, found[uuid]) for uuid in self._wanted if uuid in found]

    def _instances(self, card: Any) -> list[Any]:
        """The MIG instances of a card; each counts as a device."""
        mode = self._call("nvmlDeviceGetMigMode", card)
        if not mode or mode[0] != 1:
            return []
        count = self._call("nvmlDeviceGetMaxMigDeviceCount", card) or 0
        found = (self._call("nvmlDeviceGetMigDeviceHandleByIndex", card, index) for index in range(count))
        return [handle for handle in found if handle is not None]

    def _fact(self, uuid: str, handle: Any) -> Gpu:
        memory = self._memory(handle)
        compute = self._call("nvmlDeviceGetCudaComputeCapability", handle)
        return Gpu(
            uuid=uuid,
            name=_text(self._call("nvmlDeviceGetName", handle)),
            memory_bytes=int(memory.total) if memory is not None else 0,
            compute=f"{compute[0]}.{compute[1]}" if compute else "",
        )

    def _load(self, uuid: str, handle: Any, own: Collection[int]) -> GpuLoad:
        memory = self._memory(handle)
        rates = self._call("nvmlDeviceGetUtilizationRates", handle)
        power = self._call("nvmlDeviceGetPowerUsage", handle)
        return GpuLoad(
            uuid=uuid,
            utilization=None if rates is None else rates.gpu / 100.0,
            memory_free=None if memory is None else int(memory.free),
            memory_total=None if memory is None else int(memory.total),
            temperature_c=self._temperature(handle),
            power_w=None if power is None else power / 1000.0,
            throttled=self._throttled(handle),
            foreign_memory=self._foreign(handle, own),
            foreign_utilization=self._foreign_share(uuid, handle, own),
        )

    def _memory(self, handle: Any) -> Any:
        """Version 2 tells reserved memory apart from used; older drivers know only version 1."""
        version = getattr(self._nvml, "nvmlMemory_v2", None)
        memory = self._call("nvmlDeviceGetMemoryInfo", handle, version) if version is not None else None
        return self._call("nvmlDeviceGetMemoryInfo", handle) if memory is None else memory

    def _temperature(self, handle: Any) -> float | None:
        sensor = getattr(self._nvml, "NVML_TEMPERATURE_GPU", 0)
        degrees = self._call("nvmlDeviceGetTemperatureV", handle, sensor)
        if degrees is None:
            degrees = self._call("nvmlDeviceGetTemperature", handle, sensor)
        return None if degrees is None else float(degrees)

    def _throttled(self, handle: Any) -> bool | None:
        reasons = self._call("nvmlDeviceGetCurrentClocksEventReasons", handle)
        if reasons is None:
            reasons = self._call("nvmlDeviceGetCurrentClocksThrottleReasons", handle)
        if reasons is None:
            return None
        mask = 0
        for name in _THROTTLING:
            # Drivers before 535 call events throttle reasons; the bits are the same.
            older = getattr(self._nvml, f"nvmlClocksThrottleReason{name}", 0)
            mask |= getattr(self._nvml, f"nvmlClocksEventReason{name}", older)
        return bool(reasons & mask)

    def _foreign(self, handle: Any, own: Collection[int]) -> int | None:
        """Bytes of processes that are not ours; None where that can't be told (see `_foreign_share`, too)."""
        compute = self._call("nvmlDeviceGetComputeRunningProcesses", handle)
        graphics = self._call("nvmlDeviceGetGraphicsRunningProcesses", handle)
        if compute is None and graphics is None:
            return None
        held = {entry.pid: entry.usedGpuMemory for entry in [*(graphics or []), *(compute or [])]}
        if held and not any(pid in own for pid in held):
            return None
        foreign = [used for pid, used in held.items() if pid not in own]
        return None if any(used is None for used in foreign) else int(sum(foreign))

    def _foreign_share(self, uuid: str, handle: Any, own: Collection[int]) -> float | None:
        """Share of the time since the last reading that processes other than ours used; None where that can't be told.

        In a container the driver may number processes otherwise than we do: unless it knows one of ours, ours would
        count as foreign, and training would rest because of itself.
        """
        running = self._call("nvmlDeviceGetComputeRunningProcesses", handle) or []
        if not any(entry.pid in own for entry in running):
            return None
        since = self._sampled.get(uuid, 0)
        samples = self._call("nvmlDeviceGetProcessUtilization", handle, since, nothing=[])
        if samples is None:
            return None
        self._sampled[uuid] = max((sample.timeStamp for sample in samples), default=since)
        used = sum(int(sample.smUtil) for sample in samples if sample.pid not in own)
        return min(1.0, used / 100.0)

    def _call(self, name: str, *arguments: Any, nothing: Any = None) -> Any:
        """The answer, or None where this driver or GPU does not support the question. Raises `_Lost`.

        `nothing`: the answer where there is none of what was asked for.
        """
        function = getattr(self._nvml, name, None)
        if function is None:
            return None
        try:
            return function(*arguments)
        except self._nvml.NVMLError as error:
            if type(error).__name__ in _LOST:
                raise _Lost(str(error)) from error
            return nothing if type(error).__name__ == "NVMLError_NotFound" else None


def _text(value: Any) -> str:
    """Older bindings answer bytes."""
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    return "" if value is None else str(value)
