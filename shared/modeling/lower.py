"""The lower part of a split model as a function of what is trained there, so that it can be computed with other values
than those that the base carries: older ones, or another device's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from shared.modeling import split
from shared.modeling.base_model import Base
from shared.modeling.data import Batch
from shared.modeling.lora import Carried


class Lower(nn.Module):
    """`base`: a lower part that carries `carried`, whose names (`Carried.named`) the values go by."""

    def __init__(self, base: Base, carried: Carried) -> None:
        super().__init__()
        self.model = base.model
        self._base = [base]  # in a list: the base is no module, its model is registered above
        own = {id(tensor): name for name, tensor in carried.named().items()}
        self._paths = {own[id(p)]: path for path, p in self.named_parameters() if id(p) in own}

    def features(self, values: Mapping[str, torch.Tensor], batch: Batch) -> torch.Tensor:
        """As `split.features`, with `values` for all that is trained."""
        found: Any = torch.func.functional_call(self, {self._paths[n]: value for n, value in values.items()}, (batch,))
        return found  # type: ignore[no-any-return]  # a module's call is untyped

    def forward(self, batch: Batch) -> torch.Tensor:
        """See `features`."""
        return split.features(self._base[0], batch)
