"""Copies a running coordinator's state into an archive: backup.py STATE_DIR ARCHIVE.

The event log first, by SQLite's own online copy; then the blobs, which are never changed once they lie there. What the
log names is then in the copy: blobs are only removed when they are some rounds old.
"""

import contextlib
import sqlite3
import sys
import tarfile
import tempfile
from pathlib import Path

state, archive = Path(sys.argv[1]), Path(sys.argv[2])
with tempfile.TemporaryDirectory(dir=archive.parent) as place, tarfile.open(archive, "w") as tar:
    copy = Path(place) / "events.sqlite"
    with (
        contextlib.closing(sqlite3.connect(state / "events.sqlite")) as source,
        contextlib.closing(sqlite3.connect(copy)) as target,
    ):
        source.backup(target)
    tar.add(copy, "events.sqlite")
    for path in sorted(state.iterdir()):
        # The lock and the address are of the running process; the rest is the log, copied above.
        if path.name not in ("lock", "api.json") and not path.name.startswith("events.sqlite"):
            # Something may be removed while it is copied; it is then of a round long past.
            for inner in [path, *sorted(path.rglob("*"))]:
                with contextlib.suppress(FileNotFoundError):
                    tar.add(inner, str(inner.relative_to(state)), recursive=False)
