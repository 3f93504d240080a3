"""Write the global adapter as an ordinary PEFT folder, without torch.

`PeftModel.from_pretrained(model, folder)` gives the coordinator's model: every module has its own rank, the scaling is
1 (alpha = rank), U diag(sigma) V^T is split evenly in lora_B and lora_A, and the head stands under `modules_to_save`.
"""

from __future__ import annotations

import glob
import json
import os
import shutil
import tempfile
from collections.abc import Container, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from coordinator.core.aggregation.base import narrow
from coordinator.core.aggregation.registry import name_of
from coordinator.core.facts import Metrics
from coordinator.export_tensors import tensor_file
from shared import pruning_file
from shared.adapter import Adapter, Factors
from shared.errors import UserError
from shared.files import sync_folder
from shared.jobs import JobSpec, TaskKind, TaskSpec
from shared.norms import column_weights
from shared.pruning_file import PRUNING_FILE, PruningFile
from shared.starts import start_of
from shared.tensors import Array
from shared.units import Group

_PREFIX = "base_model.model."
_TASK_TYPES: dict[TaskKind, str] = {"classification": "SEQ_CLS", "causal": "CAUSAL_LM"}
_WHOLE_HEADS = ("classifier", "score")
"""peft saves these as a whole for SEQ_CLS; a second wrapper inside one of them would clash."""
_NO_TARGETS = "dummy-target-modules"
"""What peft takes for "no LoRA at all, the head alone"."""
CONV1D_MODELS = frozenset({"gpt2", "openai-gpt", "imagegpt", "decision_transformer"})
"""Model types whose linear layers are transformers' Conv1D, which stores W as (in x out)."""


def export_peft(
    adapter: Adapter, folder: Path, *, spec: JobSpec, base: str, metrics: Metrics | None = None,
    groups: Sequence[Group] = (), classes: Mapping[str, float] | None = None, transposed: Container[str] = (),
) -> None:  # fmt: skip
    """Write `adapter` to `folder`, whole or not at all; a former export there is replaced.

    `metrics`: the held-out evaluation to quote in the README. `groups`, `classes`: of a job that prunes. `transposed`:
    dense tensors that transformers stores as (in x out). Raises `UserError` where `folder` can't be written.
    """
    factors = {name: part for name, part in sorted(adapter.factors.items()) if part.rank > 0}
    dense = {name: one.T if name in transposed else one for name, one in adapter.dense.items()}
    files = {
        "adapter_config.json": as_json(_config(factors, adapter.dense, spec, base)),
        "adapter_model.safetensors": tensor_file(_tensors(factors, dense), adapter.base_digest),
        "README.md": _readme(adapter, factors, spec, base, metrics).encode(),
    }
    if spec.task.labels:
        files["labels.json"] = as_json({"id2label": {str(i): label for i, label in enumerate(spec.task.labels)}})
    if groups and adapter.kept:
        files[PRUNING_FILE] = _pruning_file(adapter, spec.task, groups, classes or {})
    write_folder(folder, files)


def _pruning_file(adapter: Adapter, task: TaskSpec, groups: Sequence[Group], classes: Mapping[str, float]) -> bytes:
    return pruning_file.write(
        PruningFile(
            job=adapter.job, round=adapter.round, task=task, groups=list(groups), kept=adapter.kept,
            scores=adapter.scores, classes=dict(sorted(classes.items())),
        )
    )  # fmt: skip


def split(part: Factors) -> tuple[Array, Array]:
    """lora_B (out x r) and lora_A (r x in) whose plain product is what `part` adds to W."""
    weights = column_weights(part)
    root = np.sqrt(np.abs(weights))
    return narrow(part.b * (root * np.sign(weights))), narrow(root[:, None] * part.a)


def _tensors(factors: Mapping[str, Factors], dense: Mapping[str, Array]) -> dict[str, Array]:
    tensors = {f"{_PREFIX}{name}": narrow(tensor) for name, tensor in dense.items()}
    for name, part in factors.items():
        b, a = split(part)
        tensors[f"{_PREFIX}{name}.lora_B.weight"] = b
        tensors[f"{_PREFIX}{name}.lora_A.weight"] = a
    return tensors


def _config(factors: Mapping[str, Factors], dense: Iterable[str], spec: JobSpec, base: str) -> dict[str, Any]:
    ranks = {name: part.rank for name, part in factors.items()}
    largest = max(ranks.values(), default=1)
    # peft reads the keys as patterns for the end of a module's name; a full name matches its module alone.
    unequal = {name: rank for name, rank in ranks.items() if rank != largest}
    return {
        "peft_type": "LORA",
        "task_type": _TASK_TYPES.get(spec.task.kind),
        "base_model_name_or_path": base,
        "revision": spec.base.revision or None,
        "inference_mode": True,
        "r": largest,
        "lora_alpha": largest,
        "rank_pattern": unequal,
        "alpha_pattern": unequal,
        "target_modules": list(ranks) or _NO_TARGETS,
        "modules_to_save": _modules_to_save(dense) or None,
        "fan_in_fan_out": bool(factors) and _stores_transposed(Path(base)),
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
    }


def _modules_to_save(dense: Iterable[str]) -> list[str]:
    """Modules that hold the dense tensors: known heads as a whole, else the module that owns the tensor."""
    owners = set()
    for name in dense:
        root = name.partition(".")[0]
        owners.add(root if root in _WHOLE_HEADS else name.rpartition(".")[0])
    return sorted(owners)


def _stores_transposed(base: Path) -> bool:
    """Whether the base in folder `base` has Conv1D layers; peft corrects a wrong guess itself, but warns."""
    try:
        config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and config.get("model_type") in CONV1D_MODELS


def _readme(adapter: Adapter, factors: Mapping[str, Factors], spec: JobSpec, base: str, metrics: Metrics | None) -> str:
    ranks = [part.rank for part in factors.values()]
    lines = [
        f"# {adapter.job}",
        "",
        f"LoRA adapter trained by Muster in {adapter.round} rounds (aggregator `{name_of(spec.strategy)}`).",
        "",
        f"- base model: `{base}`, digest `{adapter.base_digest}`",
        f"- task: {spec.task.kind} on `{spec.task.dataset}`",
        f"- tuned modules: {len(ranks)}" + (f", ranks {min(ranks)} to {max(ranks)}" if ranks else ""),
        f"- dense tensors: {_some(sorted(adapter.dense), sided=start_of(adapter.notes) == 'sides')}",
        *metrics_lines(metrics),
    ]
    if adapter.kept:
        lines.append(
            f"- pruned: it is for a model of fewer heads and channels ({PRUNING_FILE}), which `muster export "
            "--ratio` makes"
        )
    if spec.task.labels:
        lines += ["", "Labels (also in `labels.json`):", ""]
        lines += [f"{index}. {label}" for index, label in enumerate(spec.task.labels)]
    return "\n".join([*lines, "", *_usage(spec, base), ""])


def _some(names: Sequence[str], *, sided: bool) -> str:
    if sided:
        return f"{len(names)}, one side of the split model; they replace the base's"
    return ", ".join(names) or "none"


def metrics_lines(metrics: Metrics | None) -> list[str]:
    """The evaluation in lines of a README."""
    if metrics is None:
        return ["- held-out evaluation: none"]
    values = {"loss": metrics.loss, "accuracy": metrics.accuracy, "perplexity": metrics.perplexity}
    shown = ", ".join(f"{name} {value:.6g}" for name, value in values.items() if value is not None)
    return [f"- held-out evaluation: {shown} ({metrics.rows} rows)"]


def _usage(spec: JobSpec, base: str) -> list[str]:
    if spec.task.kind == "least_squares":
        return ["There is no transformer behind this task: read the factors with safetensors."]
    factory = factory_of(spec)
    labels = f", num_labels={len(spec.task.labels)}" if spec.task.kind == "classification" else ""
    return [
        "```python",
        "from peft import PeftModel",
        f"from transformers import {factory}",
        "",
        f'model = {factory}.from_pretrained("{base}"{labels})',
        'model = PeftModel.from_pretrained(model, "path/of/this/folder")',
        "```",
    ]


def factory_of(spec: JobSpec) -> str:
    """The class of transformers that loads the model of the job's task."""
    classes = spec.task.kind == "classification"
    return "AutoModelForSequenceClassification" if classes else "AutoModelForCausalLM"


def as_json(content: Mapping[str, Any]) -> bytes:
    """A file of JSON for people."""
    return (json.dumps(content, indent=2) + "\n").encode()


def write_folder(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write an export to `folder`, whole or not at all. Raises `UserError` where it can't be written."""
    try:
        _replace_folder(folder, files)
    except OSError as error:
        raise UserError(f"{folder}: the export can't be written: {error.strerror or error}") from error


def _replace_folder(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write beside the target, flush, rename; what a crash leaves there is hidden, and removed by the next export."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    for left in folder.parent.glob(f".{glob.escape(folder.name)}.*"):
        shutil.rmtree(left)
    made = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        for name, content in files.items():
            with (made / name).open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        made.chmod(0o755)
        sync_folder(made)
        if folder.is_dir():
            former = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
            folder.replace(former)
            made.replace(folder)
            shutil.rmtree(former)
        else:
            made.replace(folder)
        sync_folder(folder.parent)
    finally:
        shutil.rmtree(made, ignore_errors=True)
