"""NVML as a test wants it: cards as tables, every failure of the real one, a driver that hangs."""

from __future__ import annotations

import threading
from collections import deque
from types import SimpleNamespace
from typing import Any

WAIT_S = 20.0


class NVMLError(Exception):
    """Base of what NVML raises; the real one has a class per return value, too."""


def _error(name: str) -> type[NVMLError]:
    return type(f"NVMLError_{name}", (NVMLError,), {})


ERRORS = {
    name: _error(name)
    for name in (
        "NotSupported", "NotFound", "GpuIsLost", "ResetRequired", "GpuNotFound", "DriverNotLoaded", "Uninitialized",
        "LibRmVersionMismatch", "Timeout", "NoPermission", "Unknown", "FunctionNotFound", "InvalidArgument",
        "LibraryNotFound", "InsufficientPower", "IrqIssue", "Memory",
    )
}  # fmt: skip
"""NVML's name of an error -> its class."""


class Card(dict[str, Any]):
    """What a card, or MIG instance, answers: name of a question after `nvmlDeviceGet` -> the answer, or the error to
    raise. What is not in it is not supported. `lost`: it raises this, whatever it is asked."""

    lost: str = ""

    def __hash__(self) -> int:
        return id(self)


class FakeNvml:
    """The module `pynvml`, for the cards given. `absent`: why `nvmlInit` fails; `hung`: set while no call returns."""

    NVMLError = NVMLError
    nvmlMemory_v2 = 2  # noqa: N815 - NVML's name
    NVML_TEMPERATURE_GPU = 0
    NVML_CLOCK_SM = 1
    NVML_CLOCK_MEM = 2
    nvmlEventTypeXidCriticalError = 0x8  # noqa: N815 - NVML's name
    nvmlClocksEventReasonSwPowerCap = 0x4  # noqa: N815 - NVML's name
    nvmlClocksThrottleReasonHwSlowdown = 0x8  # noqa: N815 - NVML's name
    nvmlClocksEventReasonSwThermalSlowdown = 0x20  # noqa: N815 - NVML's name
    nvmlClocksEventReasonHwThermalSlowdown = 0x40  # noqa: N815 - NVML's name
    nvmlClocksEventReasonHwPowerBrakeSlowdown = 0x80  # noqa: N815 - NVML's name

    def __init__(self, cards: list[Card] | None = None, *, absent: str = "", driver: Any = b"580.65.06") -> None:
        self.cards = cards or []
        self.absent = absent
        self.driver = driver
        self.asked: list[tuple[str, tuple[Any, ...]]] = []
        self.sessions = 0
        self.open = False
        self.broken = ""
        """What every call of the present session raises; a new one heals it."""
        self.events: dict[int, deque[SimpleNamespace]] = {}
        """Index of a card -> errors not yet asked for."""
        self._free = threading.Event()
        self._free.set()

    def hang(self, yes: bool) -> None:
        """Whether calls return."""
        (self._free.clear if yes else self._free.set)()

    def xid(self, index: int, number: int, instance: int = 0xFFFFFFFF) -> None:
        """Card `index` has an error."""
        event = SimpleNamespace(eventType=0x8, eventData=number, gpuInstanceId=instance)
        self.events.setdefault(index, deque()).append(event)

    def nvmlInit(self) -> None:  # noqa: N802 - NVML's name
        assert self._free.wait(WAIT_S)
        if self.absent:
            raise ERRORS[self.absent](self.absent)
        self.sessions += 1
        self.open, self.broken = True, ""

    def nvmlShutdown(self) -> None:  # noqa: N802 - NVML's name
        if self.broken:
            raise ERRORS[self.broken]("at the shutdown, too")
        self.open = False

    def nvmlSystemGetDriverVersion(self) -> Any:  # noqa: N802 - NVML's name
        self._wait()
        return self.driver

    def nvmlSystemGetCudaDriverVersion_v2(self) -> int:  # noqa: N802 - NVML's name
        return 13020

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802 - NVML's name
        self._wait()
        return len(self.cards)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> Card:  # noqa: N802 - NVML's name
        self._wait()
        if self.cards[index].lost == "no handle":
            raise ERRORS["GpuIsLost"]("GPU is lost")
        return self.cards[index]

    def nvmlDeviceGetMigDeviceHandleByIndex(self, card: Card, index: int) -> Card:  # noqa: N802 - NVML's name
        if index >= len(card["instances"]):
            raise ERRORS["NotFound"]("no such instance")
        return card["instances"][index]  # type: ignore[no-any-return]  # the test's own table

    def nvmlEventSetCreate(self) -> list[int]:  # noqa: N802 - NVML's name
        self._wait()
        return [self.sessions]

    def nvmlDeviceRegisterEvents(self, card: Card, _kinds: int, events: list[int]) -> None:  # noqa: N802
        events.append(next(index for index, known in enumerate(self.cards) if known is card))

    def nvmlEventSetWait_v2(self, events: list[int], timeout_ms: int) -> SimpleNamespace:  # noqa: N802
        self._wait()
        assert timeout_ms == 0, "telemetry never waits for an event"
        assert events[0] == self.sessions, "the set belongs to a session that is over"
        for index in events[1:]:
            if self.cards[index].lost:
                raise ERRORS["GpuIsLost"]("GPU is lost")
            if self.events.get(index):
                return self.events[index].popleft()
        raise ERRORS["Timeout"]("timeout")

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("nvmlDeviceGet"):
            raise AttributeError(name)

        def ask(card: Card, *arguments: Any) -> Any:
            self._wait()
            key = name.removeprefix("nvmlDeviceGet")
            self.asked.append((key, arguments))
            if card.lost:
                raise ERRORS["GpuIsLost" if card.lost == "no handle" else card.lost]("GPU is lost")
            if key not in card:
                raise ERRORS["NotSupported"](key)
            answer = card[key]
            if isinstance(answer, NVMLError):
                raise answer
            return answer[arguments[0]] if key in ("ClockInfo", "MaxClockInfo") else answer

        return ask

    def _wait(self) -> None:
        assert self._free.wait(WAIT_S)
        if self.open and self.broken:
            raise ERRORS[self.broken](self.broken)


def process(pid: int, used: int | None) -> SimpleNamespace:
    """A running process; `used`: bytes, None where the driver can't tell."""
    return SimpleNamespace(pid=pid, usedGpuMemory=used)


def sample(pid: int, share: int, at: int = 5) -> SimpleNamespace:
    """A process's utilization in percent at time stamp `at`."""
    return SimpleNamespace(pid=pid, smUtil=share, timeStamp=at)


def full(uuid: str = "GPU-1", **changes: Any) -> Card:
    """A card that answers everything."""
    values = {
        "UUID": uuid,
        "Name": b"NVIDIA L4",
        "CudaComputeCapability": (8, 9),
        "MemoryInfo": SimpleNamespace(total=24_000, free=20_000, used=4_000, reserved=500),
        "UtilizationRates": SimpleNamespace(gpu=37, memory=12),
        "PowerUsage": 41_500,
        "EnforcedPowerLimit": 72_000,
        "TotalEnergyConsumption": 123_456_789,
        "ClockInfo": {1: 1710, 2: 6251},
        "MaxClockInfo": {1: 2040, 2: 6251},
        "TemperatureV": 55,
        "CurrentClocksEventReasons": 0x4,
        "RemappedRows": (0, 0, 0, 0),
        "SupportedEventTypes": 0x8 | 0x1,
        "ComputeRunningProcesses": [process(10, 1_000), process(99, 2_500)],
        "GraphicsRunningProcesses": [process(99, 2_500), process(98, 500)],
    }
    return Card({**values, **changes})
