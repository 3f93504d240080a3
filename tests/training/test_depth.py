"""Depth: below the deepest tuned block there is no graph, nothing is saved for backward, and nothing is trained."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from edge_daemon.training.loop import Loop
from shared.jobs import Bits, TaskSpec, TrainingSpec
from shared.modeling import base_model, lora
from shared.modeling.base_model import Base
from shared.modeling.data import tokenize
from tests.training.tiny_models import COLOURS, STORIES, Pipes, assignment, global_adapter, make_bert

_BLOCK = re.compile(r"^(.*?\.(\d+))\.")


class Graph:
    """What autograd kept of the blocks: bytes saved in each, whether its input and its output carry a graph."""

    def __init__(self) -> None:
        self.saved: dict[int, int] = {}
        self.inputs: dict[int, bool] = {}
        self.outputs: dict[int, bool] = {}
        self.current = -1

    def enter(self, block: int, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        self.current = block
        hidden = args[0] if args else kwargs["hidden_states"]
        self.inputs[block] = hidden.requires_grad or hidden.grad_fn is not None

    def leave(self, block: int, output: Any) -> None:
        self.current = -1
        hidden = output[0] if isinstance(output, tuple) else output
        self.outputs[block] = hidden.requires_grad or hidden.grad_fn is not None

    def pack(self, tensor: torch.Tensor) -> torch.Tensor:
        self.saved[self.current] = self.saved.get(self.current, 0) + tensor.numel() * tensor.element_size()
        return tensor


@contextmanager
def watched(base: Base) -> Iterator[Graph]:
    """Watches the blocks of `base` while it trains."""
    graph = Graph()
    names = {int(found[2]): found[1] for name in base.linears if (found := _BLOCK.match(name))}
    hooks = []
    for block, name in names.items():
        module = base.model.get_submodule(name)
        hooks.append(
            module.register_forward_pre_hook(
                lambda _, args, kwargs, block=block: graph.enter(block, args, kwargs), with_kwargs=True
            )
        )
        hooks.append(module.register_forward_hook(lambda _, args, output, block=block: graph.leave(block, output)))
    try:
        with torch.autograd.graph.saved_tensors_hooks(graph.pack, lambda tensor: tensor):
            yield graph
    finally:
        for hook in hooks:
            hook.remove()


@pytest.fixture(scope="module")
def deep_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bert(tmp_path_factory.mktemp("deep"), layers=4)


CASES: list[tuple[str, TaskSpec, str, Bits, int]] = [
    *(("deep_bert", COLOURS, "colours", 32, depth) for depth in (1, 2, 3, 4)),
    *(("deep_bert", COLOURS, "colours", bits, 2) for bits in (16, 8, 4)),  # type: ignore[misc]  # they are bits
    *((name, STORIES, "stories", 32, depth) for name in ("gpt2", "llama") for depth in (1, 2)),
    ("llama", STORIES, "stories", 4, 1),
]


@pytest.mark.parametrize(("model", "task", "rows", "bits", "depth"), CASES)
def test_back_propagation_stops_below_the_deepest_tuned_block(
    model: str, task: TaskSpec, rows: str, bits: Bits, depth: int, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    base = base_model.load(request.getfixturevalue(model), task, bits)
    blocks = 1 + max(linear.block for linear in base.linears.values())
    lowest = blocks - depth
    ranks = {linear.name: 2 for linear in base.linears.values() if linear.block >= lowest}
    work = assignment(
        base, ranks=ranks, task=task, bits=bits, steps=2, training=TrainingSpec(lr=1e-2, checkpoint_every=100)
    )
    # The global adapter is larger than what is trained, so that frozen directions ride along in every block.
    carried = lora.carry(base, global_adapter(base, 3), ranks, alpha_ratio=2.0, seed=7, round=1)
    before = {name: tensor.detach().clone() for name, tensor in carried.named().items()}
    data = tokenize(str(request.getfixturevalue(rows)), task, base.tokenizer)
    loop = Loop(base, carried, data, work, Pipes().control, tmp_path)
    with watched(base) as graph:
        assert loop.run() == "complete"
    assert sorted(graph.inputs) == list(range(blocks))
    for block in range(blocks):
        assert graph.outputs[block] == (block >= lowest), block
        assert graph.inputs[block] == (block > lowest), block
        assert (graph.saved.get(block, 0) > 0) == (block >= lowest), block
    assert {name.rpartition(".")[0] for name in before} >= set(ranks)
    changed = {name for name, tensor in carried.named().items() if not torch.equal(tensor, before[name])}
    assert {name.rpartition(".")[0] for name in changed} >= set(ranks)
    assert all(p.grad is None for name, p in base.model.named_parameters() if not p.requires_grad)
