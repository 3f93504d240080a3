"""What runs of a whole fleet have in common: a folder that is held and left clean, and an orderly end by a signal."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
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


def status(carry_out: Callable[[], str], interrupted: str) -> int:
    """The exit code of a run that `carry_out` does, which gives the job's state, and the one line that it owes.

    0: the job finished; 1: it did not; 130: interrupted, and what that means is said. Raises `UserError` for bad input.
    """
    with interruptible():
        try:
            state = carry_out()
        except KeyboardInterrupt:
            print(f"interrupted: {interrupted}", file=sys.stderr)  # noqa: T201 - a command's output
            return INTERRUPTED
        except RunFailed as error:
            print(f"error: {error}", file=sys.stderr)  # noqa: T201 - the one line the operator sees
            return 1
    return 0 if state == "finished" else 1


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
