"""The same tensors give the same file in every process, and the library reads it back."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
from safetensors import safe_open
from safetensors.numpy import load

from coordinator.export_tensors import DIGEST_NOTE, tensor_file

TENSORS = {f"layer.{n}.weight": np.full((n + 1, 3), n, np.float32) for n in range(5)}
PROGRAM = """
import hashlib, numpy as np
from coordinator.export_tensors import tensor_file
tensors = {f"layer.{n}.weight": np.full((n + 1, 3), n, np.float32) for n in range(5)}
print(hashlib.sha256(tensor_file(tensors, "a" * 64)).hexdigest())
"""


def test_the_library_reads_what_is_written(tmp_path: Path) -> None:
    data = tensor_file(TENSORS, "a" * 64)
    found = load(data)
    assert found.keys() == TENSORS.keys()
    assert all(np.array_equal(found[name], TENSORS[name]) for name in TENSORS)
    path = tmp_path / "adapter.safetensors"
    path.write_bytes(data)
    with safe_open(path, framework="np") as file:
        assert file.metadata() == {"format": "pt", DIGEST_NOTE: "a" * 64}


def test_every_process_writes_the_same_bytes() -> None:
    told = {subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, check=True).stdout for _ in range(6)}
    assert len(told) == 1
