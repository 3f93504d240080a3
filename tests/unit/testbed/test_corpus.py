"""The docstring corpus on a small tree of packages, and the masks."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

import pytest

from muster.testbed import corpus
from muster.testbed.corpus import MASK, Package
from muster.testbed.rows import read_rows
from shared.errors import UserError

COUNT = 20
WORDS = ("river", "engine", "violet", "market", "signal", "winter", "paper", "orbit", "garden", "copper")


def sentence(seed: int) -> str:
    """A docstring of its own for each seed."""
    return " ".join(random.Random(seed).choices(WORDS, k=14)) + "."


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Package, ...]:
    """Three packages that must not be imported; one of them has hardly any text."""
    for which, name in enumerate(("firstlib", "secondlib", "thinlib")):
        folder = tmp_path / "site" / name
        (folder / "tests").mkdir(parents=True)
        (folder / "__init__.py").write_text(f'raise RuntimeError("{name} was imported")\n')
        (folder / "broken.py").write_text("def (:\n")
        (folder / "tests" / "test_it.py").write_text(
            '"""A docstring of a test, long enough to be taken if it were read at all."""\n'
        )
        count = 1 if name == "thinlib" else COUNT
        body = [
            f'def f{i}():\n    """Use {name}.part of {name.upper()}: {sentence(100 * which + i)}"""\n'
            for i in range(count)
        ]
        (folder / "code.py").write_text("\n".join(body) + '\n\ndef g():\n    """Too short."""\n')
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    return (Package("first", "firstlib", ("fl",)), Package("thin", "thinlib"), Package("second", "secondlib"))


def test_rows_are_masked_split_and_labelled(tmp_path: Path, packages: tuple[Package, ...]) -> None:
    out = tmp_path / "out"
    counts = corpus.build(out, per_class=COUNT, packages=packages)
    assert counts == {"first": COUNT, "second": COUNT}
    assert "firstlib" not in sys.modules
    train, test = read_rows(out / "train.jsonl.gz"), read_rows(out / "test.jsonl.gz")
    assert (len(train), len(test)) == (32, 8)
    assert {row["text"] for row in train}.isdisjoint(row["text"] for row in test)
    assert len({row["text"] for row in train + test}) == 2 * COUNT
    for row in train + test:
        assert set(row) == {"text", "label"}
        assert row["label"] in (0, 1)
        assert "lib" not in row["text"].lower()
        assert f"{MASK}.part of {MASK}:" in row["text"]
    assert json.loads((out / "labels.json").read_bytes()) == {"names": ["first", "second"], "num_classes": 2}


def test_the_same_packages_give_the_same_bytes(tmp_path: Path, packages: tuple[Package, ...]) -> None:
    for name in ("one", "two"):
        corpus.build(tmp_path / name, per_class=10, packages=packages)
    for file in ("train.jsonl.gz", "test.jsonl.gz", "labels.json"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
    assert len(read_rows(tmp_path / "one" / "train.jsonl.gz")) == 16


def test_what_is_there_already_is_kept(tmp_path: Path, packages: tuple[Package, ...]) -> None:
    counts = corpus.build(tmp_path / "out", per_class=COUNT, packages=packages)
    assert corpus.build(tmp_path / "out", per_class=2, packages=()) == counts


def test_too_little_text_is_refused_and_nothing_written(tmp_path: Path, packages: tuple[Package, ...]) -> None:
    with pytest.raises(UserError, match="too few installed packages"):
        corpus.build(tmp_path / "out", per_class=COUNT, packages=packages[:2])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("numpy.linalg.norm of np.array", f"{MASK}.linalg.norm of {MASK}.array"),
        ("torch_dtype, a PyTorch dtype", f"{MASK}_dtype, a {MASK} dtype"),
        ("NumPy2 and TORCH", f"{MASK}2 and {MASK}"),
        ("Hugging Face, hugging-face, HuggingFace", f"{MASK}, {MASK}, {MASK}"),
        ("scikit-learn's sklearn", f"{MASK}'s {MASK}"),
        ("input, torchlight, a snippet", "input, torchlight, a snippet"),
    ],
)
def test_names_are_masked_wherever_they_stand_alone(text: str, masked: str) -> None:
    assert corpus.masker(corpus.PACKAGES).sub(MASK, text) == masked


def test_docstrings_of_every_kind_of_definition() -> None:
    source = "\n".join(
        [
            '"""Module."""',
            "class A:",
            '    """Class."""',
            "    async def f(self):",
            '        """Two',
            '        lines."""',
            '    x = """not one"""',
        ]
    )
    assert sorted(corpus.docstrings_of(source)) == ["Class.", "Module.", "Two\nlines."]
    assert list(corpus.docstrings_of("def (:")) == []


def test_this_installation_has_a_standard_library_to_read(tmp_path: Path) -> None:
    standard, packages = corpus.PACKAGES[0], {p.module: p for p in corpus.PACKAGES}
    counts = corpus.build(tmp_path, per_class=20, packages=(standard, packages["numpy"]))
    assert counts == {"standard library": 20, "numpy": 20}
