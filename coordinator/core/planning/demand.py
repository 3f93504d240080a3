"""What a piece of work costs, whichever device does it: FLOP, parameters, activations, bytes on the link.

    FLOP per sample = tokens * [2*P_f + 2*P_b + 6*sum_m r_m*(o_m + n_m)]

P_f: parameters a forward pass multiplies with; P_b: those above the lowest tuned block, through which the gradient goes
(frozen weights need no weight gradient). A linear layer that is tuned itself costs 2 more per parameter and token for
the gradient of its weight, is no part of the frozen base, and reads the same activations as one with an adapter, but
for the adapter's own (a few per cent). Our own derivation; the activations are an estimate that measurement corrects.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import msgspec

from coordinator.core.facts import ActivationFacts, ModelFacts, ModuleSpec
from coordinator.core.planning.reasons import mebibytes
from shared.errors import UserError
from shared.jobs import BaseSpec, Bits, Codec, JobSpec, TaskKind

BYTES_LINEAR: Mapping[int, float] = {32: 4.0, 16: 2.0, 8: 1 + 4 / 64, 4: 0.5 + 1 / 64 + 4 / (64 * 256)}
"""Bytes per weight of a linear layer; below 16 bits with a scale per block of 64: fp32, at 4 bits itself quantized to 8
bits with an fp32 scale per 256 of them."""
BYTES_CODEC: Mapping[str, int] = {"fp32": 4, "bf16": 2, "int8": 1}
BYTES_TRAINED = 16
"""Per trained parameter: weight, gradient and two moments of AdamW, all fp32."""
BYTES_LOADED = 4
"""Of these, what already lies in memory before the first step."""


class Demand(msgspec.Struct, frozen=True, kw_only=True):
    """Costs of a work; `flop` and activations (bytes) are per sample."""

    flop: float
    activations: float
    """Over an fp32 base, on a CPU."""
    activations_half: float
    """Over a base of fewer bits, which computes in bf16."""
    on_gpu: tuple[float, float]
    """The same two on a GPU."""
    adapter_params: int
    """Trained: the factors of all modules and the dense tensors. With these the base itself is, where it is tuned."""
    frozen_params: int
    """The rest of the global adapter, riding along frozen; an upper bound."""
    linear_params: int
    other_params: int
    largest: int
    """Parameters of the largest single linear layer: what quantizing holds beside the model."""
    accumulation: int
    kind: TaskKind

    def micro(self, batch: int) -> int:
        """Samples whose activations are in memory at once."""
        return -(-batch // self.accumulation)

    def activation_bytes(self, bits: Bits, *, gpu: bool = False) -> float:
        """Activations per sample at the precision that a base of `bits` computes in, on a CPU or a GPU."""
        full, half = self.on_gpu if gpu else (self.activations, self.activations_half)
        return full if bits == 32 else half

    def weight_bytes(self, bits: Bits) -> float:
        """The frozen base in memory: linear layers at `bits`, the rest in fp32 or, below 32 bits, bf16."""
        return self.linear_params * BYTES_LINEAR[bits] + self.other_params * (4 if bits == 32 else 2)

    def fixed_bytes(self, bits: Bits) -> float:
        """All that does not grow with the batch, without the agent itself."""
        return self.weight_bytes(bits) + BYTES_TRAINED * self.adapter_params + 4 * self.frozen_params


def tuned_modules(facts: ModelFacts, base: BaseSpec) -> list[ModuleSpec]:
    """The modules that the job tunes, by name. Raises `UserError` where there are none."""
    wanted = base.targets
    found = [
        module
        for module in facts.modules
        if not wanted or any(module.name == last or module.name.endswith(f".{last}") for last in wanted)
    ]
    if not found:
        names = sorted({module.name.rpartition(".")[2] for module in facts.modules})
        raise UserError(f"base.targets {wanted}: no such linear layer; there are {', '.join(names) or 'none'}")
    return sorted(found, key=lambda module: module.name)


def demand(facts: ModelFacts, job: JobSpec, ranks: Mapping[str, int], global_rank: int = 0) -> Demand:
    """The costs of tuning with `ranks` (module -> rank; 0 or absent: not tuned).

    `global_rank`: an upper bound of the global adapter's rank per module.
    """
    tuned = [(module, rank) for module in facts.modules if (rank := ranks.get(module.name, 0)) > 0]
    factors = sum(rank * (module.out + module.inp) for module, rank in tuned)
    tokens = tokens_of(job)
    # A causal model multiplies with its token matrix once more for the logits.
    logits = facts.other_params if job.task.kind == "causal" else 0
    whole = tunes_base(facts)
    depth = 1.0 if whole else depth_share(facts, [module for module, _ in tuned])
    forward = facts.linear_params + logits
    backward = facts.linear_params * depth + logits
    weights = facts.linear_params + logits if whole else 0
    activations, activations_half = _activations(facts, facts.activations, job, tokens, depth)
    return Demand(
        flop=float(tokens * (2 * forward + 2 * backward + 2 * weights + 6 * factors)),
        activations=activations,
        activations_half=activations_half,
        on_gpu=_activations(facts, facts.activations_gpu or facts.activations, job, tokens, depth),
        adapter_params=factors + dense_params(facts),
        frozen_params=global_params(facts.modules, global_rank),
        linear_params=0 if whole else facts.linear_params,
        other_params=0 if whole else facts.other_params,
        largest=facts.largest or max((module.out * module.inp for module in facts.modules), default=0),
        accumulation=job.training.accumulation,
        kind=job.task.kind,
    )


def block_flop(facts: ModelFacts, job: JobSpec) -> float:
    """FLOP per sample to back-propagate through one block that holds no adapter."""
    return 2.0 * tokens_of(job) * facts.linear_params / max(1, facts.blocks)


def tokens_of(job: JobSpec) -> int:
    """Tokens of a sample, at most; a row of least squares counts as one."""
    return 1 if job.task.kind == "least_squares" else job.task.max_tokens


def dense_params(facts: ModelFacts) -> int:
    """Parameters that are tuned densely."""
    return sum(math.prod(shape) for shape in facts.dense.values())


def tunes_base(facts: ModelFacts) -> bool:
    """Whether every parameter is tuned itself, so that nothing of the base is frozen."""
    return bool(facts.modules) and all(f"{module.name}.weight" in facts.dense for module in facts.modules)


def global_params(modules: Iterable[ModuleSpec], rank: int) -> int:
    """Parameters of a global adapter of at most `rank` per module: factors, or the whole matrix where that is less."""
    return sum(
        min(kept * (module.out + module.inp + 1), module.out * module.inp)
        for module in modules
        if (kept := min(rank, module.out, module.inp)) > 0
    )


def traffic(
    facts: ModelFacts, ranks: Mapping[str, int], global_rank: int, codec: Codec, stacked: int = 1,
    *, sends_a: bool = True, global_codec: Codec = "fp32",
) -> tuple[int, int, str]:  # fmt: skip
    """(download, upload, explanation) of one device and round, in bytes.

    Down: the global adapter of at most `global_rank`, once, at `global_codec`. Up: the trained factors, of `stacked`
    agents side by side, and the dense tensors at `codec`. `sends_a`: False where B alone is sent.
    """
    dense, dense_rows = dense_params(facts), sum(shape[0] for shape in facts.dense.values())
    rows = int(sends_a)
    tuned = [(module, rank * stacked) for module in facts.modules if (rank := ranks.get(module.name, 0)) > 0]
    down = _encoded(
        global_params([module for module, _ in tuned], global_rank) + dense,
        sum(min(global_rank, module.out, module.inp) + module.out for module, _ in tuned) + dense_rows,
        global_codec,
    )
    up = _encoded(
        sum(rank * (module.out + rows * module.inp) for module, rank in tuned) + dense,
        sum(rows * rank + module.out for module, rank in tuned) + dense_rows,
        codec,
    )
    why = (
        f"download {mebibytes(down)} (global rank {global_rank}), upload {mebibytes(up)} "
        f"({len(tuned)} modules and {dense} dense parameters at {BYTES_CODEC[codec]} B)"
    )
    return down, up, why


def _encoded(numbers: int, rows: int, codec: Codec) -> int:
    """Bytes of so many numbers in so many rows."""
    return BYTES_CODEC[codec] * numbers + (4 * rows if codec == "int8" else 0)


def depth_share(facts: ModelFacts, tuned: Iterable[ModuleSpec]) -> float:
    """Share of the blocks that the gradient passes: from the lowest tuned one to the output."""
    # A module outside the blocks may lie before them.
    lowest = min((max(module.block, 0) for module in tuned), default=None)
    if facts.blocks <= 0 or lowest is None:
        return 0.0 if lowest is None else 1.0
    return 1.0 - lowest / facts.blocks


def _activations(
    facts: ModelFacts, counted: Mapping[str, ActivationFacts], job: JobSpec, tokens: int, depth: float
) -> tuple[float, float]:
    """Bytes per sample that backward needs, (in fp32, in bf16): as counted, or else by `_estimate`."""
    both = [counted.get(bits) for bits in ("32", "16")]
    if both[0] is None or both[1] is None:
        whole = _estimate(facts, job, tokens, depth)
        # bf16 halves all but the softmax and the loss.
        return whole, 0.6 * whole
    full, half = (found.fixed + facts.blocks * depth * found.block for found in both if found is not None)
    return full, half


def _estimate(facts: ModelFacts, job: JobSpec, tokens: int, depth: float) -> float:
    """Bytes per sample in fp32, where nothing was counted.

    Per token and block: 8 widths around attention and norms, 2 in the feed-forward part, and 2 rows of attention scores
    per head. A causal model adds logits, their softmax and their gradient.
    """
    intermediate = facts.intermediate or 4 * facts.hidden
    if job.task.kind == "least_squares":
        return 4.0 * (facts.hidden + facts.linear_params / max(1, facts.hidden)) * 2
    per_block = 8 * facts.hidden + 2 * intermediate + 2 * facts.heads * tokens
    vocabulary = facts.other_params / max(1, facts.hidden) if job.task.kind == "causal" else 0.0
    return 4.0 * tokens * (facts.blocks * per_block * depth + 3 * vocabulary)
