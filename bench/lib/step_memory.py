"""Memory of training steps: what planners predict of it, and what the allocators of CUDA and of the CPU tell."""

from __future__ import annotations

import gc
import io
import json
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile

from coordinator.core.planning.demand import BYTES_TRAINED, demand
from coordinator.workers.model_worker import ModelWorker
from coordinator.workers.protocol import Prepare, Prepared
from edge_daemon.training.loop import Loop
from shared.frames import FrameWriter
from shared.jobs import Bits, JobSpec
from shared.modeling.base_model import Base

_MIB = 2**20
BYTES_GRADIENT = 4
"""Of `BYTES_TRAINED`, what is there in backward alone."""


class Predicted(NamedTuple):
    """Bytes: of the frozen base, of all that is trained with its gradients and moments, of the batch."""

    weights: float
    trained: float
    activations: float


class Met(NamedTuple):
    """Bytes between two steps, and at the worst moment of one."""

    rest: int
    peak: int


Steps = Callable[[int], Loop]
"""Makes so many training steps over a base; as long as the loop lives, so do the optimizer's moments."""
Measure = Callable[[Base, Steps], Met]


def predicted(folder: Path, job: JobSpec, rank: int, batch: int, bits: Bits, scratch: Path, *, gpu: bool) -> Predicted:
    """As a planner has it that knows what the coordinator's worker tells of the model, `rank` on every linear layer."""
    order = Prepare(job=job, base_path=str(folder), adapter_path=str(scratch / "first-adapter"))
    answer = ModelWorker(FrameWriter(io.BytesIO())).answer(order)
    if not isinstance(answer, Prepared):
        raise ValueError(f"{folder}: {answer}")
    need = demand(answer.facts, job, {module.name: rank for module in answer.facts.modules})
    activations = need.micro(batch) * need.activation_bytes(bits, gpu=gpu)
    return Predicted(need.weight_bytes(bits), BYTES_TRAINED * need.adapter_params, activations)


def allocated(base: Base, steps: Steps) -> Met:  # noqa: ARG001 - `allocated_here` needs the base
    """What CUDA's allocator tells of a few steps; the first one makes the moments, and is not the worst."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    loop = steps(5)
    torch.cuda.synchronize()
    met = Met(rest=torch.cuda.memory_allocated(), peak=torch.cuda.max_memory_allocated())
    del loop  # not before, since the moments go with it
    return met


def allocated_here(base: Base, steps: Steps) -> Met:
    """The same of a CPU's allocator, by its profiler, which tells each block that is handed out or given back."""
    whole = held(tensors_of(base.model))
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        torch.empty(1)  # the first event: what was handed out before is there, too
        loop = steps(2)  # the second has moments
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiled.export_chrome_trace(str(path))
        events = [one for one in json.loads(path.read_bytes())["traceEvents"] if one["name"] == "[memory]"]
    # Not the sum of their "Bytes", which are of mapped files, too.
    handed_out = [one["args"]["Total Allocated"] for one in sorted(events, key=lambda one: one["ts"])]
    del loop  # as above
    whole -= handed_out[0]
    return Met(rest=whole + handed_out[-1], peak=whole + max(handed_out))


def apart(expected: Predicted, met: Met) -> tuple[float, str]:
    """(by how many per cent prediction and measurement differ, the worse of two comparisons; both in words).

    One compares all memory, the other what comes and goes within a step: activations and gradients.
    """
    moving = expected.activations + expected.trained * BYTES_GRADIENT / BYTES_TRAINED
    pairs = {"in all": (sum(expected), met.peak), "activations and gradients": (moving, met.peak - met.rest)}
    off = {name: 100 * (mine / found - 1) for name, (mine, found) in pairs.items()}
    told = ", ".join(
        f"{name} {mine / _MIB:.1f} MiB predicted, {found / _MIB:.1f} met ({off[name]:+.1f} %)"
        for name, (mine, found) in pairs.items()
    )
    weights, trained = expected.weights / _MIB, expected.trained / _MIB
    return max(map(abs, off.values())), f"{told}; of it weights {weights:.1f}, adapter and optimizer {trained:.1f}"


def tensors_of(model: Any) -> Iterator[torch.Tensor | None]:
    """Every tensor a model holds, those inside quantized parameters included."""
    for module in model.modules():
        yield from module._buffers.values()
        for parameter in module._parameters.values():
            if parameter is None:
                continue
            yield parameter.data
            state = getattr(parameter, "quant_state", None)
            if state is not None:
                yield from (state.absmax, state.state2.absmax)


def held(tensors: Iterable[torch.Tensor | None]) -> int:
    """Bytes of the storages, each once."""
    found = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for tensor in tensors
        if tensor is not None
    }
    return sum(found.values())
