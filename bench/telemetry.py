"""What a reading of the load costs the device's processor, and what it costs on the wire."""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import psutil

from edge_daemon.adapters.telemetry import jetson
from edge_daemon.adapters.telemetry.host import HostReader
from edge_daemon.adapters.telemetry.nvidia import NvidiaReader
from edge_daemon.adapters.telemetry.sampler import Sampler
from shared.codec import pack
from shared.messages import GpuLoad, HostLoad, Load

ROOT = Path(__file__).resolve().parent.parent
TREE = ROOT / "tests" / "unit" / "telemetry" / "trees" / "jetson-thor-jp7" / "tree.txt"
WARM_UP = 5


def main() -> None:
    """Measure; one JSON object a figure."""
    parser = argparse.ArgumentParser(description="cost of a reading of the load")
    parser.add_argument("--readings", type=int, default=100)
    readings = parser.parse_args().readings
    on_the_wire()
    children = [subprocess.Popen(["sleep", "3600"]) for _ in range(4)]
    try:
        machine = f"{len(psutil.pids())} processes on the machine, 4 of them its own children"
        told("host", "CPU time of a reading of the host", cpu_ms(HostReader().read, readings), machine)
        nvidia = NvidiaReader()
        gpus = f"{len(nvidia.facts())} NVIDIA GPUs here"
        told("nvidia", "CPU time of a reading of NVIDIA's GPUs", cpu_ms(nvidia.read, readings), gpus)
        with tempfile.TemporaryDirectory() as folder:
            board = jetson.find(unfold(Path(folder)))
            assert board is not None
            own = jetson.JetsonReader(board, root=Path(folder), query=lambda: "")
            note = "a hand-written tree of Thor on this machine's disk: sensors on a bus take longer"
            told("jetson", "CPU time of a reading of a Jetson's GPU", cpu_ms(own.read, readings), note)
        sampler = Sampler(print, gpus=nvidia)  # `read` hands nothing on
        told("sample", "CPU time of a whole sample, threads included", cpu_ms(sampler.read, readings), machine)
        sampler.stop()
    finally:
        for child in children:
            child.kill()
            child.wait()


def cpu_ms(read: Callable[[], object], readings: int) -> float:
    """Median milliseconds of this process's CPU time for one reading."""
    spent = []
    for _ in range(WARM_UP + readings):
        before = time.process_time()
        read()
        spent.append(1000 * (time.process_time() - before))
    return median(spent[WARM_UP:])


def on_the_wire() -> None:
    """Bytes of a load message of a device at work."""
    host = HostLoad(
        disk_free=2**38, received_per_s=1.5e5, sent_per_s=2e5, cpu_stalled=0.1, memory_stalled=0.0, disk_stalled=0.0
    )
    card = GpuLoad(
        uuid="GPU-1b9f5c2e-5f0e-4c35-9c5b-0f2d7f3f8a11", utilization=0.5, memory_free=2**33, memory_total=2**34,
        temperature_c=61.0, power_w=41.5, energy_j=1.5e9, clock_mhz=1710, memory_clock_mhz=6251, throttled=True,
        throttle=["power cap"], foreign_memory=0, foreign_utilization=0.0,
    )  # fmt: skip
    own = GpuLoad(
        uuid="integrated", utilization=0.5, temperature_c=61.0, power_w=13.5, clock_mhz=1020, throttled=False,
        power_mode="MAXN_SUPER",
    )  # fmt: skip
    for name, gpus in {"cpu": [], "card": [card], "8_cards": [card] * 8, "jetson": [own]}.items():
        load = Load(
            epoch=3, seq=17, phase="training", job="demo-1", round=2, attempt=1, cores=4.0, own_cores=1.2,
            memory_available=2**33, memory_limit=2**34, own_memory=2**30, temperature_c=50.0, on_battery=False,
            host=host, gpus=gpus,
        )  # fmt: skip
        told(f"bytes_{name}", "a load message of a device at work", len(pack(load)), "", unit="bytes")


def unfold(root: Path) -> Path:
    """The hand-written tree under `root`."""
    for row in TREE.read_text(encoding="utf-8").splitlines():
        path, _, content = row.partition(" = ")
        file = root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content.replace("\\n", "\n").replace("\\0", "\0"), encoding="utf-8")
    return root


def told(name: str, what: str, value: float, note: str, unit: str = "ms") -> None:
    """Print a figure."""
    print(json.dumps({"name": f"telemetry.{name}", "what": what, "value": round(value, 3), "unit": unit, "note": note}))


if __name__ == "__main__":
    main()
