"""The rules of the house that a machine can check. What may break one stands in the tables below, with its reason."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import lru_cache

import pytest

from tests.architecture.source import PACKAGES, ROOT, Function, Module, code_lines, modules, text_files

MAX_MODULE_LINES = 420
MAX_FUNCTION_LINES = 45

LONG_MODULES: dict[str, str] = {}
"""File -> why it is longer."""
LONG_FUNCTIONS: dict[str, str] = {}
"""file:function -> why it is longer."""
SLEEPERS: dict[str, str] = {
    "muster/testbed/": "waits for processes that it started, in a program of its own",
    "muster/cli/": "waits for the coordinator's answers while a person looks on",
    "bench/": "measures",
    "shared/transport/mqtt.py": "polls the window while a graceful stop drains it, 2 s at most",
    "edge_daemon/training/agent.py": "a thread that gives the working thread its last seconds, then ends the process",
}
"""Path prefix -> why it may call time.sleep. Everywhere else a wait is a timeout of a queue or an event."""

OURS = modules(*PACKAGES)
TOOLS = modules("scripts", "bench")
UNFINISHED = re.compile(r"\b(" + "|".join(("TO" + "DO", "FIX" + "ME", "X" + "XX")) + r")\b")
DIRECTIVE = re.compile(r"#\s*(noqa: ?[A-Z]+[0-9]+(?:, ?[A-Z]+[0-9]+)*|type: ignore(?:\[[a-z0-9, -]+\])?)(.*)")


def test_the_packages_were_found() -> None:
    assert {module.name.split("/")[0] for module in OURS} == set(PACKAGES)


def test_modules_are_short() -> None:
    lengths = {module.name: len(module.text.splitlines()) for module in (*OURS, *TOOLS)}
    too_long = {name: n for name, n in lengths.items() if n > MAX_MODULE_LINES and name not in LONG_MODULES}
    assert not too_long, f"over {MAX_MODULE_LINES} lines"
    settled = [name for name in LONG_MODULES if lengths.get(name, 0) <= MAX_MODULE_LINES]
    assert not settled, "no longer an exception"


def test_functions_are_short() -> None:
    lengths = {
        f"{module.name}:{name}": code_lines(module, function)
        for module in (*OURS, *TOOLS)
        for name, function in module.functions()
    }
    too_long = {name: n for name, n in lengths.items() if n > MAX_FUNCTION_LINES and name not in LONG_FUNCTIONS}
    assert not too_long, f"over {MAX_FUNCTION_LINES} lines of code"
    settled = [name for name in LONG_FUNCTIONS if lengths.get(name, 0) <= MAX_FUNCTION_LINES]
    assert not settled, "no longer an exception"


def _public_methods(node: ast.ClassDef) -> list[Function]:
    return [one for one in node.body if isinstance(one, Function) and not one.name.startswith("_")]


@lru_cache
def _protocols() -> tuple[frozenset[str], ...]:
    """The methods of every Protocol of the packages."""
    classes = (node for module in OURS for node in module.tree.body if isinstance(node, ast.ClassDef))
    return tuple(
        frozenset(method.name for method in _public_methods(node))
        for node in classes
        if any(ast.unparse(base) == "Protocol" for base in node.bases)
    )


def _contracts_of(node: ast.ClassDef) -> frozenset[str]:
    """Methods of a class that stand, with their docstrings, in a Protocol which the class implements whole."""
    own = {method.name for method in _public_methods(node)}
    return frozenset().union(*(methods for methods in _protocols() if methods <= own))


def _without_docstring(module: Module) -> Iterator[str]:
    if ast.get_docstring(module.tree) is None:
        yield f"{module.name}: module"
    for node in module.tree.body:
        if not isinstance(node, ast.ClassDef | Function) or node.name.startswith("_"):
            continue
        if ast.get_docstring(node) is None:
            yield f"{module.name}:{node.lineno}: {node.name}"
        if isinstance(node, ast.ClassDef):
            documented_elsewhere = _contracts_of(node)
            for method in _public_methods(node):
                if ast.get_docstring(method) is None and method.name not in documented_elsewhere:
                    yield f"{module.name}:{method.lineno}: {node.name}.{method.name}"


def test_what_is_public_has_a_docstring() -> None:
    missing = [entry for module in OURS for entry in _without_docstring(module)]
    assert not missing


def test_nothing_is_left_unfinished() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in text_files()
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), start=1)
        if UNFINISHED.search(line)
    ]
    assert not found


def _sleeps(module: Module) -> Iterator[str]:
    for line, name in module.imports():
        if name == "time.sleep":
            yield f"{module.name}:{line}"
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Attribute) and ast.unparse(node) == "time.sleep":
            yield f"{module.name}:{node.lineno}"


def test_services_do_not_sleep() -> None:
    watched = [module for module in (*OURS, *TOOLS) if not module.name.startswith(tuple(SLEEPERS))]
    assert not [place for module in watched for place in _sleeps(module)], "wait on a queue or an event instead"


def _is_broad(handler: ast.ExceptHandler) -> bool:
    if isinstance(handler.body[-1], ast.Raise):
        return False  # cleans up and passes it on
    caught = handler.type.elts if isinstance(handler.type, ast.Tuple) else [handler.type]
    return any(
        one is None or (isinstance(one, ast.Name) and one.id in {"Exception", "BaseException"}) for one in caught
    )


def test_a_broad_except_says_why() -> None:
    silent = []
    for module in (*OURS, *TOOLS):
        commented = {line for line, text in module.comments() if len(text.split()) >= 4}
        for node in ast.walk(module.tree):
            if not isinstance(node, ast.ExceptHandler) or not _is_broad(node):
                continue
            if not commented & {node.lineno - 1, node.lineno, node.lineno + 1}:
                silent.append(f"{module.name}:{node.lineno}")
    assert not silent, "name the errors, or say beside it why all are caught"


def test_what_silences_a_checker_says_why() -> None:
    silent = []
    for module in (*OURS, *TOOLS, *modules("tests")):
        comments = dict(module.comments())
        explained: set[str] = set()
        for line, text in comments.items():
            found = DIRECTIVE.search(text)
            if found is None:
                continue
            directive, reason = found.groups()
            if len(reason.split()) >= 2 or line - 1 in comments:
                explained.add(directive)
            if directive not in explained:
                silent.append(f"{module.name}:{line}: {text}")
    assert not silent, "give the reason on the same line or the line above, once for each directive of a file"


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("def f():\n    return 1\n", 2),
        ('def f():\n    """Doc\n    more."""\n\n    # why\n    return 1\n', 2),
        ("def f():\n    def g():\n        return 2\n    return g\n", 2),
    ],
)
def test_code_lines_counts_code_alone(text: str, count: int) -> None:
    module = Module(ROOT / "none.py")
    module.__dict__["text"] = text
    assert code_lines(module, next(iter(module.functions()))[1]) == count
