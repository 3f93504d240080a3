"""Control groups of emulated devices, on the real hierarchy where it is writable and on a hand-written one."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from edge_daemon.adapters.telemetry import cgroup
from muster.testbed import cgroups

MIB = 1024 * 1024
HERE = cgroups.available()
writable = pytest.mark.skipif(not (HERE.cpu and HERE.memory), reason=f"control groups: {HERE.reason}")


@writable
def test_a_process_is_limited_before_it_runs() -> None:
    code = "import sys; from edge_daemon.adapters.telemetry.host import HostReader as H; h = H(); r = h.read(); " \
        "sys.stdout.write(f'{r.cores} {r.memory_limit}')"  # fmt: skip
    with cgroups.Groups() as groups:
        group = groups.create("edge-01", cores=0.5, memory_bytes=300 * MIB)
        answer = subprocess.run(group.command([sys.executable, "-c", code]), capture_output=True, check=True)
        assert answer.stdout.split() == [b"0.5", str(300 * MIB).encode()]
        group.set_cores(0.25)
        answer = subprocess.run(group.command([sys.executable, "-c", code]), capture_output=True, check=True)
        assert answer.stdout.split()[0] == b"0.25"


@writable
def test_a_real_limit_kills_and_is_counted() -> None:
    with cgroups.Groups() as groups:
        group = groups.create("edge-01", cores=2.0, memory_bytes=64 * MIB)
        answer = subprocess.run(group.command([sys.executable, "-c", f"bytearray({200 * MIB})"]), check=False)
        assert answer.returncode == -9
        levels = tuple(folder for folder in group.folders if (folder / "memory.stat").exists())
        version = 2 if (levels[0] / "memory.max").exists() else 1
        assert cgroup.Cgroup(version, memory=levels).oom_kills() == 1


@writable
def test_leaving_kills_what_is_left_and_removes_the_groups() -> None:
    with cgroups.Groups() as groups:
        group = groups.create("edge-01", cores=0.5)
        child = subprocess.Popen(group.command(["sleep", "60"]))
        while child.pid not in group.pids():
            assert child.poll() is None
            time.sleep(0.01)
    assert child.wait(timeout=10) == -9
    assert not any(folder.exists() for folder in group.folders)


@writable
def test_the_next_run_cleans_up_after_a_killed_one() -> None:
    code = (
        "import subprocess, sys, os; from muster.testbed import cgroups; g = cgroups.Groups();"
        "d = g.create('edge-01', cores=0.5);"
        # Not through `command`: this process must outlive its parent to be a leftover.
        "p = subprocess.Popen(['sleep', '60'], stdout=subprocess.DEVNULL);"
        "(d.folders[0] / 'cgroup.procs').write_text(str(p.pid));"
        "sys.stdout.write(f'{os.getpid()} {p.pid}'); sys.stdout.flush(); os._exit(9)"
    )
    answer = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, check=False)
    run, left = answer.stdout.decode().split()
    assert f"{cgroups.PREFIX}{run}" in cgroups.clean_leftovers()
    status = Path(f"/proc/{left}/stat")
    assert not status.exists() or status.read_text().rpartition(")")[2].split()[0] == "Z"
    assert cgroups.clean_leftovers() == []


def test_a_command_dies_with_its_parent() -> None:
    code = (
        "import subprocess, sys, os; from muster.testbed.cgroups import DeviceGroup;"
        "p = subprocess.Popen(DeviceGroup('edge-01').command(['cat']), stdin=subprocess.PIPE, stdout=subprocess.PIPE);"
        # An answer means that it has become `cat`.
        "p.stdin.write(b'x\\n'); p.stdin.flush(); p.stdout.readline();"
        "sys.stdout.write(str(p.pid)); sys.stdout.flush(); keep = os.dup(p.stdin.fileno()); os._exit(9)"
    )
    answer = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, check=False)
    pid = int(answer.stdout)
    for _ in range(1000):
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                break
        except OSError:
            break
        time.sleep(0.01)
    else:
        raise AssertionError("still alive")


def handwritten_v2(root: Path) -> Path:
    """A hierarchy of version 2 as plain files: what is written can be read, nothing is enforced."""
    process = root / "proc" / "self"
    process.mkdir(parents=True)
    (process / "cgroup").write_text("0::/user.slice\n")
    (process / "mountinfo").write_text("30 23 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n")
    top = root / "sys/fs/cgroup"
    (top / "user.slice").mkdir(parents=True)
    (top / "cgroup.subtree_control").write_text("cpuset cpu pids")
    return top


def test_handwritten_v2_asks_for_the_controllers_it_needs(tmp_path: Path) -> None:
    top = handwritten_v2(tmp_path)
    run = top / f"{cgroups.PREFIX}{os.getpid()}"
    run.mkdir()
    (run / "cgroup.subtree_control").write_text("cpu memory")
    device = run / "edge-01"
    device.mkdir()
    for name in ("cpu.max", "memory.max", "memory.swap.max"):
        (device / name).write_text("max")
    groups = cgroups.Groups(root=tmp_path)
    assert groups.available == cgroups.Available(cpu=True, memory=True)
    groups.create("edge-01", cores=1.5, memory_bytes=500 * MIB)
    assert (top / "cgroup.subtree_control").read_text() == "+memory"
    assert (device / "cpu.max").read_text() == "75000 50000"
    assert (device / "memory.max").read_text() == str(500 * MIB)
    assert (device / "memory.swap.max").read_text() == "0"


def test_where_nothing_is_mounted_niceness_stands_in(tmp_path: Path) -> None:
    with cgroups.Groups(root=tmp_path) as groups:
        found = groups.available
        assert not found.cpu
        assert not found.memory
        assert "no control groups" in found.reason
        command = groups.create("edge-01", cores=0.5, memory_bytes=MIB, nice=7).command(["true"])
        assert command[command.index("--nice") + 1] == "7"
        assert "--group" not in command
