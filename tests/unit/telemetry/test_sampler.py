"""The sampler's threads: period, readers that hang or fail, what a load says of it."""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Collection

import pytest

from edge_daemon.adapters.telemetry.budgeted import Budgeted, Unanswered
from edge_daemon.adapters.telemetry.host import HostReading
from edge_daemon.adapters.telemetry.nvidia import NvidiaReader
from edge_daemon.adapters.telemetry.sampler import Sampler
from shared.messages import GpuLoad, HostLoad, Load
from tests.unit.telemetry.fake_nvml import FakeNvml, full

WAIT_S = 20.0
READING = HostReading(
    cores=2.0, own_cores=0.5, foreign_cores=0.25, throttled=0.1, memory_available=5, memory_limit=7, own_memory=3,
    oom_kills=0,
    temperature_c=40.0, on_battery=False, host=HostLoad(disk_free=9), own_pids=frozenset({1, 2}),
)  # fmt: skip


class Host:
    """Readings without a machine; the first `failures` ones fail, all hang while `free` is not set."""

    def __init__(self, failures: int = 0) -> None:
        self.failures = failures
        self.free = threading.Event()
        self.free.set()

    def read(self) -> HostReading:
        assert self.free.wait(WAIT_S)
        if self.failures:
            self.failures -= 1
            raise OSError("no /proc today")
        return READING


class Gpus:
    """A driver that hangs while `free` is not set."""

    def __init__(self) -> None:
        self.free = threading.Event()
        self.free.set()
        self.own: Collection[int] = ()

    def read(self, own: Collection[int] = ()) -> list[GpuLoad]:
        self.own = own
        assert self.free.wait(WAIT_S)
        return [GpuLoad(uuid="GPU-1", utilization=0.5)]


def test_a_reading_becomes_a_load() -> None:
    gpus = Gpus()
    sampler = Sampler(lambda load: None, host=Host(), gpus=gpus)
    load = sampler.read()
    sampler.stop()
    assert load == Load(
        epoch=0, seq=0, cores=2.0, own_cores=0.5, foreign_cores=0.25, throttled=0.1, memory_available=5,
        memory_limit=7, own_memory=3, temperature_c=40.0, on_battery=False,
        gpus=[GpuLoad(uuid="GPU-1", utilization=0.5)], host=HostLoad(disk_free=9),
    )  # fmt: skip
    assert gpus.own == {1, 2}


def until(found: Callable[[], bool]) -> None:
    """Asks again until it is so."""
    for _ in range(2000):
        if found():
            return
        time.sleep(0.005)
    raise AssertionError("it does not come")


def test_a_hung_driver_costs_only_its_own_readings_and_is_told() -> None:
    gpus = Gpus()
    sampler = Sampler(lambda load: None, host=Host(), gpus=gpus, budget_s=0.05)
    gpus.free.clear()
    silences = []
    for _ in range(3):
        load = sampler.read()
        assert (load.cores, load.gpus, set(load.hung)) == (2.0, [], {"gpu"})
        silences.append(load.hung["gpu"])
    assert 0.05 <= silences[0] < silences[1] < silences[2]
    gpus.free.set()
    until(lambda: sampler.read().gpus != [])
    assert sampler.read().hung == {}
    sampler.stop()


def test_a_driver_that_hangs_in_nvml_never_stops_the_heartbeats_and_recovers() -> None:
    """The whole way: real threads, the real reader, a fake driver that does not return."""
    nvml = FakeNvml([full()])
    loads: queue.Queue[Load] = queue.Queue()
    reader = NvidiaReader(nvml=nvml)
    sampler = Sampler(loads.put, host=Host(), gpus=reader, period_s=0.01, budget_s=0.05)
    sampler.start()
    assert [gpu.uuid for gpu in loads.get(timeout=WAIT_S).gpus] == ["GPU-1"]
    nvml.hang(True)
    until(lambda: bool(loads.get(timeout=WAIT_S).hung))
    for _ in range(20):
        load = loads.get(timeout=WAIT_S)
        assert (load.cores, load.gpus) == (2.0, [])
    nvml.hang(False)
    until(lambda: loads.get(timeout=WAIT_S).gpus != [])
    sampler.stop()


def test_a_hung_host_is_told_and_its_last_reading_stands() -> None:
    host, gpus = Host(), Gpus()
    sampler = Sampler(lambda load: None, host=host, gpus=gpus, budget_s=0.05)
    sampler.read()
    host.free.clear()
    load = sampler.read()
    assert (load.cores, load.memory_limit, set(load.hung)) == (2.0, 7, {"host"})
    assert load.gpus, "the GPUs are read all the same"
    assert gpus.own == {1, 2}
    host.free.set()
    until(lambda: sampler.read().hung == {})
    sampler.stop()


def test_a_host_that_hangs_from_the_start_tells_nothing_but_that() -> None:
    host = Host()
    host.free.clear()
    sampler = Sampler(lambda load: None, host=host, budget_s=0.05)
    load = sampler.read()
    assert (load.cores, load.memory_limit, set(load.hung)) == (0.0, 0, {"host"})
    host.free.set()
    sampler.stop()


def test_a_failing_gpu_reader_is_no_hung_one() -> None:
    class Broken:
        def read(self, own: Collection[int] = ()) -> list[GpuLoad]:
            raise ArithmeticError(f"no GPUs for {own}")

    sampler = Sampler(lambda load: None, host=Host(), gpus=Broken(), budget_s=WAIT_S)
    load = sampler.read()
    assert (load.cores, load.gpus, load.hung) == (2.0, [], {})
    sampler.stop()


def test_what_a_reader_answers_late_is_never_taken_for_the_next_answer() -> None:
    free = threading.Event()

    def ask(question: int) -> int:
        if question == 1:
            assert free.wait(WAIT_S)
        return question

    asked: Budgeted[int, int] = Budgeted("test", ask, budget_s=0.05)
    for question in (1, 2):
        with pytest.raises(Unanswered):
            asked.read(question)
    free.set()
    answers: list[int] = []

    def answered() -> bool:
        with contextlib.suppress(Unanswered):
            answers.append(asked.read(3))
        return bool(answers)

    until(answered)
    assert answers == [3]
    assert asked.silent_s == 0.0
    asked.stop()


def test_the_period_changes_at_run_time() -> None:
    loads: queue.Queue[Load] = queue.Queue()
    sampler = Sampler(loads.put, host=Host(), period_s=3600.0)
    sampler.start()
    loads.get(timeout=WAIT_S)
    sampler.set_period(0.01)
    for _ in range(5):
        loads.get(timeout=WAIT_S)
    sampler.set_period(3600.0)
    sampler.stop()
    assert not [thread for thread in threading.enumerate() if thread.name == "telemetry"]


def test_a_failed_reading_does_not_end_telemetry() -> None:
    loads: queue.Queue[Load] = queue.Queue()
    sampler = Sampler(loads.put, host=Host(failures=2), period_s=0.01)
    sampler.start()
    assert loads.get(timeout=WAIT_S).cores == 2.0
    sampler.stop()
