"""The demo's text: docstrings of installed packages. The task: tell which package a docstring is from.

Sources are parsed, never imported. Names of the packages are masked, also inside dotted names. Which rows are taken and
which of them are held out depends on hashes of the texts alone, so the same packages give the same files.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import inspect
import re
import sysconfig
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from muster.testbed.rows import Row, write_rows
from shared.errors import UserError
from shared.files import write_whole

MASK = "PKG"
_SKIP = {"tests", "test", "testing", "_vendor", "vendor", "externals", "site-packages", "dist-packages", "__pycache__"}
_LENGTHS = (60, 4000)
"""Characters of a docstring that is neither too thin to tell anything nor a manual."""
_KEEP = 600
"""Characters kept of one; the model reads no more."""
_LARGEST_SOURCE = 300_000
_HELD_OUT = 0.2


@dataclass(frozen=True)
class Package:
    """A class of the task: its label, the import name ("" for the standard library), other names it goes by."""

    label: str
    module: str
    aliases: tuple[str, ...] = ()


PACKAGES = (
    Package("standard library", "", ("python", "cpython", "stdlib")),
    Package("numpy", "numpy", ("np",)),
    Package("torch", "torch", ("pytorch", "torchscript", "torchvision", "torchaudio", "libtorch")),
    Package("transformers", "transformers", ("huggingface", "hugging face")),
    Package("scipy", "scipy", ("sp",)),
    Package("matplotlib", "matplotlib", ("mpl", "pyplot", "plt")),
    Package("sympy", "sympy"),
    Package("scikit-learn", "sklearn", ("scikit", "scikit-learn")),
    Package("networkx", "networkx", ("nx",)),
    Package("pip", "pip", ("pypi",)),
    Package("peft", "peft"),
    Package("huggingface_hub", "huggingface_hub", ("hf",)),
    Package("pandas", "pandas", ("pd",)),
    Package("setuptools", "setuptools", ("distutils",)),
)
"""In the order of preference; the first ones installed with enough text become the classes."""


def build(
    folder: Path, *, per_class: int = 500, classes: int = 10, packages: Sequence[Package] = PACKAGES
) -> dict[str, int]:
    """Write `train.jsonl.gz`, `test.jsonl.gz` and `labels.json` into `folder`; the rows of each class.

    Per class at most `per_class` docstrings, a fifth of them held out; a class with fewer than half of that is left
    out. Files that are there already are kept. Raises `UserError` where fewer than two packages have enough text.
    """
    manifest = folder / "corpus.json"
    if manifest.is_file():
        return msgspec.json.decode(manifest.read_bytes(), type=dict[str, int])
    mask = masker(packages)
    seen: set[str] = set()
    chosen: dict[str, list[str]] = {}
    for package in packages:
        if len(chosen) == classes:
            break
        texts = _docstrings(package, mask, per_class, seen)
        if len(texts) >= per_class // 2:
            chosen[package.label] = texts
    if len(chosen) < 2:
        raise UserError("too few installed packages have docstrings; install the extras train and coordinator")
    train: list[tuple[str, Row]] = []
    test: list[tuple[str, Row]] = []
    for label, texts in enumerate(chosen.values()):
        held_out = round(len(texts) * _HELD_OUT)
        for place, text in enumerate(texts):
            (test if place < held_out else train).append((_digest(text), {"text": text, "label": label}))
    for name, rows in (("train", train), ("test", test)):
        write_rows(folder / f"{name}.jsonl.gz", (row for _, row in sorted(rows, key=lambda pair: pair[0])))
    names = list(chosen)
    write_whole(folder / "labels.json", msgspec.json.encode({"names": names, "num_classes": len(names)}))
    counts = {label: len(texts) for label, texts in chosen.items()}
    write_whole(manifest, msgspec.json.encode(counts))
    return counts


def masker(packages: Iterable[Package]) -> re.Pattern[str]:
    """Matches every name of every package, as a word or as a part of a dotted or underscored one."""
    names = {name.lower() for p in packages for name in (p.module, *p.aliases) if name}
    longest_first = sorted(names, key=lambda name: (-len(name), name))
    parts = "|".join(re.escape(name).replace(r"\ ", r"[\s_-]?") for name in longest_first)
    return re.compile(rf"(?<![A-Za-z])(?:{parts})(?![A-Za-z])", re.IGNORECASE)


def docstrings_of(source: str) -> Iterator[str]:
    """The docstrings of a module's source, its classes and functions; none where it does not parse."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError):
        return
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            text = ast.get_docstring(node, clean=False)
            if text:
                yield inspect.cleandoc(text)


def _docstrings(package: Package, mask: re.Pattern[str], count: int, seen: set[str]) -> list[str]:
    """The `count` masked docstrings of a package with the smallest digests; none that `seen` knows.

    Files are parsed in the order of their hashes until three times as many are found: a sample over the whole package
    at a fraction of the cost of reading it.
    """
    found: dict[str, str] = {}
    for path in _files(package):
        try:
            source = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            continue
        for text in docstrings_of(source):
            if not _LENGTHS[0] <= len(text) <= _LENGTHS[1]:
                continue
            masked = mask.sub(MASK, text)[:_KEEP]
            key = _gist(masked)
            if len(key) < _LENGTHS[0] // 2 or key in seen:
                continue
            seen.add(key)
            found[_digest(masked)] = masked
        if len(found) >= 3 * count:
            break
    return [found[digest] for digest in sorted(found)[:count]]


def _files(package: Package) -> list[Path]:
    """Source files of a package, in the order of hashes of their paths inside it."""
    root = _root(package)
    if root is None:
        return []
    found = []
    for path in root.rglob("*.py"):
        inside = path.relative_to(root)
        if not _SKIP.intersection(inside.parts[:-1]) and path.stat().st_size <= _LARGEST_SOURCE:
            found.append((_digest(inside.as_posix()), path))
    return [path for _, path in sorted(found)]


def _root(package: Package) -> Path | None:
    if not package.module:
        return Path(sysconfig.get_paths()["stdlib"])
    # A top-level package is found without being run.
    spec = importlib.util.find_spec(package.module)
    origin = spec.origin if spec else None
    return Path(origin).parent if origin and Path(origin).name == "__init__.py" else None


def _gist(text: str) -> str:
    """What makes two docstrings the same: their letters, of the first part."""
    return re.sub(r"[^a-z]+", "", text.lower())[:160]


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
