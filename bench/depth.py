"""What depth saves: step time and bytes saved for backward with the top 1 .. 6 blocks of MiniLM tuned.

`python bench/depth.py [--base FOLDER] [--turns 7] [--steps 5]`. The agent's loop, one thread, fp32, rank 8 on every
linear layer of the tuned blocks, no global adapter yet. Times are CPU seconds of the process, so that other load on the
machine counts little; all depths take turns, a figure is the median over the turns. Bytes are those that autograd packs
in one step, each storage once, without the parameters.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from agent_step import BATCH, RANK, TOKENS, adapter, rows, run_agent, task

from coordinator.core.facts import ModelFacts, ModuleSpec
from coordinator.core.planning.demand import demand
from muster.testbed.models import minilm_folder
from shared.adapter import Adapter
from shared.jobs import BaseSpec, JobSpec
from shared.modeling import base_model
from shared.modeling.base_model import Base
from shared.modeling.data import TokenData, tokenize


def ranks_of(base: Base, depth: int) -> dict[str, int]:
    """`RANK` on every linear layer of the top `depth` blocks."""
    lowest = 1 + max(linear.block for linear in base.linears.values()) - depth
    return {linear.name: RANK for linear in base.linears.values() if linear.block >= lowest}


def saved_bytes(base: Base, data: TokenData, given: Adapter, ranks: dict[str, int]) -> int:
    """Bytes that autograd keeps for backward in one step."""
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    parameters: set[int] = {p.untyped_storage().data_ptr() for p in base.model.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run_agent(base, data, given, 1, ranks)
    return sum(kept.values())


def predicted(base: Base, depths: int) -> list[tuple[float, float]]:
    """(FLOP, activations) of each depth as the planners' cost model has them, as shares of full depth."""
    config = base.model.config
    covered, others = base_model.count_parameters(base)
    facts = ModelFacts(
        modules=[ModuleSpec(name=m.name, out=m.out, inp=m.inp, block=m.block) for m in base.linears.values()],
        base_digest="", linear_params=covered, other_params=others, blocks=depths, hidden=config.hidden_size,
        heads=config.num_attention_heads, intermediate=config.intermediate_size,
    )  # fmt: skip
    job = JobSpec(name="bench", base=BaseSpec(model=""), task=task())
    needs = [demand(facts, job, ranks_of(base, depth)) for depth in range(1, depths + 1)]
    return [(need.flop / needs[-1].flop, need.activations / needs[-1].activations) for need in needs]


def measure(folder: Path, source: Path, turns: int, steps: int) -> Iterator[dict[str, Any]]:
    """A figure of time and one of bytes for each depth."""
    base = base_model.load(folder, task(), 32)
    data = tokenize(str(source), task(), base.tokenizer)
    given = adapter(base, 0)
    depths = 1 + max(linear.block for linear in base.linears.values())
    every = range(1, depths + 1)
    seconds: dict[int, list[float]] = {depth: [] for depth in every}
    for turn in range(turns + 1):
        for depth in every if turn % 2 else reversed(every):
            loop, _ = run_agent(base, data, given, steps, ranks_of(base, depth))
            if turn:  # the first one warms up
                seconds[depth].append(loop.position.cpu_s / steps)
    step_s = {depth: statistics.median(found) for depth, found in seconds.items()}
    kept = {depth: saved_bytes(base, data, given, ranks_of(base, depth)) for depth in every}
    case = f"MiniLM, {BATCH} x {TOKENS} tokens, rank {RANK} on every linear layer of the tuned blocks, fp32, 1 thread"
    for depth, (flop, activations) in zip(every, predicted(base, depths), strict=True):
        yield {
            "name": f"depth.step_{depth}",
            "what": f"CPU time of an agent step with the top {depth} of {depths} blocks tuned, to all",
            "value": round(step_s[depth] / step_s[depths], 4), "unit": "x", "target": "",
            "note": f"{case}, {turns} turns of {steps}; {step_s[depth]:.3f} CPU s a step; by FLOP {flop:.3f}",
        }  # fmt: skip
        yield {
            "name": f"depth.saved_{depth}",
            "what": f"bytes saved for backward with the top {depth} of {depths} blocks tuned, to all",
            "value": round(kept[depth] / kept[depths], 4), "unit": "x", "target": "",
            "note": f"{case}; {kept[depth] / 2**20:.1f} MiB; by the cost model {activations:.3f}",
        }  # fmt: skip


def main() -> int:
    """Print the results, one JSON object a line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", type=Path)
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--steps", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as made:
        source = Path(made) / "rows.jsonl"
        rows(source)
        for found in measure(arguments.base or minilm_folder(), source, arguments.turns, arguments.steps):
            print(json.dumps(found), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
