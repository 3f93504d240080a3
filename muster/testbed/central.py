"""What a federated run is compared with: one central LoRA run on the pooled data, and the head alone on one share.

Plain peft on the base as the coordinator loads it, without adapters of ours; the same head to begin with, the same
objective, optimizer settings and evaluation as a federated run of the same job.
"""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coordinator.core.facts import Metrics
from coordinator.web.views import JobView
from shared.errors import UserError
from shared.jobs import JobSpec

if TYPE_CHECKING:
    from shared.modeling.base_model import Base
    from shared.modeling.data import TokenData


@dataclass(frozen=True)
class Effort:
    """How much is trained: `steps` optimizer steps of `batch` samples each."""

    steps: int
    batch: int


@dataclass(frozen=True)
class Reference:
    """A reference run: its quality on the whole held-out file of the job, before and after."""

    before: Metrics
    after: Metrics
    effort: Effort
    losses: list[float]
    """Mean training loss of each step."""


def effort_of(job: JobView) -> Effort:
    """The steps of a federated run, each with the samples that all its devices together trained on per step."""
    steps, samples = 0, 0
    for view in job.rounds:
        done = [part.facts for part in view.participants if part.facts is not None]
        if done:
            steps += round(statistics.median(facts.steps for facts in done))
            samples += sum(facts.samples for facts in done)
    if not steps:
        raise UserError(f"job {job.id} has trained nothing yet")
    return Effort(steps, max(1, round(samples / steps)))


def central_lora(spec: JobSpec, base: Path, train: Path, effort: Effort, *, rows: int = 0) -> Reference:
    """LoRA of the job's rank on every layer it tunes, and its head, on the rows of `train` in one place.

    `rows`: how many of the held-out file are evaluated, 0 for all. Raises `UserError` for files that don't fit.
    """
    return _run(spec, base, train, effort, rows, lora=True)


def head_alone(spec: JobSpec, base: Path, share: Path, effort: Effort, *, rows: int = 0) -> Reference:
    """Only the head is trained, on one device's `share`: what that device could do without any other."""
    return _run(spec, base, share, effort, rows, lora=False)


def standard_error(metrics: Metrics) -> float:
    """Of an accuracy: sqrt(p (1 - p) / rows); 0 where there is none."""
    if metrics.accuracy is None or not metrics.rows:
        return 0.0
    return math.sqrt(metrics.accuracy * (1 - metrics.accuracy) / metrics.rows)


def _run(spec: JobSpec, folder: Path, train: Path, effort: Effort, rows: int, *, lora: bool) -> Reference:
    from shared.modeling import base_model
    from shared.modeling.data import tokenize

    base = base_model.load(folder, spec.task)
    base.set_dense(base_model.fresh_head(base, spec.seed))
    data = tokenize(str(train), spec.task, base.tokenizer)
    held_out = tokenize(spec.evaluation.data, spec.task, base.tokenizer, rows=rows)
    before = _evaluate(base, held_out, spec)
    losses = _train(base, data, spec, effort, lora=lora)
    return Reference(before, _evaluate(base, held_out, spec), effort, losses)


def _train(base: Base, data: TokenData, spec: JobSpec, effort: Effort, *, lora: bool) -> list[float]:
    import torch

    from shared.modeling.data import batches
    from shared.modeling.objective import loss_sum

    torch.manual_seed(spec.seed)
    factors = _inject(base, spec) if lora else ([], [])
    head = list(base.head.values())
    for tensor in head:
        tensor.requires_grad_(True)
    if not factors[0] and not head:
        raise UserError(f"task.kind {spec.task.kind} has no head to train alone")
    training = spec.training
    optimizer = torch.optim.AdamW(
        [
            {"params": factors[0], "weight_decay": 0.0, "slower": 1.0},
            {"params": factors[1], "weight_decay": 0.0, "slower": training.lora_plus},
            {"params": head, "weight_decay": training.weight_decay, "slower": 1.0},
        ],
        lr=training.lr,
    )
    losses = []
    base.model.train()
    for step, batch in enumerate(batches(data, spec.seed, 1, effort.batch, effort.steps)):
        for group in optimizer.param_groups:
            group["lr"] = _rate(spec, step, effort.steps) / group["slower"]
        loss = loss_sum(base.model, batch, data.kind)[0] / batch.weight
        loss.backward()  # type: ignore[no-untyped-call]  # torch's own lacks annotations
        if training.max_grad_norm:
            torch.nn.utils.clip_grad_norm_([*factors[0], *factors[1], *head], training.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
    base.model.eval()
    return losses


def _inject(base: Base, spec: JobSpec) -> tuple[list[Any], list[Any]]:
    """Peft's LoRA on the layers the job tunes; its factors B and A."""
    from peft import LoraConfig, inject_adapter_in_model

    names = [linear.name for linear in base.tunable(spec.base.targets)]
    rank = spec.strategy.rank
    # Peft annotates alpha as a whole number and computes with any.
    alpha: Any = spec.training.alpha_ratio * rank
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules="|".join(map(re.escape, names)))
    inject_adapter_in_model(config, base.model)
    named = list(base.model.named_parameters())
    return [t for name, t in named if "lora_B" in name], [t for name, t in named if "lora_A" in name]


def _rate(spec: JobSpec, step: int, steps: int) -> float:
    """The job's learning rate at `step` of `steps`."""
    training = spec.training
    if step < training.warmup_steps:
        return training.lr * (step + 1) / training.warmup_steps
    if training.schedule == "constant":
        return training.lr
    done = (step - training.warmup_steps) / max(1, steps - training.warmup_steps)
    return training.lr * ((1 - done) if training.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done)))


def _evaluate(base: Base, held_out: TokenData, spec: JobSpec) -> Metrics:
    from shared.modeling.evaluation import evaluate

    found = evaluate(base, held_out, spec.evaluation.batch)
    return Metrics(
        loss=found.loss, rows=found.rows, accuracy=found.accuracy, perplexity=found.perplexity, seconds=found.seconds
    )


def compared(federated: Metrics, reference: Metrics) -> Sequence[str]:
    """The two side by side, in lines for a report."""
    if federated.accuracy is not None and reference.accuracy is not None:
        gap = 100 * (reference.accuracy - federated.accuracy)
        error = 100 * math.hypot(standard_error(federated), standard_error(reference))
        return [
            f"accuracy {federated.accuracy:.3f} against {reference.accuracy:.3f} on {federated.rows} rows: "
            f"{gap:+.1f} points (standard error {error:.1f})"
        ]
    return [f"loss {federated.loss:.4f} against {reference.loss:.4f} on {federated.rows} rows"]
