"""Subprocesses that never outlive their parent."""

from __future__ import annotations

import ctypes
import fcntl
import os
import signal
from pathlib import Path

from shared.errors import Occupied

_PR_SET_PDEATHSIG = 1
# Loaded once, before any fork: loading it in the child could deadlock.
_LIBC = ctypes.CDLL(None, use_errno=True)


def die_with_parent() -> None:
    """For `preexec_fn`: the kernel kills this process when the thread that started it ends (Linux)."""
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def lock_folder(folder: Path, program: str, name: str = "state_dir") -> int:
    """Hold `folder`, which its user calls `name`, for this process; the lock ends with it. Returns the descriptor to
    keep open.

    Raises `Occupied` if another process holds it: two with one state would undo each other's work.
    """
    descriptor = os.open(folder / "lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        raise Occupied(f"{folder}: another {program} runs with this {name}; stop it or choose another") from error
    return descriptor


def how_it_ended(code: int | None) -> str:
    """What the exit code of a process says, as `subprocess` gives it; None: it runs, and nothing is said."""
    if code is None:
        return ""
    return f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
