"""How a device begins from the global adapter: a note in the adapter that all who train or merge obey.

| start | trained on the device | the rest of the global adapter | agents of one device |
|---|---|---|---|
| `directions` | the first min(rank, global rank) directions, as published | rides along frozen | products stacked |
| `factors` | the first columns of the global factors, as they are | rides along frozen | factors averaged |
| `fresh` | a new LoRA | all of it rides along frozen | products stacked |
| `cut_directions` | as `directions` | is dropped | products stacked |
| `cut_factors` | as `factors` | is dropped | factors averaged |
| `frozen_a` | B alone; A is the job's, the same everywhere and always | rides along frozen | factors averaged |
| `bottleneck` | bottleneck adapters of the blocks that the work names: dense tensors | is dropped | tensors averaged |
| `dense` | every parameter of the base, itself: there are no factors | there is none | tensors averaged |
| `sides` | of a split model one side as `directions`, the other as `dense` | rides along frozen | products stacked |

A module that the device does not tune keeps all of the global adapter, frozen, under every start: what is dropped is
dropped from what a device tunes. Factors are averaged where the aggregator averages them itself.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from typing import Literal, cast, get_args

import numpy as np

from shared.tensors import Array

Start = Literal[
    "directions", "factors", "fresh", "cut_directions", "cut_factors", "frozen_a", "dense", "bottleneck", "sides"
]
START_NOTE = "start"


def start_of(notes: Mapping[str, str]) -> Start:
    """The start that a global adapter's notes ask for; `directions` where they say nothing known."""
    named = notes.get(START_NOTE, "")
    return cast(Start, named) if named in get_args(Start) else "directions"


def drops_rest(start: Start) -> bool:
    """Whether a tuned module loses the directions that its device does not train."""
    return start in ("cut_directions", "cut_factors")


def has_factors(start: Start) -> bool:
    """Whether LoRA factors are trained at all."""
    return start not in ("dense", "bottleneck")


def averages_factors(start: Start) -> bool:
    """Whether the agents of one device make one update by the mean of their factors, not of their products."""
    return start in ("factors", "cut_factors", "frozen_a", "dense", "bottleneck")


def unsent_a(rank: int) -> Array:
    """What an update carries for an A that is the first `rank` rows of the global adapter's and was not trained."""
    return np.zeros((rank, 0), np.float32)


def fixed_rows(seed: int, module: str, rank: int, inp: int) -> Array:
    """The first `rank` rows of the A (rank x inp) that `frozen_a` never trains: kaiming-uniform, as LoRA's own start.

    A function of the job's seed and the module alone: a smaller rank has the first rows of a larger one.
    """
    digest = hashlib.sha256(f"{seed}/fixed/{module}".encode()).digest()
    bound = 1.0 / math.sqrt(inp)
    rows = np.random.default_rng(int.from_bytes(digest[:8], "little")).uniform(-bound, bound, (rank, inp))
    return rows.astype(np.float32)
