"""Seconds of a forward pass: a merged export against its base, and the same adapter unmerged under PEFT beside it.

`python bench/latency.py [--base FOLDER] [--turns 60]`. One thread, fp32. MiniLM as a classifier, and an untrained GPT-2
with the blocks of that in `examples/e2e.toml`: time does not depend on weights. The adapter is what a job with a global
rank of 16 on every linear layer exports. All three models run in each turn, in an order that changes, so that other
load on the machine meets them alike; a figure is the median over the turns of the ratio within a turn.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
import transformers
from agent_step import adapter
from peft import PeftModel

from coordinator import export
from muster.merged import merge
from muster.testbed.models import SmallGpt2, make_small_gpt2, minilm_folder
from shared.jobs import BaseSpec, JobSpec, TaskSpec
from shared.modeling import base_model

RANK, WARM_UP, LABELS = 16, 5, 14
CASES = ((1, 32, 8), (16, 128, 1))
"""(batch, tokens, how many times the turns): a short pass varies more."""
TARGET = "<= 1.05"
MINILM = TaskSpec(kind="classification", dataset="texts", labels=[str(n) for n in range(LABELS)], max_tokens=128)
GPT2 = TaskSpec(kind="causal", dataset="texts", max_tokens=128)


@dataclass(frozen=True)
class Models:
    """The same model thrice: as it was, with the adapter in its weights, with the adapter beside them."""

    base: Any
    merged: Any
    unmerged: Any


def models(folder: Path, task: TaskSpec, scratch: Path) -> Models:
    """Made the way `muster export` makes them. Raises `ValueError` where merged and base differ in a module."""
    made = adapter(base_model.load(folder, task), RANK)
    spec = JobSpec(name="bench", base=BaseSpec(model="bench"), task=task)
    export.export_peft(made, scratch / "adapter", spec=spec, base=str(folder))
    merged = merge(scratch / "adapter", scratch / "merged")
    base, beside = plain(folder, task), plain(folder, task)
    found = Models(base, plain(merged, task), PeftModel.from_pretrained(beside, str(scratch / "adapter")))
    if modules(found.merged) != modules(found.base):
        raise ValueError(f"{folder}: the merged export has other modules than its base")
    for one in (found.base, found.merged, found.unmerged):
        one.eval()
    return found


def plain(folder: Path, task: TaskSpec) -> Any:
    """As transformers loads it, fp32."""
    if task.kind == "causal":
        return transformers.AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32)
    kind = transformers.AutoModelForSequenceClassification
    return kind.from_pretrained(str(folder), dtype=torch.float32, num_labels=len(task.labels))


def modules(model: Any) -> list[tuple[str, type]]:
    """Name and type of each."""
    return [(name, type(module)) for name, module in model.named_modules()]


def seconds(model: Any, batch: int, tokens: int) -> float:
    """Of one forward pass."""
    ids = torch.arange(batch * tokens).remainder(200).view(batch, -1)
    mask = torch.ones_like(ids)
    started = time.perf_counter()
    model(input_ids=ids, attention_mask=mask)
    return time.perf_counter() - started


def in_turns(sides: Sequence[Any], batch: int, tokens: int, turns: int) -> list[list[float]]:
    """Seconds of each model in each turn after the warm-up; six turns of three models have every order once."""
    found: list[list[float]] = []
    with torch.inference_mode():
        for turn in range(WARM_UP + turns):
            order = [(turn + place) % len(sides) for place in range(len(sides))]
            took = {side: seconds(sides[side], batch, tokens) for side in (order if turn % 2 else order[::-1])}
            if turn >= WARM_UP:
                found.append([took[side] for side in range(len(sides))])
    return found


def elsewhere() -> float:
    """CPU seconds of all other processes since the machine's start."""
    all_s = psutil.cpu_times()
    return float(all_s.user + all_s.nice + all_s.system) - time.process_time()


def figures(name: str, words: str, three: Models, batch: int, tokens: int, turns: int) -> Iterator[dict[str, Any]]:
    """Merged and unmerged against the base, for one size of batch."""
    before, began = elsewhere(), time.monotonic()
    took = in_turns((three.base, three.merged, three.unmerged), batch, tokens, turns)
    load = (elsewhere() - before) / (time.monotonic() - began) / (os.cpu_count() or 1)
    ms = [1e3 * statistics.median(side) for side in zip(*took, strict=True)]
    kinds = (
        ("merged", "merged export", TARGET, f"the same {len(modules(three.base))} modules"),
        ("unmerged", "PEFT model, adapter unmerged,", "", f"LoRA of rank {RANK} on every linear layer"),
    )
    for side, (kind, what, target, more) in enumerate(kinds, start=1):
        ratios = [turn[side] / turn[0] for turn in took]
        low, _, high = statistics.quantiles(ratios, n=4)
        yield {
            "name": f"latency.{name}_{kind}_{batch}x{tokens}",
            "what": f"forward pass of a {what} to its base's, {words}, batch {batch}, {tokens} tokens",
            "value": round(statistics.median(ratios), 4), "unit": "x", "target": target,
            "note": f"{ms[side]:.2f} ms and {ms[0]:.2f} ms, {turns} in turns, median ratio (quartiles {low:.3f} "
            f"and {high:.3f}), {torch.get_num_threads()} thread, fp32; {more}; others used {load:.0%} of the processor",
        }  # fmt: skip


def measure(minilm: Path, turns: int, scratch: Path) -> Iterator[dict[str, Any]]:
    """Every size of batch for both models."""
    text = scratch / "text.txt"
    text.write_text("".join(f"{n} {n * n} {n * n * n}\n" for n in range(1000)), encoding="utf-8")
    gpt2 = make_small_gpt2(scratch / "gpt2", [text], SmallGpt2(steps=1))
    for name, words, folder, task in (("minilm", "MiniLM", minilm, MINILM), ("gpt2", "small GPT-2", gpt2, GPT2)):
        three = models(folder, task, scratch / f"{name}-made")
        for batch, tokens, times in CASES:
            yield from figures(name, words, three, batch, tokens, times * turns)


def main() -> int:
    """Print the results, one JSON object a line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", type=Path)
    parser.add_argument("--turns", type=int, default=60)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        for found in measure(arguments.base or minilm_folder(), arguments.turns, Path(scratch)):
            print(json.dumps(found), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
