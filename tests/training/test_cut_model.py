"""A base cut to some of its blocks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from muster.testbed.models import cut_bert
from shared.errors import UserError
from shared.modeling import base_model
from tests.training.tiny_models import COLOURS


@pytest.mark.parametrize(("last", "kept"), [(False, 0), (True, 1)])
def test_a_cut_base_has_the_blocks_that_were_asked(bert: Path, tmp_path: Path, last: bool, kept: int) -> None:
    whole = base_model.load(bert, COLOURS)
    folder = cut_bert(bert, tmp_path / "cut", 1, last=last)
    cut = base_model.load(folder, COLOURS)
    assert {linear.block for linear in cut.linears.values()} == {0}
    for name in cut.linears:
        theirs = whole.model.get_submodule(name.replace(".0.", f".{kept}.")).weight
        assert torch.equal(cut.model.get_submodule(name).weight, theirs)
    assert torch.equal(cut.model.get_input_embeddings().weight, whole.model.get_input_embeddings().weight)
    before = (folder / "model.safetensors").stat().st_mtime_ns
    assert cut_bert(bert, folder, 1) == folder and (folder / "model.safetensors").stat().st_mtime_ns == before


def test_more_blocks_than_there_are_can_not_be_kept(bert: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has 2 layers, 3 were asked"):
        cut_bert(bert, tmp_path / "cut", 3)
    assert not (tmp_path / "cut").exists()


def test_a_narrow_base_keeps_the_channels_of_the_largest_weights(bert: Path, tmp_path: Path) -> None:
    whole = base_model.load(bert, COLOURS).model
    narrow = base_model.load(cut_bert(bert, tmp_path / "narrow", 2, channels=5), COLOURS)
    name = next(name for name in narrow.linears if name.endswith("0.intermediate.dense"))
    wide, out = whole.get_submodule(name).weight, whole.get_submodule(name.replace("intermediate", "output")).weight
    kept = sorted(range(len(wide)), key=lambda place: -float(wide[place].norm() * out[:, place].norm()))[:5]
    assert torch.equal(narrow.model.get_submodule(name).weight, wide[sorted(kept)])
    assert narrow.model.config.intermediate_size == 5
    with pytest.raises(UserError, match="channels, 100000 were asked"):
        cut_bert(bert, tmp_path / "more", 1, channels=100_000)
