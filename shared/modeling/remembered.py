"""What batch normalisation remembers of the batches it saw: the forward pass writes it, no gradient does."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch

REMEMBERED = (".running_mean", ".running_var")
"""Ends of the names of these tensors."""


@contextlib.contextmanager
def remembering(tensors: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Have what is remembered among `tensors` be as it was before where the body raises: a step that is given up, or
    done again, has been seen by nobody."""
    before = {name: one.detach().clone() for name, one in tensors.items() if name.endswith(REMEMBERED)}
    try:
        yield
    except BaseException:
        with torch.no_grad():
            for name, value in before.items():
                tensors[name].copy_(value)
        raise
