"""A base model written once at a given bit width, and its quantized layers read back bit for bit.

The tensors keep the names of the source's files. A linear layer's weight that is quantized (8 or 4 bits) is replaced by
its parts, `<name>` + "/" + part, (out x in) for every architecture; all other tensors are stored in the precision in
which they are used. Devices that load it compute exactly what they would over the source.

In FedPipe (arXiv 2404.06448), by a public digest, the server hands out the quantized model; once for each bit width is
our reading. The formats, and where they are from: `quantization`.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import msgspec
import torch
from torch import nn

from shared import bases
from shared.files import sync_folder, write_whole
from shared.ids import digest_of
from shared.jobs import Bits, TaskSpec
from shared.modeling.base_model import Base, compute_dtype, load
from shared.modeling.data import Beat, silent
from shared.modeling.quantization import parts_of
from shared.modeling.weights import FOLDER_PATTERNS, WeightFiles, base_digest

PACKED_BITS: tuple[Bits, ...] = (32, 16, 8, 4)


def pack(source: Path, task: TaskSpec, bits: Bits, target: Path, beat: Beat = silent) -> str:
    """Write `source` at `bits` into a folder beneath `target`, if it is not there; the digest of its manifest.

    At 32 bits the files are those of the source. `task` tells which layers the source's architecture has. Raises
    `ModelFault` for a source that can't be loaded.
    """
    digest = base_digest(source)
    named = target / f"{digest}-{bits}"
    if named.is_dir():
        return digest_of((named / bases.MANIFEST).read_bytes())
    temporary = target / f".{digest}-{bits}"
    shutil.rmtree(temporary, ignore_errors=True)  # left by a worker that was killed; there is one worker at a time
    temporary.mkdir(parents=True)
    for path in _others(source):
        shutil.copyfile(path, temporary / path.name)
        beat("packing the base")
    if bits == 32:
        for path in sorted(source.glob("*.safetensors")):
            shutil.copyfile(path, temporary / path.name)
            beat("packing the base")
    else:
        _write_tensors(load(source, task, bits, beat=beat), temporary / "model.safetensors", beat)
    manifest = _describe(temporary, digest, bits, beat)
    write_whole(temporary / bases.MANIFEST, manifest)
    temporary.replace(named)
    sync_folder(target)
    return digest_of(manifest)


def _others(source: Path) -> Iterator[Path]:
    """Configuration and tokenizer. An index of several weight files fits only those."""
    for pattern in FOLDER_PATTERNS:
        if not pattern.endswith((".safetensors", ".index.json")):
            yield from sorted(source.glob(pattern))


def _write_tensors(base: Base, path: Path, beat: Beat) -> None:
    from safetensors.torch import save_file

    files = WeightFiles(base.folder)
    layers = {base.source_key(name): base.model.get_submodule(name) for name in base.linears}
    tensors: dict[str, torch.Tensor] = {}
    for key in files.names():
        beat("packing the base")
        layer = layers.get(key)
        if layer is not None and base.bits < 16:
            tensors.update({f"{key}/{part}": value for part, value in _own(layer, base.bits)})
            continue
        value = files.read(key)
        tensors[key] = value.to(compute_dtype(base.bits)).contiguous() if value.is_floating_point() else value
    save_file(tensors, path)


def _own(layer: nn.Module, bits: Bits) -> Iterator[tuple[str, torch.Tensor]]:
    """Parts in memory of their own: layers share the code book, which the file format does not allow."""
    for part, value in parts_of(layer, bits).items():
        yield part, value.detach().cpu().clone()


def _describe(folder: Path, digest: str, bits: Bits, beat: Beat) -> bytes:
    files = []
    for path in sorted(folder.iterdir()):
        whole = hashlib.sha256()
        with path.open("rb") as file:
            while block := file.read(1 << 22):
                whole.update(block)
                beat("packing the base")
            os.fsync(file.fileno())
        files.append(bases.BaseFile(name=path.name, size=path.stat().st_size, sha=whole.hexdigest()))
    return msgspec.json.encode(bases.BaseManifest(base_digest=digest, bits=bits, files=files))
