"""Adapter files: the global adapter that devices start from, and the updates they return.

One msgpack map. Per tuned module W (out x in) the product `scaling * b @ diag(sigma) @ a` is what it adds to W, with
b (out x rank), a (rank x in) and sigma (rank) present only in the global adapter's triplet form. Dense tensors (heads)
ride along whole. Needs numpy, so the daemon does not import it: to it an adapter is a file.
"""

from __future__ import annotations

import math
import mmap
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import msgpack
import msgspec
import numpy as np
import numpy.typing as npt
from msgspec import Meta

from shared import tensors
from shared.codec import SCHEMA
from shared.errors import DecodeError
from shared.jobs import Codec
from shared.tensors import Array, WireTensor

Kind = Literal["global", "update"]
MAX_PARTS = 16_384
"""Modules, and dense tensors, of one file; a file of more tiny ones would take many times its size in memory."""
MAX_SIDE = 2**20
"""Rows or columns of a layer that was pruned."""
Places = npt.NDArray[np.intp]
_Text = Annotated[str, Meta(max_length=1000)]
_Units = Annotated[dict[_Text, Annotated[bytes, Meta(max_length=2**17)]], Meta(max_length=1024)]


@dataclass(frozen=True)
class Factors:
    """What an adapter adds to one module: `scaling * b @ diag(sigma) @ a`.

    b (out x rank), a (rank x in), sigma (rank) or None for all ones; float32. `trained`: in an update, how many of the
    global adapter's directions (its first, the largest) are contained in it and so must leave the rest. An update under
    the start `frozen_a` has an a without columns where the global adapter holds all its rows. `rows`, `columns`: in an
    update of a pruned device, which of the whole layer's b's rows and a's columns are; None: all.
    """

    b: Array
    a: Array
    scaling: float = 1.0
    sigma: Array | None = None
    trained: int = 0
    rows: Places | None = None
    columns: Places | None = None

    @property
    def rank(self) -> int:
        """Columns of b."""
        return int(self.b.shape[1])


@dataclass(frozen=True)
class Adapter:
    """A decoded adapter file; its arrays are views of the file's bytes."""

    kind: Kind
    job: str
    round: int
    base_digest: str
    factors: dict[str, Factors]
    dense: dict[str, Array]
    attempt: int = 0
    device: str = ""
    notes: dict[str, str] = field(default_factory=dict)
    kept: dict[str, bytes] = field(default_factory=dict)
    """Of a global adapter: the heads and channels of the smaller model that it is for, as bits; {}: the whole base."""
    scores: dict[str, bytes] = field(default_factory=dict)
    """A byte for what each of them matters. In a global adapter what the fleet found, from which the model can be made
    of any size; in an update what its device found, 0 for those that are gone."""


class _WireModule(msgspec.Struct, frozen=True, kw_only=True):
    name: _Text
    scaling: float
    trained: int
    b: WireTensor
    a: WireTensor
    sigma: WireTensor | None = None
    rows: Annotated[bytes, Meta(max_length=MAX_SIDE // 8)] = b""
    columns: Annotated[bytes, Meta(max_length=MAX_SIDE // 8)] = b""
    """Bits, lowest first; empty: all."""


class _WireAdapter(msgspec.Struct, frozen=True, kw_only=True):
    schema: int
    kind: Kind
    job: _Text
    round: int
    base_digest: _Text
    modules: Annotated[list[_WireModule], Meta(max_length=MAX_PARTS)]
    dense: Annotated[list[tuple[_Text, WireTensor]], Meta(max_length=MAX_PARTS)]
    attempt: int = 0
    device: _Text = ""
    notes: Annotated[dict[_Text, str], Meta(max_length=1000)] = {}
    kept: _Units = {}
    scores: _Units = {}


class _Version(msgspec.Struct, frozen=True):
    schema: int


_DECODER = msgspec.msgpack.Decoder(_WireAdapter)


def write(adapter: Adapter, codec: Codec = "fp32") -> bytes:
    """`adapter` as bytes; modules and tensors by name, so equal adapters give equal bytes."""
    modules = []
    for name in sorted(adapter.factors):
        part = adapter.factors[name]
        module = {
            "name": name,
            "scaling": float(part.scaling),
            "trained": part.trained,
            "b": _plain(tensors.encode(part.b, codec)),
            "a": _plain(tensors.encode(part.a, codec)),
            "sigma": None if part.sigma is None else _plain(tensors.encode(part.sigma)),
        }
        for side, where in (("rows", part.rows), ("columns", part.columns)):
            if where is not None:
                module[side] = bits_of(where)
        modules.append(module)
    units = (("kept", adapter.kept), ("scores", adapter.scores))
    packed = msgpack.packb(
        {
            "schema": SCHEMA,
            "kind": adapter.kind,
            "job": adapter.job,
            "round": adapter.round,
            "base_digest": adapter.base_digest,
            "modules": modules,
            "dense": [[name, _plain(tensors.encode(adapter.dense[name], codec))] for name in sorted(adapter.dense)],
            "attempt": adapter.attempt,
            "device": adapter.device,
            "notes": dict(sorted(adapter.notes.items())),
            **{key: dict(sorted(found.items())) for key, found in units if found},
        },
        use_bin_type=True,
    )
    assert isinstance(packed, bytes)
    return packed


def read(data: bytes | memoryview | mmap.mmap) -> Adapter:
    """Decode an adapter. Raises `DecodeError` with a reason; shapes agree with each other afterwards."""
    try:
        wire = _DECODER.decode(data)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        _check_version(data)
        raise DecodeError(f"not an adapter: {error}"[:200]) from error
    _check_version(data)
    factors: dict[str, Factors] = {}
    for module in wire.modules:
        if module.name in factors:
            raise DecodeError(f"module {module.name!r:.100} twice")
        factors[module.name] = _factors(module)
    dense = {name: tensors.decode(tensor) for name, tensor in wire.dense}
    if len(dense) != len(wire.dense):
        raise DecodeError("a dense tensor twice")
    return Adapter(
        kind=wire.kind, job=wire.job, round=wire.round, base_digest=wire.base_digest, factors=factors,
        dense=dense, attempt=wire.attempt, device=wire.device, notes=wire.notes,
        kept=wire.kept, scores=wire.scores,
    )  # fmt: skip


def read_file(path: Path) -> Adapter:
    """Decode the adapter at `path`, memory-mapped: arrays read from disk when they are used."""
    with path.open("rb") as file:
        if os.fstat(file.fileno()).st_size == 0:
            raise DecodeError("not an adapter: empty file")
        return read(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))


def _check_version(data: bytes | memoryview | mmap.mmap) -> None:
    """Another major may have other fields: its number is the better reason. Bytes without one pass."""
    try:
        schema = msgspec.msgpack.decode(data, type=_Version).schema
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError):
        return
    if schema != SCHEMA:
        raise DecodeError(f"adapter of schema {schema}, this side speaks {SCHEMA}")


def _factors(module: _WireModule) -> Factors:
    b, a = tensors.decode(module.b), tensors.decode(module.a)
    sigma = None if module.sigma is None else tensors.decode(module.sigma)
    if b.ndim != 2 or a.ndim != 2 or b.shape[1] != a.shape[0] or (sigma is not None and sigma.shape != a.shape[:1]):
        raise DecodeError(f"module {module.name!r:.100}: shapes of b {b.shape} and a {a.shape} do not fit")
    if not math.isfinite(module.scaling):
        raise DecodeError(f"module {module.name!r:.100}: scaling {module.scaling}")
    if not 0 <= module.trained <= a.shape[0]:
        raise DecodeError(f"module {module.name!r:.100}: {module.trained} trained directions of rank {a.shape[0]}")
    rows, columns = indices(module.rows), indices(module.columns)
    if any(where is not None and not len(where) for where in (rows, columns)):
        raise DecodeError(f"module {module.name!r:.100}: none of its rows or columns is left")
    if (rows is not None and len(rows) != len(b)) or (columns is not None and len(columns) != a.shape[1]):
        raise DecodeError(f"module {module.name!r:.100}: its rows and columns are not those of b and a")
    return Factors(b=b, a=a, scaling=module.scaling, sigma=sigma, trained=module.trained, rows=rows, columns=columns)


def bits_of(where: Places) -> bytes:
    """Rising places as bits, lowest first."""
    bits = np.zeros(int(where[-1]) + 1 if len(where) else 0, dtype=np.uint8)
    bits[where] = 1
    return np.packbits(bits, bitorder="little").tobytes()


def indices(bits: bytes) -> Places | None:
    """What `bits_of` was given; None: no bits, which stands for all places."""
    return np.flatnonzero(np.unpackbits(np.frombuffer(bits, np.uint8), bitorder="little")) if bits else None


def _plain(tensor: WireTensor) -> list[object]:
    return [tensor.dtype, tensor.shape, tensor.data, tensor.scales]
