"""How far a device is to prune its model in a round: part of `shared.messages.Work`."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from shared.fields import Text

UnitBits = Annotated[dict[Text, Annotated[bytes, Meta(max_length=4096)]], Meta(max_length=1024)]
"""Group of heads or channels -> bits of the units that stay; `shared.units.too_many` says of which bases they fit."""


class Pruning(msgspec.Struct, frozen=True, kw_only=True):
    """How far a device prunes its model in one round, bit by bit, with tuning in between."""

    ratio: Annotated[float, Meta(ge=0.0, lt=1.0)]
    """Share of each group's units that is gone at the end of the round."""
    kept: UnitBits = {}
    """Units that were there at the end of its last round; {}: all."""
    begin: Annotated[float, Meta(ge=0.0, lt=1.0)] = 0.0
    """Share of each group's units that is gone at its beginning: the rest goes by the global adapter's fleet scores."""
    every: Annotated[int, Meta(ge=1)] = 20
    """Optimizer steps for each pruning, at least one pruning a round."""
    criterion: Literal["lora", "magnitude"] = "lora"
    """What goes first: units of the least importance by LoRA gradients, or of the smallest weights."""
    heads: bool = True
    """Whether attention heads go, too; else FFN channels alone."""
