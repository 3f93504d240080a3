"""A finished job that pruned, as an ordinary smaller model: its adapter in the weights, heads and channels cut out.

The folder holds what transformers' `from_pretrained` takes. Every block has as many heads and channels as the others,
so that the config can say it; where an architecture's config knows no such number of heads (BERT, RoBERTa, GPT-2; of
LLaMA's kind one that does not divide the width), a file of model code lies beside it, which `trust_remote_code=True`
loads. Size, latency and quality are measured against the whole model and stand in its card, README.md.
"""

from __future__ import annotations

import json
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from muster import merged
from shared import pruning_file, units
from shared.errors import DecodeError, UserError
from shared.jobs import TaskSpec
from shared.pruning_file import PRUNING_FILE, PruningFile

CODE = "modeling_smaller.py"
BATCHES, REPEATS, WARM_UP = (1, 16), 30, 3


@dataclass(frozen=True)
class Measured:
    """Of one model: parameters, milliseconds of a forward pass by batch, and on rows given, its quality."""

    parameters: int
    latency_ms: dict[int, float]
    """The fastest of `REPEATS`: other work on the machine only ever adds to it."""
    loss: float | None = None
    accuracy: float | None = None


def make(
    adapter: Path, folder: Path, *, base: str = "", ratio: float | None = None, device_class: str = "", data: str = ""
) -> Path:
    """Write the model of the exported PEFT folder `adapter`, with `ratio` of its units gone, as `folder`.

    `ratio`: None: as far as devices of `device_class`, or else the job, pruned. `data`: file of rows to measure on.
    Raises `UserError` with a one-line reason.
    """
    merged.check_new(folder)
    told = _read(adapter)
    wanted = _ratio(told, ratio, device_class)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".muster-smaller-") as temporary:
        whole = merged.merge(adapter, Path(temporary) / "whole", base)
        made = Path(temporary) / "model"
        _write(whole, made, told, wanted, data)
        made.replace(folder)
    return folder


def _read(adapter: Path) -> PruningFile:
    try:
        told = pruning_file.read(adapter)
    except DecodeError as error:
        raise UserError(str(error)) from error
    if told is None:
        raise UserError("the job pruned nothing (strategy.name): leave out --ratio and --device-class")
    return told


def _ratio(told: PruningFile, ratio: float | None, device_class: str) -> float | None:
    """None: the job's own."""
    if device_class and ratio is not None:
        raise UserError("--ratio and --device-class exclude each other")
    if device_class and device_class not in told.classes:
        raise UserError(f"no device class {device_class!r} took part; there are {', '.join(sorted(told.classes))}")
    return told.classes[device_class] if device_class else ratio


def _write(whole: Path, made: Path, told: PruningFile, ratio: float | None, data: str) -> None:
    from shared.modeling import base_model, pruning

    kept, task = told.units_left(ratio), told.task
    base = base_model.load(whole, task)
    before = _measured(base, task, data)
    pruning.prune(base, kept)
    after = _measured(base, task, data)
    _save(base, told, kept, made)
    base.tokenizer.save_pretrained(str(made))
    sizes = {name: base.whole_size(name) for name in base.linears}
    gone = units.share(pruning.groups_of(base), kept, sizes)
    (made / "README.md").write_text(_card(told, before, after, gone, data), encoding="utf-8")
    card = {"whole": msgspec.to_builtins(before), "smaller": msgspec.to_builtins(after), "weights_gone": gone}
    (made / "measured.json").write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")


def _save(base: Any, told: PruningFile, kept: units.Kept, made: Path) -> None:
    """`config.json`, weights, and the model code where the config can't say it all."""
    from shared.modeling.stored_form import as_stored

    model = base.model
    config = model.config
    heads, channels = (
        {len(kept.get(g.name, range(g.count))) for g in told.groups if g.kind == kind} for kind in ("heads", "channels")
    )
    if len(heads) > 1 or len(channels) > 1:
        raise UserError(f"{PRUNING_FILE}: its blocks are of unequal sizes, which no config can say")
    if channels:
        setattr(config, "n_inner" if config.model_type == "gpt2" else "intermediate_size", channels.pop())
    count = next(iter(heads), None)
    whole = next((g.count for g in told.groups if g.kind == "heads"), None)
    code = ""
    if count is not None and count != whole:
        code = _CODE.get(config.model_type) or ("" if _said(config, count) else _LLAMA)
        if code:
            config.heads_left = count
            name = type(model).__name__
            config.auto_map = {_auto(name): f"{Path(CODE).stem}.Smaller"}
            code = code.replace("WHOLE", name)
    as_stored(base)
    config.use_cache = True
    model.save_pretrained(str(made))
    if code:
        (made / CODE).write_text(code, encoding="utf-8")


def _said(config: Any, count: int) -> bool:
    """Have the config of a LLaMA say so many key and value heads, with the query heads that share them; False: it
    can't, for transformers wants the width to be a multiple of the query heads even where `head_dim` is given."""
    shared = config.num_attention_heads // config.num_key_value_heads
    if config.hidden_size % (count * shared):
        return False
    config.head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    config.num_key_value_heads, config.num_attention_heads = count, count * shared
    return True


def _auto(name: str) -> str:
    return "AutoModelForSequenceClassification" if name.endswith("SequenceClassification") else "AutoModelForCausalLM"


def _measured(base: Any, task: TaskSpec, data: str) -> Measured:
    import torch

    from shared.modeling import evaluation
    from shared.modeling.data import tokenize

    base.model.eval()
    latency = {}
    size = int(base.model.config.vocab_size)
    with torch.inference_mode():
        for batch in BATCHES:
            tokens = torch.arange(batch * task.max_tokens).remainder(size).view(batch, -1)
            times = []
            for _ in range(WARM_UP + REPEATS):
                started = time.perf_counter()
                base.model(input_ids=tokens, attention_mask=torch.ones_like(tokens))
                times.append(time.perf_counter() - started)
            latency[batch] = 1e3 * min(times[WARM_UP:])
    parameters = sum(parameter.numel() for parameter in base.model.parameters())
    if not data:
        return Measured(parameters, latency)
    found = evaluation.evaluate(base, tokenize(data, task, base.tokenizer))
    return Measured(parameters, latency, found.loss, found.accuracy)


def _card(told: PruningFile, before: Measured, after: Measured, gone: float, data: str) -> str:
    length = told.task.max_tokens
    rows = [
        ("parameters", f"{before.parameters:,}", f"{after.parameters:,}"),
        *(
            (
                f"forward pass, batch {batch}, {length} tokens, fastest of {REPEATS}",
                f"{before.latency_ms[batch]:.1f} ms",
                f"{ms:.1f} ms",
            )
            for batch, ms in after.latency_ms.items()
        ),
    ]
    if after.loss is not None and before.loss is not None:
        rows.append(("loss on the rows given", f"{before.loss:.4f}", f"{after.loss:.4f}"))
    if after.accuracy is not None and before.accuracy is not None:
        rows.append(("accuracy on the rows given", f"{before.accuracy:.4f}", f"{after.accuracy:.4f}"))
    table = "\n".join(f"| {name} | {one} | {other} |" for name, one, other in rows)
    measured = "" if data else "Quality was not measured: no rows were given (`--data`). "
    return f"""---
library_name: transformers
tags: [pruned, lora]
---
# {told.job}, smaller

Fine-tuned across a fleet by Muster (job {told.job}, round {told.round}), {gone:.0%} of the weights of its blocks
pruned: whole attention heads and FFN channels, the least important by LoRA gradients on the devices. The adapter is
in the weights.

| measured where it was exported | whole | smaller |
|---|---|---|
{table}

{measured}Load it with transformers' `from_pretrained`{_HOW}.
"""


_HOW = f"; where {CODE} lies beside the weights, with `trust_remote_code=True`"
_BERT = '''"""WHOLE with fewer attention heads than its config can say; written by Muster's export."""

from torch import nn
from transformers import WHOLE


class Smaller(WHOLE):
    def __init__(self, config):
        super().__init__(config)
        for block in self.base_model.encoder.layer:
            own = block.attention.self
            own.num_attention_heads = config.heads_left
            own.all_head_size = config.heads_left * own.attention_head_size
            for part in ("query", "key", "value"):
                setattr(own, part, nn.Linear(config.hidden_size, own.all_head_size))
            block.attention.output.dense = nn.Linear(own.all_head_size, config.hidden_size)
        self.post_init()
'''
_GPT2 = '''"""WHOLE with fewer attention heads than its config can say; written by Muster's export."""

from transformers import WHOLE
from transformers.pytorch_utils import Conv1D


class Smaller(WHOLE):
    def __init__(self, config):
        super().__init__(config)
        for block in self.base_model.h:
            own = block.attn
            own.num_heads = config.heads_left
            own.split_size = config.heads_left * own.head_dim
            own.c_attn = Conv1D(3 * own.split_size, config.hidden_size)
            own.c_proj = Conv1D(config.hidden_size, own.split_size)
        self.post_init()
'''
_LLAMA = '''"""WHOLE with a number of attention heads that its config can't say; written by Muster's export."""

from torch import nn
from transformers import WHOLE


def part(old, inp, out):
    return nn.Linear(inp, out, bias=old.bias is not None)


class Smaller(WHOLE):
    def __init__(self, config):
        super().__init__(config)
        for block in self.base_model.layers:
            own = block.self_attn
            keys = config.heads_left * own.head_dim
            queries = keys * own.num_key_value_groups
            own.q_proj = part(own.q_proj, config.hidden_size, queries)
            own.k_proj = part(own.k_proj, config.hidden_size, keys)
            own.v_proj = part(own.v_proj, config.hidden_size, keys)
            own.o_proj = part(own.o_proj, queries, config.hidden_size)
        self.post_init()
'''
_CODE = {"bert": _BERT, "roberta": _BERT, "gpt2": _GPT2}
