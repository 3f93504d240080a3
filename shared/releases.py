"""Where a device's releases are, for those who read them: `<state_dir>/releases/current` is the folder in use."""

from __future__ import annotations

from pathlib import Path

FOLDER = "releases"
CURRENT = "current"
FILE_MODE = 0o644
"""Of every file in a release."""


def in_use(releases: Path) -> Path | None:
    """The folder that `current` in `releases` points to; None where there is none. It stays where it is while another
    takes its place, so resolve it once and read all files from there."""
    current = releases / CURRENT
    if not current.is_symlink() or not current.is_dir():
        return None
    return current.resolve()
