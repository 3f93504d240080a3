"""Put the bottleneck adapters of an exported folder (strategy `fedadapter`) on a model of transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from shared.errors import UserError


def load(model: Any, folder: str | Path) -> Any:
    """`model`, as `from_pretrained` gave it, with the adapters and the head in `folder`; it is changed in place.

    Raises `UserError` where the folder holds none, or they do not fit the model.
    """
    from shared.modeling.bottleneck import load_export

    try:
        return load_export(model, Path(folder)).eval()
    except (OSError, ValueError) as error:
        raise UserError(f"{folder}: no exported bottleneck adapters: {error}") from error
    except (AttributeError, KeyError, RuntimeError) as error:
        raise UserError(f"{folder}: the adapters do not fit the model: {error}") from error
