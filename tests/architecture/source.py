"""The repository's own files, parsed once for the tests of this folder."""

from __future__ import annotations

import ast
import io
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
PACKAGES = ("shared", "coordinator", "edge_daemon", "muster")
SKIPPED = {".venv", ".git", "build", "dist", "runs", "__pycache__"}
TEXT_SUFFIXES = {".py", ".md", ".toml", ".sh", ".txt", ".conf", ".html", ".js", ".css", ".json", ".yml", ".service", ""}

Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Module:
    """A Python file."""

    path: Path

    @cached_property
    def text(self) -> str:
        return self.path.read_text(encoding="utf-8")

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text, filename=str(self.path))

    @property
    def name(self) -> str:
        """Path from the root, as shown in failures."""
        return self.path.relative_to(ROOT).as_posix()

    def functions(self) -> Iterator[tuple[str, Function]]:
        """Every function with its name in the module, methods and inner functions too."""
        yield from _functions(self.tree, "")

    def comments(self) -> Iterator[tuple[int, str]]:
        """Line and text of every comment."""
        for token in tokenize.generate_tokens(io.StringIO(self.text).readline):
            if token.type == tokenize.COMMENT:
                yield token.start[0], token.string

    def imports(self) -> Iterator[tuple[int, str]]:
        """Line and dotted name of every import, inside functions too; `from a import b` counts as `a.b`."""
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    yield node.lineno, alias.name
            elif isinstance(node, ast.ImportFrom):
                for alias in node.names:
                    yield node.lineno, f"{node.module or ''}.{alias.name}"


def _functions(node: ast.AST, prefix: str) -> Iterator[tuple[str, Function]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, Function):
            yield f"{prefix}{child.name}", child
            yield from _functions(child, f"{prefix}{child.name}.")
        elif isinstance(child, ast.ClassDef):
            yield from _functions(child, f"{prefix}{child.name}.")
        else:
            yield from _functions(child, prefix)


@lru_cache
def modules(*folders: str) -> tuple[Module, ...]:
    """Every Python file under these folders of the repository, sorted."""
    found = [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]
    return tuple(Module(path) for path in found if not SKIPPED & set(path.relative_to(ROOT).parts))


def text_files() -> Iterator[Path]:
    """Every text file a person may have written."""
    for path in sorted(ROOT.rglob("*")):
        parts = path.relative_to(ROOT).parts
        hidden = any(part in SKIPPED or part.endswith(("_cache", ".egg-info", ".hypothesis")) for part in parts)
        if not hidden and path.is_file() and path.suffix in TEXT_SUFFIXES:
            yield path


def code_lines(module: Module, function: Function) -> int:
    """Lines of a function without its docstring, comments, blank lines and inner functions."""
    body = function.body
    first = body[1:] if ast.get_docstring(function) is not None else body
    inner = [node for node in ast.walk(function) if isinstance(node, Function) and node is not function]
    skipped = {line for node in inner for line in range(node.lineno, (node.end_lineno or node.lineno) + 1)}
    lines = module.text.splitlines()
    end = function.end_lineno or function.lineno
    start = first[0].lineno if first else end + 1
    head = range(function.lineno, body[0].lineno)
    return sum(
        1
        for number in (*head, *range(start, end + 1))
        if number not in skipped and lines[number - 1].strip() and not lines[number - 1].strip().startswith("#")
    )
