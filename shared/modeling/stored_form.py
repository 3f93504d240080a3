"""A loaded model in the form in which model folders store it: its config, and the classes of its layers."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

from shared.jobs import TaskSpec
from shared.modeling.base_model import Base
from shared.modeling.parameters import set_module


def whole_config(base: Base, task: TaskSpec) -> str:
    """`config.json` of an ordinary model folder for the whole model, head included."""
    import transformers

    stored = transformers.AutoConfig.from_pretrained(str(base.folder), trust_remote_code=False)
    config = copy.deepcopy(base.model.config)
    config.architectures = [type(base.model).__name__]
    if hasattr(stored, "use_cache"):
        config.use_cache = stored.use_cache  # off for training alone
    if task.labels:
        config.id2label = dict(enumerate(task.labels))
        config.label2id = {label: index for index, label in enumerate(task.labels)}
    return str(config.to_json_string(use_diff=False))


def as_stored(base: Base) -> None:
    """Give linear layers that are stored transposed (GPT-2) their own class again, for saving; ends its use here."""
    from transformers.pytorch_utils import Conv1D

    kind: Any = Conv1D
    for name in [one for one in base.linears if base.is_transposed(one)]:
        linear = base.model.get_submodule(name)
        layer = kind(linear.out_features, linear.in_features)
        layer.weight = nn.Parameter(linear.weight.detach().t().contiguous(), requires_grad=False)
        layer.bias = linear.bias
        set_module(base.model, name, layer)
