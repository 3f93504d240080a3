"""Makes a wheelhouse: all that a host of one kind installs, with hashes, so that it needs no network.

    .venv/bin/python scripts/wheelhouse.py                      # for machines like this one, into wheelhouse/<target>
    .venv/bin/python scripts/wheelhouse.py --python 3.12 --platform manylinux_2_28_aarch64 --find-links built/

A folder holds wheels, a lock per profile (`requirements-<profile>.txt`: every package with its version and hash),
`SHA256SUMS`, and `wheelhouse.json`, which the Ansible roles read: for each profile its release and its files. A release
is named `<version>-<first 8 digits of the lock's sha256>`: the same contents have the same name, on every host.

Run again it downloads nothing unless requirements, constraints or options changed. Wheels of packages that have only a
source distribution (systemd-python) are built here; for another Python or platform than this machine's, build them on a
machine of that kind (`pip wheel systemd-python`) and name their folder with --find-links.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import asdict, dataclass
from email.parser import HeaderParser
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PROFILES = {
    "edge": "muster[systemd]",
    "edge-train": "muster[systemd,train]",
    "coordinator": "muster[systemd,coordinator,cli]",
    "coordinator-train": "muster[systemd,coordinator,cli,train]",
}
"""Name -> what is installed. `-train` brings torch: on a coordinator for evaluation, on a device for training."""
EPOCH = "315619200"
"""1980-01-02, the time of every file in Muster's wheel: the same source gives the same wheel, to the byte."""
MADE_BY = 1
"""Rises when this script makes something else of the same input."""


class Failed(Exception):
    """What the operator has to change, in one line."""


@dataclass(frozen=True)
class File:
    """A wheel."""

    name: str
    sha256: str
    size: int


@dataclass(frozen=True)
class Target:
    """The machines that the wheels are for. `python` and `platforms` empty: as here."""

    name: str
    python: str
    platforms: tuple[str, ...]

    @property
    def options(self) -> list[str]:
        """For `pip download`."""
        if not self.foreign:
            return []
        tag = self.python.replace(".", "")
        found = ["--only-binary=:all:", "--implementation", "cp", "--python-version", self.python]
        found += ["--abi", f"cp{tag}", "--abi", "abi3", "--abi", "none"]
        return [*found, *(part for name in self.platforms for part in ("--platform", name))]

    @property
    def foreign(self) -> bool:
        """Whether wheels can't be built here."""
        return bool(self.python)


def main() -> int:
    """Make the folder; prints its releases. Exit code 2: the operator has to change something."""
    arguments = _arguments()
    try:
        target = _target(arguments)
        folder = Path(arguments.out or ROOT / "wheelhouse" / target.name)
        folder.mkdir(parents=True, exist_ok=True)
        profiles = dict(PROFILES)
        if arguments.profile:
            profiles = dict(_profile(text) for text in arguments.profile)
        found = make(folder, Path(arguments.source), target, profiles, arguments.find_links, arguments.pip)
    except Failed as error:
        print(f"wheelhouse: {error}", file=sys.stderr)
        return 2
    for name, release in found.items():
        print(f"{folder}: {name} is release {release}")
    return 0


def make(
    folder: Path, source: Path, target: Target, profiles: dict[str, str], find_links: list[str], pip: list[str]
) -> dict[str, str]:
    """Fill `folder`; returns profile -> release. Raises `Failed`."""
    own = _own_wheel(source, folder)
    resolved = _resolve(folder, own, target, profiles, find_links, pip)
    keep = {own.name, *(file.name for files in resolved.values() for file in files)}
    for path in folder.glob("*.whl"):
        if path.name not in keep:
            path.unlink()
    for path in folder.glob("requirements-*.txt"):
        path.unlink()
    version = own.name.split("-")[1]
    described = {}
    for name, files in resolved.items():
        everything = sorted([own, *files], key=lambda file: file.name.lower())
        lock = "".join(_line(file) for file in everything)
        (folder / f"requirements-{name}.txt").write_text(lock, encoding="utf-8")
        release = f"{version}-{hashlib.sha256(lock.encode()).hexdigest()[:8]}"
        described[name] = {"release": release, "files": [asdict(file) for file in everything]}
    _write(folder, {"version": version, "target": target.name, "profiles": described})
    return {name: str(profile["release"]) for name, profile in described.items()}


def _write(folder: Path, description: dict[str, object]) -> None:
    text = json.dumps(description, indent=1, sort_keys=True) + "\n"
    (folder / "wheelhouse.json").write_text(text, encoding="utf-8")
    names = sorted(
        path.name for path in folder.iterdir() if path.suffix in (".whl", ".txt", ".json") and path.name[0] != "."
    )
    sums = "".join(f"{_digest(folder / name)}  {name}\n" for name in names)
    (folder / "SHA256SUMS").write_text(sums, encoding="utf-8")


def _own_wheel(source: Path, folder: Path) -> File:
    """Muster's wheel, made from a copy of `source`: a build leaves files in the folder that it builds."""
    for path in folder.glob("muster-*.whl"):
        path.unlink()
    with tempfile.TemporaryDirectory(prefix="muster-wheel-") as temporary:
        copy = Path(temporary) / "source"
        copy.mkdir()
        for name in ("pyproject.toml", "README.md", "LICENSE"):
            shutil.copy(source / name, copy)
        for name in ("coordinator", "edge_daemon", "muster", "shared"):
            shutil.copytree(source / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        environment = {**os.environ, "SOURCE_DATE_EPOCH": EPOCH}
        _pip("wheel", "--no-deps", "--wheel-dir", str(folder), str(copy), environment=environment)
    return _file(next(folder.glob("muster-*.whl")))


def _resolve(
    folder: Path, own: File, target: Target, profiles: dict[str, str], find_links: list[str], pip: list[str]
) -> dict[str, list[File]]:
    """Third-party wheels of each profile, downloaded or built where the note of the last run does not fit."""
    wanted = _wanted(folder / own.name, target, profiles, find_links, pip)
    note = folder / ".resolved.json"
    if note.exists():
        last = json.loads(note.read_text(encoding="utf-8"))
        files = {name: [File(**file) for file in found] for name, found in last["files"].items()}
        if last["wanted"] == wanted and all(_whole(folder, file) for found in files.values() for file in found):
            return files
    files = {}
    for name, requirement in profiles.items():
        with tempfile.TemporaryDirectory(dir=folder, prefix=".new-") as temporary:
            _fetch(Path(temporary), folder, own, requirement, target, find_links, pip)
            files[name] = []
            for path in sorted(Path(temporary).iterdir()):
                if path.name != own.name:
                    path.replace(folder / path.name)
                    files[name].append(_file(folder / path.name))
    content = {"wanted": wanted, "files": {name: [asdict(file) for file in found] for name, found in files.items()}}
    note.write_text(json.dumps(content), encoding="utf-8")
    return files


def _fetch(
    into: Path, folder: Path, own: File, requirement: str, target: Target, find_links: list[str], pip: list[str]
) -> None:
    requirements = [re.sub(r"^muster(\[.*\])?$", rf"muster\1 @ {(folder / own.name).resolve().as_uri()}", part)
                    for part in requirement.split()]  # fmt: skip
    links = [part for place in [str(folder), *find_links] for part in ("--find-links", place)]
    if target.foreign:
        _pip("download", "--dest", str(into), *target.options, *links, *pip, *requirements)
        return
    # What was built here before is taken again (--find-links), so its hash stays.
    _pip("wheel", "--wheel-dir", str(into), *_constraints(), *links, *pip, *requirements)


def _constraints() -> list[str]:
    """The versions that were tested together, where this is the Python they were tested with."""
    path = ROOT / "constraints" / "py{}{}.txt".format(*sys.version_info[:2])
    return ["--constraint", str(path)] if path.exists() else []


def _wanted(
    wheel: Path, target: Target, profiles: dict[str, str], find_links: list[str], pip: list[str]
) -> list[object]:
    """All that decides which third-party wheels there are."""
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = HeaderParser().parsestr(archive.read(name).decode())
    pins = "".join(Path(place).read_text(encoding="utf-8") for place in _constraints()[1:])
    here = "{}.{}".format(*sys.version_info[:2]) + platform.machine()
    requires = sorted(metadata.get_all("Requires-Dist") or [])
    return [
        MADE_BY,
        here,
        list(asdict(target).values())[:2],
        list(target.platforms),
        profiles,
        requires,
        pins,
        find_links,
        pip,
    ]


def _line(file: File) -> str:
    """A line of a lock. The name and version are the wheel's own."""
    name, version = file.name.split("-")[:2]
    return f"{name.replace('_', '-').lower()}=={version} --hash=sha256:{file.sha256}\n"


def _file(path: Path) -> File:
    if path.suffix != ".whl":
        raise Failed(f"{path.name} is no wheel: build one on a machine of the target and give --find-links its folder")
    return File(path.name, _digest(path), path.stat().st_size)


def _whole(folder: Path, file: File) -> bool:
    path = folder / file.name
    return path.exists() and path.stat().st_size == file.size and _digest(path) == file.sha256


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1024 * 1024):
            digest.update(block)
    return digest.hexdigest()


def _pip(*arguments: str, environment: dict[str, str] | None = None) -> None:
    command = [sys.executable, "-m", "pip", arguments[0], "--disable-pip-version-check", "--no-input", "--quiet"]
    done = subprocess.run([*command, *arguments[1:]], capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        lines = [line for line in (done.stderr or done.stdout).splitlines() if line.startswith("ERROR")]
        raise Failed(f"pip {arguments[0]} failed: {' '.join(lines[:3]) or done.stderr.strip()[-500:]}")


def _target(arguments: argparse.Namespace) -> Target:
    python, platforms = arguments.python, tuple(arguments.platform)
    if bool(python) != bool(platforms):
        raise Failed("--python and --platform go together: both describe another kind of machine")
    machine = platform.machine()
    if platforms:
        machine = next((name for name in ("x86_64", "aarch64") if platforms[0].endswith(name)), platforms[0])
    version = python or "{}.{}".format(*sys.version_info[:2])
    return Target(arguments.target or f"{machine}-py{version.replace('.', '')}", python, platforms)


def _profile(text: str) -> tuple[str, str]:
    name, _, requirement = text.partition("=")
    if not requirement and name in PROFILES:
        return name, PROFILES[name]
    if not re.fullmatch(r"[a-z][a-z0-9-]*", name) or not requirement:
        raise Failed(f"--profile {text!r}: one of {', '.join(PROFILES)}, or NAME='muster[extras] package ...'")
    return name, requirement


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Make a folder of wheels from which hosts install without a network.")
    parser.add_argument("--out", default="", help="folder to fill (wheelhouse/<target>)")
    parser.add_argument("--target", default="", help="name of the kind of machine (as in x86_64-py311)")
    parser.add_argument("--source", default=str(ROOT), help="Muster's source (this repository)")
    parser.add_argument("--profile", action="append", default=[], metavar="NAME[=REQUIREMENTS]",
                        help=f"only these profiles; without REQUIREMENTS one of {', '.join(PROFILES)}")  # fmt: skip
    parser.add_argument("--python", default="", metavar="3.N", help="the hosts' Python, if not this machine's")
    parser.add_argument("--platform", action="append", default=[], metavar="TAG", help="the hosts' platform tags")
    parser.add_argument("--find-links", action="append", default=[], metavar="DIR", help="more wheels")
    parser.add_argument("--pip", action="append", default=[], metavar="OPTION",
                        help="passed on to pip, such as --pip=--index-url=URL for a CUDA build of torch")  # fmt: skip
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
