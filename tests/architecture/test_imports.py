"""Who may import whom: the contracts of `pyproject.toml`, and what they can't see."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from tests.architecture.source import ROOT, modules

CORES = ("coordinator/core", "edge_daemon/core")
IMPURE = {
    "asyncio", "concurrent", "datetime", "importlib", "io", "logging", "multiprocessing", "os", "pathlib", "queue",
    "psutil", "random", "secrets", "select", "shutil", "signal", "socket", "sqlite3", "subprocess", "sys", "tempfile",
    "threading", "time", "torch", "uuid",
    "shared.transport", "shared.modeling", "shared.blob_folder", "shared.settings", "shared.logs", "shared.files",
    "shared.processes", "shared.subprocess_pipe", "shared.notify", "shared.lifeline", "shared.service", "numpy.random",
}  # fmt: skip
IMPURE_CALLS = {"open", "print", "input", "exec", "eval", "__import__"}
TORCH = {"torch", "transformers", "peft", "bitsandbytes", "accelerate", "datasets", "shared.modeling"}
EDGE_CORE_TOO = {"numpy", "scipy"}


def _within(name: str, forbidden: set[str]) -> bool:
    return any(name == one or name.startswith(f"{one}.") for one in forbidden)


def test_contracts_hold() -> None:
    program = Path(sys.executable).parent / "lint-imports"
    done = subprocess.run([program, "--no-cache"], cwd=ROOT, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " 0 broken" in done.stdout


@pytest.mark.parametrize("core", CORES)
def test_cores_import_nothing_impure_even_inside_functions(core: str) -> None:
    forbidden = IMPURE | (EDGE_CORE_TOO if core.startswith("edge") else set())
    found = [
        f"{module.name}:{line}: {name}"
        for module in modules(core)
        for line, name in module.imports()
        if _within(name, forbidden)
    ]
    assert not found


@pytest.mark.parametrize(
    ("program", "subprocess_folder", "never"),
    [
        ("coordinator", "coordinator/workers/", TORCH),
        ("edge_daemon", "edge_daemon/training/", TORCH | {"numpy", "scipy", "shared.adapter", "shared.tensors"}),
    ],
)
def test_services_leave_heavy_imports_to_their_subprocess(
    program: str, subprocess_folder: str, never: set[str]
) -> None:
    found = [
        f"{module.name}:{line}: {name}"
        for module in modules(program)
        if not module.name.startswith(subprocess_folder)
        for line, name in module.imports()
        if _within(name, never)
    ]
    assert not found


@pytest.mark.parametrize("core", CORES)
def test_cores_call_nothing_impure(core: str) -> None:
    found = [
        f"{module.name}:{node.lineno}: {node.func.id}"
        for module in modules(core)
        for node in ast.walk(module.tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in IMPURE_CALLS
    ]
    assert not found


@pytest.mark.parametrize(
    ("service", "never"),
    [
        (
            "edge_daemon.service",
            ("torch", "transformers", "peft", "numpy", "scipy", "cryptography", "coordinator", "muster"),
        ),
        ("coordinator.service", ("torch", "transformers", "peft", "bitsandbytes", "edge_daemon", "muster")),
    ],
)
def test_a_service_process_stays_light(service: str, never: tuple[str, ...]) -> None:
    code = f"import sys, {service}; print(*sorted(set(sys.modules) & set({never!r})))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []
