"""Least squares with LoRA in numpy: a task small enough for fault tests and for large fleets in one process.

The base model is a frozen zero matrix W (out x inp), named "IxO" (inputs x outputs), with one tunable module,
"linear"; under the start `dense` W itself is trained, and nothing else. Data are rows {"x": [inputs], "y": [outputs]}.
All arithmetic is float64 on one thread's order of operations, so equal inputs give equal bytes; files are float32.
What is trained and what rides along is as the global adapter asks (`shared.starts`).
"""

from __future__ import annotations

import gzip
import io
import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from coordinator.core.facts import ModelFacts, ModuleSpec
from shared import adapter as adapters
from shared.adapter import Adapter, Factors
from shared.errors import DecodeError, UserError
from shared.ids import Digest, digest_of
from shared.jobs import TrainingSpec
from shared.messages import Assignment, UpdateFacts
from shared.starts import START_NOTE, Start, drops_rest, fixed_rows, start_of, unsent_a

MODULE = "linear"
WEIGHT = f"{MODULE}.weight"
_MODEL = re.compile(r"\s*(\d{1,6})\s*x\s*(\d{1,6})\s*")
_NORMALISER = math.sqrt(3.0)
"""Splits a direction into factors of the magnitudes LoRA starts with; see the aggregator's initialisation."""

Matrix = npt.NDArray[np.float64]
Ended = Literal["complete", "time", "drain"]


@dataclass(frozen=True)
class Rows:
    """A data set: x (rows x inputs), y (rows x outputs)."""

    x: Matrix
    y: Matrix

    def __len__(self) -> int:
        return int(self.x.shape[0])


def parse_model(model: str) -> tuple[int, int]:
    """(inputs, outputs) of a model named "IxO". Raises `UserError` for another name."""
    match = _MODEL.fullmatch(model)
    inputs, outputs = (int(match[1]), int(match[2])) if match else (0, 0)
    if inputs < 1 or outputs < 1:
        raise UserError(f"base model {model!r:.80}: least squares wants 'inputs x outputs', such as '16x8'")
    return inputs, outputs


def base_digest(model: str) -> Digest:
    """The digest that stands for the base: of its name, since nothing else is in it."""
    return digest_of(model.encode())


def model_facts(model: str, start: Start = "directions") -> ModelFacts:
    """What planners need to know of the base named `model`, under `start`."""
    inputs, outputs = parse_model(model)
    return ModelFacts(
        modules=[ModuleSpec(name=MODULE, out=outputs, inp=inputs, block=0)],
        dense={WEIGHT: [outputs, inputs]} if start == "dense" else {},
        base_digest=base_digest(model),
        linear_params=inputs * outputs,
        other_params=0,
        blocks=1,
        hidden=inputs,
    )


def initial_adapter(job: str, model: str, start: Start = "directions") -> bytes:
    """The global adapter of round 0: no factors; W where it is trained. `start`: as the job's aggregator wants it."""
    inputs, outputs = parse_model(model)
    notes: dict[str, str] = {START_NOTE: start}
    dense = {WEIGHT: np.zeros((outputs, inputs), np.float32)} if start == "dense" else {}
    return adapters.write(
        Adapter(kind="global", job=job, round=0, base_digest=base_digest(model), factors={}, dense=dense, notes=notes)
    )


def read_rows(path: Path, model: str, limit: int = 0) -> Rows:
    """The rows of a JSONL(.gz) file, the first `limit` (0: all). Raises `UserError` naming file and line."""
    inputs, outputs = parse_model(model)
    xs: list[list[float]] = []
    ys: list[list[float]] = []
    try:
        with gzip.open(path, "rt") if path.suffix == ".gz" else path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                if limit and len(xs) >= limit:
                    break
                x, y = _row(line, inputs, outputs, f"{path}:{number}")
                xs.append(x)
                ys.append(y)
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: can't be read: {error}") from error
    if not xs:
        raise UserError(f"{path}: no rows")
    return Rows(np.asarray(xs, dtype=np.float64), np.asarray(ys, dtype=np.float64))


def _row(line: str, inputs: int, outputs: int, where: str) -> tuple[list[float], list[float]]:
    try:
        row = json.loads(line)
        x, y = [float(v) for v in row["x"]], [float(v) for v in row["y"]]
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f'{where}: not a row {{"x": [...], "y": [...]}}: {error}') from error
    if len(x) != inputs or len(y) != outputs:
        raise UserError(f"{where}: {len(x)} inputs and {len(y)} outputs, the model has {inputs} and {outputs}")
    return x, y


def make_rows(model: str, rows: int, seed: int, *, noise: float = 0.1, shift: float = 0.0, task: int = 0) -> Rows:
    """Synthetic rows of a linear map that `task` fixes; `shift` tilts it per device (seeded by `seed`)."""
    inputs, outputs = parse_model(model)
    truth = np.random.default_rng([task, inputs, outputs]).standard_normal((outputs, inputs)) / math.sqrt(inputs)
    rng = np.random.default_rng([seed, 1])
    local = truth + shift * rng.standard_normal(truth.shape) / math.sqrt(inputs)
    x = rng.standard_normal((rows, inputs))
    return Rows(x, x @ local.T + noise * rng.standard_normal((rows, outputs)))


def write_rows(path: Path, rows: Rows) -> None:
    """Write `rows` as JSONL."""
    with path.open("w", encoding="utf-8") as file:
        for x, y in zip(rows.x.tolist(), rows.y.tolist(), strict=True):
            file.write(json.dumps({"x": x, "y": y}) + "\n")


def loss_of(adapter: Adapter, rows: Rows) -> float:
    """Mean squared error of the base with `adapter` on `rows`."""
    part, weight = adapter.factors.get(MODULE), adapter.dense.get(WEIGHT)
    given = np.zeros_like(rows.y) if part is None else _apply(part, rows.x)
    if weight is not None:
        given = given + rows.x @ weight.astype(np.float64).T
    return float(np.mean(np.square(given - rows.y)))


def _apply(part: Factors, x: Matrix) -> Matrix:
    inner: Matrix = x @ part.a.astype(np.float64).T
    if part.sigma is not None:
        inner = inner * part.sigma.astype(np.float64)
    result: Matrix = part.scaling * (inner @ part.b.astype(np.float64).T)
    return result


@dataclass
class Training:
    """One assignment under way. Everything that the bytes of the update depend on is in `save`."""

    assignment: Assignment
    rows: Rows
    frozen: Factors | None
    """The directions of the global adapter that are not trained here."""
    trained: int
    a: Matrix
    b: Matrix
    batch: int
    part: int = 0
    parts: int = 1
    """As in `protocol.Train`."""
    trains_a: bool = True
    """False: B alone is trained (`ffa`)."""
    w: Matrix | None = None
    """W where it is trained itself (`full`)."""
    step_done: int = 0
    drawn: int = 0
    """Samples taken so far, over all epochs."""
    losses: list[float] = field(default_factory=list)
    """The first and the last step's loss."""

    @property
    def finished(self) -> bool:
        """Whether all steps of the assignment are done, extra ones as well."""
        return self.step_done >= self.assignment.work.most_steps

    def step(self) -> float:
        """One step of gradient descent; returns the loss of its batch before the step."""
        x, y = self._next_batch()
        scaling = self.assignment.training.alpha_ratio
        low = x @ self.a.T
        residual = scaling * (low @ self.b.T) - y
        if self.frozen is not None:
            residual = residual + _apply(self.frozen, x)
        if self.w is not None:
            residual = residual + x @ self.w.T
        loss = float(np.mean(np.square(residual)))
        outer = (2.0 / residual.size) * residual
        grad_b = scaling * (outer.T @ low)
        grad_a = scaling * ((outer @ self.b).T @ x) if self.trains_a else np.zeros_like(self.a)
        grad_w = np.zeros(()) if self.w is None else outer.T @ x
        norm = math.sqrt(float(sum(np.sum(np.square(grad)) for grad in (grad_a, grad_b, grad_w))))
        limit = self.assignment.training.max_grad_norm
        rate = learning_rate(self.assignment, self.step_done) * (limit / norm if 0 < limit < norm else 1.0)
        self.a = self.a - rate * grad_a
        self.b = self.b - rate * grad_b
        self.w = None if self.w is None else self.w - rate * grad_w
        self.step_done += 1
        self.losses = [self.losses[0] if self.losses else loss, loss]
        return loss

    def _next_batch(self) -> tuple[Matrix, Matrix]:
        rows = len(self.rows)
        positions = np.arange(self.drawn, self.drawn + self.batch) * self.parts + self.part
        picked = np.empty(self.batch, dtype=np.int64)
        for epoch in range(int(positions[0]) // rows, int(positions[-1]) // rows + 1):
            order = np.random.default_rng([self.assignment.seed, self.assignment.round, 2, epoch]).permutation(rows)
            here = positions // rows == epoch
            picked[here] = order[positions[here] % rows]
        self.drawn += self.batch
        return self.rows.x[picked], self.rows.y[picked]

    def factors(self) -> Factors:
        """The trained factors as they travel."""
        known = not self.trains_a and self.trained == len(self.a)
        return Factors(
            b=self.b.astype(np.float32),
            a=unsent_a(self.trained) if known else self.a.astype(np.float32),
            scaling=self.assignment.training.alpha_ratio,
            trained=self.trained,
        )

    def update(self, device: str = "") -> bytes:
        """The file of the update of `device`."""
        work = self.assignment
        parts = {MODULE: self.factors()} if self.a.shape[0] else {}
        made = Adapter(
            kind="update", job=work.job, round=work.round, base_digest=work.base_digest, factors=parts,
            dense={} if self.w is None else {WEIGHT: self.w.astype(np.float32)},
            attempt=work.attempt, device=device,
        )  # fmt: skip
        return adapters.write(made, work.training.codec if self.parts == 1 else "fp32")

    def norm(self) -> float:
        """Euclidean norm of all tensors of the update."""
        tensors = (self.a, self.b) if self.w is None else (self.w,)
        return math.sqrt(float(sum(np.sum(np.square(tensor)) for tensor in tensors)))

    def importance(self) -> dict[str, float]:
        """Share of each module in the size of what was trained, where it was asked for."""
        sizes = {MODULE: float(np.linalg.norm(self.b @ self.a))} if self.assignment.work.score else {}
        total = sum(sizes.values())
        return {name: size / total for name, size in sizes.items()} if total > 0 else {}

    def save(self) -> bytes:
        """A checkpoint; `restore` continues from it to the same bytes."""
        buffer = io.BytesIO()
        numbers = np.asarray([self.step_done, self.drawn], dtype=np.int64)
        w = np.zeros((0, 0)) if self.w is None else self.w
        np.savez(buffer, a=self.a, b=self.b, w=w, numbers=numbers, losses=np.asarray(self.losses, dtype=np.float64))
        return buffer.getvalue()

    def restore(self, checkpoint: bytes) -> None:
        """Continue from `checkpoint`. Raises `ValueError` where it is not one of this work's shape."""
        with np.load(io.BytesIO(checkpoint), allow_pickle=False) as saved:
            try:
                a, b, w, numbers, losses = (saved[name] for name in ("a", "b", "w", "numbers", "losses"))
            except KeyError as error:
                raise ValueError(f"checkpoint without {error}") from error
        if a.shape != self.a.shape or b.shape != self.b.shape:
            raise ValueError(f"checkpoint of shapes {a.shape}, {b.shape}")
        self.a, self.b, self.w = a, b, None if self.w is None else w
        self.step_done, self.drawn = int(numbers[0]), int(numbers[1])
        self.losses = [float(v) for v in losses]


def begin(
    assignment: Assignment, adapter: Adapter, rows: Rows, *, batch: int = 0, fill: bool = False, part: int = 0,
    parts: int = 1,
) -> Training:  # fmt: skip
    """Prepare `assignment` from the global `adapter`. `batch` 0: the assigned one.

    The first k = min(rank, rank of G) directions of G = U diag(sigma) V^T become A0 = V^T / sqrt(3),
    B0 = sqrt(3) U sigma / scaling; fresh ones have A random and B zero (`fill`: B random too, so that an update that
    was never trained is not degenerate). Raises `UserError` for a wrong base and `DecodeError` for foreign shapes.
    """
    inputs, outputs = parse_model(assignment.base.model)
    if assignment.base_digest != base_digest(assignment.base.model):
        raise UserError(f"base {assignment.base.model!r} has another digest here")
    rank = assignment.work.ranks.get(MODULE, 0)
    whole = adapter.factors.get(MODULE)
    if whole is not None and (whole.a.shape[1] != inputs or whole.b.shape[0] != outputs):
        raise DecodeError(f"global adapter of {whole.b.shape[0]} x {whole.a.shape[1]}, base of {outputs} x {inputs}")
    start = start_of(adapter.notes)
    known = 0 if whole is None or start == "fresh" else min(rank, whole.rank)
    rng = np.random.default_rng([assignment.seed, assignment.round, 1])
    a = rng.standard_normal((rank, inputs)) / math.sqrt(inputs)
    if start == "frozen_a":
        a = fixed_rows(assignment.seed, MODULE, rank, inputs).astype(np.float64)
    b = rng.standard_normal((outputs, rank)) / math.sqrt(outputs) if fill else np.zeros((outputs, rank))
    frozen = None
    if whole is not None:
        sigma = whole.scaling * (np.ones(whole.rank) if whole.sigma is None else whole.sigma.astype(np.float64))
        # Factors that were averaged as they are (no sigma) have their size already.
        size = 1.0 if whole.sigma is None else _NORMALISER
        a[:known] = whole.a[:known].astype(np.float64) / size
        scaling = assignment.training.alpha_ratio
        b[:, :known] = size * whole.b[:, :known].astype(np.float64) * sigma[:known] / scaling
        if known < whole.rank and not (rank and drops_rest(start)):
            frozen = Factors(b=whole.b[:, known:], a=whole.a[known:], sigma=sigma[known:].astype(np.float32))
    return Training(
        assignment=assignment, rows=rows, frozen=frozen, trained=known, a=a, b=b, batch=batch or assignment.work.batch,
        part=part, parts=parts, trains_a=start != "frozen_a",
        w=adapter.dense[WEIGHT].astype(np.float64) if start == "dense" else None,
    )  # fmt: skip


def learning_rate(assignment: Assignment, step: int) -> float:
    """The rate of local step `step` (from 0), by the job's schedule over its rounds and its warm-up."""
    training: TrainingSpec = assignment.training
    done = (assignment.round - 1) / assignment.rounds
    factor = 1.0
    if training.schedule == "linear":
        factor = 1.0 - done
    elif training.schedule == "cosine":
        factor = 0.5 * (1.0 + math.cos(math.pi * done))
    overall = (assignment.round - 1) * assignment.work.steps + step
    if overall < training.warmup_steps:
        factor *= (overall + 1) / training.warmup_steps
    return training.lr * factor


def facts_of(
    training: Training, *, ended: Ended = "complete", step_s: float = 0.0, train_s: float = 0.0, **measured: Any
) -> UpdateFacts:
    """What `training` gave; times and anything in `measured` (fields of `UpdateFacts`) are the caller's."""
    first, last = (training.losses[0], training.losses[1]) if training.losses else (0.0, 0.0)
    return UpdateFacts(
        samples=training.drawn,
        steps=training.step_done,
        batch=training.batch,
        bits=training.assignment.work.bits,
        loss_first=first,
        loss_last=last,
        step_s=step_s,
        train_s=train_s,
        ended=ended,
        norm=training.norm(),
        importance=training.importance(),
        **measured,
    )


def train(
    assignment: Assignment, adapter: bytes, rows: Rows, *, batch: int = 0, device: str = ""
) -> tuple[bytes, UpdateFacts]:
    """Do the whole `assignment` at once: the update's file of `device` and its facts (times 0)."""
    training = begin(assignment, adapters.read(adapter), rows, batch=batch)
    while not training.finished:
        training.step()
    return training.update(device), facts_of(training)
