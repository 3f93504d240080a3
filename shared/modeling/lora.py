"""LoRA by peft: the trainable part of the global adapter, its frozen rest, and reading an update back.

Of the global adapter's directions of a module, as published, the first `trained` become trainable, more are added
fresh up to the rank asked for, and the rest stays frozen: folded into an fp32 weight, or beside a weight of fewer bits
as a second adapter, since one fold into a quantized weight costs up to six times the delta. The start model is the
exact global one either way. The split A = V^T/sqrt(3), B = sqrt(3) U sigma / scaling gives both factors the size that
LoRA's own start has (rows of kaiming-uniform A have norm 1/sqrt(3)). Some aggregators ask for other starts than this
(`shared.starts`): no rest, a new LoRA beside all of it, or B alone trained.
"""

from __future__ import annotations

import hashlib
import math
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from shared import units
from shared.adapter import Adapter, Factors, Places
from shared.modeling import bottleneck, pruning
from shared.modeling.base_model import Base
from shared.modeling.faults import AdapterFault
from shared.modeling.parameters import set_module
from shared.starts import Start, drops_rest, fixed_rows, start_of, unsent_a
from shared.tensors import Array

Cuts = dict[str, tuple[Places | None, Places | None]]
OWN = "own"
REST = "rest"
_RANK_STEP = 16


@dataclass(frozen=True)
class Split:
    """One module's part of the global adapter. `b`, `a`: to train (rank columns); `rest`: b and a of what stays."""

    b: Array
    a: Array
    trained: int
    rest: tuple[Array, Array] | None


@dataclass
class Carried:
    """The trainable tensors on a base, by module; `trained` directions of the global adapter are among them."""

    factors: dict[str, tuple[nn.Parameter, nn.Parameter]]
    """Module -> (b, a)."""
    trained: dict[str, int]
    scaling: float
    dense: dict[str, nn.Parameter]
    """Tensors that are trained themselves: the head with bottleneck adapters, or every parameter of the base."""
    trains_a: bool = True
    """False: every A is the job's and stays as it is."""
    cuts: Cuts = field(default_factory=dict)
    """Module of a pruned base -> the rows and columns of the whole layer that it has (None: all)."""

    def trained_factors(self) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        """The factors that an optimizer may move: every B, and every A where they are trained."""
        return [b for b, _ in self.factors.values()], [a for _, a in self.factors.values() if self.trains_a]

    def parameters(self) -> list[nn.Parameter]:
        """All trainable tensors: factors B, factors A, then dense ones."""
        bs, inputs = self.trained_factors()
        return bs + inputs + list(self.dense.values())

    def named(self) -> dict[str, nn.Parameter]:
        """The trainable tensors by a name that is stable over restarts."""
        named = dict(self.dense)
        for module, (b, a) in self.factors.items():
            named[f"{module}.lora_b"] = b
            if self.trains_a:
                named[f"{module}.lora_a"] = a
        return named


def check_adapter(base: Base, adapter: Adapter) -> None:
    """Raise `AdapterFault` unless every tensor of the adapter fits the base."""
    for name, part in adapter.factors.items():
        linear = base.linears.get(name)
        if linear is None:
            raise AdapterFault(f"adapter of round {adapter.round}: the base has no linear layer {name}")
        out, inp = base.whole_size(name)
        if (part.b.shape[0], part.a.shape[1]) != (out, inp):
            raise AdapterFault(
                f"adapter of round {adapter.round}: {name} is {out}x{inp}, "
                f"its factors are for {part.b.shape[0]}x{part.a.shape[1]}"
            )
    shapes = _dense_shapes(base, adapter)
    given = {name: tuple(tensor.shape) for name, tensor in adapter.dense.items()}
    if given != shapes:
        odd = sorted(name for name in shapes.keys() | given.keys() if shapes.get(name) != given.get(name))
        raise AdapterFault(
            f"adapter of round {adapter.round}: dense tensor {odd[0]} is {given.get(odd[0])}, "
            f"the base wants {shapes.get(odd[0])}"
        )


def _dense_shapes(base: Base, adapter: Adapter) -> dict[str, tuple[int, ...]]:
    """The dense tensors that an adapter for `base` must hold."""
    start = start_of(adapter.notes)
    if start != "dense":
        head = {name: tuple(tensor.shape) for name, tensor in base.head.items()}
        if start == "sides":
            return head | {name: base.shapes[name] for name in adapter.dense.keys() & base.shapes.keys()}
        return head | bottleneck.dense_shapes(base, adapter.dense) if start == "bottleneck" else head
    if base.bits != 32:
        raise AdapterFault(f"adapter of round {adapter.round}: it is the whole model, for a base of 32 bits only")
    return base.shapes


def left_of(base: Base, name: str, part: Factors) -> Factors:
    """What is left of a module's global factors on a base that was pruned."""
    return units.left_of(part, *base.cuts.get(name, (None, None)))


def product(part: Factors, start: int = 0) -> tuple[Array, Array]:
    """b and a whose product is what directions `start` and later of an adapter add to W."""
    b = part.b[:, start:] * np.float32(part.scaling)
    if part.sigma is not None:
        b = b * part.sigma[start:]
    return np.ascontiguousarray(b, dtype=np.float32), part.a[start:]


def merge(base: Base, adapter: Adapter) -> None:
    """Make `base` (fp32) the global model: the units cut that are gone, every direction folded, the dense tensors set.

    Raises `DecodeError` and `ModelFault` where the units are not the base's.
    """
    check_adapter(base, adapter)
    detach(base)
    if adapter.kept or base.cuts:
        pruning.prune(base, units.unpack(pruning.groups_of(base), adapter.kept))
    if start_of(adapter.notes) == "bottleneck":
        _with_bottlenecks(base, adapter, _widths(base, adapter), 0)
        return
    base.tune_densely(adapter.dense)
    base.fold({name: product(left_of(base, name, part)) for name, part in adapter.factors.items() if part.rank})
    base.set_dense(adapter.dense)


def split(part: Factors | None, out: int, fresh: Array, scaling: float, start: Start = "directions") -> Split:
    """Divide a module's global directions for a device that begins as `start` says.

    `fresh` (rank x in): the rows of A where the global adapter gives none.
    """
    a, rank = fresh.copy(), len(fresh)
    b = np.zeros((out, rank), dtype=np.float32)
    if part is None or not part.rank:
        return Split(b, a, 0, None)
    trained = 0 if start == "fresh" else min(rank, part.rank)
    if part.sigma is None:
        b[:, :trained] = part.b[:, :trained] * np.float32(part.scaling / scaling)
        a[:trained] = part.a[:trained]
    else:
        size = math.sqrt(3.0)
        b[:, :trained] = part.b[:, :trained] * part.sigma[:trained] * np.float32(size * part.scaling / scaling)
        a[:trained] = part.a[:trained] / np.float32(size)
    stays = trained < part.rank and not (rank and drops_rest(start))
    return Split(b, a, trained, product(part, trained) if stays else None)


def carry(
    base: Base, adapter: Adapter, ranks: Mapping[str, int], *, alpha_ratio: float, seed: int, round: int
) -> Carried:
    """Put the global adapter on `base` with trainable LoRA of `ranks`; whatever it carried before is taken off.

    Raises `AdapterFault` where adapter or ranks do not fit the base.
    """
    check_adapter(base, adapter)
    start = start_of(adapter.notes)
    if start == "bottleneck":
        detach(base)
        return _with_bottlenecks(base, adapter, ranks, seed)
    unknown = sorted(ranks.keys() - base.linears.keys())
    if unknown:
        raise AdapterFault(f"ranks name {unknown[0]}, a linear layer that the base does not have")
    detach(base)
    base.tune_densely(adapter.dense)
    wanted = {name: rank for name, rank in sorted(ranks.items()) if rank > 0}
    splits = {}
    for name in sorted(wanted.keys() | adapter.factors.keys()):
        rank, inp = wanted.get(name, 0), base.whole_size(name)[1]
        fresh = fixed_rows(seed, name, rank, inp) if start == "frozen_a" else _fresh_rows(seed, round, name, rank, inp)
        columns = base.cuts.get(name, (None, None))[1]
        fresh = fresh if columns is None else fresh[:, columns]
        part = adapter.factors.get(name)
        part = None if part is None else left_of(base, name, part)
        splits[name] = split(part, base.linears[name].out, fresh, alpha_ratio, start)
    rests = {name: part.rest for name, part in splits.items() if part.rest is not None}
    if base.bits == 32:
        base.fold(rests)
    else:
        rests = {name: _widened(*rest) for name, rest in rests.items()}
        _inject(base, REST, {name: rest[1].shape[0] for name, rest in rests.items()}, 1.0)
    _inject(base, OWN, wanted, alpha_ratio)
    base.set_dense(adapter.dense)
    _fill(base, {} if base.bits == 32 else rests, {name: splits[name] for name in wanted})
    layers = {name: base.model.get_submodule(name) for name in wanted}
    carried = Carried(
        factors={name: (layer.lora_B[OWN].weight, layer.lora_A[OWN].weight) for name, layer in layers.items()},
        trained={name: splits[name].trained for name in wanted},
        scaling=alpha_ratio,
        dense=base.dense,
        trains_a=start != "frozen_a",
        cuts=dict(base.cuts),
    )
    return _thawed(base, carried)


def _thawed(base: Base, carried: Carried) -> Carried:
    """Have gradients flow to what is carried, and to nothing else."""
    base.model.requires_grad_(False)
    for tensor in carried.parameters():
        tensor.requires_grad_(True)
    return carried


def _widths(base: Base, adapter: Adapter) -> dict[str, int]:
    return {block: width for block in bottleneck.sites(base) if (width := bottleneck.width_of(adapter.dense, block))}


def _with_bottlenecks(base: Base, adapter: Adapter, widths: Mapping[str, int], seed: int) -> Carried:
    """`base` with the head and the bottleneck adapters of the global adapter, each cut or grown to its width."""
    base.restore()
    tensors = bottleneck.put_on(base, adapter.dense, widths, seed)
    base.set_dense({name: adapter.dense[name] for name in base.head})
    return _thawed(base, Carried(factors={}, trained={}, scaling=1.0, dense=base.head | tensors))


def detach(base: Base) -> None:
    """Take every adapter off again; the base's own layers stay where they are."""
    from peft.tuners.lora import LoraLayer

    kinds = (LoraLayer, bottleneck.Bottlenecked)
    wrapped = {name: module for name, module in base.model.named_modules() if isinstance(module, kinds)}
    for name, layer in wrapped.items():
        set_module(base.model, name, layer.get_base_layer())
    _forget_config(base)
    for tensor in base.dense.values():
        tensor.requires_grad_(False)
        tensor.grad = None


def read_update(
    carried: Carried, *, job: str, round: int, attempt: int, base_digest: str, device: str = "",
    notes: dict[str, str] | None = None,
) -> Adapter:  # fmt: skip
    """The trainable tensors as an update."""
    factors = {}
    for name, (b, a) in carried.factors.items():
        trained = carried.trained[name]
        known = not carried.trains_a and trained == len(a)
        rows, columns = carried.cuts.get(name, (None, None))
        factors[name] = Factors(
            b=_array(b), a=unsent_a(trained) if known else _array(a), scaling=carried.scaling, trained=trained,
            rows=rows, columns=columns,
        )  # fmt: skip
    return Adapter(
        kind="update", job=job, round=round, base_digest=base_digest, factors=factors,
        dense={name: _array(tensor) for name, tensor in carried.dense.items()},
        attempt=attempt, device=device, notes=notes or {},
    )  # fmt: skip


def _widened(b: Array, a: Array) -> tuple[Array, Array]:
    """The same product with zeros beside it, up to a rank of whole `_RANK_STEP`s.

    torch's CPU library compiles and keeps a kernel for every shape it meets. Ranks of the global adapter differ by
    module and round: with 36 modules this took 130 MiB within three rounds (lab log, 2026-11-24).
    """
    more = -b.shape[1] % _RANK_STEP
    return np.pad(b, ((0, 0), (0, more))), np.pad(a, ((0, more), (0, 0)))


def _inject(base: Base, name: str, ranks: Mapping[str, int], scaling: float) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    if not ranks:
        return
    config = LoraConfig(
        r=1,
        lora_alpha=1,
        # As one expression: peft shortens a long list to suffixes.
        target_modules="|".join(re.escape(module) for module in ranks),
        rank_pattern={f"^{re.escape(module)}$": rank for module, rank in ranks.items()},
        alpha_pattern={f"^{re.escape(module)}$": scaling * rank for module, rank in ranks.items()},
    )
    if base.bits == 8:
        from shared.modeling.quantization import LinearNF, lora_nf

        config._register_custom_module({LinearNF: lora_nf()})
    # peft asks the model before it wraps a 4-bit layer of bitsandbytes as one.
    base.model.is_loaded_in_4bit = base.bits == 4
    _forget_config(base)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Unsupported layer type")  # ours, registered above
        inject_adapter_in_model(config, base.model, adapter_name=name, low_cpu_mem_usage=True)


def _forget_config(base: Base) -> None:
    """Peft leaves the last adapter's configuration on the model and would warn of it at the next."""
    if hasattr(base.model, "peft_config"):
        del base.model.peft_config


def _fill(base: Base, rests: Mapping[str, tuple[Array, Array]], own: Mapping[str, Split]) -> None:
    for name in sorted(rests.keys() | own.keys()):
        layer = base.model.get_submodule(name)
        active = []
        if name in rests:
            b, a = rests[name]
            _set_factors(layer, REST, b, a, base.device, base.compute)
            active.append(REST)
        if name in own:
            _set_factors(layer, OWN, own[name].b, own[name].a, base.device, torch.float32)
            active.append(OWN)
        layer.set_adapter(active)


class _Factor(nn.Linear):
    """A float32 factor used in the precision of its input: peft would keep a float32 copy of every input instead."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(input, self.weight.to(input.dtype))


def _set_factors(layer: Any, name: str, b: Array, a: Array, device: str, dtype: torch.dtype) -> None:
    layer.cast_input_dtype_enabled = False
    for factors, value in ((layer.lora_B, b), (layer.lora_A, a)):
        factor = _Factor(value.shape[1], value.shape[0], bias=False, device="meta")
        factor.weight = nn.Parameter(torch.from_numpy(np.array(value)).to(device, dtype))
        factors[name] = factor


def _array(tensor: torch.Tensor) -> Array:
    array: Array = tensor.detach().to("cpu", torch.float32).numpy().copy()
    return array


def _fresh_rows(seed: int, round: int, name: str, rank: int, inp: int) -> Array:
    """Kaiming-uniform rows, the same on every device: equal fresh directions make the sum of updates low in rank."""
    mixed = int.from_bytes(hashlib.sha256(f"{seed}/{round}/{name}".encode()).digest()[:8], "little")
    bound = 1.0 / math.sqrt(inp)
    return np.random.default_rng(mixed).uniform(-bound, bound, (rank, inp)).astype(np.float32)
