"""The optimizer over carried tensors and its learning rate, the same wherever they are trained."""

from __future__ import annotations

import math
from typing import Any

import torch

from shared.jobs import TrainingSpec
from shared.modeling.faults import OutOfMemory, is_out_of_memory
from shared.modeling.lora import Carried


def learning_rate(training: TrainingSpec, step: int, steps: int) -> float:
    """Rate of step `step` (from 0) of the job's `steps`: linear warm-up, then the schedule down to zero."""
    if step < training.warmup_steps:
        return training.lr * (step + 1) / training.warmup_steps
    if training.schedule == "constant":
        return training.lr
    done = min(1.0, (step - training.warmup_steps) / max(1, steps - training.warmup_steps))
    if training.schedule == "linear":
        return training.lr * (1.0 - done)
    return training.lr * 0.5 * (1.0 + math.cos(math.pi * done))


def rate_of(training: TrainingSpec, round: int, rounds: int, steps: int, done: int) -> float:
    """Rate of the step after `done` of a round's `steps`, in round `round` (from 1) of the job's `rounds`."""
    return learning_rate(training, (round - 1) * steps + done, rounds * steps)


def optimizer_of(carried: Carried, training: TrainingSpec) -> torch.optim.Optimizer:
    """AdamW over what is trained. Decay of the factors would decay the directions that they took over from the global
    adapter.

    On a CPU in one pass over each tensor: what torch takes there by itself makes a copy of it for each operation, which
    for a dense model takes as long as the gradients.
    """
    bs, inputs = carried.trained_factors()
    groups: list[dict[str, Any]] = [
        {"params": bs, "weight_decay": 0.0, "slower": 1.0},
        {"params": inputs, "weight_decay": 0.0, "slower": training.lora_plus},
        {"params": list(carried.dense.values()), "weight_decay": training.weight_decay, "slower": 1.0},
    ]
    given = [group for group in groups if group["params"]]
    one_pass = True if all(one.device.type == "cpu" for group in given for one in group["params"]) else None
    return torch.optim.AdamW(given, lr=training.lr, fused=one_pass)


def begin_moments(optimizer: torch.optim.Optimizer) -> None:
    """See to it that all that has a gradient has moments. Can be done again where it raises for lack of memory.

    AdamW would begin a state first and allocate then: if memory runs out in between, it can take no step any more.
    """
    for group in optimizer.param_groups:
        for tensor in group["params"]:
            if tensor.grad is not None and not optimizer.state[tensor]:
                optimizer.state[tensor] = {
                    "step": torch.tensor(0.0, dtype=torch.float32),
                    "exp_avg": torch.zeros_like(tensor, memory_format=torch.preserve_format),
                    "exp_avg_sq": torch.zeros_like(tensor, memory_format=torch.preserve_format),
                }


def advance(optimizer: torch.optim.Optimizer, carried: Carried, training: TrainingSpec, rate: float) -> None:
    """One step at `rate` on the gradients that are there, clipped as the job says; they are gone afterwards.

    Raises `OutOfMemory` where some of the tensors have moved already; after any other error they are as they were.
    """
    begin_moments(optimizer)
    for tensor in carried.parameters():
        # One pass over two layouts would take each value's gradient from another place, and say nothing.
        if tensor.grad is not None and tensor.grad.stride() != tensor.stride():
            tensor.grad = torch.empty_like(tensor).copy_(tensor.grad)
    if training.max_grad_norm:
        torch.nn.utils.clip_grad_norm_(carried.parameters(), training.max_grad_norm)
    for group in optimizer.param_groups:
        group["lr"] = rate / group["slower"]
    try:
        optimizer.step()
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemory("a step of the optimizer does not fit the memory") from error
    optimizer.zero_grad(set_to_none=True)


def state_of(optimizer: torch.optim.Optimizer, carried: Carried) -> dict[str, torch.Tensor]:
    """Values and moments of all that is trained, by name, for a checkpoint."""
    named = carried.named()
    tensors: dict[str, torch.Tensor] = {f"value/{name}": tensor for name, tensor in named.items()}
    for name, tensor in named.items():
        for moment, value in optimizer.state[tensor].items():
            tensors[f"{moment}/{name}"] = torch.as_tensor(value)
    return tensors


def restore(optimizer: torch.optim.Optimizer, carried: Carried, tensors: dict[str, torch.Tensor]) -> bool:
    """Give all that is trained the values and moments of `state_of`; False, and nothing done, where one is missing."""
    named = carried.named()
    if any(f"value/{name}" not in tensors for name in named):
        return False
    with torch.no_grad():
        for name, tensor in named.items():
            tensor.copy_(tensors[f"value/{name}"])
            state = {
                moment: tensors[f"{moment}/{name}"].clone().to("cpu" if moment == "step" else tensor.device)
                for moment in ("step", "exp_avg", "exp_avg_sq")
                if f"{moment}/{name}" in tensors
            }
            optimizer.state[tensor] = state
            if not state:
                del optimizer.state[tensor]
    return True
