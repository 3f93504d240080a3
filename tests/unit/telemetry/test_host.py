"""The host reader on a recorded tree (version 1), on hand-written ones (version 2, containers), on this machine."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from edge_daemon.adapters.telemetry import cgroup, facts, own
from edge_daemon.adapters.telemetry.host import HostReader

RECORDED = Path(__file__).parent / "trees" / "recorded-v1"
GROUP = "muster-emulate-9204/edge-01"
MIB = 1024 * 1024


@pytest.fixture
def recorded(tmp_path: Path) -> Path:
    """A copy of the recorded tree that a test may change."""
    return Path(shutil.copytree(RECORDED, tmp_path / "tree"))


def write(root: Path, files: dict[str, str]) -> Path:
    """A hand-written tree."""
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


class Clock:
    """Seconds that the test moves."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_recorded_limits(recorded: Path) -> None:
    reading = HostReader(root=recorded, pid=9205, clock=Clock()).read()
    assert reading.cores == 0.5
    assert reading.memory_limit == 512 * MIB
    assert reading.memory_available == 512 * MIB - 83267584
    assert (reading.own_cores, reading.foreign_cores, reading.throttled) == (0.0, 0.0, 0.0)
    assert reading.oom_kills == 0
    assert reading.temperature_c is None
    assert reading.on_battery is None


def test_rates_are_differences_to_the_reading_before(recorded: Path) -> None:
    clock = Clock()
    reader = HostReader(root=recorded, pid=9205, clock=clock)
    reader.read()
    clock.now += 10.0
    usage = recorded / "sys/fs/cgroup/cpuacct" / GROUP / "cpuacct.usage"
    usage.write_text(str(int(usage.read_text()) + 5 * 10**9))
    # Of the group's 5 s the daemon's child used 2 s (200 ticks of 10 ms).
    stat = recorded / "proc/9207/stat"
    stat.write_text(stat.read_text().replace(" 0 0 0 40 0 0 0 ", " 0 0 0 240 0 0 0 ", 1))
    write(recorded / "sys/fs/cgroup/cpu" / GROUP, {"cpu.stat": "nr_periods 240\nnr_throttled 90\n"})
    reading = reader.read()
    assert reading.own_cores == pytest.approx(0.2, abs=0.01)
    assert reading.foreign_cores == pytest.approx(0.3, abs=0.01)
    assert reading.throttled == pytest.approx(0.25)


def test_a_reaped_child_leaves_its_time_with_its_parent(recorded: Path) -> None:
    clock = Clock()
    reader = HostReader(root=recorded, pid=9205, clock=clock)
    reader.read()
    clock.now += 1.0
    shutil.rmtree(recorded / "proc/9207")
    stat = recorded / "proc/9205/stat"
    stat.write_text(stat.read_text().replace(" 24 3 0 0 ", " 24 3 90 0 ", 1))
    assert reader.read().own_cores == pytest.approx(0.5, abs=0.01)


def test_page_cache_that_can_be_dropped_is_available(recorded: Path) -> None:
    write(recorded / "sys/fs/cgroup/memory" / GROUP, {"memory.stat": "cache 50000000\ntotal_inactive_file 40000000\n"})
    reading = HostReader(root=recorded, pid=9205).read()
    assert reading.memory_available == 512 * MIB - 83267584 + 40000000


def test_a_kill_for_memory_is_counted(recorded: Path) -> None:
    reader = HostReader(root=recorded, pid=9205)
    assert reader.oom_kills() == 0
    write(recorded / "sys/fs/cgroup/memory" / GROUP, {"memory.oom_control": "under_oom 0\noom_kill 3\n"})
    assert reader.oom_kills() == 3


def test_without_a_quota_everything_else_on_the_host_is_foreign(recorded: Path) -> None:
    (recorded / "sys/fs/cgroup/cpu" / GROUP / "cpu.cfs_quota_us").write_text("-1\n")
    clock = Clock()
    reader = HostReader(root=recorded, pid=9205, clock=clock)
    reader.read()
    clock.now += 10.0
    stat = recorded / "proc/stat"
    stat.write_text(stat.read_text().replace("cpu0 1577 ", "cpu0 2577 ", 1))
    reading = reader.read()
    assert reading.cores == 2.0
    assert reading.foreign_cores == pytest.approx(1.0)
    assert reading.throttled == 0.0


PINNED = {
    "proc/7/status": "Name:\tpython\nCpus_allowed_list:\t0-3\n",
    "proc/meminfo": "MemTotal: 100 kB\nMemFree: 10 kB\nMemAvailable: 10 kB\nBuffers: 0 kB\nCached: 0 kB\n",
}


def busy(seconds: dict[int, int]) -> dict[str, str]:
    """Each of eight processors has been busy for so many seconds."""
    counts = {cpu: 100 * seconds.get(cpu, 0) for cpu in range(8)}
    rows = [f"cpu  {sum(counts.values())} 0 0 0 0 0 0 0 0 0"]
    rows += [f"cpu{cpu} {count} 0 0 0 0 0 0 0 0 0" for cpu, count in counts.items()]
    return {"proc/stat": "\n".join([*rows, "btime 1700000000", ""])}


def test_what_other_processors_do_is_not_foreign_to_who_is_pinned(tmp_path: Path) -> None:
    clock = Clock()
    reader = HostReader(root=write(tmp_path, PINNED | busy({4: 10, 5: 10})), pid=7, clock=clock)
    reader.read()
    clock.now += 10.0
    write(tmp_path, busy({2: 5, 4: 20, 5: 20}))
    reading = reader.read()
    assert (reading.cores, reading.foreign_cores) == (4.0, pytest.approx(0.5))


def test_processors_that_are_switched_off_are_not_there(tmp_path: Path) -> None:
    """A Jetson's power mode does that; the list of those allowed keeps them."""
    clock, online = Clock(), "sys/devices/system/cpu/online"
    reader = HostReader(root=write(tmp_path, PINNED | busy({}) | {online: "0-7\n"}), pid=7, clock=clock)
    assert reader.read().cores == 4.0
    clock.now += 10.0
    write(tmp_path, busy({0: 10, 3: 10}) | {online: "0-1,4\n"})
    reading = reader.read()
    assert (reading.cores, reading.foreign_cores) == (2.0, 0.0), "its rate is that of other processors than before"
    clock.now += 10.0
    write(tmp_path, busy({0: 20, 3: 20}))
    assert reader.read().foreign_cores == pytest.approx(1.0)


HANDWRITTEN_V2 = {
    "proc/7/cgroup": "0::/fleet.slice/edge.service\n",
    "proc/7/mountinfo": "30 23 0:26 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate\n",
    "proc/7/status": "Name:\tpython\nCpus_allowed_list:\t0-3,6\n",
    "proc/meminfo": "MemTotal: 4194304 kB\nMemFree: 1048576 kB\nMemAvailable: 3145728 kB\n"
    "Buffers: 0 kB\nCached: 0 kB\nShmem: 0 kB\nActive: 0 kB\nInactive: 0 kB\n",
    "proc/stat": "cpu  100 0 100 800 0 0 0 0 0 0\nbtime 1700000000\n",
    "sys/fs/cgroup/fleet.slice/cpu.max": "150000 100000\n",
    "sys/fs/cgroup/fleet.slice/cpu.stat": "usage_usec 9000000\nnr_periods 10\nnr_throttled 0\n",
    "sys/fs/cgroup/fleet.slice/memory.max": "1073741824\n",
    "sys/fs/cgroup/fleet.slice/memory.current": "805306368\n",
    "sys/fs/cgroup/fleet.slice/memory.stat": "anon 1\ninactive_file 268435456\n",
    "sys/fs/cgroup/fleet.slice/edge.service/cpu.max": "max 100000\n",
    "sys/fs/cgroup/fleet.slice/edge.service/cpu.stat": "usage_usec 1000000\n",
    "sys/fs/cgroup/fleet.slice/edge.service/memory.max": "max\n",
    "sys/fs/cgroup/fleet.slice/edge.service/memory.current": "1048576\n",
    "sys/fs/cgroup/fleet.slice/edge.service/memory.events": "low 0\nmax 9\noom 2\noom_kill 1\n",
}


def test_handwritten_v2_limits_of_an_ancestor_bind(tmp_path: Path) -> None:
    clock = Clock()
    reader = HostReader(root=write(tmp_path, HANDWRITTEN_V2), pid=7, clock=clock)
    reading = reader.read()
    assert reading.cores == 1.5
    assert reading.memory_limit == 1024 * MIB
    assert reading.memory_available == 512 * MIB
    assert reading.oom_kills == 1
    clock.now += 2.0
    write(tmp_path, {"sys/fs/cgroup/fleet.slice/cpu.stat": "usage_usec 11000000\nnr_periods 30\nnr_throttled 5\n"})
    reading = reader.read()
    # Whoever shares the quota competes with us, so the neighbours under the same slice are foreign.
    assert reading.foreign_cores == pytest.approx(1.0)
    assert reading.throttled == pytest.approx(0.25)


def test_handwritten_no_groups_is_the_whole_machine(tmp_path: Path) -> None:
    files = {name: text for name, text in HANDWRITTEN_V2.items() if "cgroup" not in name and "mountinfo" not in name}
    reading = HostReader(root=write(tmp_path, files), pid=7).read()
    assert reading.cores == 5.0
    assert reading.memory_limit == 4096 * MIB
    assert reading.memory_available == 3072 * MIB


def test_handwritten_container_sees_its_group_at_the_mount_point(tmp_path: Path) -> None:
    write(
        tmp_path,
        {
            "proc/7/cgroup": "4:memory:/docker/abc\n3:cpu,cpuacct:/docker/abc\n",
            "proc/7/mountinfo": (
                "1 0 0:1 /docker/abc /sys/fs/cgroup/memory ro - cgroup cgroup rw,memory\n"
                "2 0 0:2 /docker/abc /sys/fs/cgroup/cpu,cpuacct ro - cgroup cgroup rw,cpu,cpuacct\n"
            ),
            "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "200000\n",
            "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": "1000000\n",
            "sys/fs/cgroup/memory/memory.usage_in_bytes": "1200000\n",
        },
    )
    group = cgroup.find(tmp_path, "7")
    assert group.quota() == 2.0
    assert group.memory_left() == cgroup.Memory(1000000, 0)


@pytest.mark.parametrize(
    ("files", "degrees"),
    [
        ({}, None),
        ({"thermal/thermal_zone0/type": "acpitz\n", "thermal/thermal_zone0/temp": "27800\n"}, 27.8),
        (
            {
                "thermal/thermal_zone0/type": "gpu-thermal\n",
                "thermal/thermal_zone0/temp": "51000\n",
                "thermal/thermal_zone8/type": "tj-thermal\n",
                "thermal/thermal_zone8/temp": "49500\n",
            },
            49.5,
        ),
        ({"thermal/thermal_zone0/type": "tj-thermal\n", "thermal/thermal_zone0/temp": "-256000\n"}, None),
        (
            {
                "thermal/thermal_zone0/type": "acpitz\n",
                "thermal/thermal_zone0/temp": "20000\n",
                "hwmon/hwmon2/name": "k10temp\n",
                "hwmon/hwmon2/temp1_input": "61250\n",
                "hwmon/hwmon2/temp3_input": "58000\n",
            },
            61.25,
        ),
    ],
)
def test_handwritten_temperature(tmp_path: Path, files: dict[str, str], degrees: float | None) -> None:
    root = write(tmp_path, {**HANDWRITTEN_V2, **{f"sys/class/{name}": text for name, text in files.items()}})
    assert HostReader(root=root, pid=7).read().temperature_c == degrees


@pytest.mark.parametrize(
    ("supplies", "on_battery"),
    [
        ({}, None),
        ({"AC/type": "Mains", "AC/online": "1", "BAT0/type": "Battery", "BAT0/status": "Charging"}, False),
        ({"AC/type": "Mains", "AC/online": "0", "BAT0/type": "Battery", "BAT0/status": "Discharging"}, True),
        ({"BAT0/type": "Battery", "BAT0/status": "Full"}, False),
        ({"mouse/type": "Battery", "mouse/scope": "Device", "mouse/status": "Discharging"}, None),
    ],
)
def test_handwritten_battery(tmp_path: Path, supplies: dict[str, str], on_battery: bool | None) -> None:
    files = {f"sys/class/power_supply/{name}": text for name, text in supplies.items()}
    assert HostReader(root=write(tmp_path, {**HANDWRITTEN_V2, **files}), pid=7).read().on_battery is on_battery


def test_facts_of_a_recorded_machine(recorded: Path) -> None:
    found = facts.static_facts(HostReader(root=recorded, pid=9205), root=recorded)
    assert found.hardware.startswith("AMD EPYC")
    assert found.cores == 0.5
    assert found.memory_bytes == 512 * MIB
    assert found.gpus == []
    assert len(found.boot_id) == 36


def test_handwritten_facts_of_a_jetson(tmp_path: Path) -> None:
    write(
        tmp_path,
        {
            "proc/device-tree/model": "NVIDIA Jetson Orin Nano Developer Kit\0",
            "etc/nv_tegra_release": "# R36 (release), REVISION: 4.4, GCID: 1\nmore\n",
        },
    )
    assert facts.hardware(tmp_path).startswith(
        "NVIDIA Jetson Orin Nano Developer Kit, L4T R36 (release), REVISION: 4.4"
    )


def test_this_machine() -> None:
    reader = HostReader()
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        reading = reader.read()
        assert {os.getpid(), child.pid} <= reading.own_pids
        assert reading.own_pids == own._by_search(os.getpid()), "as a search through all processes finds them"
    finally:
        child.communicate(b"\n")
    assert 0 < reading.cores <= (psutil.cpu_count() or 1)
    assert 0 < reading.memory_available <= reading.memory_limit <= psutil.virtual_memory().total


def test_readings_a_moment_apart_keep_the_rates_and_none_exceeds_the_cores(recorded: Path) -> None:
    (recorded / "sys/fs/cgroup/cpu" / GROUP / "cpu.cfs_quota_us").write_text("-1\n")
    clock = Clock()
    reader = HostReader(root=recorded, pid=9205, clock=clock)
    reader.read()
    stat = recorded / "proc/stat"
    clock.now += 0.01
    stat.write_text(stat.read_text().replace("cpu0 1577 ", "cpu0 1578 ", 1))
    assert reader.read().foreign_cores == 0.0  # a tick of 10 ms within 10 ms is no whole core
    clock.now += 9.99
    stat.write_text(stat.read_text().replace("cpu0 1578 ", "cpu0 2577 ", 1))
    assert reader.read().foreign_cores == pytest.approx(1.0)
    clock.now += 0.1
    stat.write_text(stat.read_text().replace("cpu0 2577 ", "cpu0 2652 ", 1))
    assert reader.read().foreign_cores == pytest.approx(1.0)
    clock.now += 0.9
    stat.write_text(stat.read_text().replace("cpu0 2652 ", "cpu0 86951 ", 1))
    reading = reader.read()
    assert reading.foreign_cores == reading.cores == 2.0


def test_own_memory_is_that_of_the_daemon_and_its_descendants() -> None:
    command = [sys.executable, "-c", "held = b'1' * 64_000_000; print('held', flush=True); input()"]
    reader = HostReader()
    before = reader.read().own_memory
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert child.stdout is not None
        assert child.stdout.readline() == b"held\n"
        assert reader.read().own_memory - before >= 64_000_000
    finally:
        child.kill()
        child.wait()


def test_grandchildren_and_children_of_threads_are_ours() -> None:
    code = (
        "import subprocess, sys, threading\n"
        "def start():\n"
        "    started.append(subprocess.Popen([sys.executable, '-c', 'input()'], stdin=subprocess.PIPE))\n"
        "started = []; done = threading.Event()\n"
        "threading.Thread(target=lambda: (start(), done.wait())).start()\n"
        "while not started: pass\n"
        "print(started[0].pid, flush=True); input(); done.set(); started[0].communicate()\n"
    )
    child = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert child.stdout is not None
        grandchild = int(child.stdout.readline())
        assert {child.pid, grandchild} <= HostReader().read().own_pids
    finally:
        child.communicate(b"\n")


@pytest.mark.parametrize("name", ["python", "a b) (c", ") 1 2 3 4 5 6 7 8 9"])
def test_handwritten_processes_by_any_name(tmp_path: Path, name: str) -> None:
    write(
        tmp_path,
        {
            "proc/7/task/7/children": "8 9 ",
            "proc/8/task/8/children": "",
            "proc/9/task/9/children": "",
            "proc/9/task/12/children": "13 ",
            "proc/7/stat": f"7 ({name}) S 1 7 7 0 -1 4194304 1 0 0 0 100 20 30 4 20 0 1 0 1 1 1\n",
            "proc/7/statm": "1000 500 200 1 0 1 0\n",
            "proc/13/statm": "garbage\n",
        },
    )
    assert own.tree(tmp_path, 7) == {7, 8, 9, 13}
    found = own.used(tmp_path, own.tree(tmp_path, 7))
    assert found.cpu_s == pytest.approx(1.54 * 100 / os.sysconf("SC_CLK_TCK"))
    assert found.memory == 300 * os.sysconf("SC_PAGE_SIZE")
