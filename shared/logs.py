"""Logging of all programs: to the journal under systemd, else to standard error (plain on a terminal, else JSON).

A line carries, beside its text, what it is about: in the journal as fields that `journalctl` filters by
(`journalctl MUSTER_ROUND=12`), in JSON under the same names in lower case without the prefix. `event` names the class
of lines, and gives it its MESSAGE_ID. Never logged: payloads, rows, keys.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import uuid
from collections.abc import Mapping

_PREFIX = "MUSTER_"
_EVENTS = uuid.UUID("6d757374-6572-4c6f-8a67-000000000001")
"""Name space of the MESSAGE_IDs: uuid5 of it and the event's name."""
_subject: dict[str, str] = {}
"""What this process works on now. Replaced whole, so that any thread may read it."""


def event(name: str, **fields: object) -> dict[str, str]:
    """For `extra=` of a logging call: the class of the line, and what it is about (device, job, round, attempt)."""
    message_id = uuid.uuid5(_EVENTS, name).hex
    return {"MESSAGE_ID": message_id, f"{_PREFIX}EVENT": name, **_journal_fields(fields)}


def about(**fields: object) -> None:
    """From now on each line is about these, until the next call; a line's own fields come first."""
    global _subject
    _subject = _journal_fields(fields)


def trace(job: str, round_: int, attempt: int) -> str:
    """What the lines of one attempt at a round have in common, on the coordinator and on every device."""
    return f"{job}.{round_}.{attempt}"


def _journal_fields(fields: Mapping[str, object]) -> dict[str, str]:
    return {f"{_PREFIX}{name.upper()}": str(value) for name, value in fields.items() if value not in ("", None)}


class _Subject(logging.Filter):
    """Adds what the process is (`constant`) and works on; lets every record pass."""

    def __init__(self, constant: Mapping[str, object]) -> None:
        super().__init__()
        self._constant = _journal_fields(constant)

    def filter(self, record: logging.LogRecord) -> bool:
        record.__dict__.update({**self._constant, **_subject, **_own(record)})
        return True


def _own(record: logging.LogRecord) -> dict[str, str]:
    return {name: value for name, value in record.__dict__.items() if name.startswith(_PREFIX)}


class _JsonFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line = {
            "ts": round(record.created, 3),
            "level": record.levelname,
            "logger": record.name,
            "text": record.getMessage(),
            **{name.removeprefix(_PREFIX).lower(): value for name, value in sorted(_own(record).items())},
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)


def set_up(program: str, level: str = "INFO", **constant: object) -> None:
    """Configure the root logger of a program. `level` as in `logging`; `constant`: what every line is about."""
    handler = _journal(program) if _stderr_is_the_journal() else None
    if handler is None:
        handler = logging.StreamHandler(sys.stderr)
        plain = logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s")
        handler.setFormatter(plain if sys.stderr.isatty() else _JsonFormatter())
    handler.addFilter(_Subject(constant))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level)


def set_level(level: str) -> None:
    """Log no less than this from now on."""
    logging.getLogger().setLevel(level)


def _stderr_is_the_journal() -> bool:
    """Whether systemd connected our standard error to the journal: JOURNAL_STREAM is inherited by any child."""
    try:
        found = os.fstat(2)
    except OSError:
        return False
    return os.environ.get("JOURNAL_STREAM") == f"{found.st_dev}:{found.st_ino}"


def _journal(program: str) -> logging.Handler | None:
    """None: systemd's library is not installed; the journal then gets JSON by standard error."""
    try:
        from systemd.journal import JournalHandler
    except ImportError:
        return None
    handler = JournalHandler(SYSLOG_IDENTIFIER=program)
    assert isinstance(handler, logging.Handler)
    return handler
