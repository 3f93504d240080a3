"""What only a CUDA device can tell: the doctor's steps on it, a round at 4 bits, and the memory of training steps
against what planners predict. `not run` where there is none.

`python bench/on_cuda.py [--device cpu]`: with `--device cpu` the same code runs without CUDA, as a rehearsal whose
figures are marked so.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from agent_step import BATCH, RANK, TOKENS, adapter, rows, run_agent, task
from predicted_memory import APART, BITS, WHAT, off, without_cuda
from step_memory import allocated

from muster.testbed.models import minilm_folder
from shared.jobs import Bits
from shared.modeling import base_model
from shared.modeling.data import tokenize

STEPS = 20
DOCTOR = "`muster-edge doctor --cuda`: steps that pass, from the driver to a 4-bit product"
ROUND = f"a round of {STEPS} steps at 4 bits (NF4) on CUDA, seconds per step"
ALLOCATOR = "`torch.cuda.max_memory_allocated`"


def doctor(device: str) -> dict[str, Any]:
    """How many of the steps pass, and what the first that does not says."""
    command = [sys.executable, "-m", "edge_daemon.training.cuda_steps", "--device", device]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=600)
    steps = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    good = [one for one in steps if one.get("good")]
    told = "; ".join(str(one.get("text", "")) for one in steps)
    return {"value": len(good), "unit": f"of {len(steps)}", "met": len(good) == len(steps), "note": told}


def four_bits(device: str) -> dict[str, Any]:
    """Seconds per step of the agent's own loop."""
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "rows.jsonl"
        rows(path)
        base = base_model.load(Path(minilm_folder()), task(), 4, device)
        data = tokenize(str(path), task(), base.tokenizer)
        given = adapter(base, 0)
        run_agent(base, data, given, 3)
        _, seconds = run_agent(base, data, given, STEPS)
    note = f"MiniLM, {BATCH} x {TOKENS} tokens, rank {RANK} on every linear layer"
    return {"value": seconds / STEPS, "unit": "s", "met": None, "note": note}


def memory(device: str, bits: Bits) -> dict[str, Any]:
    """What planners predict for a GPU, against its allocator; without one against a CPU that keeps what a GPU does."""
    return off(bits, allocated, device=device, gpu=True) if device == "cuda" else without_cuda(bits, gpu=True)


def figures() -> list[tuple[str, str, str, Callable[[str], dict[str, Any]]]]:
    """(name, words, target, what measures it on a device) of each."""
    memories = [
        (
            f"cuda.memory_{bits}",
            WHAT.format(bits=bits, where="on CUDA", allocator=ALLOCATOR),
            APART,
            partial(memory, bits=bits),
        )
        for bits in BITS
    ]
    return [("cuda.doctor", DOCTOR, "", doctor), ("cuda.round_4_bits", ROUND, "", four_bits), *memories]


def main() -> int:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    device = parser.parse_args().device
    not_run = {"value": "not run", "unit": "", "met": None, "note": "no CUDA device on this machine"}
    there = device == "cpu" or torch.cuda.is_available()
    for name, what, target, measure in figures():
        found = measure(device) if there else dict(not_run)
        if device == "cpu":
            found["note"] = f"a rehearsal on the CPU; {found['note']}"
        print(json.dumps({"name": name, "what": what, "target": target, **found}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
