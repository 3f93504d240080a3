"""The frozen base model: loaded tensor by tensor at a chosen precision, described for planners, restored exactly.

Names of modules and tensors are those of the plain Hugging Face model. A linear layer's weight is (out x in) here for
every architecture: GPT-2's transposed `Conv1D` becomes an ordinary linear layer while loading.
"""

from __future__ import annotations

import importlib
import json
import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from shared import bases
from shared.adapter import Places
from shared.allocator import give_back, spare_imported
from shared.jobs import Bits, TaskSpec
from shared.modeling.data import Beat, silent
from shared.modeling.faults import ModelFault, one_line
from shared.modeling.parameters import Source, put, set_module, stored
from shared.modeling.weights import WeightFiles
from shared.tensors import Array
from shared.units import Group

log = logging.getLogger(__name__)
_BLOCK = re.compile(r"\.(\d+)\.")
FACTORIES = {
    "classification": "AutoModelForSequenceClassification", "causal": "AutoModelForCausalLM",
    "image": "AutoModelForImageClassification",
}  # fmt: skip
_HEADS = frozenset({"classifier", "score", "pre_classifier"})


Cut = tuple[Places | None, Places | None]
"""The rows and columns of a stored layer that are left (None: all)."""


@dataclass(frozen=True)
class Linear:
    """A linear layer inside transformer block `block`: W is (out x inp)."""

    name: str
    out: int
    inp: int
    block: int


@dataclass
class Base:
    """A loaded base model with its tokenizer.

    `head`: tensors that are always tuned themselves, float32, by name. `shapes`: of every parameter, a shared one once.
    """

    folder: Path
    kind: str
    labels: int
    max_tokens: int
    bits: Bits
    device: str
    model: Any
    tokenizer: Any
    linears: dict[str, Linear]
    head: dict[str, nn.Parameter]
    shapes: dict[str, tuple[int, ...]] = field(repr=False, default_factory=dict)
    _sources: dict[str, Source] = field(repr=False, default_factory=dict)
    cuts: dict[str, Cut] = field(repr=False, default_factory=dict)
    """Pruned layer -> its rows and columns in the stored one (None: all)."""
    whole: dict[str, Linear] = field(repr=False, default_factory=dict)
    """Pruned layer -> what it was."""
    groups: list[Group] = field(repr=False, default_factory=list)
    """What can be pruned of the whole model, once that was asked for."""
    half: tuple[Literal["lower", "upper"], int] | None = None
    """Which part of the model is left of it, and at which block it was cut (`shared.modeling.split`); None: all."""
    _folded: set[str] = field(default_factory=set)
    _tuned: set[str] = field(repr=False, default_factory=set)

    @property
    def compute(self) -> torch.dtype:
        """The precision of activations."""
        return compute_dtype(self.bits)

    @property
    def dense(self) -> dict[str, nn.Parameter]:
        """The tensors that are tuned themselves: the head, and what `tune_densely` named."""
        return self.head | {name: self.model.get_parameter(name) for name in sorted(self._tuned)}

    def tune_densely(self, names: Iterable[str]) -> None:
        """Have the parameters `names` tuned themselves, beside the head; all others get their stored values back.

        Only for a base of 32 bits without adapters on it. Raises `ModelFault` for a name that is no parameter.
        """
        wanted = set(names) - self.head.keys()
        if wanted and self.bits != 32:
            raise ModelFault("only an fp32 base can be tuned itself")
        if unknown := sorted(wanted - self.shapes.keys()):
            raise ModelFault(f"the base has no parameter {unknown[0]}")
        self._read_again(self._tuned - wanted)
        self._tuned = wanted

    def restore(self) -> None:
        """Give every parameter but the head its stored value, byte by byte."""
        self.tune_densely(())
        if self.bits == 32:  # nothing else is ever written to
            self.fold({})

    def tunable(self, targets: Iterable[str]) -> list[Linear]:
        """The linear layers whose name ends with one of `targets` (none: all). Raises `ModelFault` if that is none."""
        wanted = tuple(targets)
        found = [
            linear for linear in self.linears.values()
            if not wanted or any(linear.name == t or linear.name.endswith(f".{t}") for t in wanted)
        ]  # fmt: skip
        if not found:
            names = sorted({name.rpartition(".")[2] for name in self.linears})
            raise ModelFault(f"base.targets {list(wanted)}: no such linear layer; there are {', '.join(names)}")
        return found

    def fold(self, deltas: Mapping[str, tuple[Array, Array]]) -> None:
        """Make each weight its stored value plus b @ a (b out x rank, a rank x in), and all others their stored value.

        Reads the stored values again, so that nothing drifts over rounds. Only for a base of 32 bits.
        """
        if self.bits != 32:
            raise ModelFault("only an fp32 base takes a folded adapter")
        self._read_again(f"{name}.weight" for name in self._folded | deltas.keys())
        for name, factors in deltas.items():
            weight = self.model.get_submodule(name).get_parameter("weight")
            with torch.no_grad():
                b, a = (torch.from_numpy(np.array(part)).to(weight.device) for part in factors)
                weight.addmm_(b, a)
        self._folded = set(deltas)

    def whole_size(self, module: str) -> tuple[int, int]:
        """(out, in) of linear layer `module` before anything of it was pruned."""
        linear = self.whole.get(module, self.linears[module])
        return linear.out, linear.inp

    def value(self, files: WeightFiles, name: str, cut: Cut | None = None) -> torch.Tensor:
        """The stored value of a parameter, float32; of a pruned layer what is left of it, or what `cut` would leave."""
        module, _, leaf = name.rpartition(".")
        source = self._sources[name]
        if source.key in files:
            value = stored(files, source)
        else:  # packed: what it says is all there is
            from shared.modeling.quantization import from_parts

            shape = torch.Size(self.whole_size(module))
            layer: Any = from_parts(files.parts(source.key), shape, False, self.bits, self.compute, self.device)
            value = layer.dequantized().float().cpu()
        rows, columns = cut or self.cuts.get(module, (None, None))
        value = value if rows is None else value[torch.from_numpy(rows)]
        return value if columns is None or leaf != "weight" else value[:, torch.from_numpy(columns)]

    def is_transposed(self, module: str) -> bool:
        """Whether the weight of linear layer `module` is stored (in x out)."""
        return self._sources[f"{module}.weight"].transposed

    def source_key(self, module: str) -> str:
        """The name under which the weight of linear layer `module` is stored."""
        return self._sources[f"{module}.weight"].key

    def set_dense(self, values: Mapping[str, Array]) -> None:
        """Copy the tensors of `dense` out of an adapter whose names and shapes were checked."""
        dense = self.dense
        with torch.no_grad():
            for name, value in values.items():
                dense[name].copy_(torch.from_numpy(np.array(value)))

    def _read_again(self, names: Iterable[str]) -> None:
        """Give the parameters `names` their stored values."""
        files = WeightFiles(self.folder)
        with torch.no_grad():
            for name in sorted(names):
                self.model.get_parameter(name).copy_(self.value(files, name))


def import_libraries(beat: Beat = silent) -> None:
    """Import what loading a model needs, which takes seconds and a third of the agent's memory."""
    for name in ("transformers.modeling_utils", "accelerate", "peft"):
        importlib.import_module(name)
        beat("starting")


def compute_dtype(bits: Bits) -> torch.dtype:
    """Precision of activations over a base of `bits`."""
    return torch.float32 if bits == 32 else torch.bfloat16


def load(folder: Path, task: TaskSpec, bits: Bits = 32, device: str = "cpu", beat: Beat = silent) -> Base:
    """Load the model in `folder` for `task`. One stored tensor at a time is held beside the model.

    The head is not initialised; `fresh_head` gives its first values. Raises `ModelFault` with a one-line reason.
    """
    packed = bases.read(folder)
    if packed is not None and packed.bits != bits:
        raise ModelFault(f"{folder}: packed at {packed.bits} bits, {bits} are wanted")
    base, transposed = _bare(folder, task, bits, device)
    model = base.model
    beat("loading the base")
    missing = _fill(base, transposed, beat)
    if missing:
        raise ModelFault(f"{folder}: its weights lack {missing[0]} and {len(missing) - 1} more")
    _finish_head(base)
    base.shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    model.to(device)
    model.eval()
    model.requires_grad_(False)
    # Without it the stored tensors that were read one by one stay resident.
    give_back()
    return base


def outline(folder: Path, task: TaskSpec, bits: Bits, blocks: int) -> Base:
    """A model of the architecture in `folder` with only so many blocks, its memory never written: for counting.

    It computes in the precision of a base of `bits`. Raises `ModelFault` as `load` does.
    """
    base, _ = _bare(folder, task, bits, "cpu", blocks)
    model = base.model
    for name, parameter in list(model.named_parameters()):
        put(model, name, torch.empty(parameter.shape, dtype=base.compute))
    model.tie_weights()
    _finish_head(base)
    model.requires_grad_(False)
    return base


def _bare(folder: Path, task: TaskSpec, bits: Bits, device: str, blocks: int = 0) -> tuple[Base, set[str]]:
    """A base whose parameters hold nothing yet, and the names of the layers that its files hold transposed."""
    if task.kind == "image" and bits != 32:
        raise ModelFault("task.kind image: its models compute at 32 bits only")
    spare_imported(import_libraries)
    tokenizer = _tokenizer(folder, task)
    model = _empty_model(folder, task, tokenizer, blocks)
    transposed = _conv1d_to_linear(model)
    base = Base(
        folder=folder, kind=task.kind, labels=len(task.labels), max_tokens=task.max_tokens, bits=bits, device=device,
        model=model, tokenizer=tokenizer, linears={linear.name: linear for linear in _linears(model)}, head={},
    )  # fmt: skip
    return base, transposed


def fresh_head(base: Base, seed: int) -> dict[str, Array]:
    """First values of the head: matrices normal(0, 0.02), biases zero, norms one; the same for the same seed."""
    values: dict[str, Array] = {}
    generator = np.random.default_rng([seed, 0x4EAD])
    for name in sorted(base.head):
        shape = tuple(base.head[name].shape)
        if len(shape) > 1:
            values[name] = generator.normal(0.0, 0.02, shape).astype(np.float32)
        else:
            values[name] = np.full(shape, 0.0 if name.endswith("bias") else 1.0, dtype=np.float32)
    return values


def count_parameters(base: Base) -> tuple[int, int]:
    """Parameters in the blocks' linear weights (those that quantization covers), and all others."""
    covered = sum(linear.out * linear.inp for linear in base.linears.values())
    total = 0
    for name, parameter in base.model.named_parameters():
        if name.removesuffix(".weight") not in base.linears:
            total += parameter.numel()
    return covered, total


def _tokenizer(folder: Path, task: TaskSpec) -> Any:
    if task.kind == "image":
        return importlib.import_module("shared.modeling.convolutional").pixels(folder)
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelFault(f"{folder}: its tokenizer can't be loaded: {one_line(error, 160)}") from error


def _empty_model(folder: Path, task: TaskSpec, tokenizer: Any, blocks: int = 0) -> Any:
    """The architecture with parameters that hold no memory yet; buffers are real. `blocks`: other than its own."""
    import transformers

    accelerate: Any = importlib.import_module("accelerate")
    factory: Any = getattr(transformers, FACTORIES[task.kind])

    try:
        config = transformers.AutoConfig.from_pretrained(str(folder), trust_remote_code=False)
        if blocks:
            config.num_hidden_layers = blocks
        if getattr(config, "pad_token_id", 0) is None:
            config.pad_token_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else config.eos_token_id
        if task.kind != "causal":
            config.num_labels = len(task.labels)
            config.problem_type = "single_label_classification"
        with accelerate.init_empty_weights(include_buffers=False):
            model = factory.from_config(config, trust_remote_code=False, dtype=torch.float32)
    except (OSError, ValueError, KeyError, json.JSONDecodeError) as error:
        raise ModelFault(f"{folder}: not a model for {task.kind}: {one_line(error, 160)}") from error
    _check_length(folder, config, task.max_tokens)
    if task.kind == "causal":
        model.config.use_cache = False
    return model


def _check_length(folder: Path, config: Any, max_tokens: int) -> None:
    positions = getattr(config, "max_position_embeddings", None)
    if positions is None:
        return
    if config.model_type.endswith("roberta"):
        positions -= config.pad_token_id + 1  # it counts positions from there on
    if max_tokens > positions:
        raise ModelFault(f"task.max_tokens {max_tokens}: {folder} takes {positions} at most")


def _conv1d_to_linear(model: nn.Module) -> set[str]:
    """Replace GPT-2's (in x out) layers by linear ones; the names of those replaced."""
    from transformers.pytorch_utils import Conv1D

    replaced = [name for name, module in model.named_modules() if isinstance(module, Conv1D)]
    for name in replaced:
        old = model.get_submodule(name)
        inp, out = old.get_parameter("weight").shape
        set_module(model, name, nn.Linear(inp, out, device="meta"))
    return set(replaced)


def _linears(model: nn.Module) -> Iterator[Linear]:
    for name, module in model.named_modules():
        block = _BLOCK.search(f".{name}.")
        if isinstance(module, nn.Linear) and block and name.partition(".")[0] not in _HEADS:
            yield Linear(name, module.out_features, module.in_features, int(block.group(1)))
        elif isinstance(module, nn.Conv2d) and block:  # what it multiplies; no LoRA goes there
            yield Linear(name, module.out_channels, module.weight[0].numel(), int(block.group(1)))


def _fill(base: Base, transposed: set[str], beat: Beat) -> list[str]:
    """Read every parameter that is stored; the names of those inside the base model that are not."""
    files = WeightFiles(base.folder)
    prefix = base.model.base_model_prefix
    for name, _ in list(base.model.named_parameters(remove_duplicate=False)):
        key = files.key(name, prefix)
        if key is None:
            continue
        module = name.rpartition(".")[0]
        turn = module in transposed and name.endswith("weight")
        linear = base.linears.get(module)
        weight = linear if name.endswith(".weight") else None
        base._sources[name] = Source(key, turn)
        if weight is not None:
            beat("loading the base")
            if key not in files:
                _put_packed(base, weight, files.parts(key))
                continue
        value = files.read(key)
        value = value.t() if turn else value
        if weight is not None and base.bits < 16:
            put_quantized(base, weight, value)
            continue
        put(base.model, name, value.to(base.compute).contiguous())
    base.model.tie_weights()
    return _missing(base)


def _missing(base: Base) -> list[str]:
    """Parameters that no file gave: those outside the blocks become the head; the others are returned."""
    lacking = [name for name, parameter in base.model.named_parameters() if parameter.is_meta]
    if base.kind != "causal":
        for name in [n for n in lacking if not _BLOCK.search(n) and "embed" not in n]:
            lacking.remove(name)
            shape = base.model.get_parameter(name).shape
            put(base.model, name, torch.zeros(shape))
    return lacking


def _finish_head(base: Base) -> None:
    """Head tensors in float32, with the inputs of their modules cast to it."""
    if base.kind == "causal":
        return
    stored = WeightFiles(base.folder)
    for name, _ in list(base.model.named_parameters()):
        if name.partition(".")[0] in _HEADS or stored.key(name, base.model.base_model_prefix) is None:
            owner = base.model.get_submodule(name.rpartition(".")[0])
            put(base.model, name, base.model.get_parameter(name).detach().to(base.device, torch.float32))
            base.head[name] = base.model.get_parameter(name)
            if base.compute is not torch.float32 and not owner._forward_pre_hooks:
                owner.register_forward_pre_hook(_cast_to_float)


def _cast_to_float(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(arg.float() if isinstance(arg, torch.Tensor) and arg.is_floating_point() else arg for arg in args)


def put_quantized(base: Base, linear: Linear, value: torch.Tensor) -> None:
    """Make `value` (out x in) the weight of `linear`, at the base's bits."""
    from shared.modeling.quantization import quantized

    old = base.model.get_submodule(linear.name)
    has_bias = old.bias is not None
    set_module(base.model, linear.name, quantized(value, has_bias, base.bits, base.compute, base.device))


def _put_packed(base: Base, linear: Linear, parts: dict[str, torch.Tensor]) -> None:
    from shared.modeling.quantization import from_parts

    has_bias = base.model.get_submodule(linear.name).bias is not None
    shape = torch.Size((linear.out, linear.inp))
    set_module(base.model, linear.name, from_parts(parts, shape, has_bias, base.bits, base.compute, base.device))
