"""What planners predict of an agent's memory against what its tensors take: exact parts to 1 %, activations to 10 %."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch

from bench.lib.step_memory import held, tensors_of
from coordinator.core.planning.demand import BYTES_TRAINED, Demand, demand
from coordinator.workers.model_worker import ModelWorker
from coordinator.workers.protocol import Prepare, Prepared
from muster.testbed.models import minilm_folder
from shared.frames import FrameWriter
from shared.jobs import BaseSpec, Bits, JobSpec, TaskSpec
from shared.modeling import base_model, lora
from shared.modeling.activations import saved_bytes
from shared.modeling.base_model import Base
from shared.modeling.data import TokenData
from shared.modeling.objective import loss_sum
from tests.training.tiny_models import empty_adapter

RANK, BATCH = 8, 8
TASK = TaskSpec(kind="classification", dataset="texts", labels=[str(label) for label in range(14)], max_tokens=48)
JOB = JobSpec(name="try", base=BaseSpec(model="minilm"), task=TASK)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    """The facts that the coordinator's worker tells planners of MiniLM."""
    path = tmp_path_factory.mktemp("worker") / "adapter"
    order = Prepare(job=JOB, base_path=str(minilm_folder()), adapter_path=str(path))
    answer = ModelWorker(FrameWriter(io.BytesIO())).answer(order)
    assert isinstance(answer, Prepared), answer
    return answer


def need_of(prepared: Prepared, lowest: int) -> Demand:
    ranks = {module.name: RANK for module in prepared.facts.modules if module.block >= lowest}
    return demand(prepared.facts, JOB, ranks)


def saved(base: Base) -> int:
    """Bytes that autograd keeps for a batch beside the model's own tensors."""
    tokens = TASK.max_tokens
    ids, starts = np.full(BATCH * tokens, 5, dtype=np.int32), np.arange(BATCH + 1) * tokens
    data = TokenData(kind=TASK.kind, ids=ids, starts=starts, targets=np.zeros(BATCH, dtype=np.int64), pad_id=0)
    own = [tensor for tensor in tensors_of(base.model) if tensor is not None]
    base.model.train()
    return saved_bytes(own, lambda: loss_sum(base.model, data.batch(np.arange(BATCH)), TASK.kind))


@pytest.mark.parametrize("bits", [32, 16, 8, 4])
def test_the_parts_of_the_prediction_are_what_the_tensors_take(prepared: Prepared, bits: Bits) -> None:
    base = base_model.load(minilm_folder(), TASK, bits)
    need = need_of(prepared, 0)
    assert need.weight_bytes(bits) == pytest.approx(held(tensors_of(base.model)), rel=0.01)
    for lowest in (0, 4):
        need = need_of(prepared, lowest)
        ranks = {name: RANK for name, linear in base.linears.items() if linear.block >= lowest}
        carried = lora.carry(base, empty_adapter(base), ranks, alpha_ratio=2.0, seed=0, round=1)
        optimizer = torch.optim.AdamW(carried.parameters())
        for tensor in carried.parameters():
            tensor.grad = torch.zeros_like(tensor)
        optimizer.step()
        moments = [value for state in optimizer.state.values() for value in state.values() if value.dim()]
        trained = 2 * sum(tensor.nbytes for tensor in carried.parameters()) + sum(value.nbytes for value in moments)
        assert BYTES_TRAINED * need.adapter_params == pytest.approx(trained, rel=0.01)
        optimizer.zero_grad(set_to_none=True)
        assert BATCH * need.activation_bytes(bits) == pytest.approx(saved(base), rel=0.1)
