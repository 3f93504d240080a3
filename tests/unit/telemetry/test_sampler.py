"""The sampler's threads: period, a hung GPU driver, a failing reading."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Collection

from edge_daemon.adapters.telemetry.host import HostReading
from edge_daemon.adapters.telemetry.sampler import Sampler
from shared.messages import GpuLoad, Load

WAIT_S = 20.0
READING = HostReading(
    cores=2.0, own_cores=0.5, foreign_cores=0.25, throttled=0.1, memory_available=5, memory_limit=7, own_memory=3,
    oom_kills=0,
    temperature_c=40.0, on_battery=False,
)  # fmt: skip


class Host:
    """Readings without a machine; the first `failures` ones fail."""

    def __init__(self, failures: int = 0) -> None:
        self.failures = failures

    def read(self) -> HostReading:
        if self.failures:
            self.failures -= 1
            raise OSError("no /proc today")
        return READING

    def tree(self) -> set[int]:
        return {1, 2}


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
        gpus=[GpuLoad(uuid="GPU-1", utilization=0.5)],
    )  # fmt: skip
    assert gpus.own == {1, 2}


def test_a_hung_driver_stops_only_its_own_readings() -> None:
    gpus = Gpus()
    sampler = Sampler(lambda load: None, host=Host(), gpus=gpus, budget_s=0.05)
    gpus.free.clear()
    for _ in range(3):
        load = sampler.read()
        assert (load.cores, load.gpus) == (2.0, [])
    gpus.free.set()
    for _ in range(1000):
        if sampler.read().gpus:
            break
        time.sleep(0.005)
    else:
        raise AssertionError("the driver answers again but is not asked")
    sampler.stop()


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
