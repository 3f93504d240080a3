"""A base model's files: where they are, their digest, and its tensors one at a time."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from shared import bases
from shared.modeling.faults import ModelFault, one_line

FOLDER_PATTERNS = ["config.json", "*.safetensors", "*.safetensors.index.json", *bases.TOKENIZER_FILES]
"""The files of a model folder that count."""


def resolve(model: str, revision: str = "", *, hub: bool) -> Path:
    """Folder of a base model: `model` itself, or with `hub` a hub id's files at `revision`, downloaded if not cached.

    Raises `ModelFault` for an unknown model, and for a folder without `config.json` or safetensors.
    """
    folder = Path(model).expanduser()
    if not folder.is_dir():
        if folder.is_absolute() or model.startswith(".") or model.count("/") > 1:
            raise ModelFault(f"{model}: no such model folder")
        if not hub:
            raise ModelFault(f"{model}: no such model folder, and policy.hub is off")
        folder = _from_hub(model, revision)
    if not (folder / "config.json").is_file():
        raise ModelFault(f"{model}: no config.json there")
    if not any(folder.glob("*.safetensors")):
        raise ModelFault(f"{model}: no *.safetensors there; other weight formats are not loaded")
    return folder


def _from_hub(model: str, revision: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        found = snapshot_download(model, revision=revision or None, allow_patterns=FOLDER_PATTERNS)
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ModelFault(f"{model}: no such folder, and not from the hub: {one_line(error, 160)}") from error
    return Path(found)


def base_digest(folder: Path, cache: Path | None = None) -> str:
    """SHA-256 over config, safetensors and tokenizer files, each by name and content.

    `cache`: JSON file of digests by path, size and time of change, so that large files are read once. A packed base
    (`shared.bases`) has the digest of what it was made from.
    """
    packed = bases.read(folder)
    if packed is not None:
        return packed.base_digest
    known = _read_cache(cache)
    whole = hashlib.sha256()
    fresh = False
    for path in sorted({p for pattern in FOLDER_PATTERNS for p in folder.glob(pattern)}, key=lambda p: p.name):
        stat = path.stat()
        key = f"{path.resolve()}|{stat.st_size}|{stat.st_mtime_ns}"
        if key not in known:
            known[key] = _sha(path)
            fresh = True
        whole.update(f"{path.name}\0{known[key]}\n".encode())
    if fresh and cache is not None:
        _write_cache(cache, known)
    return whole.hexdigest()


def _sha(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _read_cache(cache: Path | None) -> dict[str, str]:
    if cache is None:
        return {}
    try:
        content = json.loads(cache.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _write_cache(cache: Path, known: dict[str, str]) -> None:
    temporary = cache.with_name(f"{cache.name}.{os.getpid()}")
    # A cache that can't be written costs time only.
    with contextlib.suppress(OSError):
        cache.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(known), encoding="utf-8")
        temporary.replace(cache)


class WeightFiles:
    """The tensors of a folder's safetensors files, read when asked for."""

    def __init__(self, folder: Path) -> None:
        self._files: dict[str, Path] = {}
        for path in sorted(folder.glob("*.safetensors")):
            with _opened(path) as file:
                self._files.update(dict.fromkeys(file.keys(), path))
        self._packed = {name.partition("/")[0] for name in self._files if "/" in name}

    def __contains__(self, key: str) -> bool:
        return key in self._files

    def names(self) -> list[str]:
        """The names of all tensors, sorted."""
        return sorted(self._files)

    def parts(self, key: str) -> dict[str, torch.Tensor]:
        """The parts of a quantized tensor `key` of a packed base; {} where it is not one."""
        start = f"{key}/"
        return {name[len(start) :]: self.read(name) for name in self._files if name.startswith(start)}

    def read(self, key: str) -> torch.Tensor:
        """The tensor `key` in memory of its own."""
        with _opened(self._files[key]) as file:
            tensor: torch.Tensor = file.get_tensor(key)
            return tensor.clone()

    def key(self, name: str, prefix: str) -> str | None:
        """The key under which parameter `name` of a model with base-model prefix `prefix` is stored, if it is."""
        names = [name, f"{prefix}.{name}"]
        if name.startswith(f"{prefix}."):
            names.append(name[len(prefix) + 1 :])
        # BERT's own checkpoints name the tensors of a LayerNorm as TensorFlow did.
        names += [n[:-6] + "gamma" for n in names if n.endswith("LayerNorm.weight")]
        names += [n[:-4] + "beta" for n in names if n.endswith("LayerNorm.bias")]
        return next((candidate for candidate in names if candidate in self._files or candidate in self._packed), None)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise ModelFault(f"{path}: not a safetensors file: {one_line(error, 120)}") from error
