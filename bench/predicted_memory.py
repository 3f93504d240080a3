"""Memory of the agent's training steps, as planners predict it, against what the CPU's allocator hands out for them.

`python bench/predicted_memory.py`. First as they are; then keeping of attention and dropout what a GPU keeps, against
what planners predict for a GPU. That is as near as one gets to `bench/on_cuda.py` without CUDA: only that tells which
kernels run there, and what CUDA's libraries take for themselves.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from agent_step import RANK, adapter, run_agent, task
from step_memory import Measure, Met, Steps, allocated_here, apart, predicted

from edge_daemon.training.loop import Loop
from muster.testbed.models import minilm_folder
from shared.jobs import BaseSpec, Bits, JobSpec, TaskSpec
from shared.modeling import base_model
from shared.modeling.activations import as_on_gpu
from shared.modeling.base_model import Base
from shared.modeling.data import TokenData

BITS: tuple[Bits, ...] = (16, 8, 4)
WHAT = (
    "training step at {bits} bits {where}: predicted memory off {allocator}, in all or what comes and goes, the worse"
)
APART = "<= 10"
"""Per cent."""


class Size(NamedTuple):
    """Of a batch: so large that what CUDA's libraries take for themselves counts little."""

    batch: int = 32
    tokens: int = 128


def off(
    bits: Bits, measure: Measure, size: Size | None = None, *, device: str = "cpu", gpu: bool = False
) -> dict[str, Any]:
    """How far the prediction, for a `gpu` or a CPU, is from what `measure` finds of the agent's own loop, per cent."""
    size = size or Size()
    job = JobSpec(name="bench", base=BaseSpec(model="minilm"), task=_full_length(size.tokens))
    base = base_model.load(minilm_folder(), job.task, bits, device)
    given, data = adapter(base, 0), _filled(size)

    def steps(count: int) -> Loop:
        return run_agent(base, data, given, count, batch=size.batch)[0]

    with tempfile.TemporaryDirectory() as scratch:
        expected = predicted(minilm_folder(), job, RANK, size.batch, bits, Path(scratch), gpu=gpu)
    value, told = apart(expected, measure(base, steps))
    note = f"{told}; MiniLM, {size.batch} x {size.tokens} tokens, rank {RANK} on every linear layer"
    return {"value": round(value, 2), "unit": "%", "met": value <= float(APART.split()[1]), "note": note}


def without_cuda(bits: Bits, size: Size | None = None, *, gpu: bool) -> dict[str, Any]:
    """`off` on the CPU; `gpu`: what is kept there, and predicted, is a GPU's."""
    return off(bits, _as_on_gpu if gpu else allocated_here, size, gpu=gpu)


def _as_on_gpu(base: Base, steps: Steps) -> Met:
    with as_on_gpu():
        return allocated_here(base, steps)


def _full_length(tokens: int) -> TaskSpec:
    return TaskSpec(kind="classification", dataset="bench", labels=task().labels, max_tokens=tokens)


def _filled(size: Size) -> TokenData:
    """Two batches without padding."""
    count = 2 * size.batch
    return TokenData(
        kind="classification", ids=np.full(count * size.tokens, 5, dtype=np.int32),
        starts=np.arange(count + 1, dtype=np.int64) * size.tokens, targets=np.zeros(count, dtype=np.int64), pad_id=0,
    )  # fmt: skip


def main() -> int:
    """Print the figures."""
    for gpu in (False, True):
        where = "that keeps what a GPU does, on the CPU" if gpu else "on the CPU"
        for bits in BITS:
            what = WHAT.format(bits=bits, where=where, allocator="its allocator")
            name = f"predicted_memory.{'as_gpu' if gpu else 'cpu'}_{bits}"
            print(json.dumps({"name": name, "what": what, "target": APART, **without_cuda(bits, gpu=gpu)}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
