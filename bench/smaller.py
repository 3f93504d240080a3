"""Latency of a model with half of its heads and FFN channels gone, against the whole one: MiniLM, fp32.

`python bench/smaller.py [--base FOLDER] [--repeats 60]`. Which units are gone does not matter for time, so they are
drawn at random. Whole and smaller model take turns, so that other load on the machine meets both; a figure is the
ratio of the medians. `muster export --ratio 0.5` measures the same for its model card, one model after the other.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from muster.testbed.models import minilm_folder
from shared import units
from shared.jobs import TaskSpec
from shared.modeling import base_model, pruning
from shared.modeling.base_model import Base

RATIO, WARM_UP = 0.5, 5
CASES = ((1, 32), (16, 32), (1, 128), (16, 128))
"""(batch, tokens)."""
LABELS = 14


def models(folder: Path) -> tuple[Base, Base]:
    """The whole model, and one with `RATIO` of its units gone."""
    task = TaskSpec(kind="classification", dataset="texts", labels=[str(n) for n in range(LABELS)], max_tokens=128)
    whole, smaller = base_model.load(folder, task), base_model.load(folder, task)
    known = pruning.groups_of(smaller)
    rng = np.random.default_rng(0)
    pruning.prune(smaller, units.best(known, {one.name: rng.uniform(0.1, 1.0, one.count) for one in known}, RATIO))
    return whole, smaller


def seconds(base: Base, batch: int, tokens: int) -> float:
    """Of one forward pass."""
    ids = torch.arange(batch * tokens).remainder(1000).view(batch, -1)
    mask = torch.ones_like(ids)
    started = time.perf_counter()
    base.model(input_ids=ids, attention_mask=mask)
    return time.perf_counter() - started


def measure(folder: Path, repeats: int) -> Iterator[dict[str, Any]]:
    """One result for each case, and the share of parameters left."""
    whole, smaller = models(folder)
    count = [sum(p.numel() for p in base.model.parameters()) for base in (whole, smaller)]
    covered = [sum(one.out * one.inp for one in base.linears.values()) for base in (whole, smaller)]
    yield {
        "name": "smaller.parameters",
        "what": f"parameters of MiniLM with {RATIO:.0%} of heads and channels gone, to all",
        "value": round(count[1] / count[0], 4), "unit": "x", "target": "",
        "note": f"{count[1]:,} of {count[0]:,}; in the blocks' matrices {covered[1] / covered[0]:.2f}",
    }  # fmt: skip
    with torch.inference_mode():
        for batch, tokens in CASES:
            took: tuple[list[float], list[float]] = ([], [])
            for turn in range(WARM_UP + repeats):
                for base, found in zip((whole, smaller), took, strict=True):
                    spent = seconds(base, batch, tokens)
                    if turn >= WARM_UP:
                        found.append(spent)
            before, after = map(statistics.median, took)
            yield {
                "name": f"smaller.latency_{batch}x{tokens}",
                "what": f"forward pass of the smaller MiniLM, batch {batch}, {tokens} tokens, to the whole one's",
                "value": round(after / before, 4), "unit": "x", "target": "<= 0.6",
                "note": f"{1e3 * after:.2f} ms and {1e3 * before:.2f} ms, {repeats} in turns, "
                f"{torch.get_num_threads()} threads, fp32",
            }  # fmt: skip


def main() -> int:
    """Print the results, one JSON object a line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", type=Path)
    parser.add_argument("--repeats", type=int, default=60)
    arguments = parser.parse_args()
    for found in measure(arguments.base or minilm_folder(), arguments.repeats):
        print(json.dumps(found), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
