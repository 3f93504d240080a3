"""Tensors as the bytes of a safetensors file that names its base, the same bytes for the same tensors."""

from __future__ import annotations

import json
from collections.abc import Mapping

from safetensors.numpy import save

from shared.tensors import Array

DIGEST_NOTE = "muster_base_digest"
"""In the metadata of the tensors: the digest of the base that they are for."""
_LENGTH = 8


def tensor_file(tensors: Mapping[str, Array], base_digest: str) -> bytes:
    """A safetensors file of `tensors`, made for the base of `base_digest`.

    The library writes the entries of the metadata in an order that changes from process to process; here they are
    sorted, since a repeated export must give the same file.
    """
    data = save(dict(tensors), metadata={"format": "pt", DIGEST_NOTE: base_digest})
    end = _LENGTH + int.from_bytes(data[:_LENGTH], "little")
    header = json.loads(data[_LENGTH:end])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    padded = text.ljust(-(-len(text) // 8) * 8)
    return len(padded).to_bytes(_LENGTH, "little") + padded + data[end:]
