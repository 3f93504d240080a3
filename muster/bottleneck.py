"""Put the bottleneck adapters of an exported folder (strategy `fedadapter`) on a model of transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from shared.errors import UserError


def load(model: Any, folder: str | Path) -> Any:
    """`model`, as `from_pretrained` gave it, with the adapters and the head in `folder`; it is changed in place.

    Raises `UserError` where the folder holds none, or they do not fit the model.
    """
    import torch
    from safetensors.torch import load_file

    from shared.modeling.base_model import set_module
    from shared.modeling.bottleneck import LAST_PROJECTION, TENSORS, Bottlenecked, tensor_names

    folder = Path(folder)
    try:
        config = json.loads((folder / "bottleneck_config.json").read_text(encoding="utf-8"))
        tensors = load_file(folder / "bottleneck.safetensors")
    except (OSError, ValueError) as error:
        raise UserError(f"{folder}: no exported bottleneck adapters: {error}") from error
    last = LAST_PROJECTION.get(model.config.model_type)
    if last is None:
        raise UserError(f"bottleneck adapters do not fit models of type {model.config.model_type}")
    try:
        for block in config["widths"]:
            names = tensor_names(block)
            parts = {part: tensors.pop(names[part]).numpy() for part in TENSORS}
            path = f"{block}.{last}"
            set_module(model, path, Bottlenecked(model.get_submodule(path), parts, str(model.device)))
        with torch.no_grad():
            for name, tensor in tensors.items():
                model.get_parameter(name).copy_(tensor)
    except (AttributeError, KeyError, RuntimeError) as error:
        raise UserError(f"{folder}: the adapters do not fit the model: {error}") from error
    return model.eval()
