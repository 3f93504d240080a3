"""`muster-edge classify` and `muster-edge generate`: ask the released model that this device has in use.

The model is loaded in a process of its own, so that torch stays out of this one; the daemon need not run.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import msgspec

from edge_daemon.core.rollout import installed
from edge_daemon.core.state import Journal
from edge_daemon.settings import EdgeSettings
from shared import settings
from shared.errors import UserError
from shared.releases import CURRENT, FOLDER, in_use

COMMANDS = {
    "classify": ("TEXT", "Say the label of each text, by the released model that is in use on this device."),
    "generate": ("PROMPT", "Continue each prompt, by the released model that is in use on this device."),
}
ANSWER = [sys.executable, "-m", "edge_daemon.training.answer"]


def main(argv: Sequence[str]) -> int:
    """Answer; `argv` begins with the command's name. Exit code 2: it can't be answered, said in one line."""
    ask = argv[0]
    what, about = COMMANDS[ask]
    parser = argparse.ArgumentParser(prog=f"muster-edge {ask}", description=about)
    parser.add_argument("texts", metavar=what, nargs="+")
    parser.add_argument("--config", default="/etc/muster/edge.toml", help="settings file (%(default)s)")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument("--bits", type=int, choices=(4, 8, 16, 32), help="precision of the base; as it was tried here")
    if ask == "generate":
        parser.add_argument("--tokens", type=int, default=32, help="at most so many new tokens (%(default)s)")
    asked = parser.parse_args(argv[1:])
    try:
        root = Path(settings.load(Path(asked.config), EdgeSettings).state_dir)
        folder = in_use_here(root)
    except UserError as error:
        print(f"muster-edge: {error}", file=sys.stderr)  # noqa: T201 - the one line the owner sees
        return 2
    command = [*ANSWER, ask, "--folder", str(folder), "--bits", str(asked.bits or _bits(root))]
    command += ["--tokens", str(asked.tokens)] if ask == "generate" else []
    command += ["--json"] if asked.json else []
    return subprocess.run([*command, "--", *asked.texts], check=False).returncode


def in_use_here(root: Path) -> Path:
    """The folder of the release in use. Raises `UserError` where there is none."""
    folder = in_use(root / FOLDER)
    if folder is None:
        raise UserError(
            f"no release is in use on this device ({root / FOLDER / CURRENT} is not there); "
            "release a finished job with: muster release JOB"
        )
    return folder


def _bits(root: Path) -> int:
    """The precision that the release in use was tried at; 32 where that is not known."""
    try:
        rollout = msgspec.msgpack.decode((root / "journal").read_bytes(), type=Journal).rollout
    except (OSError, msgspec.MsgspecError):
        return 32
    known = installed(rollout, rollout.active)
    return known.bits or 32 if known else 32
