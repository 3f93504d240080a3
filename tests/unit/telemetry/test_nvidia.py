"""The NVML reader on fake drivers: missing ones, old ones, lost ones, MIG, errors, other people's processes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from edge_daemon.adapters.telemetry.nvidia import NvidiaReader
from shared.messages import GpuLoad
from tests.unit.telemetry.fake_nvml import ERRORS, Card, FakeNvml, full, process, sample


class Clock:
    """Seconds that the test moves."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


def reader(nvml: FakeNvml, *uuids: str, clock: Clock | None = None) -> NvidiaReader:
    return NvidiaReader(uuids, nvml=nvml, retry_s=30.0, clock=clock or Clock())


def test_every_field() -> None:
    found = reader(FakeNvml([full()]))
    (gpu,) = found.facts()
    assert (gpu.uuid, gpu.name, gpu.memory_bytes, gpu.compute) == ("GPU-1", "NVIDIA L4", 24_000, "8.9")
    assert (gpu.integrated, gpu.power_limit_w, gpu.clock_max_mhz, gpu.memory_clock_max_mhz) == (False, 72, 2040, 6251)
    assert found.driver() == "580.65.06, CUDA 13.2"
    (load,) = found.read(own={10})
    assert (load.utilization, load.memory_free, load.memory_total) == (0.37, 20_000, 24_000)
    assert (load.temperature_c, load.power_w, load.throttled) == (55.0, 41.5, True)
    assert (load.energy_j, load.clock_mhz, load.memory_clock_mhz) == (123_456.789, 1710, 6251)
    assert (load.throttle, load.xids, load.fault) == (["power cap"], [], "")
    assert load.foreign_memory == 3_000


def test_what_is_not_supported_is_absent_never_zero() -> None:
    (load,) = reader(FakeNvml([Card({"UUID": "GPU-1"})])).read()
    assert load == GpuLoad(uuid="GPU-1")
    assert (load.utilization, load.throttled, load.energy_j, load.clock_mhz) == (None, None, None, None)


FACTS = {"UUID", "Name", "CudaComputeCapability", "EnforcedPowerLimit", "MaxClockInfo"}
ASKED = sorted(set(full()) - FACTS)
LOST = {"GpuIsLost", "ResetRequired", "GpuNotFound"}


@pytest.mark.parametrize("error", sorted(set(ERRORS) - LOST))
@pytest.mark.parametrize("key", ASKED)
def test_one_question_that_fails_takes_only_its_field_away(key: str, error: str) -> None:
    lost = error in ("DriverNotLoaded", "Uninitialized", "LibRmVersionMismatch")
    nvml = FakeNvml([full(**{key: ERRORS[error](error)})])
    loads = reader(nvml).read(own={10})
    if lost:  # of the whole session, each time anew
        assert (loads, nvml.sessions) == ([], 2)
        return
    (load,) = loads
    whole = reader(FakeNvml([full()])).read(own={10})[0]
    absent = {name for name in load.__struct_fields__ if getattr(load, name) != getattr(whole, name)}
    assert all(getattr(load, name) in (None, []) for name in absent - {"foreign_memory"})
    assert len(absent) <= (3 if key == "MemoryInfo" else 2), absent
    assert absent or key in ("RemappedRows", "SupportedEventTypes")


@pytest.mark.parametrize("key", sorted(FACTS - {"UUID"}))
def test_a_fact_that_is_not_told_is_absent(key: str) -> None:
    (gpu,) = reader(FakeNvml([full(**{key: ERRORS["Unknown"]("Unknown")})])).facts()
    (whole,) = reader(FakeNvml([full()])).facts()
    absent = {name for name in gpu.__struct_fields__ if getattr(gpu, name) != getattr(whole, name)}
    assert absent
    assert all(getattr(gpu, name) in (None, "") for name in absent)


def test_a_gpu_without_memory_of_its_own_is_an_integrated_one() -> None:
    """GB10: by NVML, but its memory is the machine's."""
    (gpu,) = reader(FakeNvml([full(MemoryInfo=ERRORS["NotSupported"]("Not Supported"))])).facts()
    assert (gpu.integrated, gpu.memory_bytes) == (True, 0)


def test_a_foreign_process_of_unknown_size_makes_the_sum_unknown() -> None:
    card = Card({"UUID": "GPU-1", "ComputeRunningProcesses": [process(10, 1_000), process(99, None)]})
    found = reader(FakeNvml([card]))
    assert found.read(own={10})[0].foreign_memory is None
    assert found.read(own={10, 99})[0].foreign_memory == 0


def test_an_older_driver_is_asked_the_older_question() -> None:
    card = Card({"UUID": "GPU-1", "Temperature": 61, "CurrentClocksThrottleReasons": 0x8})
    (load,) = reader(FakeNvml([card])).read()
    assert (load.temperature_c, load.throttled, load.throttle) == (61.0, True, ["hardware"])


def test_memory_is_asked_by_version_2_first() -> None:
    nvml = FakeNvml([full()])
    reader(nvml).read()
    assert ("MemoryInfo", (2,)) in nvml.asked


@pytest.mark.parametrize(
    ("mask", "words"),
    [
        (0x0, []),
        (0x1, []),  # idle
        (0x4, ["power cap"]),
        (0x20, ["heat"]),
        (0x48, ["hardware", "hardware heat"]),
        (0x88, ["hardware", "power brake"]),
    ],
)
def test_throttle_reasons_in_words(mask: int, words: list[str]) -> None:
    (load,) = reader(FakeNvml([full(CurrentClocksEventReasons=mask)])).read()
    assert (load.throttled, load.throttle) == (bool(words), words)


def test_only_the_listed_gpus_in_their_order() -> None:
    nvml = FakeNvml([Card({"UUID": "GPU-1"}), Card({"UUID": "GPU-2"}), Card({"UUID": "GPU-3"})])
    assert [load.uuid for load in reader(nvml, "GPU-3", "GPU-1", "GPU-9").read()] == ["GPU-3", "GPU-1"]


# ---- MIG


def mig() -> Card:
    """A card of two instances. An instance has memory and processes of its own; what heat is, the card knows."""
    instances = [
        Card({"UUID": f"MIG-{name}", "GpuInstanceId": number, "MemoryInfo": SimpleNamespace(total=10, free=free)})
        for name, number, free in (("a", 1, 4), ("b", 2, 9))
    ]
    return full(MigMode=(1, 1), MaxMigDeviceCount=7, instances=instances)


def test_each_mig_instance_is_a_gpu() -> None:
    found = reader(FakeNvml([mig(), full("GPU-2")]))
    assert [gpu.uuid for gpu in found.facts()] == ["MIG-a", "MIG-b", "GPU-2"]
    first, second, _ = found.read()
    assert (first.memory_free, second.memory_free) == (4, 9)
    # The heat of the card is the heat of each; its watts and its work are nobody's share.
    assert (first.temperature_c, first.clock_mhz, first.throttle) == (55.0, 1710, ["power cap"])
    assert (first.utilization, first.power_w, first.energy_j) == (None, None, None)


def test_an_error_of_one_instance_is_its_own_and_one_of_the_card_everybodys() -> None:
    nvml = FakeNvml([mig(), full("GPU-2")])
    found = reader(nvml)
    found.read()
    nvml.xid(0, 94, instance=2)
    assert [load.xids for load in found.read()] == [[], [94], []]
    nvml.xid(0, 48)
    assert [load.xids for load in found.read()] == [[48], [94, 48], []]


# ---- errors


def test_errors_are_kept_each_once() -> None:
    nvml = FakeNvml([full(), full("GPU-2")])
    found = reader(nvml)
    assert [load.xids for load in found.read()] == [[], []]
    for number in (31, 94, 31):
        nvml.xid(0, number)
    assert [load.xids for load in found.read()] == [[31, 94], []]
    assert [load.xids for load in found.read()] == [[31, 94], []]
    nvml.broken = "Uninitialized"  # another process shut the library down
    nvml.xid(1, 63)
    assert [load.xids for load in found.read()] == [[31, 94], [63]], "events of the new session are heard, too"


def test_an_endless_stream_of_errors_does_not_hold_the_reading_up() -> None:
    nvml = FakeNvml([full()])
    for number in range(1, 200):
        nvml.xid(0, number)
    found = reader(nvml)
    for _ in range(3):
        found.read()
    assert found.read()[0].xids == list(range(1, 33))


@pytest.mark.parametrize("supported", [0x1, ERRORS["NotSupported"]("no events here")])
def test_a_card_without_such_events_is_not_asked_again(supported: Any) -> None:
    nvml = FakeNvml([full(SupportedEventTypes=supported)])
    found = reader(nvml)
    nvml.xid(0, 79)
    assert found.read()[0].xids == []
    found.read()
    assert [key for key, _ in nvml.asked].count("SupportedEventTypes") == 1


def test_memory_that_could_not_be_repaired_counts_as_its_error() -> None:
    (load,) = reader(FakeNvml([full(RemappedRows=(3, 1, 0, 1))])).read()
    assert (load.xids, load.fault) == ([64], "row remapping failed")
    (load,) = reader(FakeNvml([full(RemappedRows=(3, 1, 1, 0))])).read()
    assert load.xids == [], "a row that waits for the next reset disturbs nobody"


# ---- drivers and GPUs that come and go


@pytest.mark.parametrize("cards", [[], [full()]])
def test_without_a_driver_there_are_no_gpus(cards: list[Card]) -> None:
    found = reader(FakeNvml(cards, absent="DriverNotLoaded"))
    assert (found.facts(), found.read(), found.driver()) == ([], [], "")


def test_a_driver_that_comes_later_is_found_but_not_looked_for_all_the_time() -> None:
    nvml, clock = FakeNvml([full()], absent="LibraryNotFound"), Clock()
    found = reader(nvml, clock=clock)
    assert found.read() == []
    nvml.absent = ""
    clock.now += 29.0
    assert found.read() == []
    clock.now += 2.0
    assert len(found.read()) == 1


def test_a_driver_that_was_loaded_anew_begins_a_new_session() -> None:
    nvml = FakeNvml([full()])
    found = reader(nvml)
    assert len(found.read()) == 1
    nvml.broken = "DriverNotLoaded"
    (load,) = found.read()
    assert (load.utilization, load.fault, nvml.sessions) == (0.37, "", 2)


def test_a_driver_that_went_away_takes_its_gpus_along() -> None:
    nvml, clock = FakeNvml([full()]), Clock()
    found = reader(nvml, clock=clock)
    found.read()
    nvml.broken = nvml.absent = "DriverNotLoaded"
    (load,) = found.read()
    assert (load.uuid, load.utilization, load.xids) == ("GPU-1", None, [79])
    nvml.absent = ""
    clock.now += 31.0
    assert found.read()[0].utilization == 0.37


@pytest.mark.parametrize("how", ["GpuIsLost", "ResetRequired", "GpuNotFound", "no handle"])
def test_a_lost_gpu_is_told_and_the_others_go_on(how: str) -> None:
    nvml, clock = FakeNvml([full(), full("GPU-2")]), Clock()
    found = reader(nvml, clock=clock)
    assert [load.fault for load in found.read()] == ["", ""]
    nvml.cards[0].lost = how
    lost, other = found.read()
    assert (lost.uuid, lost.xids, lost.utilization) == ("GPU-1", [79], None)
    assert lost.fault.startswith("lost: ")
    assert (other.uuid, other.utilization, other.fault) == ("GPU-2", 0.37, "")
    assert nvml.sessions == 2
    for _ in range(5):
        found.read()
    assert nvml.sessions == 2, "a session that did not help is not begun again at once"
    clock.now += 31.0
    found.read()
    assert nvml.sessions == 3
    nvml.cards[0].lost = ""  # reset
    assert [load.xids for load in found.read()] == [[], []]


def test_facts_of_the_others_are_told_beside_a_lost_gpu() -> None:
    nvml = FakeNvml([full(), full("GPU-2")])
    nvml.cards[0].lost = "GpuIsLost"
    assert [gpu.uuid for gpu in reader(nvml).facts()] == ["GPU-2"]


def test_a_gpu_that_was_never_there_is_not_lost() -> None:
    nvml = FakeNvml([full()])
    assert [load.uuid for load in reader(nvml, "GPU-1", "GPU-9").read()] == ["GPU-1"]


# ---- other people's processes


def test_the_share_of_foreign_processes() -> None:
    card = full(ProcessUtilization=[sample(10, 60), sample(99, 25), sample(98, 10)])
    found = reader(FakeNvml([card]))
    assert found.read(own={10})[0].foreign_utilization == 0.35
    card["ProcessUtilization"] = [sample(10, 60), sample(99, 90), sample(98, 80)]
    assert found.read(own={10})[0].foreign_utilization == 1.0


def test_samples_are_asked_for_since_the_last_ones() -> None:
    nvml = FakeNvml([full(ProcessUtilization=[sample(10, 60, at=5), sample(99, 25, at=7)])])
    found = reader(nvml)
    found.read(own={10})
    found.read(own={10})
    assert [arguments for key, arguments in nvml.asked if key == "ProcessUtilization"] == [(0,), (7,)]


def test_no_sample_means_that_nobody_computes() -> None:
    nvml = FakeNvml([full(ProcessUtilization=ERRORS["NotFound"]("Not Found"))])
    assert reader(nvml).read(own={10})[0].foreign_utilization == 0.0


def test_where_the_driver_does_not_know_our_process_nothing_counts_as_foreign() -> None:
    """In a container it may number processes otherwise: our own work would make us rest for ever."""
    card = full(ProcessUtilization=[sample(4010, 95)], ComputeRunningProcesses=[process(4010, 1)])
    (load,) = reader(FakeNvml([card])).read(own={10})
    assert (load.foreign_utilization, load.foreign_memory) == (None, None)
    idle = full(ComputeRunningProcesses=[], GraphicsRunningProcesses=[])
    assert reader(FakeNvml([idle])).read(own={10})[0].foreign_memory == 0


def test_the_real_bindings_have_every_name_that_is_asked_for() -> None:
    """What they lack would be silently absent everywhere."""
    import pynvml

    asked = [*ASKED, *FACTS, "Count", "HandleByIndex", "MigMode", "MaxMigDeviceCount", "GpuInstanceId", "Temperature"]
    asked += ["MigDeviceHandleByIndex", "ProcessUtilization", "CurrentClocksThrottleReasons"]
    for key in asked:
        assert hasattr(pynvml, f"nvmlDeviceGet{key}"), key
    for name in ("nvmlInit", "nvmlShutdown", "nvmlEventSetCreate", "nvmlDeviceRegisterEvents", "nvmlEventSetWait_v2",
                 "nvmlSystemGetDriverVersion", "nvmlSystemGetCudaDriverVersion_v2"):  # fmt: skip
        assert hasattr(pynvml, name), name
    fake = FakeNvml()
    for name in vars(FakeNvml):
        if name.startswith(("NVML_", "nvmlClocks", "nvmlEventType", "nvmlMemory")):
            value = getattr(pynvml, name)
            assert value == getattr(fake, name) or name == "nvmlMemory_v2", name
    for name in ERRORS:
        assert hasattr(pynvml, f"NVMLError_{name}"), name


def test_the_real_bindings_without_a_driver() -> None:
    """This machine, whatever it has: a real library that says no, or real GPUs."""
    found = NvidiaReader()
    assert len(found.facts()) == len(found.read())
    found.close()
