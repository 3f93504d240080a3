"""The NVIDIA reader on a second implementation of the part of NVML that it uses."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from edge_daemon.adapters.telemetry.nvidia import NvidiaReader


class FakeNvml:
    """Cards of a machine. What a card's dict lacks is not supported there."""

    class NVMLError(Exception):
        pass

    class NVMLError_NotSupported(NVMLError):  # noqa: N801 - NVML's name
        pass

    class NVMLError_NotFound(NVMLError):  # noqa: N801 - NVML's name
        pass

    class NVMLError_GpuIsLost(NVMLError):  # noqa: N801 - NVML's name
        pass

    nvmlMemory_v2 = 2  # noqa: N815 - NVML's name
    NVML_TEMPERATURE_GPU = 0
    nvmlClocksEventReasonSwPowerCap = 0x4  # noqa: N815 - NVML's name
    nvmlClocksThrottleReasonHwSlowdown = 0x8  # noqa: N815 - NVML's name

    def __init__(self, cards: list[dict[str, Any]], *, driver: bool = True) -> None:
        self.cards = cards
        self.driver = driver
        self.asked: list[tuple[str, tuple[Any, ...]]] = []
        self.sessions = 0
        self.lost = False

    def nvmlInit(self) -> None:  # noqa: N802 - NVML's name
        if not self.driver:
            raise self.NVMLError("Driver Not Loaded")
        self.sessions += 1
        self.lost = False

    def nvmlShutdown(self) -> None:  # noqa: N802 - NVML's name
        if self.lost:
            raise self.NVMLError("GPU is lost")

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802 - NVML's name
        return len(self.cards)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> dict[str, Any]:  # noqa: N802 - NVML's name
        return self.cards[index]

    def nvmlDeviceGetMigDeviceHandleByIndex(self, card: dict[str, Any], index: int) -> dict[str, Any]:  # noqa: N802
        if index >= len(card["instances"]):
            raise self.NVMLError_NotSupported("no such instance")
        return card["instances"][index]  # type: ignore[no-any-return]  # the test's own dict

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("nvmlDeviceGet"):
            raise AttributeError(name)

        def ask(card: dict[str, Any], *arguments: Any) -> Any:
            if self.lost:
                raise self.NVMLError_GpuIsLost("GPU is lost")
            key = name.removeprefix("nvmlDeviceGet")
            self.asked.append((key, arguments))
            if key not in card:
                raise self.NVMLError_NotSupported(key)
            if isinstance(card[key], self.NVMLError):
                raise card[key]
            return card[key]

        return ask


def sample(pid: int, share: int, at: int = 5) -> SimpleNamespace:
    return SimpleNamespace(pid=pid, smUtil=share, timeStamp=at)


def process(pid: int, used: int | None) -> SimpleNamespace:
    return SimpleNamespace(pid=pid, usedGpuMemory=used)


FULL = {
    "UUID": "GPU-1",
    "Name": b"NVIDIA L4",
    "CudaComputeCapability": (8, 9),
    "MemoryInfo": SimpleNamespace(total=24_000, free=20_000, used=4_000),
    "UtilizationRates": SimpleNamespace(gpu=37, memory=12),
    "PowerUsage": 41_500,
    "TemperatureV": 55,
    "CurrentClocksEventReasons": 0x4,
    "ComputeRunningProcesses": [process(10, 1_000), process(99, 2_500)],
    "GraphicsRunningProcesses": [process(99, 2_500), process(98, 500)],
}


def test_every_field() -> None:
    reader = NvidiaReader(nvml=FakeNvml([FULL]))
    (gpu,) = reader.facts()
    assert (gpu.uuid, gpu.name, gpu.memory_bytes, gpu.compute) == ("GPU-1", "NVIDIA L4", 24_000, "8.9")
    (load,) = reader.read(own={10})
    assert (load.utilization, load.memory_free, load.memory_total) == (0.37, 20_000, 24_000)
    assert (load.temperature_c, load.power_w, load.throttled) == (55.0, 41.5, True)
    assert load.foreign_memory == 3_000


def test_what_is_not_supported_is_absent_never_zero() -> None:
    (load,) = NvidiaReader(nvml=FakeNvml([{"UUID": "GPU-1"}])).read()
    assert load.uuid == "GPU-1"
    for field in load.__struct_fields__:
        if field != "uuid":
            assert getattr(load, field) is None, field


def test_a_foreign_process_of_unknown_size_makes_the_sum_unknown() -> None:
    card = {"UUID": "GPU-1", "ComputeRunningProcesses": [process(10, 1_000), process(99, None)]}
    reader = NvidiaReader(nvml=FakeNvml([card]))
    assert reader.read(own={10})[0].foreign_memory is None
    assert reader.read(own={10, 99})[0].foreign_memory == 0


def test_an_older_driver_is_asked_the_older_question() -> None:
    card = {"UUID": "GPU-1", "Temperature": 61, "CurrentClocksThrottleReasons": 0x8}
    (load,) = NvidiaReader(nvml=FakeNvml([card])).read()
    assert (load.temperature_c, load.throttled) == (61.0, True)


def test_only_the_listed_gpus_in_their_order() -> None:
    nvml = FakeNvml([{"UUID": "GPU-1"}, {"UUID": "GPU-2"}, {"UUID": "GPU-3"}])
    reader = NvidiaReader(["GPU-3", "GPU-1", "GPU-9"], nvml=nvml)
    assert [load.uuid for load in reader.read()] == ["GPU-3", "GPU-1"]


def test_each_mig_instance_is_a_gpu() -> None:
    card = {
        "UUID": "GPU-1",
        "MigMode": (1, 1),
        "MaxMigDeviceCount": 7,
        "instances": [{"UUID": "MIG-a"}, {"UUID": "MIG-b"}],
    }
    assert [gpu.uuid for gpu in NvidiaReader(nvml=FakeNvml([card])).facts()] == ["MIG-a", "MIG-b"]


@pytest.mark.parametrize("cards", [[], [FULL]])
def test_without_a_driver_there_are_no_gpus(cards: list[dict[str, Any]]) -> None:
    reader = NvidiaReader(nvml=FakeNvml(cards, driver=False))
    assert reader.facts() == []
    assert reader.read() == []


def test_a_driver_that_comes_later_is_found() -> None:
    nvml = FakeNvml([FULL], driver=False)
    reader = NvidiaReader(nvml=nvml)
    assert reader.read() == []
    nvml.driver = True
    assert len(reader.read()) == 1


def test_a_lost_gpu_begins_a_new_session() -> None:
    nvml = FakeNvml([FULL])
    reader = NvidiaReader(nvml=nvml)
    assert len(reader.read()) == 1
    nvml.lost = True
    assert len(reader.read()) == 1
    assert nvml.sessions == 2


def test_the_share_of_foreign_processes() -> None:
    card = {**FULL, "ProcessUtilization": [sample(10, 60), sample(99, 25), sample(98, 10)]}
    reader = NvidiaReader(nvml=FakeNvml([card]))
    assert reader.read(own={10})[0].foreign_utilization == 0.35
    card["ProcessUtilization"] = [sample(10, 60), sample(99, 90), sample(98, 80)]
    assert reader.read(own={10})[0].foreign_utilization == 1.0


def test_samples_are_asked_for_since_the_last_ones() -> None:
    nvml = FakeNvml([{**FULL, "ProcessUtilization": [sample(10, 60, at=5), sample(99, 25, at=7)]}])
    reader = NvidiaReader(nvml=nvml)
    reader.read(own={10})
    reader.read(own={10})
    assert [arguments for key, arguments in nvml.asked if key == "ProcessUtilization"] == [(0,), (7,)]


def test_no_sample_means_that_nobody_computes() -> None:
    nvml = FakeNvml([{**FULL, "ProcessUtilization": FakeNvml.NVMLError_NotFound("Not Found")}])
    assert NvidiaReader(nvml=nvml).read(own={10})[0].foreign_utilization == 0.0


def test_where_the_driver_does_not_know_our_process_nothing_counts_as_foreign() -> None:
    """In a container it may number processes otherwise: our own work would make us rest for ever."""
    card = {**FULL, "ProcessUtilization": [sample(4010, 95)], "ComputeRunningProcesses": [process(4010, 1)]}
    (load,) = NvidiaReader(nvml=FakeNvml([card])).read(own={10})
    assert (load.foreign_utilization, load.foreign_memory) == (None, None)
    idle = {**FULL, "ComputeRunningProcesses": [], "GraphicsRunningProcesses": []}
    assert NvidiaReader(nvml=FakeNvml([idle])).read(own={10})[0].foreign_memory == 0
