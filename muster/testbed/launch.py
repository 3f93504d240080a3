"""Start a command inside control groups, so that it dies with the process that asked for it.

`python launch.py --parent PID [--nice N] [--group FOLDER]... -- COMMAND...` A script of the standard library alone: it
runs without the site packages and is gone after its `exec`. (A function between fork and exec, the other way, may
deadlock in a program with threads.)
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from pathlib import Path

_PR_SET_PDEATHSIG = 1


def main(arguments: list[str]) -> None:
    """Enter the groups, then become the command. Exits with 2 and one line where a group can't be entered."""
    split = arguments.index("--")
    options, command = arguments[:split], arguments[split + 1 :]
    pairs = list(zip(options[::2], options[1::2], strict=True))
    parent = next(int(value) for key, value in pairs if key == "--parent")
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        # It died before we asked to be told.
        raise SystemExit(1)
    for key, value in pairs:
        if key == "--nice":
            os.nice(int(value))
        elif key == "--group":
            try:
                (Path(value) / "cgroup.procs").write_text(str(os.getpid()), encoding="ascii")
            except OSError as error:
                raise SystemExit(f"muster: control group {value} can't be entered: {error}") from error
    os.execvp(command[0], command)


if __name__ == "__main__":
    main(sys.argv[1:])
