"""What comes from the Hugging Face hub, over a local substitute of its two downloads: there is no network here."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from transformers import AutoTokenizer

from edge_daemon.protocol import Probe, Probed
from edge_daemon.training.agent import Agent
from shared.modeling import data, weights
from shared.modeling.faults import DataFault, ModelFault
from tests.training.tiny_models import COLOURS, Pipes, colour_rows

TRAIN, TEST = colour_rows(9, seed=1), colour_rows(4, seed=2)


class Broken(Exception):
    """As the package's own errors: neither `OSError` nor `ValueError`."""


def load_dataset(name: str, *, split: str, trust_remote_code: bool) -> list[dict[str, Any]]:
    """`datasets.load_dataset` of a hub that holds one data set with two splits."""
    assert trust_remote_code is False
    if name == "someone/broken":
        raise Broken("An error occurred while generating the dataset\nand a page of hints")
    if name != "someone/colours":
        raise FileNotFoundError(f"Couldn't find {name} on the Hub\nand a page of hints")
    if split not in ("train", "test"):
        raise ValueError(f"Unknown split {split!r}")
    return TRAIN if split == "train" else TEST


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """The package `datasets` over `load_dataset`."""
    package, errors = types.ModuleType("datasets"), types.ModuleType("datasets.exceptions")
    package.__dict__.update(load_dataset=load_dataset, exceptions=errors)
    errors.__dict__["DatasetsError"] = Broken
    monkeypatch.setitem(sys.modules, "datasets", package)
    monkeypatch.setitem(sys.modules, "datasets.exceptions", errors)


@pytest.mark.parametrize(
    ("source", "rows"), [("someone/colours", TRAIN), ("someone/colours:train", TRAIN), ("someone/colours:test", TEST)]
)
def test_a_hub_data_set_is_read_like_a_file(hub: None, bert: Path, source: str, rows: list[dict[str, Any]]) -> None:
    assert list(data.read_rows(source, hub=True)) == list(enumerate(rows, start=1))
    assert data.describe(source, share_labels=False, hub=True).rows == len(rows)
    words = AutoTokenizer.from_pretrained(str(bert))
    tokens = data.DataStore().load(source, COLOURS, words, "w", hub=True)
    assert tokens.targets.tolist() == [row["label"] for row in rows]


@pytest.mark.parametrize(
    ("source", "told"),
    [
        ("someone/else", "the hub data set can't be loaded: Couldn't find someone/else on the Hub"),
        ("someone/broken", "the hub data set can't be loaded: An error occurred while generating the dataset"),
        ("someone/colours:dev", "the hub data set can't be loaded: Unknown split 'dev'"),
    ],
)
def test_what_the_hub_does_not_give_is_one_line(hub: None, source: str, told: str) -> None:
    with pytest.raises(DataFault) as caught:
        list(data.read_rows(source, hub=True))
    assert str(caught.value) == f"{source}: {told}"


def test_without_the_package_its_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataFault, match=r"someone/colours: a hub data set needs the package datasets \(extra hub\)"):
        list(data.read_rows("someone/colours", hub=True))


@pytest.mark.parametrize("allowed", [True, False])
def test_an_agent_offers_a_hub_data_set_where_its_owner_allows_it(hub: None, allowed: bool) -> None:
    pipes = Pipes()
    probed = Agent(pipes.control).probe(Probe(threads=1, datasets={"colours": "someone/colours"}, hub=allowed))
    assert isinstance(probed, Probed)
    if allowed:
        assert probed.datasets["colours"].rows == len(TRAIN)
    else:
        assert probed.datasets == {}
        assert probed.notes["colours"] == "someone/colours: no such data file"


@pytest.fixture
def downloads(monkeypatch: pytest.MonkeyPatch, bert: Path) -> list[tuple[str, str | None]]:
    """What was asked of `snapshot_download`, over a hub that holds one model."""
    asked: list[tuple[str, str | None]] = []

    def snapshot_download(model: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        assert "*.safetensors" in allow_patterns
        assert not [pattern for pattern in allow_patterns if pattern.endswith((".py", ".bin", "*"))]
        asked.append((model, revision))
        if model != "someone/tiny":
            raise OSError(f"404: no {model}\nand a page of hints")
        return str(bert)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return asked


def test_a_hub_model_is_the_folder_of_its_files(downloads: list[tuple[str, str | None]], bert: Path) -> None:
    assert weights.resolve("someone/tiny", hub=True) == bert
    assert weights.resolve("someone/tiny", "abc123", hub=True) == bert
    assert downloads == [("someone/tiny", None), ("someone/tiny", "abc123")]


def test_a_model_the_hub_does_not_have_is_one_line(downloads: list[tuple[str, str | None]]) -> None:
    with pytest.raises(ModelFault) as caught:
        weights.resolve("someone/else", hub=True)
    assert str(caught.value) == "someone/else: no such folder, and not from the hub: 404: no someone/else"


def test_nothing_is_asked_of_the_hub_where_the_owner_forbids_it(downloads: list[tuple[str, str | None]]) -> None:
    """Not even for what looks like a hub id, as a folder does that is not mounted."""
    with pytest.raises(ModelFault, match="models/minilm: no such model folder, and policy.hub is off"):
        weights.resolve("models/minilm", hub=False)
    assert downloads == []
