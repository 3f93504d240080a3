"""`scripts/setup.sh` on a machine that lacks packages, for a user who may not install them: it names them, and ends."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TOOLS = ("bash", "cat", "cut", "dirname", "env", "grep", "head", "id", "mktemp", "rm", "sha256sum", "tail")
NOBODY = 65534
ELSEWHERE = ":/usr/sbin:/sbin"
"""Where the script looks for mosquitto beyond the PATH; this machine has it there."""


@pytest.fixture
def place() -> Iterator[Path]:
    """A copy of what the script needs, which anyone may write to, and a `bin` that lacks mosquitto and gcc."""
    folder = Path(tempfile.mkdtemp(prefix="muster-setup-"))
    (folder / "scripts").mkdir()
    text = (ROOT / "scripts" / "setup.sh").read_text(encoding="utf-8")
    assert text.count(ELSEWHERE) == 1
    (folder / "scripts" / "setup.sh").write_text(text.replace(ELSEWHERE, ""), encoding="utf-8")
    shutil.copy(ROOT / "pyproject.toml", folder)
    shutil.copytree(ROOT / "constraints", folder / "constraints")
    (folder / "bin").mkdir()
    for name in TOOLS:
        found = shutil.which(name)
        assert found, name
        (folder / "bin" / name).symlink_to(found)
    stub(folder, "apt-get", 'touch "$MUSTER_TEST_PLACE/apt-was-called"')
    for path in (folder, folder / "scripts"):
        path.chmod(0o777)
    yield folder
    shutil.rmtree(folder)


def stub(place: Path, name: str, line: str) -> None:
    """A program of one line."""
    path = place / "bin" / name
    path.write_text(f"#!{shutil.which('sh')}\n{line}\n", encoding="utf-8")
    path.chmod(0o755)


def names(place: Path) -> list[str]:
    return sorted(str(path.relative_to(place)) for path in place.rglob("*"))


def set_up(place: Path) -> subprocess.CompletedProcess[str]:
    """Run it as a user without rights, with nothing but `bin` on the PATH and no terminal to ask for a password."""
    nobody = {"user": NOBODY, "group": NOBODY, "extra_groups": []} if os.geteuid() == 0 else {}
    return subprocess.run(
        [shutil.which("bash") or "bash", str(place / "scripts" / "setup.sh")],
        env={"PATH": str(place / "bin"), "MUSTER_TEST_PLACE": str(place)}, cwd=place, stdin=subprocess.DEVNULL,
        capture_output=True, text=True, timeout=60, **nobody,
    )  # fmt: skip


@pytest.mark.parametrize("sudo", ["", "exit 1"], ids=["no sudo", "sudo that asks for a password"])
def test_without_root_the_packages_are_named_and_nothing_is_installed(place: Path, sudo: str) -> None:
    if sudo:
        stub(place, "sudo", sudo)
    before = names(place)
    done = set_up(place)
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    first, listed, advice = done.stderr.splitlines()
    assert first.startswith("setup: these packages are missing, and this user may not install them")
    packages = listed.removeprefix("setup:").split()
    assert {"mosquitto", "gcc", "libc6-dev", "pkg-config"} <= set(packages)
    assert advice.endswith(f"run make again:  apt-get install {' '.join(packages)}")
    assert names(place) == before


def test_without_apt_the_packages_are_named_too(place: Path) -> None:
    (place / "bin" / "apt-get").unlink()
    before = names(place)
    done = set_up(place)
    assert done.returncode == 2, done.stderr
    first, listed = done.stderr.splitlines()
    assert first.startswith("setup: this machine has no apt.")
    assert "mosquitto" in listed.split()
    assert names(place) == before


@pytest.mark.skipif(os.geteuid() != 0, reason="root: another user's clone")
def test_in_another_users_clone_it_is_one_fault_and_nothing_is_touched(place: Path) -> None:
    programs = (
        "mosquitto",
        "gcc",
        "pkg-config",
        "systemd-analyze",
        "systemd-nspawn",
        "debootstrap",
        "ip",
        "ssh-keygen",
    )
    for name in programs:
        stub(place, name, "exit 0")
    python = shutil.which("python3", path="/usr/bin") or shutil.which("python3")
    assert python
    for tool in (python, *(shutil.which(name) or "" for name in ("stat", "sort"))):
        (place / "bin" / Path(tool).name).symlink_to(tool)
    (place / ".venv" / "lib").mkdir(parents=True)
    (place / ".venv" / "lib" / "module.py").write_text("")
    (place / ".venv" / ".muster-setup").write_text("of another state")
    for path in (place, place / "scripts"):
        path.chmod(0o755)
    before = names(place)
    done = set_up(place)
    assert done.returncode == 2, done.stderr
    first, advice = done.stderr.splitlines()
    assert "may not write there (it belongs to root)" in first
    assert advice.endswith("clone the repository to a folder of your own, and run make there")
    assert names(place) == before
