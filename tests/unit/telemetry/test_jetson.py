"""The Jetson reader on hand-written trees (see the README in each): no test here ran on a Jetson."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import pytest

from edge_daemon.adapters.telemetry import facts, gpus, jetson, jetson_power
from edge_daemon.adapters.telemetry.host import HostReader
from edge_daemon.adapters.telemetry.jetson import Board, JetsonReader
from edge_daemon.protocol import INTEGRATED
from edge_daemon.settings import TelemetrySettings
from shared.messages import Gpu, GpuLoad
from tests.unit.telemetry.fake_nvml import ERRORS, Card, FakeNvml, full, process
from tests.unit.telemetry.jetson_trees import names, put, unfold
from tests.unit.telemetry.test_nvidia import Clock, reader

XAVIER, ORIN_NX, ORIN_NANO, AGX_ORIN, THOR = (
    "jetson-agx-xavier-jp5", "jetson-orin-nx-jp5", "jetson-orin-nano-jp6", "jetson-agx-orin-jp7", "jetson-thor-jp7",
)  # fmt: skip


def read(root: Path, own: Collection[int] = (), **options: Any) -> list[GpuLoad]:
    return device(root, **options).read(own)


def device(root: Path, **options: Any) -> JetsonReader:
    board = jetson.find(root)
    assert board is not None
    return JetsonReader(board, root=root, **{"query": lambda: "", **options})


def test_every_tree_says_that_it_is_hand_written() -> None:
    from tests.unit.telemetry.jetson_trees import TREES

    assert names() == sorted([XAVIER, ORIN_NX, ORIN_NANO, AGX_ORIN, THOR])
    for name in names():
        assert "hand-written" in (TREES / name / "README.md").read_text(encoding="utf-8").splitlines()[0]


@pytest.mark.parametrize(
    ("name", "chip", "jetpack"),
    [
        (XAVIER, "tegra194", "5 (L4T 35.4.1)"),
        (ORIN_NX, "tegra234", "5 (L4T 35.4.1)"),
        (ORIN_NANO, "tegra234", "6 (L4T 36.4.4)"),
        (AGX_ORIN, "tegra234", "7.2 (L4T 39.2.0)"),
        (THOR, "tegra264", "7.2 (L4T 39.2.0)"),
    ],
)
def test_boards_are_told_apart(tmp_path: Path, name: str, chip: str, jetpack: str) -> None:
    board = jetson.find(unfold(name, tmp_path))
    assert board is not None
    assert (board.chip, board.jetpack) == (chip, jetpack)
    assert "\0" not in board.model


def test_a_tegra_kernel_is_enough_and_arm_is_not(tmp_path: Path) -> None:
    put(tmp_path, "proc/sys/kernel/osrelease", "6.8.0-1013-nvidia-64k\n")  # a Grace server
    put(tmp_path, "proc/device-tree/model", "some ARM server\0")
    assert jetson.find(tmp_path) is None
    put(tmp_path, "proc/sys/kernel/osrelease", "5.15.148-tegra\n")
    board = jetson.find(tmp_path)
    assert board == Board("some ARM server", "", None)
    assert board.jetpack == ""


@pytest.mark.parametrize(
    ("release", "jetpack"),
    [((36, "5.0"), "6.2.2 (L4T 36.5.0)"), ((38, "2.0"), "7.0 (L4T 38.2.0)"), ((38, "4.0"), "7.1 (L4T 38.4.0)"),
     ((32, "7.1"), "L4T 32.7.1"), ((41, "1.0"), "L4T 41.1.0")],
)  # fmt: skip
def test_an_unknown_release_is_told_as_it_is(release: tuple[int, str], jetpack: str) -> None:
    assert Board("x", release=release).jetpack == jetpack


@pytest.mark.parametrize(
    ("name", "utilization", "clock", "gpu_c", "host_c", "watts"),
    [
        # No rail has the whole: 62+33+155+0+16+174 mA at 18.992 V.
        (XAVIER, 0.734, 1377, 39.5, 40.0, 8.356),
        (ORIN_NX, 0.0, 306, 46.187, 47.5, 5.384),
        (ORIN_NANO, 0.998, 1020, 62.843, 62.843, 13.517),
        # The GPU sleeps: the junction stands for it.
        (AGX_ORIN, 0.0, 306, 52.031, 52.031, 3.14 + 0.8 + 4.735 + 0.397),
        # No load in sysfs; the board's own sensor measures all of it.
        (THOR, None, 1575, 55.1, 55.1, 23.125),
    ],
)
def test_readings(
    tmp_path: Path, name: str, utilization: float | None, clock: int, gpu_c: float, host_c: float, watts: float
) -> None:
    root = unfold(name, tmp_path)
    (load,) = read(root)
    assert (load.uuid, load.utilization, load.clock_mhz, load.temperature_c) == (INTEGRATED, utilization, clock, gpu_c)
    assert load.power_w == pytest.approx(watts, abs=0.01)
    assert (load.throttled, load.throttle) == (False, [])
    assert (load.memory_total, load.memory_free, load.foreign_memory) == (None, None, None)
    host = HostReader(root=root, pid=1).read()
    assert host.temperature_c == host_c
    meminfo = (root / "proc/meminfo").read_text()
    assert f"MemAvailable:   {host.memory_available // 1024} kB" in meminfo


@pytest.mark.parametrize(("name", "compute"), [(XAVIER, "7.2"), (ORIN_NANO, "8.7"), (THOR, "11.0")])
def test_facts(tmp_path: Path, name: str, compute: str) -> None:
    root = unfold(name, tmp_path)
    found = facts.static_facts(HostReader(root=root, pid=1), device(root), root=root)
    (gpu,) = found.gpus
    assert (gpu.uuid, gpu.integrated, gpu.memory_bytes, gpu.compute) == (INTEGRATED, True, 0, compute)
    assert gpu.clock_max_mhz is not None and gpu.clock_max_mhz >= 918
    assert found.jetpack.startswith(("5 ", "6 ", "7.2 "))
    assert found.memory_bytes > 7 * 2**30


@pytest.mark.parametrize("label", ["POM_5V_IN", "VDD_IN"])
def test_the_whole_is_taken_where_a_rail_has_it_by_its_old_name_too(tmp_path: Path, label: str) -> None:
    root = unfold(ORIN_NANO, tmp_path)
    put(root, "sys/bus/i2c/devices/1-0040/hwmon/hwmon1/in1_label", f"{label}\n")
    assert jetson_power.read(root).watts == pytest.approx(4.984 * 2.712)


def test_a_rail_above_its_critical_current_throttles(tmp_path: Path) -> None:
    root = unfold(ORIN_NANO, tmp_path)
    put(root, "sys/bus/i2c/devices/1-0040/hwmon/hwmon1/curr2_crit_alarm", "1\n")
    (load,) = read(root)
    assert (load.throttled, load.throttle) == (True, ["over-current"])


def test_what_is_missing_is_absent(tmp_path: Path) -> None:
    put(tmp_path, "etc/nv_tegra_release", "# R36 (release), REVISION: 4.4, GCID: 1\n")
    (load,) = read(tmp_path)
    assert load == GpuLoad(uuid=INTEGRATED)
    root = unfold(XAVIER, tmp_path)
    put(root, "sys/bus/i2c/devices/1-0040/hwmon/hwmon3/in1_input", "garbage\n")
    assert read(root)[0].power_w == pytest.approx(18.992 * 0.378, abs=0.01)


def test_a_gpu_whose_folder_comes_late_is_found(tmp_path: Path) -> None:
    """Early after the boot the folder is not there, and what NVML says of such a GPU is no reading."""
    root = unfold(ORIN_NANO, tmp_path)
    nvml = reader(FakeNvml([Card({"UUID": "GPU-x", "UtilizationRates": full()["UtilizationRates"]})]))
    late = root / "sys/class/devfreq/17000000.gpu"
    late.rename(root / "elsewhere")
    found = device(root, nvml=nvml)
    assert [gpu.uuid for gpu in found.facts()] == [INTEGRATED]
    assert found.read()[0].utilization is None
    (root / "elsewhere").rename(late)
    assert found.read()[0].utilization == 0.998


def test_zeros_of_nvml_are_not_believed_where_the_gpu_has_a_driver_of_its_own(tmp_path: Path) -> None:
    zeros = Card({"UUID": "GPU-0", "Name": "Orin (nvgpu)", "UtilizationRates": full()["UtilizationRates"],
                  "PowerUsage": 0, "TemperatureV": 0})  # fmt: skip
    (load,) = read(unfold(ORIN_NANO, tmp_path), nvml=reader(FakeNvml([zeros])))
    assert (load.utilization, load.temperature_c) == (0.998, 62.843)
    assert load.power_w is not None and load.power_w > 13


def thor_by_nvml(**changes: Any) -> FakeNvml:
    """What NVML tells of a Thor: no memory, but load and processes."""
    silent = ERRORS["NotSupported"]("Not Supported")
    return FakeNvml([full("GPU-thor", Name="NVIDIA Thor", MemoryInfo=silent, TotalEnergyConsumption=silent, **changes)])


def test_thor_is_read_by_nvml_where_sysfs_says_nothing(tmp_path: Path) -> None:
    root = unfold(THOR, tmp_path)
    found = device(root, nvml=reader(thor_by_nvml()))
    assert [(gpu.uuid, gpu.integrated) for gpu in found.facts()] == [(INTEGRATED, True)]
    (load,) = found.read(own={10})
    assert (load.uuid, load.utilization, load.foreign_memory) == (INTEGRATED, 0.37, 3000)
    assert (load.memory_total, load.memory_free) == (None, None)
    # The board's input, not the GPU's share; the clock that devfreq shows; the reasons of both.
    assert (load.power_w, load.clock_mhz, load.throttle) == (23.125, 1575, ["power cap"])


def test_thor_tells_its_errors(tmp_path: Path) -> None:
    nvml = thor_by_nvml()
    found = device(unfold(THOR, tmp_path), nvml=reader(nvml))
    found.read()
    nvml.xid(0, 94)
    assert found.read()[0].xids == [94]


def test_memory_that_the_driver_claims_is_the_machines(tmp_path: Path) -> None:
    found = device(unfold(THOR, tmp_path), nvml=reader(thor_by_nvml(ComputeRunningProcesses=[process(1, 5)])))
    (gpu,) = found.facts()
    (load,) = found.read()
    assert (gpu.memory_bytes, load.memory_total) == (0, None)


def test_a_card_beside_the_integrated_gpu(tmp_path: Path) -> None:
    root = unfold(AGX_ORIN, tmp_path)
    nvml = reader(FakeNvml([full("GPU-card")]))
    assert [gpu.uuid for gpu in device(root, nvml=nvml).facts()] == [INTEGRATED, "GPU-card"]
    assert {load.uuid for load in read(root, nvml=nvml)} == {INTEGRATED, "GPU-card"}
    assert [load.uuid for load in read(root, nvml=nvml, uuids=["GPU-card"])] == ["GPU-card"]
    (root / "sys/class/devfreq/17000000.gpu").rename(root / "off")
    assert [gpu.uuid for gpu in device(root, nvml=nvml).facts()] == ["GPU-card"]
    assert [load.uuid for load in read(root, nvml=nvml)] == ["GPU-card"]


def test_the_power_mode_is_asked_for_now_and_then(tmp_path: Path) -> None:
    asked: list[str] = []

    def query() -> str:
        asked.append("NV Power Mode: MODE_15W_6CORE\n2\n")
        return asked[-1]

    clock = Clock()
    found = device(unfold(ORIN_NANO, tmp_path), query=query, mode_s=60.0, clock=clock)
    assert {found.read()[0].power_mode for _ in range(3)} == {"MODE_15W_6CORE"}
    clock.now += 61.0
    found.read()
    assert len(asked) == 2


@pytest.mark.parametrize("answer", ["", "Error: need to be root\n", "NV Power Mode:"])
def test_a_power_mode_that_is_not_told_is_absent(tmp_path: Path, answer: str) -> None:
    (load,) = read(unfold(ORIN_NANO, tmp_path), query=lambda: answer)
    assert load.power_mode == ""


def test_the_real_command_is_absent_or_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert jetson.nvpmodel() == ""
    program = tmp_path / "nvpmodel"
    program.write_text('#!/bin/sh\necho "NV Power Mode: $1"\n')
    program.chmod(0o755)
    assert jetson.nvpmodel() == "NV Power Mode: -q\n"
    program.write_text("#!/bin/sh\nexec /bin/sleep 60\n")
    assert jetson.nvpmodel(within_s=0.2) == ""


def test_the_reader_that_a_machine_needs(tmp_path: Path) -> None:
    settings = TelemetrySettings()
    assert isinstance(gpus.source([], settings, unfold(THOR, tmp_path / "a")), JetsonReader)
    assert not isinstance(gpus.source([], settings, tmp_path / "b"), JetsonReader)
    assert gpus.source(["cpu", "cpu"], settings, tmp_path / "a") is None


def test_what_the_owner_does_not_list_is_not_read(tmp_path: Path) -> None:
    root = unfold(ORIN_NANO, tmp_path)
    assert read(root, uuids=["GPU-1"]) == []
    assert [load.uuid for load in read(root, uuids=[INTEGRATED])] == [INTEGRATED]
    assert device(root, uuids=["GPU-1"]).facts() == []


def test_facts_know_the_driver(tmp_path: Path) -> None:
    root = unfold(THOR, tmp_path)
    found = facts.static_facts(HostReader(root=root, pid=1), device(root, nvml=reader(thor_by_nvml())), root=root)
    assert found.driver == "580.65.06, CUDA 13.2"
    assert isinstance(found.gpus[0], Gpu)
