"""The shipped units: where they lie, what they say, and how they are installed."""

from __future__ import annotations

import shutil
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
DEPLOY = ROOT / "deploy" / "systemd"
SERVICES = ("muster-edge.service", "muster-coordinator.service")
VENDOR = Path("/usr/lib/systemd/system")


def install(tree: Path) -> None:
    """Install the units under the root folder `tree`, with stand-ins for what a whole system would have."""
    system, vendor = tree / "etc/systemd/system", tree / "usr/lib/systemd/system"
    vendor.mkdir(parents=True)
    shutil.copytree(DEPLOY / "mosquitto.service.d", system / "mosquitto.service.d")
    for name in SERVICES:
        shutil.copy(DEPLOY / name, system)
    for path in VENDOR.glob("*"):
        if path.suffix in {".target", ".slice", ".mount"} or path.name in {"mosquitto.service", "-.slice"}:
            shutil.copy(path, vendor)
    for program in ("opt/muster/current/bin/muster-edge", "opt/muster/current/bin/muster-coordinator",
                    "usr/sbin/mosquitto", "bin/kill"):  # fmt: skip
        path = tree / program
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("#!/bin/sh\n", encoding="ascii")
        path.chmod(0o755)
    for kind in ("sysusers", "tmpfiles"):
        folder = tree / f"usr/lib/{kind}.d"
        folder.mkdir(parents=True)
        shutil.copy(DEPLOY / f"muster.{kind}.conf", folder / "muster.conf")


def lines_of(unit: Path) -> list[tuple[str, str]]:
    """Key and value of each line of a unit."""
    lines = [line for line in unit.read_text(encoding="utf-8").splitlines() if line[:1] not in ("", "#", "[")]
    return [(key.strip(), value.strip()) for key, _, value in (line.partition("=") for line in lines)]
