"""Base models that the coordinator serves: one folder per bit width, described by a manifest, found by its digest.

A packed base holds the linear layers of the blocks already quantized, so that a device neither stores nor moves the
weights at full precision. The digest of the manifest (in an assignment) covers every file, whoever delivers them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta

from shared.errors import DecodeError
from shared.fields import Sha
from shared.ids import digest_of
from shared.jobs import Bits

FOLDER = "bases"
"""Of both programs, in their `state_dir`."""
MANIFEST = "packed.json"
MAX_MANIFEST_BYTES = 256 * 1024
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.txt",
    "vocab.json", "merges.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model",
)  # fmt: skip
FileName = Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}\Z")]
"""Never a path: what is fetched under this name is written under it."""


class BaseFile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One file; `size` in bytes."""

    name: FileName
    size: Annotated[int, Meta(ge=0)]
    sha: Sha


class BaseManifest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A base at one bit width. `base_digest`: of the files it was made from."""

    base_digest: Sha
    bits: Bits
    files: Annotated[list[BaseFile], Meta(min_length=1, max_length=1000)]

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files)


def decode(data: bytes, sha: str) -> BaseManifest:
    """The manifest whose digest is `sha`. Raises `DecodeError`."""
    if digest_of(data) != sha:
        raise DecodeError(f"manifest of a base: its digest is {digest_of(data)[:12]}, not {sha[:12]}")
    try:
        manifest = msgspec.json.decode(data, type=BaseManifest)
    except msgspec.MsgspecError as error:
        raise DecodeError(f"manifest of a base: {error}") from error
    names = [file.name for file in manifest.files]
    if len(set(names)) < len(names) or MANIFEST in names:
        raise DecodeError("manifest of a base: a name is there twice")
    return manifest


def read(folder: Path) -> BaseManifest | None:
    """The manifest of a packed base's folder; None: an ordinary model folder. Raises `DecodeError`."""
    try:
        data = (folder / MANIFEST).read_bytes()
    except OSError:
        return None
    return decode(data, digest_of(data))
