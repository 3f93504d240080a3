"""Loss and quality of a loaded model on tokenised data."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import numpy as np
import torch

from shared.modeling.base_model import Base
from shared.modeling.data import Beat, TokenData, silent
from shared.modeling.objective import loss_sum


@dataclass(frozen=True)
class Quality:
    """Mean loss per row (classification) or per completion token (causal), and what follows from it."""

    loss: float
    rows: int
    accuracy: float | None
    perplexity: float | None
    seconds: float


def evaluate(base: Base, data: TokenData, batch: int = 64, beat: Beat = silent) -> Quality:
    """Evaluate on every row, longest together so that little is padded; rows in another order give the same."""
    started = time.monotonic()
    order = np.lexsort((np.arange(data.rows), -data.lengths))
    total, right, weight = 0.0, 0, 0
    base.model.eval()
    with torch.inference_mode():
        for start in range(0, data.rows, batch):
            part = data.batch(order[start : start + batch], base.device)
            loss, hits = loss_sum(base.model, part, data.kind)
            total += float(loss)
            right += hits
            weight += part.weight
            beat("evaluating")
    loss_mean = total / weight
    causal = data.kind == "causal"
    return Quality(
        loss=loss_mean,
        rows=data.rows,
        accuracy=None if causal else right / data.rows,
        perplexity=math.exp(min(loss_mean, 700.0)) if causal else None,
        seconds=time.monotonic() - started,
    )
