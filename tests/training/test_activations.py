"""What is counted on one and two blocks is what a whole model saves for backward, at every precision of the base."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest

from muster.testbed.models import minilm_folder
from shared.jobs import Bits, TaskSpec
from shared.modeling import activations, base_model, lora
from shared.modeling.data import TokenData
from shared.modeling.objective import loss_sum
from tests.training.tiny_models import COLOURS, STORIES, empty_adapter

MINILM = TaskSpec(kind="classification", dataset="texts", labels=[str(label) for label in range(14)], max_tokens=48)
CASES = {"bert": COLOURS, "gpt2": STORIES, "llama": STORIES}
ROWS = 6


def saved(folder: Path, task: TaskSpec, bits: Bits, lowest: int, rank: int, *, gpu: bool = False) -> float:
    """Bytes per sample that a base tuned from block `lowest` on saves for backward; `gpu`: as on one."""
    base = base_model.load(folder, task, bits)
    start = empty_adapter(base)
    ranks = {linear.name: rank for linear in base.linears.values() if linear.block >= lowest}
    lora.carry(base, start, ranks, alpha_ratio=2.0, seed=0, round=1)
    tokens = task.max_tokens
    targets = np.full(ROWS, task.kind == "causal", dtype=np.int64)
    starts = np.concatenate([[0], np.cumsum([tokens] * (ROWS - 1) + [tokens - 1])])
    data = TokenData(
        kind=task.kind, ids=np.full(starts[-1], 5, dtype=np.int32), starts=starts, targets=targets, pad_id=0
    )
    own = [*base.model.parameters(), *base.model.buffers()]
    for parameter in base.model.parameters():
        state = getattr(parameter, "quant_state", None)
        if state is not None:
            own += [state.absmax, state.code]
    base.model.train()
    batch = data.batch(np.arange(ROWS))
    with activations.as_on_gpu() if gpu else nullcontext():
        return activations.saved_bytes(own, lambda: loss_sum(base.model, batch, task.kind)) / ROWS


def near(folder: Path, task: TaskSpec, bits: Bits, blocks: int, lowest: int, rank: int, *, gpu: bool = False) -> float:
    """Predicted over saved."""
    found = activations.count(folder, task, bits, gpu=gpu)
    return (found.fixed + (blocks - lowest) * found.block) / saved(folder, task, bits, lowest, rank, gpu=gpu)


@pytest.mark.parametrize("gpu", [False, True])
@pytest.mark.parametrize("bits", [32, 16, 8, 4])
@pytest.mark.parametrize("name", list(CASES))
def test_every_architecture_is_counted_within_a_tenth(
    request: pytest.FixtureRequest, name: str, bits: Bits, gpu: bool
) -> None:
    folder = request.getfixturevalue(name)
    for lowest in (0, 1):
        assert near(folder, CASES[name], bits, 2, lowest, 4, gpu=gpu) == pytest.approx(1.0, abs=0.1)


@pytest.mark.parametrize("gpu", [False, True])
@pytest.mark.parametrize(("bits", "lowest", "rank"), [(32, 0, 8), (32, 3, 32), (8, 0, 2), (4, 5, 8)])
def test_two_blocks_tell_of_six(bits: Bits, lowest: int, rank: int, gpu: bool) -> None:
    assert near(minilm_folder(), MINILM, bits, 6, lowest, rank, gpu=gpu) == pytest.approx(1.0, abs=0.1)


def test_a_gpu_keeps_no_scores_and_a_byte_of_each_dropout() -> None:
    """By hand, of a block of MiniLM in fp32: what a CPU keeps beyond it are three squares of scores for each head
    (before and after dropout, and its factors) less the sums and the mask that fused attention keeps, and three bytes
    more of each number of two dropouts."""
    cpu, gpu = (activations.count(minilm_folder(), MINILM, 32, gpu=gpu) for gpu in (False, True))
    tokens, heads, width = MINILM.max_tokens, 12, 384
    scores, sums, mask = 3 * 4 * heads * tokens**2, 4 * heads * tokens, 4 * tokens**2
    assert cpu.block - gpu.block == scores - sums - mask + 2 * 3 * width * tokens
