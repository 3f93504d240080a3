"""A finished job as ordinary model weights: the base with the adapter added, for programs that know nothing of LoRA.

The sum is made on an fp32 copy, since one fold into fewer bits costs up to six times what was learned. The result has
the modules of the base, name by name, loads by transformers' `from_pretrained` alone, and infers at no extra cost.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from coordinator.export_tensors import DIGEST_NOTE
from shared.errors import UserError


def merge(adapter: Path, folder: Path, base: str = "") -> Path:
    """Write the model of the exported PEFT folder `adapter` as `folder`, which must not exist or be empty.

    `base`: folder or hub id of the base model; empty: as the adapter names it. Whole or not at all. Raises `UserError`
    with a one-line reason where there is nothing to merge into.
    """
    check_new(folder)
    if (adapter / "config.json").is_file():
        raise UserError("the job trained the whole model: its export is one already, leave out --merged")
    if (adapter / "bottleneck_config.json").is_file():
        raise UserError("bottleneck adapters are not linear and can't be merged into the base: leave out --merged")
    config = _read(adapter / "adapter_config.json")
    base = base or str(config.get("base_model_name_or_path") or "")
    if config.get("task_type") not in ("SEQ_CLS", "CAUSAL_LM"):
        raise UserError(f"{adapter}: there is no transformer behind this task, so nothing to merge the adapter into")
    model, tokenizer = _merged(adapter, _base_folder(adapter, base, config), str(config["task_type"]))
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".muster-merged-") as temporary:
        made = Path(temporary) / "model"
        model.save_pretrained(str(made))
        tokenizer.save_pretrained(str(made))
        made.replace(folder)
    return folder


def check_new(folder: Path) -> None:
    """Raise `UserError` where `folder` holds something already."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder}: exists already and is not an empty folder")


def _base_folder(adapter: Path, base: str, config: Mapping[str, Any]) -> Path:
    """The base's files; refused where they are not those that the adapter was trained on."""
    try:
        from safetensors import safe_open

        from shared.modeling import weights
    except ImportError as error:
        raise UserError(f"merging needs {error.name}: pip install 'muster[train]'") from error
    try:
        folder = weights.resolve(base, str(config.get("revision") or ""), hub=True)
    except UserError as error:
        raise UserError(f"base model {error}; name the base's folder with --base") from error
    if "quantization_config" in _read(folder / "config.json"):
        raise UserError(f"base model {base}: its weights are stored quantized; merge into the unquantized ones")
    with safe_open(adapter / "adapter_model.safetensors", framework="pt") as file:
        wanted = (file.metadata() or {}).get(DIGEST_NOTE, "")
    found = weights.base_digest(folder)
    if wanted and wanted != found:
        raise UserError(f"base model {base}: digest {found[:12]}, the adapter was trained on {wanted[:12]}")
    return folder


def _merged(adapter: Path, base: Path, task: str) -> tuple[Any, Any]:
    """(the model with the adapter in its weights, its tokenizer)."""
    import torch
    import transformers
    from peft import PeftModel

    from shared.modeling.faults import one_line

    labels = labels_of(adapter)
    given: dict[str, Any] = {"num_labels": len(labels)} if task == "SEQ_CLS" else {}
    name = "AutoModelForSequenceClassification" if task == "SEQ_CLS" else "AutoModelForCausalLM"
    factory: Any = getattr(transformers, name)
    logs: Any = transformers.logging
    loud = logs.get_verbosity()
    # It warns of a head that the base lacks, which the adapter brings.
    logs.set_verbosity_error()
    try:
        model = factory.from_pretrained(str(base), dtype=torch.float32, trust_remote_code=False, **given)
        tokenizer = transformers.AutoTokenizer.from_pretrained(str(base), trust_remote_code=False)
        graph = _graph(model)
        merged: Any = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise UserError(f"base model {base}: does not take the adapter: {one_line(error, 200)}") from error
    finally:
        logs.set_verbosity(loud)
    if _graph(merged) != graph:
        odd = sorted(set(_graph(merged)) ^ set(graph))[0][0]
        raise UserError(f"base model {base}: {odd!r} would differ from the base's after merging")
    if labels:
        merged.config.id2label = dict(enumerate(labels))
        merged.config.label2id = {label: index for index, label in enumerate(labels)}
    return merged, tokenizer


def _graph(model: Any) -> list[tuple[str, str, str]]:
    """Name, type and own parameters of every module, in their order."""
    return [
        (name, type(module).__name__, str([(n, tuple(p.shape)) for n, p in module.named_parameters(recurse=False)]))
        for name, module in model.named_modules()
    ]


def labels_of(adapter: Path) -> list[str]:
    """Names of the classes in an exported adapter's folder; [] where it is no classifier."""
    path = adapter / "labels.json"
    if not path.is_file():
        return []
    found = _read(path)["id2label"]
    return [found[str(index)] for index in range(len(found))]


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: can't be read: {getattr(error, 'strerror', None) or error}") from error
    if not isinstance(found, dict):
        raise UserError(f"{path}: not a JSON object")
    return found
