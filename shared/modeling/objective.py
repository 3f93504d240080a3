"""The loss of a batch: cross-entropy over rows (classification, image) or over completion tokens (causal)."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional
from transformers import PreTrainedModel

from shared.modeling.data import IGNORED, Batch

# Their logits are the output embedding of the last hidden state, nothing more, so only completion tokens need them.
_PLAIN_HEADS = frozenset({"gpt2", "llama", "mistral", "qwen2", "qwen3"})


def loss_sum(model: Any, batch: Batch, kind: str) -> tuple[torch.Tensor, int]:
    """Sum of the losses over the batch's weight (float32), and how many rows were classified right (causal: 0)."""
    if kind == "causal":
        return _causal(model, batch), 0
    given = {"pixel_values": batch.ids} if kind == "image" else {"input_ids": batch.ids, "attention_mask": batch.mask}
    logits = model(**given).logits.float()
    right = int((logits.detach().argmax(dim=-1) == batch.targets).sum())
    return functional.cross_entropy(logits, batch.targets, reduction="sum"), right


def _causal(model: Any, batch: Batch) -> torch.Tensor:
    targets = batch.targets[:, 1:]
    learned = targets != IGNORED
    if model.config.model_type in _PLAIN_HEADS and _is_plain(model):
        hidden = model.base_model(input_ids=batch.ids, attention_mask=batch.mask)[0]
        logits = model.get_output_embeddings()(hidden[:, :-1][learned])
    else:
        logits = model(input_ids=batch.ids, attention_mask=batch.mask).logits[:, :-1][learned]
    return functional.cross_entropy(logits.float(), targets[learned], reduction="sum")


def _is_plain(model: Any) -> bool:
    """Whether nothing is wrapped around it: what peft wraps calls another thing its base model."""
    return isinstance(model, PreTrainedModel)
