"""The upper part of the model in the top worker: the merged step and what becomes of it (MergeSFL, arXiv 2311.13348).

The paper's: features of all devices are one mixed batch, one step of the top model on its mean loss, and each device
gets the gradient of the mean loss over its own samples. Without merging (SplitFed and AdaSFL as rivals) every device
has a top of its own, trained on its features alone; these are averaged when the round ends. Our reading: LoRA or all
parameters, trained by the job's AdamW, as on the devices.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from coordinator.workers.protocol import TopRound, TopUpdate
from shared import adapter, steps, tensors
from shared.adapter import Adapter
from shared.errors import DecodeError
from shared.files import write_whole
from shared.modeling import half, lora, split
from shared.modeling.base_model import Base
from shared.modeling.checkpoint import Numbered, Position
from shared.modeling.faults import AdapterFault, is_out_of_memory
from shared.modeling.optimizing import advance, optimizer_of, rate_of, restore, state_of
from shared.modeling.remembered import remembering

LARGEST = 1e6
"""No feature of a sound model is larger; the largest known ones are some ten thousand."""
_COPY = "copy/"
log = logging.getLogger(__name__)
ALL = ""
"""The one top of all devices, where features are merged."""


@dataclass
class Copy:
    """A top model: the values and moments of what is trained, and what it learned from."""

    state: dict[str, torch.Tensor]
    samples: int = 0
    losses: list[float] = field(default_factory=list)


class TopModel:
    """The top of one round. `base`: already its upper part. Raises `AdapterFault` where the adapter does not fit."""

    def __init__(self, base: Base, order: TopRound) -> None:
        self.base = base
        self.order = order
        given = adapter.read_file(Path(order.adapter_path))
        if given.base_digest != order.base_digest:
            raise AdapterFault(f"{order.adapter_path}: made for another base")
        job = order.job
        self.carried = lora.carry(
            base, split.part_of(given, base), self._ranks(), alpha_ratio=job.training.alpha_ratio, seed=job.seed,
            round=order.round,
        )  # fmt: skip
        self._optimizer = optimizer_of(self.carried, job.training)
        names = [ALL] if order.merges else sorted(order.batches)
        first = self._state()
        self.copies = {name: Copy(dict(first)) for name in names}
        self._here = names[0]
        self._most = 0
        """Samples that are computed at once; 0: all."""
        self._work = hashlib.sha256(f"{order.work}/{order.base_digest}/{order.adapter_path}".encode()).hexdigest()
        self.checkpoints = Numbered(Path(order.folder), self._work)

    def _ranks(self) -> dict[str, int]:
        if self.order.split.above == "full":
            return {}
        tunable = self.base.tunable(self.order.job.base.targets)
        rank = self.order.job.strategy.rank
        return {one.name: min(rank, one.out, one.inp) for one in tunable}

    @property
    def message_bytes(self) -> int:
        """The largest message of features that a device of this round has reason to send."""
        config, base = self.base.model.config, self.base
        if base.kind == "image":
            tokens, numbers = 1, int(math.prod(config.shape_after(self.order.split.block)))
        else:
            tokens = base.max_tokens + 8  # batches are padded to eights
            numbers = tokens * int(config.hidden_size)
        # A float, its scale, a target and a mask for each; and the heads of the packets.
        sample: int = 4 * numbers + 16 * tokens
        return max(map(self.order.most, self.order.batches)) * sample * 9 // 8 + 64 * 1024

    # ---- steps

    def part(self, features: steps.Features, device: str) -> split.Part:
        """The features of a device as tensors. Raises `DecodeError` for what can't be its features."""
        hidden = tensors.decode(features.hidden)
        samples = hidden.shape[0] if hidden.ndim else 0
        if len(features.targets) % 4:
            raise DecodeError(f"targets of {len(features.targets)} bytes")
        if not 0 < samples <= self.order.most(device):
            raise DecodeError(f"features of {samples} samples, its batch is {self.order.most(device)} at most")
        targets = np.frombuffer(features.targets, "<i4").astype(np.int64)
        if self.base.kind == "causal":
            targets = self._by_token(targets, samples, "targets")
        mask = np.frombuffer(features.mask, "u1").astype(np.int64)
        place = self.base.device
        part = split.Part(
            torch.from_numpy(np.array(hidden)).to(place), torch.from_numpy(targets).to(place),
            torch.from_numpy(self._by_token(mask, samples, "mask")).to(place) if mask.size else None,
        )  # fmt: skip
        if fault := split.fault(self.base, part):
            raise DecodeError(fault)
        if float(part.hidden.abs().max()) > LARGEST:
            raise DecodeError(f"features beyond {LARGEST:g}")
        return part

    def _by_token(self, values: Any, samples: int, what: str) -> Any:
        if not values.size or values.size % samples:
            raise DecodeError(f"{what} that do not fit the features")
        return values.reshape(samples, -1)

    def take(self, parts: Mapping[str, split.Part], done: int) -> dict[str, split.Answer]:
        """One step over these devices' features; the answer to each."""
        self.base.model.train()
        # By the job's seed and the step: neither where files lie nor an attempt before decides what is dropped out.
        place = f"{self.order.job.seed}/{self.order.round}/{done}/top"
        torch.manual_seed(int(hashlib.sha256(place.encode()).hexdigest()[:12], 16))
        rate = self._rate(done)
        with half.fast_products(self.base.device):
            if self.order.merges:
                answers = self._merged(list(parts.values()))
                self._advance(ALL, rate, sum(len(part.targets) for part in parts.values()))
                self.copies[ALL].losses.append(float(np.mean([answer.loss for answer in answers])))
                return dict(zip(parts, answers, strict=True))
            found = {}
            for device, part in parts.items():
                self._enter(device)
                try:
                    found[device] = self._merged([part])[0]
                except DecodeError as error:
                    log.warning("%s: features of %s refused: %s", self.order.work, device, error)
                    continue
                self._advance(device, rate, len(part.targets))
                self.copies[device].losses.append(found[device].loss)
            return found

    def _merged(self, parts: list[split.Part]) -> list[split.Answer]:
        """One backward pass; where memory does not hold all at once, in pieces. Raises `DecodeError` where it gives no
        numbers; nothing is changed then."""
        with remembering(self.carried.dense):
            return self._answered(parts)

    def _answered(self, parts: list[split.Part]) -> list[split.Answer]:
        while True:
            try:
                answers = split.merged_step(self.base, parts, self._most)
                break
            except (MemoryError, RuntimeError) as error:
                self._optimizer.zero_grad(set_to_none=True)
                total = self._most or sum(len(part.targets) for part in parts)
                if total == 1 or self.base.kind == "image" or not is_out_of_memory(error):
                    raise
                self._most = total // 2
                log.warning("out of memory: the merged batch is computed %d samples at a time", self._most)
        grads = [tensor.grad for tensor in self.carried.parameters() if tensor.grad is not None]
        losses = all(math.isfinite(answer.loss) for answer in answers)
        if not losses or not all(bool(torch.isfinite(grad).all()) for grad in grads):
            self._optimizer.zero_grad(set_to_none=True)
            raise DecodeError("they make the loss or a gradient no number")
        return answers

    def _rate(self, done: int) -> float:
        order = self.order
        return rate_of(order.job.training, order.round, order.job.rounds.count, order.steps, done)

    def _advance(self, name: str, rate: float, samples: int) -> None:
        advance(self._optimizer, self.carried, self.order.job.training, rate)
        self.copies[name].samples += samples

    def _enter(self, name: str) -> None:
        """Make the copy `name` the one that the base carries."""
        if name == self._here:
            return
        self.copies[self._here].state = self._state()
        restore(self._optimizer, self.carried, self.copies[name].state)
        self._here = name

    def _state(self) -> dict[str, torch.Tensor]:
        return {name: tensor.detach().clone() for name, tensor in state_of(self._optimizer, self.carried).items()}

    # ---- checkpoints and the end

    def save(self, done: int) -> None:
        """Write the checkpoint of `done` steps."""
        self.copies[self._here].state = self._state()
        position = Position(step=done)
        for name, copy in self.copies.items():
            position.copies[name] = (copy.samples, copy.losses)
        state = {f"{_COPY}{n}/{key}": value for n, copy in self.copies.items() for key, value in copy.state.items()}
        self.checkpoints.save(done, position, state)

    def load(self, step: int) -> bool:
        """Go back to the checkpoint of `step`; those of later steps are removed. False: it can't be read."""
        found = self.checkpoints.load(step)
        if found is None:
            return False
        position, state = found
        for name, copy in self.copies.items():
            head = f"{_COPY}{name}/"
            copy.state = {key.removeprefix(head): value for key, value in state.items() if key.startswith(head)}
            samples, losses = position.copies.get(name, (0, []))
            copy.samples, copy.losses = samples, list(losses)
        self._optimizer.zero_grad(set_to_none=True)
        restore(self._optimizer, self.carried, self.copies[self._here].state)
        self.checkpoints.drop_after(step)
        return True

    def updates(self) -> list[TopUpdate]:
        """Write what was trained: one update of each copy that learned anything."""
        self.copies[self._here].state = self._state()
        written = []
        for number, (name, copy) in enumerate(sorted(self.copies.items())):
            if not copy.samples:
                continue
            restore(self._optimizer, self.carried, copy.state)
            self._here = name
            path = Path(f"{self.order.update_path}-{number}")
            write_whole(path, adapter.write(self._update(name), "fp32"))
            written.append(TopUpdate(path=str(path), samples=copy.samples, of=name))
        return written

    @property
    def loss(self) -> float:
        """Mean loss over the last fifth of the steps."""
        tails = [np.mean(copy.losses[-max(1, len(copy.losses) // 5) :]) for copy in self.copies.values() if copy.losses]
        return float(np.mean(tails)) if tails else 0.0

    def _update(self, name: str) -> Adapter:
        order = self.order
        return lora.read_update(
            self.carried, job=order.job_id, round=order.round, attempt=order.attempt, base_digest=order.base_digest,
            device=order.name if name == ALL else f"{order.name}/{name}",
        )  # fmt: skip
