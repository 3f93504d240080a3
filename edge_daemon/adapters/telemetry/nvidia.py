"""NVIDIA GPUs through NVML. Every field is optional: what a driver can't tell is absent, never 0.

A call into a hung driver does not return; `sampler.Sampler` therefore reads from a thread of its own with a budget.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Iterator
from typing import Any, NamedTuple

from edge_daemon.adapters.telemetry.nvml import GpuLost, Session, text
from edge_daemon.adapters.telemetry.xids import XidWatch
from shared.messages import Gpu, GpuLoad

_REASONS = {
    "SwPowerCap": "power cap",
    "SwThermalSlowdown": "heat",
    "HwSlowdown": "hardware",
    "HwThermalSlowdown": "hardware heat",
    "HwPowerBrakeSlowdown": "power brake",
}
_FALLEN_OFF, _REMAPPING_FAILED = 79, 64
"""XID of a GPU that is lost, and of memory that could not be repaired: what they leave behind counts as them."""
_KEPT_XIDS = 32


class _Device(NamedTuple):
    """A GPU, or a MIG instance (`instance`; None: a whole card) of the `card` that is the driver's number `place`."""

    uuid: str
    handle: Any
    card: Any
    place: int
    instance: int | None = None


class NvidiaReader:
    """Reads the GPUs (or MIG instances) of this machine. Safe from several threads.

    `uuids`: only these, in this order; empty: all. `nvml`, `retry_s`, `clock`: see `Session`.
    A missing driver or library means: no GPUs.
    """

    def __init__(
        self,
        uuids: Collection[str] = (),
        *,
        nvml: Any = None,
        retry_s: float = 30.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._wanted = tuple(uuids)
        self._session = Session(nvml, retry_s=retry_s, clock=clock)
        self._call = self._session.call
        self._xids = XidWatch(self._session)
        self._lock = threading.Lock()
        self._seen: dict[str, str] = {}
        """UUID of every GPU there ever was -> its fault when it was last asked, else ""."""
        self._errors: dict[str, list[int]] = {}
        """UUID -> XIDs since the process began: only a new process forgets them."""
        self._sampled: dict[str, int] = {}
        """UUID -> time stamp of the latest sample of its processes."""

    def facts(self) -> list[Gpu]:
        """What changes by the boot only: identity, memory, compute capability, limits."""
        with self._lock:
            return self._session.run(self._facts, [])

    def driver(self) -> str:
        """Version of the driver and of CUDA that it serves; "" without one."""
        with self._lock:
            return self._session.run(self._driver, "")

    def read(self, own: Collection[int] = ()) -> list[GpuLoad]:
        """The load of each GPU now. `own`: process ids of the daemon and its agents, whose memory is not foreign.

        A GPU that was there and is not any more is told as such.
        """
        with self._lock:
            nothing: list[GpuLoad] = []
            loads = {load.uuid: load for load in self._session.run(lambda: self._loads(own), nothing)}
            known = [uuid for uuid in self._wanted or self._seen if uuid in self._seen]
            return [loads[uuid] if uuid in loads else self._gone(uuid) for uuid in known]

    def close(self) -> None:
        """End the session with the driver."""
        with self._lock:
            self._session.close()

    def _devices(self) -> list[_Device]:
        found = {device.uuid: device for device in self._all()}
        if not self._wanted:
            return list(found.values())
        return [found[uuid] for uuid in self._wanted if uuid in found]

    def _all(self) -> Iterator[_Device]:
        for place in range(self._call("nvmlDeviceGetCount") or 0):
            try:
                yield from self._of_card(place)
            except GpuLost:
                if self._session.renewable:
                    raise

    def _of_card(self, place: int) -> list[_Device]:
        """A card, or its MIG instances: each counts as a device."""
        card = self._call("nvmlDeviceGetHandleByIndex", place)
        if card is None:
            return []
        found = []
        for handle in self._instances(card) or [card]:
            if uuid := text(self._call("nvmlDeviceGetUUID", handle)):
                instance = None if handle is card else self._call("nvmlDeviceGetGpuInstanceId", handle)
                found.append(_Device(uuid, handle, card, place, instance))
        return found

    def _instances(self, card: Any) -> list[Any]:
        mode = self._call("nvmlDeviceGetMigMode", card)
        if not mode or mode[0] != 1:
            return []
        count = self._call("nvmlDeviceGetMaxMigDeviceCount", card) or 0
        found = (self._call("nvmlDeviceGetMigDeviceHandleByIndex", card, index) for index in range(count))
        return [handle for handle in found if handle is not None]

    def _driver(self) -> str:
        driver = text(self._call("nvmlSystemGetDriverVersion"))
        cuda = self._call("nvmlSystemGetCudaDriverVersion_v2") or self._call("nvmlSystemGetCudaDriverVersion")
        return ", ".join(filter(None, [driver, f"CUDA {cuda // 1000}.{cuda % 1000 // 10}" if cuda else ""]))

    def _facts(self) -> list[Gpu]:
        found = []
        for device in self._devices():
            try:
                found.append(self._fact(device))
            except GpuLost:
                if self._session.renewable:
                    raise
        return found

    def _fact(self, device: _Device) -> Gpu:
        memory = self._memory(device.handle)
        compute = self._call("nvmlDeviceGetCudaComputeCapability", device.handle)
        limit = self._call("nvmlDeviceGetEnforcedPowerLimit", device.handle)
        self._seen.setdefault(device.uuid, "")
        return Gpu(
            uuid=device.uuid,
            name=text(self._call("nvmlDeviceGetName", device.handle)),
            memory_bytes=int(memory.total) if memory is not None else 0,
            compute=f"{compute[0]}.{compute[1]}" if compute else "",
            # A GPU that can't tell its memory (Thor, GB10) has none of its own.
            integrated=memory is None,
            power_limit_w=None if limit is None else limit / 1000.0,
            clock_max_mhz=self._clock(device, "Max", "SM"),
            memory_clock_max_mhz=self._clock(device, "Max", "MEM"),
        )

    def _loads(self, own: Collection[int]) -> list[GpuLoad]:
        devices = self._devices()
        self._watch(devices)
        found = []
        for device in devices:
            try:
                found.append(self._load(device, own))
                self._seen[device.uuid] = ""
            except GpuLost as error:
                if self._session.renewable:
                    raise
                self._seen[device.uuid] = str(error)
        return found

    def _gone(self, uuid: str) -> GpuLoad:
        """The load of a GPU that does not answer, though others may."""
        errors = [xid for xid in self._errors.get(uuid, []) if xid != _FALLEN_OFF]
        why = self._seen[uuid] or "the driver does not name it any more"
        return GpuLoad(uuid=uuid, xids=[*errors, _FALLEN_OFF], fault=f"lost: {why}"[:200])

    def _watch(self, devices: list[_Device]) -> None:
        """Take the errors that came since the last reading: a whole card's are those of all its instances."""
        for place, card in {device.place: device.card for device in devices}.items():
            try:
                events = self._xids.poll(place, card)
            except GpuLost:
                continue  # reading it says so
            for xid, instance in events:
                for device in devices:
                    if device.place == place and instance in (None, device.instance):
                        known = self._errors.setdefault(device.uuid, [])
                        if xid not in known and len(known) < _KEPT_XIDS:
                            known.append(xid)

    def _load(self, device: _Device, own: Collection[int]) -> GpuLoad:
        handle = device.handle
        memory = self._memory(handle)
        rates = self._call("nvmlDeviceGetUtilizationRates", handle)
        power = self._call("nvmlDeviceGetPowerUsage", handle)
        energy = self._call("nvmlDeviceGetTotalEnergyConsumption", handle)
        reasons = self._reasons(device)
        remapped = self._call("nvmlDeviceGetRemappedRows", device.card)
        broken = bool(remapped and remapped[3])
        compute = self._call("nvmlDeviceGetComputeRunningProcesses", handle)
        errors = self._errors.get(device.uuid, [])
        return GpuLoad(
            uuid=device.uuid,
            utilization=None if rates is None else rates.gpu / 100.0,
            memory_free=None if memory is None else int(memory.free),
            memory_total=None if memory is None else int(memory.total),
            temperature_c=self._temperature(device),
            power_w=None if power is None else power / 1000.0,
            energy_j=None if energy is None else energy / 1000.0,
            clock_mhz=self._clock(device, "", "SM"),
            memory_clock_mhz=self._clock(device, "", "MEM"),
            throttled=None if reasons is None else bool(reasons),
            throttle=reasons or [],
            foreign_memory=self._foreign(handle, compute, own),
            foreign_utilization=self._foreign_share(device.uuid, handle, compute or [], own),
            xids=[*errors, _REMAPPING_FAILED] if broken and _REMAPPING_FAILED not in errors else list(errors),
            fault="row remapping failed" if broken else "",
        )

    def _memory(self, handle: Any) -> Any:
        """Version 2 tells reserved memory apart from used; older drivers know only version 1."""
        version = self._session.constant("nvmlMemory_v2")
        memory = self._call("nvmlDeviceGetMemoryInfo", handle, version) if version is not None else None
        return self._call("nvmlDeviceGetMemoryInfo", handle) if memory is None else memory

    def _asked(self, device: _Device, name: str, *arguments: Any) -> Any:
        """Of a MIG instance what it does not tell itself, but its card does."""
        found = self._call(name, device.handle, *arguments)
        if found is None and device.instance is not None:
            found = self._call(name, device.card, *arguments)
        return found

    def _temperature(self, device: _Device) -> float | None:
        sensor = self._session.constant("NVML_TEMPERATURE_GPU") or 0
        degrees = self._asked(device, "nvmlDeviceGetTemperatureV", sensor)
        if degrees is None:
            degrees = self._asked(device, "nvmlDeviceGetTemperature", sensor)
        return None if degrees is None else float(degrees)

    def _clock(self, device: _Device, limit: str, domain: str) -> int | None:
        """MHz of a clock, or of its "Max"."""
        which = self._session.constant(f"NVML_CLOCK_{domain}")
        found = None if which is None else self._asked(device, f"nvmlDeviceGet{limit}ClockInfo", which)
        return None if found is None else int(found)

    def _reasons(self, device: _Device) -> list[str] | None:
        """Why it is throttled; [] where it is not, None where that can't be told."""
        mask = self._asked(device, "nvmlDeviceGetCurrentClocksEventReasons")
        if mask is None:
            # Drivers before 535 call events throttle reasons; the bits are the same.
            mask = self._asked(device, "nvmlDeviceGetCurrentClocksThrottleReasons")
        if mask is None:
            return None
        bits = {
            name: self._session.constant(f"nvmlClocksEventReason{name}", f"nvmlClocksThrottleReason{name}") or 0
            for name in _REASONS
        }
        return [word for name, word in _REASONS.items() if mask & bits[name]]

    def _foreign(self, handle: Any, compute: Any, own: Collection[int]) -> int | None:
        """Bytes of processes that are not ours; None where that can't be told (see `_foreign_share`, too).

        `compute`: those that compute; None: not supported.
        """
        graphics = self._call("nvmlDeviceGetGraphicsRunningProcesses", handle)
        if compute is None and graphics is None:
            return None
        held = {entry.pid: entry.usedGpuMemory for entry in [*(graphics or []), *(compute or [])]}
        if held and not any(pid in own for pid in held):
            return None
        foreign = [used for pid, used in held.items() if pid not in own]
        return None if any(used is None for used in foreign) else int(sum(foreign))

    def _foreign_share(self, uuid: str, handle: Any, running: Any, own: Collection[int]) -> float | None:
        """Share of the time since the last reading that processes other than ours used; None where that can't be told.

        In a container the driver may number processes otherwise than we do: unless it knows one of ours, ours would
        count as foreign, and training would rest because of itself.
        """
        if not any(entry.pid in own for entry in running):
            return None
        since = self._sampled.get(uuid, 0)
        samples = self._call("nvmlDeviceGetProcessUtilization", handle, since, nothing=[])
        if samples is None:
            return None
        self._sampled[uuid] = max((sample.timeStamp for sample in samples), default=since)
        used = sum(int(sample.smUtil) for sample in samples if sample.pid not in own)
        return min(1.0, used / 100.0)
