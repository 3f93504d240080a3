"""Memory of training steps by tensors: what planners predict of it, what CUDA's allocator tells, and what is counted.

Counted is where no allocator tells: the storages of the model's tensors and of AdamW's moments, and what autograd saves
for backward in one step.
"""

from __future__ import annotations

import gc
import io
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from coordinator.core.planning.demand import BYTES_TRAINED, demand
from coordinator.workers.model_worker import ModelWorker
from coordinator.workers.protocol import Prepare, Prepared
from edge_daemon.training.loop import Loop
from shared.frames import FrameWriter
from shared.jobs import Bits, JobSpec
from shared.modeling.activations import saved_bytes
from shared.modeling.base_model import Base

_MIB = 2**20


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


def predicted(folder: Path, job: JobSpec, rank: int, batch: int, bits: Bits, scratch: Path) -> Predicted:
    """As a planner has it that knows what the coordinator's worker tells of the model, `rank` on every linear layer."""
    order = Prepare(job=job, base_path=str(folder), adapter_path=str(scratch / "first-adapter"))
    answer = ModelWorker(FrameWriter(io.BytesIO())).answer(order)
    if not isinstance(answer, Prepared):
        raise ValueError(f"{folder}: {answer}")
    need = demand(answer.facts, job, {module.name: rank for module in answer.facts.modules})
    activations = need.micro(batch) * need.activation_bytes(bits)
    return Predicted(need.weight_bytes(bits), BYTES_TRAINED * need.adapter_params, activations)


def allocated(base: Base, steps: Steps) -> Met:  # noqa: ARG001 - `counted` needs the base
    """What CUDA's allocator tells of a few steps; the first one makes the moments, and is not the worst."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    loop = steps(5)
    torch.cuda.synchronize()
    met = Met(rest=torch.cuda.memory_allocated(), peak=torch.cuda.max_memory_allocated())
    del loop  # not before, since the moments go with it
    return met


def counted(base: Base, steps: Steps) -> Met:
    """What the tensors of one step take, wherever they are."""
    made: list[Loop] = []
    saved = saved_bytes(
        [tensor for tensor in tensors_of(base.model) if tensor is not None], lambda: made.append(steps(1))
    )
    moments = 2 * sum(tensor.nbytes for tensor in made[0].carried.parameters())
    rest = held(tensors_of(base.model)) + moments
    return Met(rest=rest, peak=rest + saved)


def apart(expected: Predicted, met: Met) -> tuple[float, str]:
    """(by how many per cent prediction and measurement differ, the worse of two comparisons; both in words).

    One compares all memory, the other what comes and goes within a step, which are the activations.
    """
    pairs = {"in all": (sum(expected), met.peak), "activations": (expected.activations, met.peak - met.rest)}
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
