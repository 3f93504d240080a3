"""How fast a device multiplies matrices: what tells devices apart before they have trained."""

from __future__ import annotations

import time

import torch

from shared.modeling.data import Beat, silent

CPU_SIZE, GPU_SIZE = 384, 2048
ENOUGH_S, LONGEST_S = 0.1, 2.0
"""Seconds of a CPU core or of a GPU that are measured, and on the wall at most."""


def measured(device: str, half: bool, beat: Beat = silent) -> float:
    """FLOP per second of products of square matrices, of one CPU core (fp32) or of the GPU (bf16 if `half`); 0: they
    fail.

    A core's seconds are those that it worked: neither a quota nor other programs count.
    """
    try:
        return _measured(device, half, beat)
    except (RuntimeError, AssertionError):  # whatever is wrong shows in the precisions that were proven
        return 0.0


def _measured(device: str, half: bool, beat: Beat) -> float:
    beat("measuring speed")
    gpu = device != "cpu"
    size = GPU_SIZE if gpu else CPU_SIZE
    matrix = torch.full((size, size), 1 / size, device=device, dtype=torch.bfloat16 if gpu and half else torch.float32)
    used = _wall_s if gpu else time.process_time
    _product(matrix, gpu)
    count, begun, until = 0, used(), time.monotonic() + LONGEST_S
    while (took := used() - begun) < ENOUGH_S and (not count or time.monotonic() < until):
        _product(matrix, gpu)
        count += 1
    return 2.0 * size**3 * count / took if took > 0 else 0.0


def _product(matrix: torch.Tensor, gpu: bool) -> None:
    torch.mm(matrix, matrix)
    if gpu:
        torch.cuda.synchronize(matrix.device)


def _wall_s() -> float:
    return time.monotonic()
