"""What a work begins with: the global adapter on the base, and where the work prunes, on what is left of it."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from edge_daemon.protocol import Train
from edge_daemon.training.pruner import Pruner
from shared import adapter
from shared.adapter import Adapter
from shared.errors import DecodeError
from shared.messages import Assignment
from shared.modeling import lora, pruning, split
from shared.modeling.base_model import Base
from shared.modeling.faults import AdapterFault, ModelFault
from shared.modeling.lora import Carried


class Unfit(Exception):
    """It can't be done; the text is the one-line reason."""

    def __init__(self, kind: Literal["adapter", "model"], reason: object) -> None:
        super().__init__(str(reason))
        self.kind = kind


def carry(request: Train, base: Base) -> tuple[Carried, Pruner | None]:
    """The tensors to train on `base`, and who prunes it; None: the model stays whole. Raises `Unfit`."""
    work, path = request.assignment, Path(request.adapter_path)
    try:
        given = adapter.read_file(path)
        if given.base_digest != work.base_digest:
            raise Unfit("adapter", f"{path}: made for another base")
        pruner = _pruner(base, given, work)
        if pruner is not None:
            return pruner.carry(), pruner
        carried = lora.carry(
            base,
            split.part_of(given, base) if base.half else given,
            work.work.ranks,
            alpha_ratio=work.training.alpha_ratio,
            seed=work.seed,
            round=work.round,
        )
    except ModelFault as error:
        raise Unfit("model", error) from error
    except (AdapterFault, DecodeError) as error:
        raise Unfit("adapter", error) from error
    except OSError as error:
        raise Unfit("adapter", f"{path}: can't be read: {error.strerror}") from error
    return carried, None


def _pruner(base: Base, given: Adapter, work: Assignment) -> Pruner | None:
    """For work that prunes; for other work the base gets back what was pruned before."""
    order = work.work.prune
    if order is None and not base.cuts:
        return None
    lora.detach(base)
    if order is not None:
        return Pruner(base, pruning.chosen(pruning.groups_of(base), heads=order.heads), order, given, work)
    pruning.prune(base, {})
    return None
