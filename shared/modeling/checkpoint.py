"""Checkpoints of work under way: one safetensors file, replaced atomically, bound to exactly one piece of work."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path

import msgspec
import torch
from safetensors import SafetensorError, safe_open

from shared.codec import pack
from shared.files import write_pieces
from shared.messages import Assignment

log = logging.getLogger(__name__)
NAME = "checkpoint.safetensors"
_DTYPES = {torch.float32: "F32", torch.float64: "F64", torch.int64: "I64"}


class Position(msgspec.Struct, kw_only=True):
    """How far the work has come. Times are seconds, pauses excluded but for `paused_s`."""

    step: int = 0
    samples: int = 0
    """Also the place in the order of samples: the next step takes the samples from here on."""
    batch: int = 0
    batch_limit: int = 0
    losses: list[float] = []
    step_seconds: list[float] = []
    train_s: float = 0.0
    paused_s: float = 0.0
    waits: list[float] = []
    """Seconds from sending the features of a step to having their gradient (split learning)."""
    copies: dict[str, tuple[int, list[float]]] = {}
    """Of the top worker: top model -> samples and losses."""
    cpu_s: float = 0.0


def identity(assignment: Assignment, part: int = 0, parts: int = 1) -> str:
    """Digest over everything that decides what the work gives."""
    return hashlib.sha256(pack(assignment) + f"{part}/{parts}".encode()).hexdigest()


def save_checkpoint(folder: Path, work: str, position: Position, tensors: dict[str, torch.Tensor]) -> None:
    """Write the checkpoint of `work` (its `identity`); the former one stays until this one is on the disk."""
    metadata = {"work": work, "position": msgspec.json.encode(position).decode()}
    write_pieces(folder / NAME, _pieces(tensors, metadata))


def _pieces(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> Iterator[bytes | memoryview]:
    """A safetensors file, tensor by tensor: its own library holds all of them twice, and here may be a whole model."""
    header: dict[str, object] = {"__metadata__": metadata}
    end = 0
    for name, tensor in sorted(tensors.items()):
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    yield struct.pack("<Q", len(text)) + text
    for _, tensor in sorted(tensors.items()):
        plain = tensor.detach().to("cpu").contiguous().reshape(-1)
        yield plain.view(torch.uint8).numpy().data


def load_checkpoint(folder: Path, work: str) -> tuple[Position, dict[str, torch.Tensor]] | None:
    """The checkpoint of `work`, or None where there is none, or one of other work, or one that can't be read."""
    path = folder / NAME
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("work") != work:
                return None
            position = msgspec.json.decode(metadata["position"], type=Position)
            return position, {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118  # no mapping
    except (OSError, SafetensorError, KeyError, msgspec.MsgspecError) as error:
        log.warning("checkpoint %s is not usable, the work starts again: %s", path, error)
        return None


class Numbered:
    """Checkpoints of `work` in `folder`, each under the number of its step: the start, 0, and the last `KEPT`."""

    KEPT = 3
    _NAME = "step-"

    def __init__(self, folder: Path, work: str) -> None:
        self._folder = folder
        self._work = work

    def held(self) -> list[int]:
        """The steps, rising."""
        found = (path.name.removeprefix(self._NAME) for path in self._folder.glob(f"{self._NAME}*"))
        return sorted(int(step) for step in found if step.isdecimal())

    def check(self) -> None:
        """Remove those that can't be read, or are of other work."""
        for step in self.held():
            if self.load(step) is None:
                self._remove(step)

    def save(self, step: int, position: Position, tensors: dict[str, torch.Tensor]) -> None:
        """Write that of `step`; the oldest beyond those that are kept goes."""
        place = self._place(step)
        place.mkdir(parents=True, exist_ok=True)
        save_checkpoint(place, self._work, position, tensors)
        for old in [one for one in self.held() if one][: -self.KEPT]:
            self._remove(old)

    def load(self, step: int) -> tuple[Position, dict[str, torch.Tensor]] | None:
        """As `load_checkpoint`."""
        return load_checkpoint(self._place(step), self._work)

    def drop_after(self, step: int) -> None:
        """Those of later steps are of a run that is over."""
        for later in self.held():
            if later > step:
                self._remove(later)

    def _place(self, step: int) -> Path:
        return self._folder / f"{self._NAME}{step}"

    def _remove(self, step: int) -> None:
        shutil.rmtree(self._place(step), ignore_errors=True)
