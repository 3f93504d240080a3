"""What runs of a whole fleet have in common: a folder that is held and left clean, and an orderly end by a signal."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

from shared.errors import UserError
from shared.processes import lock_folder

INTERRUPTED = 130


class RunFailed(UserError):
    """A program of the fleet ended by itself; its log is kept."""


@contextlib.contextmanager
def whole_or_nothing(out: Path, what: str) -> Iterator[None]:
    """Hold the folder for this run, a `what`.

    A folder that was not there before is removed again where the input was at fault.
    """
    existed = out.exists()
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = lock_folder(out, what)
    except OSError as error:
        raise UserError(f"--out {out}: can't be used: {error.strerror}") from error
    try:
        yield
    except RunFailed:
        raise
    except UserError:
        if not existed:
            shutil.rmtree(out, ignore_errors=True)
        raise
    finally:
        (out / "lock").unlink(missing_ok=True)
        os.close(lock)
        if not existed and out.is_dir() and not any(out.iterdir()):
            out.rmdir()  # interrupted before anything was written


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """SIGTERM means what Ctrl-C means."""

    def interrupt(*_: object) -> None:
        # What follows stops within seconds; a second signal must not leave half of it running.
        for name in (signal.SIGTERM, signal.SIGINT):
            signal.signal(name, signal.SIG_IGN)
        raise KeyboardInterrupt

    before = {name: signal.signal(name, interrupt) for name in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)
