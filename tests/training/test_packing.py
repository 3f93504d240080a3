"""A packed base computes what its source does, bit for bit, and holds no more than it says."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch

from shared import bases
from shared.errors import DecodeError
from shared.ids import digest_of
from shared.jobs import Bits, TaskSpec
from shared.modeling import base_model, packing, weights
from shared.modeling.data import tokenize
from shared.modeling.faults import BitsFault, ModelFault
from tests.training.tiny_models import COLOURS, STORIES, colour_rows, story_rows, write_jsonl

TASKS = {"bert": COLOURS, "gpt2": STORIES, "llama": STORIES}
ROWS = {"bert": colour_rows(6), "gpt2": story_rows(6), "llama": story_rows(6)}


@pytest.fixture(params=list(TASKS))
def model(request: pytest.FixtureRequest) -> tuple[Path, TaskSpec, str]:
    return request.getfixturevalue(request.param), TASKS[request.param], request.param


def logits(folder: Path, task: TaskSpec, bits: Bits, data: Path) -> torch.Tensor:
    base = base_model.load(folder, task, bits)
    base.set_dense(base_model.fresh_head(base, 3))
    batch = tokenize(str(data), task, base.tokenizer).batch(np.arange(6))
    with torch.no_grad():
        found: torch.Tensor = base.model(input_ids=batch.ids, attention_mask=batch.mask).logits
    return found


@pytest.mark.parametrize("bits", packing.PACKED_BITS)
def test_a_packed_base_gives_the_same_logits(model: tuple[Path, TaskSpec, str], bits: Bits, tmp_path: Path) -> None:
    source, task, name = model
    data = write_jsonl(tmp_path / "rows.jsonl", ROWS[name])
    sha = packing.pack(source, task, bits, tmp_path / "bases")
    folder = tmp_path / "bases" / f"{weights.base_digest(source)}-{bits}"
    manifest = bases.read(folder)
    assert manifest is not None and digest_of((folder / bases.MANIFEST).read_bytes()) == sha
    assert (manifest.bits, weights.base_digest(folder)) == (bits, weights.base_digest(source))
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        [bases.MANIFEST, *(file.name for file in manifest.files)]
    )
    assert all(digest_of((folder / file.name).read_bytes()) == file.sha for file in manifest.files)
    assert torch.equal(logits(folder, task, bits, data), logits(source, task, bits, data))


def test_a_base_is_packed_once(bert: Path, tmp_path: Path) -> None:
    sha = packing.pack(bert, COLOURS, 4, tmp_path)
    (folder,) = tmp_path.iterdir()
    stamp = (folder / bases.MANIFEST).stat().st_mtime_ns
    assert packing.pack(bert, COLOURS, 4, tmp_path) == sha
    assert (folder / bases.MANIFEST).stat().st_mtime_ns == stamp


def test_fewer_bits_are_fewer_bytes(bert: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    key = "encoder.layer.0.intermediate.dense.weight"
    sizes = []
    for bits in packing.PACKED_BITS:
        packing.pack(bert, COLOURS, bits, tmp_path)
        tensors = load_file(tmp_path / f"{weights.base_digest(bert)}-{bits}" / "model.safetensors")
        stored = next(tensors[name] for name in sorted(tensors) if name.endswith((key, f"{key}/codes")))
        sizes.append(stored.numel() * stored.element_size())
    assert sizes == [sizes[-1] * times for times in (8, 4, 2, 1)]


def test_other_bits_than_packed_are_refused(bert: Path, tmp_path: Path) -> None:
    packing.pack(bert, COLOURS, 8, tmp_path)
    (folder,) = tmp_path.iterdir()
    with pytest.raises(ModelFault, match="packed at 8 bits, 4 are wanted"):
        base_model.load(folder, COLOURS, 4)


def test_parts_that_do_not_fit_are_refused(bert: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    for bits in (8, 4):
        packing.pack(bert, COLOURS, bits, tmp_path / str(bits))
        (folder,) = (tmp_path / str(bits)).iterdir()
        tensors = load_file(folder / "model.safetensors")
        name = next(name for name in tensors if name.endswith("/codes"))
        tensors[name] = tensors[name][:-2].clone()
        save_file(tensors, folder / "model.safetensors")
        with pytest.raises(BitsFault, match="codes and scales for a layer of"):
            base_model.load(folder, COLOURS, bits)


def test_a_manifest_is_what_its_digest_says() -> None:
    file = bases.BaseFile(name="config.json", size=2, sha="0" * 64)
    good = msgspec.json.encode(bases.BaseManifest(base_digest="1" * 64, bits=4, files=[file]))
    assert bases.decode(good, digest_of(good)).size == 2
    with pytest.raises(DecodeError, match="its digest is"):
        bases.decode(good, "0" * 64)
    for bad in (
        b"{}", good.replace(b"config.json", b"../x"), good.replace(b'"size":2', b'"size":-2'),
        msgspec.json.encode(bases.BaseManifest(base_digest="1" * 64, bits=4, files=[file, file])),
    ):  # fmt: skip
        with pytest.raises(DecodeError):
            bases.decode(bad, digest_of(bad))
