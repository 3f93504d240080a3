"""Running the doctor as the unit runs the daemon: a transient unit with the same properties, drop-ins included."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from collections.abc import Sequence

from shared.errors import UserError

UNIT = "muster-edge.service"
_LIFE = re.compile(
    r"(Type|NotifyAccess|Exec\w*|Restart\w*|Watchdog\w*|Timeout\w*|KillMode|OOMPolicy|Syslog\w*|Log\w*|StandardOutput"
    r"|StandardError|RemainAfterExit|PIDFile)"
)
"""What makes a unit a service that stays; the rest is what it may do."""
_SPECIFIERS = {"%S": "/var/lib", "%C": "/var/cache", "%L": "/var/log", "%t": "/run", "%%": "%"}
"""Of a system unit; systemd expands them in files alone."""


def properties(unit: str) -> tuple[list[str], list[str]]:
    """(what its service starts, properties as "Name=value" in order), of the text that `systemctl cat` prints.

    Raises `UserError` where it starts nothing.
    """
    section, command, found = "", list[str](), list[str]()
    for line in re.sub(r"\s*\\\n\s*", " ", unit).splitlines():
        line = line.strip()
        if line.startswith("["):
            section = line
        elif section != "[Service]" or not line or line[0] in "#;":
            continue
        else:
            name, _, value = (part.strip() for part in line.partition("="))
            if name == "ExecStart":
                command = shlex.split(value)
            elif not _LIFE.fullmatch(name):
                found.append(f"{name}={_expanded(value)}")
    if not command:
        raise UserError(f"{UNIT} starts nothing (ExecStart=)")
    return command, found


def _expanded(value: str) -> str:
    return re.sub(r"%[SCLt%]", lambda match: _SPECIFIERS[match[0]], value)


def command(unit: str, arguments: Sequence[str]) -> list[str]:
    """What runs `muster-edge doctor` with `arguments` as the text of the unit says."""
    program, found = properties(unit)
    run = ["systemd-run", "--quiet", "--pipe", "--wait", "--collect", "--service-type=exec"]
    return [*run, *(f"--property={one}" for one in found), "--", program[0], "doctor", *program[1:], *arguments]


def unit_text() -> str:
    """The installed unit with its drop-ins. Raises `UserError`."""
    try:
        done = subprocess.run(["systemctl", "cat", UNIT], capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UserError(f"--sandbox: systemctl can't be run: {error}") from error
    if done.returncode:
        raise UserError(f"--sandbox: {done.stderr.strip().splitlines()[-1] if done.stderr.strip() else 'no such unit'}")
    return done.stdout


def run(arguments: Sequence[str]) -> int:
    """The doctor's exit code, run as the unit. Raises `UserError`."""
    if os.geteuid():
        raise UserError("--sandbox asks systemd for a unit of its own: run it as root")
    try:
        return subprocess.run(command(unit_text(), arguments), check=False).returncode
    except OSError as error:
        raise UserError(f"--sandbox: systemd-run can't be run: {error.strerror}") from error
