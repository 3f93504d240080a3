"""Pictures that ship inside scikit-learn: 1797 handwritten digits of 8 x 8 pixels, as rows of the task `image`."""

from __future__ import annotations

from typing import Any

import numpy as np

LABELS = [str(digit) for digit in range(10)]
_LARGEST = 16.0


def rows(seed: int = 0) -> list[dict[str, Any]]:
    """All pictures, shuffled; their pixels from 0 to 1."""
    from sklearn.datasets import load_digits

    found = load_digits()
    order = np.random.default_rng(seed).permutation(len(found.target))
    pictures = np.round(found.data / _LARGEST, 4)
    return [{"image": pictures[i].tolist(), "label": int(found.target[i])} for i in order]
