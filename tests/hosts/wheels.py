"""The wheels that the hosts install: made by `scripts/wheelhouse.py`, kept beside the trees."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from pathlib import Path
from types import ModuleType

from tests.hosts.controller import ROOT
from tests.hosts.tree import CACHE

PROFILES = {"edge-numpy": "muster[systemd] numpy", "coordinator": "muster[systemd,coordinator,cli]"}
"""With `edge-numpy`, the test agent's, in the place of `edge`."""
TORCH = {"edge-train": "muster[systemd,train]", "coordinator-train": "muster[systemd,coordinator,cli,train]"}
"""In a folder of their own: only the later days need them, and torch is large."""
FOLDER, TORCH_FOLDER = CACHE / "wheels", CACHE / "wheels-torch"
NEVER_READY = {"edge_daemon/service.py": ("        self._transport.start(self._queue.put)\n", "")}
"""A release that starts, says so to systemd, and stays up, but that the fleet never hears."""
HERE = sys.version_info[:2]
_COPIED = ("pyproject.toml", "README.md", "LICENSE", "coordinator", "edge_daemon", "muster", "shared")


def _script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("wheelhouse", ROOT / "scripts" / "wheelhouse.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def _make(folder: Path, source: Path, profiles: dict[str, str]) -> dict[str, str]:
    script = _script()
    folder.mkdir(parents=True, exist_ok=True)
    target = script.Target("x86_64-py311", "", ())
    made: dict[str, str] = script.make(folder, source, target, profiles, [str(FOLDER)], [])
    return made


def good() -> tuple[Path, dict[str, str]]:
    """The wheelhouse of this source; (folder, profile -> release)."""
    return FOLDER, _make(FOLDER, ROOT, PROFILES)


def clear_torch() -> None:
    """Have the folder there to be mounted, without the Muster of an earlier run, which hosts would try to install."""
    TORCH_FOLDER.mkdir(exist_ok=True)
    for path in TORCH_FOLDER.glob("muster-*.whl"):
        path.unlink()


def with_torch() -> tuple[Path, dict[str, str]]:
    """The same, of the profiles with torch."""
    return TORCH_FOLDER, _make(TORCH_FOLDER, ROOT, TORCH)


def other(folder: Path, version: str, changes: dict[str, tuple[str, str]]) -> tuple[Path, dict[str, str]]:
    """A wheelhouse of another version: `changes`: file of the source -> (what is there, what stands there instead)."""
    source = folder / "source"
    source.mkdir(parents=True)
    for name in _COPIED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, source / name)
    old = _version()
    versions = {
        "pyproject.toml": (f'version = "{old}"', f'version = "{version}"'),
        "shared/version.py": (f'"{old}"', f'"{version}"'),
    }
    for name, (before, after) in {**versions, **changes}.items():
        text = (source / name).read_text(encoding="utf-8")
        assert text.count(before) == 1, f"{name}: {text.count(before)} x {before!r}"
        (source / name).write_text(text.replace(before, after), encoding="utf-8")
    wheels = folder / "wheels"
    copy(wheels)
    return wheels, _make(wheels, source, PROFILES)


def copy(folder: Path) -> Path:
    """The good wheelhouse as another folder; the wheels are the same files: replace one, never write to it."""
    folder.mkdir(parents=True)
    for path in FOLDER.iterdir():
        if path.suffix == ".whl":
            os.link(path, folder / path.name)
        elif path.is_file():
            shutil.copy(path, folder / path.name)
    return folder


def _version() -> str:
    from shared.version import VERSION

    return VERSION
