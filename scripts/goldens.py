"""Golden bytes of the wire: one message of each type, and an adapter. `--write` renews `tests/goldens/*.hex`.

A golden that changes is a change of the wire: devices of the former version must still read it (`docs/wire-format.md`).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np

from shared import adapter, messages
from shared.codec import pack
from shared.jobs import BaseSpec, TaskSpec, TrainingSpec
from shared.tensors import Array

FOLDER = Path(__file__).parent.parent / "tests" / "goldens"
SHA = "ab" * 32
LAYER = "encoder.layer.0.attention.self.query"


def samples() -> dict[str, Any]:
    """Name of a message type -> a message that sets its fields, by name."""
    facts = messages.UpdateFacts(
        samples=160, steps=10, batch=16, batch_limit=0, bits=8, loss_first=2.5, loss_last=1.25, step_s=0.5, train_s=5.0,
        load_s=1.5, peak_bytes=300_000_000, base_bytes=250_000_000, cores_used=0.75, ended="time", norm=3.5,
        importance={LAYER: 1.0},
    )  # fmt: skip
    work = messages.Work(
        ranks={LAYER: 8},
        batch=16,
        bits=8,
        steps=10,
        train_for_s=60.0,
        score=True,
        reasons={"batch": "0.75 cores free"},
    )
    assignment = messages.Assignment(
        job="demo-1", round=2, attempt=1, work=work, base=BaseSpec(model="minilm", targets=["query"]),
        base_digest=SHA, task=TaskSpec(kind="classification", dataset="notes", labels=["a", "b"]),
        training=TrainingSpec(), rounds=3, seed=7, adapter=messages.BlobRef(sha=SHA, size=3_000_000),
    )  # fmt: skip
    every = (
        *_telemetry(),
        messages.Assign(term=1, assignment=assignment, reason="round 2"),
        messages.Ack(epoch=3, job="demo-1", round=2, attempt=1, verdict="reject", reason="22:00-06:00 only"),
        messages.Progress(
            epoch=3, job="demo-1", round=2, attempt=1, step=5, steps=10, samples=80, loss=1.5, samples_per_s=32.0
        ),
        messages.Manifest(
            sha=SHA, size=3_000_000, chunk=122_880, kind="update", job="demo-1", round=2, attempt=1, facts=facts
        ),
        messages.Want(sha=SHA, chunk=122_880, ranges=[(0, 2), (5, 20)]),
        messages.Done(sha=SHA, verdict="stored"),
        messages.Missing(sha=SHA, reason="not here"),
        messages.Command(kind="rebirth", reason="no birth seen"),
        messages.RoundInfo(job="demo-1", round=2, phase="training", base_digest=SHA, adapter=SHA),
        messages.CoordState(online=True, term=1, ts=1.5),
    )  # fmt: skip
    return {type(message).__name__: message for message in every}


def _telemetry() -> tuple[messages.Message, ...]:
    """What a device says of itself."""
    gpu = messages.GpuLoad(
        uuid="GPU-1", utilization=0.5, memory_free=2**33, memory_total=2**34, temperature_c=61.0, power_w=41.5,
        throttled=True, throttle=["heat"], xids=[94],
    )  # fmt: skip
    return (
        messages.DeviceState(s="ready", epoch=3, boot_id="b1", version="0.1.0", ts=1.5),
        messages.DeviceInfo(
            epoch=3, version="0.1.0", hardware="Jetson Orin NX", cores=4.0, memory_bytes=2**33, bits=[4, 8, 32],
            gpus=[messages.Gpu(uuid="integrated", name="Orin", compute="8.7", integrated=True)],
            datasets={"notes": messages.DatasetFacts(rows=100, labels={"0": 60, "1": 40})}, jetpack="7.2 (L4T 39.2.0)",
            faulty={"news": "news.jsonl: row 3 is not JSON"},
        ),
        messages.Load(
            epoch=3, seq=17, phase="training", job="demo-1", round=2, attempt=1, cores=4.0, gpus=[gpu],
            host=messages.HostLoad(disk_free=2**34, memory_stalled=0.25), hung={"host": 2.5},
        ),
    )  # fmt: skip


def adapter_sample() -> adapter.Adapter:
    """A global adapter of one module of rank 2, and a head."""
    factors = adapter.Factors(
        b=_grid(3, 2), a=_grid(2, 4), scaling=2.0, sigma=np.array([1.5, 0.5], dtype="<f4"), trained=0
    )
    return adapter.Adapter(
        kind="global", job="demo-1", round=2, base_digest=SHA, factors={LAYER: factors},
        dense={"classifier.weight": _grid(2, 3)}, notes={"aggregator": "fsr"},
    )  # fmt: skip


def goldens() -> dict[str, bytes]:
    """File name without suffix -> bytes."""
    packed = {f"message-{name}": pack(message) for name, message in samples().items()}
    files = {f"adapter-{codec}": adapter.write(adapter_sample(), codec) for codec in ("fp32", "bf16", "int8")}
    return {**packed, **files}


def hex_text(data: bytes) -> str:
    """`data` as a `.hex` file holds it: 32 bytes a line."""
    return "\n".join(data[at : at + 32].hex() for at in range(0, len(data), 32)) + "\n"


def _grid(rows: int, columns: int) -> Array:
    return np.arange(rows * columns, dtype="<f4").reshape(rows, columns) / 8


def main() -> int:
    """Write the files, or name those that differ (exit code 1)."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="renew the files")
    write = parser.parse_args().write
    wanted = {f"{name}.hex": hex_text(data) for name, data in goldens().items()}
    found = {path.name: path.read_text() for path in FOLDER.glob("*.hex")}
    if write:
        FOLDER.mkdir(parents=True, exist_ok=True)
        for name in found.keys() - wanted.keys():
            (FOLDER / name).unlink()
        for name, text in wanted.items():
            (FOLDER / name).write_text(text)
        return 0
    differing = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
    for name in differing:
        print(f"{name}: differs")
    return 1 if differing else 0


if __name__ == "__main__":
    sys.exit(main())
