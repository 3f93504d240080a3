"""Speed and memory of folding a round: `python bench/fold.py [--devices 16 1000] [--aggregators fsr fedit]`.

Updates are real files of 24 modules of 384 x 384 at rank 16, folded in the middle of a job: into a global adapter and
a residual of rank 64. Where there are more devices than `--distinct`, files are linked under several device ids. Each
case runs in its own process, on one BLAS thread, with the files in the page cache; median of `--repeat`. Prints one
JSON object a figure.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

os.environ["OPENBLAS_NUM_THREADS"] = "1"  # before numpy is imported

import numpy as np

from coordinator.core.aggregation import registry
from coordinator.core.aggregation.base import Aggregator, Expectation, narrow
from coordinator.core.facts import ModuleSpec
from coordinator.fold import Reported, fold_round
from shared import adapter as adapters
from shared.adapter import Adapter, Factors
from shared.jobs import StrategySpec
from shared.tensors import Array

MODULES = [ModuleSpec(name=f"block.{i // 6}.linear{i % 6}", out=384, inp=384, block=i // 6) for i in range(24)]
RANK = 16
GLOBAL_RANK = 64
ALPHA_RATIO = 2.0


def make_update(device: str, seed: int, rank: int = RANK) -> Adapter:
    """An update of random factors."""
    rng = np.random.default_rng(seed)
    factors = {
        m.name: Factors(
            b=rng.standard_normal((m.out, rank), dtype=np.float32) * np.float32(0.01),
            a=rng.standard_normal((rank, m.inp), dtype=np.float32),
            scaling=ALPHA_RATIO,
            trained=min(rank, GLOBAL_RANK),
        )
        for m in MODULES
    }
    head = {"head.weight": rng.standard_normal((14, 384), dtype=np.float32)}
    return Adapter(
        kind="update", job="bench", round=1, base_digest="d", factors=factors, dense=head, attempt=1, device=device
    )


def triplets_adapter(seed: int, dense: dict[str, Array]) -> Adapter:
    """A global adapter, or a residual, of full `GLOBAL_RANK`."""
    rng = np.random.default_rng(seed)
    factors = {}
    for m in MODULES:
        u, sigma, vt = np.linalg.svd(rng.standard_normal((m.out, m.inp)))
        factors[m.name] = Factors(
            b=narrow(u[:, :GLOBAL_RANK]), a=narrow(vt[:GLOBAL_RANK]), sigma=narrow(sigma[:GLOBAL_RANK] * 0.01)
        )
    return Adapter(kind="global", job="bench", round=0, base_digest="d", factors=factors, dense=dense)


def write_updates(folder: Path, devices: int, distinct: int) -> list[Reported]:
    """Update files of `devices` devices, at most `distinct` of them with contents of their own."""
    updates = []
    for index in range(devices):
        path = folder / f"device-{index:05d}"
        if index < distinct:
            path.write_bytes(adapters.write(make_update(path.name, index)))
        else:
            path.hardlink_to(folder / f"device-{index % distinct:05d}")
        updates.append(Reported(path.name, 100 + index % 7, path))
    return updates


def peak_rss() -> int:
    """Largest resident memory of this process so far, in bytes; mapped pages of the update files are among it."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(name: str, devices: int, folder: Path, repeat: int) -> dict[str, Any]:
    """Fold `devices` updates with the aggregator `name`."""
    aggregator = registry.create(StrategySpec(aggregator=name, rank=RANK, global_rank=GLOBAL_RANK))
    updates = [Reported(path.name, 100, path) for path in sorted(folder.iterdir())][:devices]
    size = sum(update.path.stat().st_size for update in updates)
    for update in updates:
        update.path.read_bytes()
    previous = triplets_adapter(1, {"head.weight": np.zeros((14, 384), np.float32)})
    residual = triplets_adapter(2, {})
    before = peak_rss()
    seconds = []
    for _ in range(repeat):
        started = time.perf_counter()
        fold_round(aggregator, MODULES, previous, residual, updates, round=1)
        seconds.append(time.perf_counter() - started)
    return {
        "aggregator": name,
        "devices": devices,
        "update_mb": round(size / devices / 1e6, 2),
        "seconds": round(median(seconds), 3),
        "mb_per_s": round(size / median(seconds) / 1e6, 1),
        "rss_before_mb": round(before / 1e6, 1),
        "rss_peak_mb": round(peak_rss() / 1e6, 1),
        "admit_ms": round(admission_seconds(aggregator, updates[0].path, previous) * 1e3, 2),
    }


def admission_seconds(aggregator: Aggregator, path: Path, previous: Adapter) -> float:
    """Seconds to read and admit one update, best of ten."""
    expected = Expectation(
        job="bench",
        round=1,
        attempt=1,
        device=path.name,
        base_digest="d",
        ranks={m.name: RANK for m in MODULES},
        modules={m.name: m for m in MODULES},
        alpha_ratio=ALPHA_RATIO,
        before=previous,
    )
    seconds = []
    for _ in range(10):
        started = time.perf_counter()
        reason = aggregator.admit(adapters.read_file(path), expected)
        seconds.append(time.perf_counter() - started)
        if reason is not None:
            raise SystemExit(f"the benchmark's own update was refused: {reason}")
    return min(seconds)


def main() -> None:
    """Run every case in a process of its own, so that peaks of memory do not mix."""
    parser = argparse.ArgumentParser(description="speed and memory of the fold")
    parser.add_argument("--devices", type=int, nargs="+", default=[16, 1000])
    parser.add_argument("--aggregators", nargs="+", default=["fsr", "fedit"], choices=["fsr", "fedit"])
    parser.add_argument("--distinct", type=int, default=32)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.folder is not None:
        print(json.dumps(measure(options.aggregators[0], options.devices[0], options.folder, options.repeat)))
        return
    cases = []
    with tempfile.TemporaryDirectory(dir="/var/tmp") as folder:
        write_updates(Path(folder), max(options.devices), options.distinct)
        for name in options.aggregators:
            for devices in options.devices:
                command = [sys.executable, __file__, "--folder", folder, "--aggregators", name]
                command += ["--devices", str(devices), "--repeat", str(options.repeat)]
                done = subprocess.run(command, capture_output=True, text=True, check=True)
                cases.append(json.loads(done.stdout))
    for case in cases:
        for figure in figures(case):
            print(json.dumps(figure))


def figures(case: dict[str, Any]) -> list[dict[str, Any]]:
    """The figures of one case, as `bench/README.md` wants them."""
    name, devices = case["aggregator"], case["devices"]
    key = f"fold.{name}_{devices}"
    shape = f"`{name}` fold at close, 24 modules of 384x384, {devices} devices at rank 16"
    note = f"one BLAS thread, mid-job, files in the page cache, median; peak RSS {case['rss_peak_mb']} MB"
    if name == "fsr" and devices <= 16:
        return [_figure(key, shape, case["seconds"], "s", "<= 1.5", note)]
    target = ">= 200" if name == "fsr" else ">= 1000"
    return [_figure(key, shape, case["mb_per_s"], "MB/s", target, note)]


def _figure(name: str, what: str, value: float, unit: str, target: str, note: str) -> dict[str, Any]:
    return {"name": name, "what": what, "value": value, "unit": unit, "target": target, "note": note}


if __name__ == "__main__":
    main()
