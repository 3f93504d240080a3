"""Writes `constraints/py311.txt`: the versions installed in this environment of all that Muster's extras bring.

Run it in an environment whose tests passed: `.venv/bin/python scripts/pins.py`.
"""

from __future__ import annotations

import sys
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
TARGET = ROOT / "constraints" / "py311.txt"
HEADER = """\
# The versions that were tested together, with Python 3.11. Written by scripts/pins.py; ranges are in pyproject.toml.
# A build's local version (torch 2.13.0+cpu) is left off, so that every build of the same version satisfies the pin.
"""


def closure(name: str, extras: frozenset[str]) -> dict[str, str]:
    """Name -> version of every installed distribution that `name` with `extras` needs, itself excluded."""
    versions: dict[str, str] = {}
    seen: set[tuple[str, str]] = set()
    pending = [(name, extra) for extra in {"", *extras}]
    while pending:
        current, extra = pending.pop()
        if (current, extra) in seen:
            continue
        seen.add((current, extra))
        try:
            distribution = metadata.distribution(current)
        except metadata.PackageNotFoundError:
            continue  # of an extra that this environment does not have
        versions[canonicalize_name(current)] = distribution.version.split("+")[0]
        for text in distribution.requires or []:
            wanted = Requirement(text)
            if wanted.marker is None or wanted.marker.evaluate({"extra": extra}):
                pending += [(canonicalize_name(wanted.name), one) for one in {"", *wanted.extras}]
    versions.pop(canonicalize_name(name), None)
    return versions


def main() -> int:
    """Write the file; refuses another Python than the one the file is named after."""
    if sys.version_info[:2] != (3, 11):
        print("scripts/pins.py: run it with Python 3.11", file=sys.stderr)
        return 2
    extras = frozenset(metadata.metadata("muster").get_all("Provides-Extra") or [])
    pins = closure("muster", extras)
    TARGET.parent.mkdir(exist_ok=True)
    lines = "".join(f"{name}=={version}\n" for name, version in sorted(pins.items()))
    TARGET.write_text(HEADER + lines, encoding="utf-8")
    print(f"{TARGET.relative_to(ROOT)}: {len(pins)} pins")
    return 0


if __name__ == "__main__":
    sys.exit(main())
