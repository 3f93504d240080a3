"""A real daemon over a real broker whose GPU driver hangs, or reports an error: it is heard all the time, and says so.

The driver is a module `pynvml` of the test's own, found before the real one; files tell it what to do.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from coordinator.web.views import DeviceView
from muster.testbed import least_squares
from muster.testbed.fleet import DeviceSpec, Fleet
from shared.messages import DeviceInfo, Load

DEVICE = "edge-01"
WITHIN_S = 60.0
DRIVER = """
import pathlib, time
from types import SimpleNamespace
HERE = pathlib.Path(__file__).parent
class NVMLError(Exception): pass
class NVMLError_Timeout(NVMLError): pass
nvmlEventTypeXidCriticalError = 8
def answers(value):
    def ask(*_):
        while (HERE / "hang").exists():
            time.sleep(0.02)
        return value
    return ask
def nvmlEventSetWait_v2(*_):
    try:
        (HERE / "xid").unlink()
    except FileNotFoundError:
        raise NVMLError_Timeout from None
    return SimpleNamespace(eventData=79, gpuInstanceId=0xFFFFFFFF)
nvmlInit = nvmlShutdown = answers(None)
nvmlDeviceGetCount = nvmlEventSetCreate = answers(1)
nvmlDeviceGetHandleByIndex = nvmlDeviceRegisterEvents = answers("handle")
nvmlDeviceGetSupportedEventTypes = answers(8)
nvmlDeviceGetUUID = answers("GPU-1")
nvmlDeviceGetMemoryInfo = answers(SimpleNamespace(total=2**34, free=2**33))
nvmlDeviceGetUtilizationRates = answers(SimpleNamespace(gpu=50, memory=0))
"""
SETTINGS = {
    "agent": {"gpus": ["GPU-1"]},
    "policy": {"disk_reserve_bytes": 0, "gpu_silence_s": 2.0},
    "telemetry": {"idle_s": 0.3, "budget_s": 0.3},
}


@pytest.fixture
def driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the module."""
    folder = tmp_path / "driver"
    folder.mkdir()
    (folder / "pynvml.py").write_text(DRIVER, encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH", "")])))
    return folder


@pytest.fixture
def fleet(tmp_path: Path, driver: Path) -> Iterator[Fleet]:
    least_squares.write_rows(tmp_path / "rows.jsonl", least_squares.make_rows("12x6", 16, seed=1))
    device = DeviceSpec(DEVICE, data={"points": tmp_path / "rows.jsonl"}, settings=SETTINGS)
    with Fleet(tmp_path / "fleet", [device], {"12x6": "12x6"}, agent="numpy", limits=False) as found:
        assert driver.is_dir()
        yield found


def seen(fleet: Fleet, met: Callable[[DeviceInfo, Load], bool]) -> DeviceView:
    """The device once it is so."""
    until = time.monotonic() + WITHIN_S
    while True:
        view = next((view for view in fleet.client.devices() if view.device == DEVICE), None)
        if view is not None and view.info is not None and view.load is not None and met(view.info, view.load):
            return view
        assert time.monotonic() < until, view
        time.sleep(0.05)


def test_a_hung_driver_never_silences_the_device(fleet: Fleet, driver: Path) -> None:
    before = seen(fleet, lambda info, load: [gpu.uuid for gpu in load.gpus] == ["GPU-1"] and bool(info.bits))
    assert before.info is not None and [gpu.memory_bytes for gpu in before.info.gpus] == [2**34]
    (driver / "hang").touch()
    hung = seen(fleet, lambda info, load: "gpu" in load.hung)
    assert hung.load is not None and hung.load.gpus == [] and hung.load.cores > 0
    # Ten more loads come while it hangs, and the device says that it takes no work.
    first = hung.load.seq
    silent = seen(fleet, lambda info, load: load.seq >= first + 10 and load.hung.get("gpu", 0.0) > 2.0)
    assert silent.info is not None and silent.info.problem.startswith("GPU driver: no answer for more than 2 s")
    assert silent.state == "ready"
    (driver / "hang").unlink()
    back = seen(fleet, lambda info, load: not load.hung and bool(load.gpus) and not info.problem)
    assert back.load is not None and back.load.gpus[0].utilization == 0.5
    assert back.epoch == before.epoch, "the connection was never lost"


def test_a_driver_that_hangs_from_the_start_is_used_once_it_answers(tmp_path: Path, driver: Path) -> None:
    """Until then an agent on the CPU was started, which must not stay."""
    (driver / "hang").touch()
    least_squares.write_rows(tmp_path / "rows.jsonl", least_squares.make_rows("12x6", 16, seed=1))
    settings = {**SETTINGS, "agent": {"gpus": []}}
    device = DeviceSpec(DEVICE, data={"points": tmp_path / "rows.jsonl"}, settings=settings)
    with Fleet(tmp_path / "fleet", [device], {"12x6": "12x6"}, agent="numpy", limits=False) as fleet:
        alone = seen(fleet, lambda info, load: bool(info.bits) and "gpu" in load.hung)
        assert alone.info is not None and alone.info.gpus == []
        (driver / "hang").unlink()
        seen(fleet, lambda info, load: [gpu.uuid for gpu in info.gpus] == ["GPU-1"] and not info.problem)
        log = tmp_path / "fleet" / f"{DEVICE}.log"
        until = time.monotonic() + WITHIN_S
        while "to be started for GPU-1" not in log.read_text(encoding="utf-8"):
            assert time.monotonic() < until, log.read_text(encoding="utf-8")
            time.sleep(0.05)


def test_an_error_of_the_driver_takes_the_device_out(fleet: Fleet, driver: Path) -> None:
    seen(fleet, lambda info, load: bool(load.gpus) and bool(info.bits) and not info.problem)
    (driver / "xid").touch()
    broken = seen(fleet, lambda info, load: bool(info.problem))
    assert broken.info is not None and broken.load is not None
    assert broken.info.problem.startswith("broken GPU: GPU-1 reported XID 79")
    assert seen(fleet, lambda info, load: load.gpus[0].xids == [79])
