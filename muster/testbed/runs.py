"""What runs of a whole fleet have in common: a folder that is held and left clean, and an orderly end by a signal."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sys
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

from shared.errors import UserError
from shared.processes import lock_folder

INTERRUPTED = 130
MARK = ".muster-run"
"""The file that says that a run of Muster has made the folder."""
INPUTS = ("data", "shares")
PRODUCTS = (
    *INPUTS, "adapter", "fleet", "logs", "report.md", "quality.png", "devices.png", "telemetry.jsonl", "result.json",
)  # fmt: skip
"""All that a run writes into its folder."""


class RunFailed(UserError):
    """A program of the fleet ended by itself; its log is kept."""


@contextlib.contextmanager
def whole_or_nothing(out: Path, what: str) -> Iterator[None]:
    """Hold the folder for this run, a `what`.

    What lies there and no run has made is never touched: where a run would write over it, this one is refused. A folder
    that was not there before is removed again where the input was at fault; of one that was, all but what was added.
    """
    try:
        existed = out.exists()
        out.mkdir(parents=True, exist_ok=True)
        before = {path.name for path in out.iterdir()}
        lock = lock_folder(out, what, "--out")
        try:
            _claim(out)
        except BaseException:
            _let_go(out, lock)
            raise
    except OSError as error:
        raise UserError(f"--out {out}: can't be used: {error.strerror}") from error
    try:
        yield
    except RunFailed:
        raise
    except UserError:
        _clean(out, {MARK, *PRODUCTS} - before)
        raise
    finally:
        _let_go(out, lock)
        if {path.name for path in out.iterdir()} - before <= {MARK}:
            _clean(out, {MARK} - before)  # it ended before anything was written
        if not existed and not any(out.iterdir()):
            out.rmdir()


def clear(out: Path) -> None:
    """Remove what an earlier run has left in this folder, which is held: it would be taken for this one's."""
    _clean(out, set(PRODUCTS) - set(INPUTS))


def _claim(out: Path) -> None:
    mark = out / MARK
    foreign = [] if mark.is_file() else [name for name in PRODUCTS if os.path.lexists(out / name)]
    if foreign:
        raise UserError(
            f"--out {out}: no run of Muster has made {', '.join(foreign)} there, and this one would write over it: "
            "move it away, or choose another folder"
        )
    mark.write_text(f"A run of Muster made this folder; the next one with it replaces {', '.join(PRODUCTS)}.\n")


def _clean(out: Path, names: Collection[str]) -> None:
    for name in names:
        path = out / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _let_go(out: Path, lock: int) -> None:
    (out / "lock").unlink(missing_ok=True)
    os.close(lock)


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
