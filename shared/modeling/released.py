"""The folder of a release as a model: on its base by peft, whole by itself, or with bottleneck adapters.

The same files that any program reads, opened as any program opens them: a release that loads here loads there. Of a
job that pruned, the model is the smaller one (`shared.pruning_file`), which other programs make by `muster export`.
"""

from __future__ import annotations

import dataclasses
import json
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from shared import pruning_file, units
from shared.errors import MusterError
from shared.files import write_whole
from shared.jobs import Bits, TaskSpec
from shared.modeling import base_model, bottleneck, pruning
from shared.modeling.base_model import Base
from shared.modeling.data import Beat, silent
from shared.modeling.faults import AdapterFault, ModelFault, one_line
from shared.modeling.parameters import set_module
from shared.pruning_file import PruningFile
from shared.release_messages import ReleaseKind
from shared.releases import FILE_MODE

_BASE_KEY = "base_model_name_or_path"
_PREFIX = "base_model.model."
TENSORS = "adapter_model.safetensors"
_UNREADABLE = (
    MusterError, OSError, ValueError, LookupError, RuntimeError, TypeError, AttributeError, SafetensorError,
)  # fmt: skip
_CONFIGS = ("adapter_config.json", "bottleneck_config.json")


def untuned(base: Path, task: TaskSpec, bits: Bits, device: str, seed: int, beat: Beat = silent) -> Base:
    """The base alone, with the fresh head that its job began with. Raises `ModelFault`."""
    loaded = base_model.load(base, task, bits, device, beat)
    loaded.set_dense(base_model.fresh_head(loaded, seed))
    return loaded


def opened(
    folder: Path, kind: ReleaseKind, base: Path | None, task: TaskSpec, bits: Bits, device: str, beat: Beat = silent
) -> Base:
    """The model that a release makes of `base` (a whole model needs none), ready to answer.

    Raises `AdapterFault` where the release does not load, `ModelFault` where the base does not.
    """
    if kind == "model":
        try:
            return base_model.load(folder, task, bits, device, beat)
        except ModelFault as error:
            raise AdapterFault(str(error)) from error
    if base is None:
        raise ModelFault("the release is an adapter, and its base is not here")
    loaded = base_model.load(base, task, bits, device, beat)
    try:
        model = _with_bottlenecks(loaded, folder) if kind == "bottleneck" else _with_lora(loaded, folder)
    except _UNREADABLE as error:
        raise AdapterFault(f"the release does not load: {one_line(error, 200)}") from error
    return dataclasses.replace(loaded, model=model.eval())


def _with_lora(base: Base, folder: Path) -> Any:
    from peft import LoraConfig, PeftModel

    config = LoraConfig.from_pretrained(str(folder))
    # Here every layer is an ordinary linear one, GPT-2's too.
    config.fan_in_fan_out = False
    if base.bits == 8:
        from shared.modeling.quantization import LinearNF, lora_nf

        config._register_custom_module({LinearNF: lora_nf()})
    base.model.is_loaded_in_4bit = base.bits == 4
    told = pruning_file.read(folder)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Unsupported layer type")  # ours, registered above
        if own := _trained_itself(base, folder):
            return _sided(base, folder, config, own)
        if told is not None:
            wrapped = _smaller(base, told, folder, config)
        else:
            wrapped = PeftModel.from_pretrained(base.model, str(folder), config=config, torch_device=base.device)
    # What peft wraps is the same model, its layers replaced; it still is one of transformers.
    return wrapped.get_base_model()


def _trained_itself(base: Base, folder: Path) -> set[str]:
    """The tensors beside LoRA and the head: one side of a model that was split."""
    with safe_open(folder / TENSORS, framework="pt") as file:
        names = {key.removeprefix(_PREFIX) for key in file.keys() if ".lora_" not in key}  # noqa: SIM118  # no mapping
    return names - base.head.keys()


def _sided(base: Base, folder: Path, config: Any, own: set[str]) -> Any:
    """`base` with one side as it was trained itself, at full precision whatever the bits of the rest, and LoRA on the
    other."""
    from peft import get_peft_model, set_peft_model_state_dict

    tensors = {key.removeprefix(_PREFIX): one for key, one in load_file(folder / TENSORS, device=base.device).items()}
    kind = next(one.dtype for one in base.model.parameters() if one.is_floating_point())
    for module in sorted({name.rpartition(".")[0] for name in own} & base.linears.keys()):
        linear = base.linears[module]
        # A weight of few bits takes no values; and the folder stores GPT-2's as transformers does.
        layer = torch.nn.Linear(linear.inp, linear.out, f"{module}.bias" in own, device=base.device, dtype=kind)
        set_module(base.model, module, layer)
        if base.is_transposed(module):
            tensors[f"{module}.weight"] = tensors[f"{module}.weight"].T
    with torch.no_grad():
        for name in sorted(own | base.head.keys()):
            base.model.get_parameter(name).copy_(tensors[name])
    config.modules_to_save = config.task_type = None
    factors = {f"{_PREFIX}{name}": one for name, one in tensors.items() if ".lora_" in name}
    if not factors:
        return base.model
    wrapped = get_peft_model(base.model, config)
    found: Any = set_peft_model_state_dict(wrapped, factors)
    if found.unexpected_keys:
        raise KeyError(found.unexpected_keys[0])
    return wrapped.get_base_model()


def _smaller(base: Base, told: PruningFile, folder: Path, config: Any) -> Any:
    """What is left of `base` after the job's pruning, with what is left there of its adapter."""
    from peft import get_peft_model, set_peft_model_state_dict

    kept = told.units_left()
    pruning.prune(base, kept)
    tensors = load_file(folder / TENSORS, device=base.device)
    for module, sides in units.places(told.groups, kept).items():
        for part, dim, where in (("lora_B", 0, sides.get("out")), ("lora_A", 1, sides.get("in"))):
            name = f"base_model.model.{module}.{part}.weight"
            if where is not None and name in tensors:
                tensors[name] = tensors[name].index_select(dim, torch.from_numpy(where).to(base.device))
    wrapped = get_peft_model(base.model, config)
    found: Any = set_peft_model_state_dict(wrapped, tensors)
    if found.unexpected_keys:
        raise KeyError(found.unexpected_keys[0])
    return wrapped


def _with_bottlenecks(base: Base, folder: Path) -> Any:
    return bottleneck.load_export(base.model, folder)


def says(base: Base) -> list[float]:
    """What a classifier answers to a word, or a language model expects after it: whether it computes at all."""
    ids = base.tokenizer("one", return_tensors="pt")["input_ids"].to(base.device)
    if not ids.shape[1]:
        ids = torch.zeros((1, 1), dtype=torch.int64, device=base.device)
    with torch.inference_mode():
        logits = base.model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    return [float(value) for value in logits.float().flatten()[:64]]


def name_base(folder: Path, base: Path) -> None:
    """Have the files of a release name the base where this device has it, for programs that look there."""
    for name in _CONFIGS:
        path = folder / name
        if not path.is_file():
            continue
        config = json.loads(path.read_text(encoding="utf-8"))
        if config.get(_BASE_KEY) != str(base):
            content = json.dumps({**config, _BASE_KEY: str(base), "revision": None}, indent=2) + "\n"
            write_whole(path, content.encode())
            path.chmod(FILE_MODE)


def base_of(folder: Path) -> Path | None:
    """The base that the files of a release name; None where they name none."""
    for name in _CONFIGS:
        if (folder / name).is_file():
            return Path(json.loads((folder / name).read_text(encoding="utf-8"))[_BASE_KEY])
    return None
