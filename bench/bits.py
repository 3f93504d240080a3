"""Perplexity and memory of a causal model over a frozen base of fewer bits: `python bench/bits.py` (needs MUSTER_DATA).

The base is a small GPT-2 trained here for a fixed number of steps on tinyshakespeare and WikiText-2's validation text,
and kept in the cache of models. It is read on WikiText-2's test text and on every eighth test row of e2e, none of which
it has seen. Linear layers of the blocks are at the format, all else as the agent has it; below fp32 activations are
bf16. bf16, NF8 and NF4 are the agent's own layers. For the other formats the dequantized weights stand in layers of
bf16, and the bytes are those of packed codes and scales. Prints one JSON object a figure.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np
import torch
from formats import Rounded, fp4, int8, normal_float

from muster.testbed.inputs import kept_gpt2
from muster.testbed.models import SmallGpt2, read_text
from muster.testbed.rows import read_rows, write_rows
from shared.jobs import Bits, TaskSpec
from shared.modeling import base_model
from shared.modeling.base_model import Base
from shared.modeling.data import TokenData, tokenize
from shared.modeling.evaluation import evaluate

DATA = Path(os.environ.get("MUSTER_DATA") or Path(__file__).parents[2] / "shared" / "data")
TRAINED_ON, HELD_OUT = ("tinyshakespeare.txt.gz", "wikitext2_valid.txt.gz"), "wikitext2_test.txt.gz"
TOKENS, WINDOWS, E2E_EVERY = 128, 512, 8
CHUNKS = 16
"""Parts of a text whose losses give the standard error of a difference."""
TASK = TaskSpec(kind="causal", dataset="lm", max_tokens=TOKENS)
CAVEAT = (
    "The base is a small GPT-2 ({layers} blocks of width {width}, {millions:.2f} million linear weights), trained here "
    f"for {SmallGpt2.steps} steps, one seed. A base that knows so little has little to lose: the formats differ by "
    f"little, which is no measure of what a large pre-trained model loses. {WINDOWS} windows of {TOKENS} tokens of "
    f"WikiText-2's test text; ±: standard errors over {CHUNKS} chunks. Below fp32 activations are bf16. bf16, NF8 and "
    "NF4 are the agent's own layers; of the other formats the dequantized weights are read, and bytes are those of "
    "packed codes and scales."
)
"""What a reader must know of all figures alike."""


@dataclass(frozen=True)
class Format:
    """A format of the linear weights. `bits`: of the base it is loaded as; `rounded`: what then becomes of a weight."""

    name: str
    words: str
    bits: Bits
    rounded: Callable[[torch.Tensor], Rounded] | None = None


FORMATS = (
    Format("fp32", "fp32", 32),
    Format("bf16", "bf16", 16),
    Format("int8", "int8 (absmax, blocks of 64)", 16, int8),
    Format("nf8", "NF8", 8),
    Format("nf4", "NF4", 4),
    Format("fp4", "fp4", 16, fp4),
    Format("nf3", "3 bits (NormalFloat)", 16, partial(normal_float, bits=3)),
    Format("nf2", "2 bits (NormalFloat)", 16, partial(normal_float, bits=2)),
)


@dataclass(frozen=True)
class Read:
    """Mean loss per token on each chunk of a text."""

    losses: tuple[float, ...]

    @property
    def perplexity(self) -> float:
        """Over all chunks, which are equally long."""
        return math.exp(fmean(self.losses))

    def above(self, other: Read) -> tuple[float, float]:
        """(how much the loss is above another's on the same chunks, the standard error)."""
        rises = [mine - its for mine, its in zip(self.losses, other.losses, strict=True)]
        return fmean(rises), stdev(rises) / math.sqrt(len(rises))


def main() -> int:
    """0: measured; 1: MUSTER_DATA is not there, which is said."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    if not DATA.is_dir():
        print(f"not run: MUSTER_DATA ({DATA} is no folder)", file=sys.stderr)
        return 1
    folder = trained()
    exact = base_model.load(folder, TASK)
    weights = {name: exact.model.get_submodule(name).weight.detach().clone() for name in exact.linears}
    texts = {"lm": windows(exact.tokenizer), "e2e": e2e(exact.tokenizer)}
    plain: dict[str, Read] = {}
    for form in FORMATS:
        base, size = held(folder, form, weights)
        found = {name: Read(tuple(evaluate(base, part).loss for part in parts)) for name, parts in texts.items()}
        print(json.dumps(_figure(form, found, plain, size, base)), flush=True)
        plain = plain or found
    return 0


def trained() -> Path:
    """The folder of the model, made where it is not there yet."""
    texts = [DATA / "lm" / name for name in TRAINED_ON]
    return kept_gpt2("gpt2-held-out", texts, lambda line: print(line, file=sys.stderr))


def windows(tokenizer: Any) -> list[TokenData]:
    """Windows spread evenly over the held-out text, dealt out to chunks; every token but a window's first is asked."""
    ids = np.asarray(tokenizer(read_text(DATA / "lm" / HELD_OUT), verbose=False)["input_ids"], dtype=np.int32)
    starts = np.linspace(0, len(ids) - TOKENS, WINDOWS).astype(np.int64)
    found = np.stack([ids[start : start + TOKENS] for start in starts])
    return [
        TokenData(
            kind="causal", ids=part.ravel(), starts=np.arange(len(part) + 1, dtype=np.int64) * TOKENS,
            targets=np.ones(len(part), dtype=np.int64), pad_id=0,
        )
        for part in (found[chunk::CHUNKS] for chunk in range(CHUNKS))
    ]  # fmt: skip


def e2e(tokenizer: Any) -> list[TokenData]:
    """Every eighth test row, dealt out to chunks; the tokens of the completion are asked."""
    rows = read_rows(DATA / "e2e" / "test.jsonl.gz")[::E2E_EVERY]
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / f"{chunk}.jsonl.gz" for chunk in range(CHUNKS)]
        for chunk, path in enumerate(files):
            write_rows(path, rows[chunk::CHUNKS])
        return [tokenize(str(path), TASK, tokenizer) for path in files]


def held(folder: Path, form: Format, weights: dict[str, torch.Tensor]) -> tuple[Base, int]:
    """(the base at a format, bytes of its linear weights as held or packed)."""
    base = base_model.load(folder, TASK, form.bits)
    size = 0
    for name, weight in weights.items():
        layer = base.model.get_submodule(name)
        if form.rounded is None:
            size += _bytes(_weight_tensors(layer))
            continue
        rounded = form.rounded(weight)
        size += rounded.bytes
        with torch.no_grad():
            layer.weight.copy_(rounded.weight)
    return base, size


def _weight_tensors(layer: Any) -> Iterator[torch.Tensor]:
    """The tensors of a linear layer's weight, scales included."""
    yield from layer.buffers()
    weight = getattr(layer, "weight", None)
    if weight is not None:
        yield weight.data
        state = getattr(weight, "quant_state", None)
        if state is not None:
            yield from (state.absmax, state.state2.absmax, state.offset)


def _bytes(tensors: Iterator[torch.Tensor] | Sequence[torch.Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def _figure(form: Format, found: dict[str, Read], plain: dict[str, Read], size: int, base: Base) -> dict[str, Any]:
    """The result of one format; `plain`: what fp32 reads, but for itself."""
    count = sum(linear.out * linear.inp for linear in base.linears.values())
    others = _bytes(
        [p.data for name, p in base.model.named_parameters() if name.removesuffix(".weight") not in base.linears]
    )
    rises = {name: read.above(plain.get(name, read)) for name, read in found.items()}
    rise, error = rises["e2e"]
    told = f", loss {rise:+.5f} +- {error:.5f} against fp32" if plain else ""
    note = f"e2e test rows, untuned: perplexity {found['e2e'].perplexity:.2f}{told}; all else {others / 2**20:.2f} MiB"
    config = base.model.config
    return {
        "name": f"bits.{form.name}", "what": f"perplexity over a base at {form.words}, WikiText-2 test, small GPT-2",
        "value": round(found["lm"].perplexity, 4), "unit": "", "target": "", "note": note, "format": form.words,
        "loss_rise": round(rises["lm"][0], 8), "loss_rise_error": round(rises["lm"][1], 8),
        "e2e_perplexity": round(found["e2e"].perplexity, 4), "linear_bytes": size, "other_bytes": others,
        "bits_per_weight": round(8 * size / count, 4),
        "caveat": CAVEAT.format(layers=config.n_layer, width=config.n_embd, millions=count / 1e6),
    }  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
