"""Logging of both services: to the journal under systemd, else to standard error (plain on a terminal, else JSON)."""

from __future__ import annotations

import json
import logging
import os
import sys


class _JsonFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line = {
            "ts": round(record.created, 3),
            "level": record.levelname,
            "logger": record.name,
            "text": record.getMessage(),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)


def set_up(program: str, level: str = "INFO") -> None:
    """Configure the root logger of a service named `program`. `level` as in `logging`."""
    handler: logging.Handler
    handler = _journal(program) if os.environ.get("JOURNAL_STREAM") else logging.StreamHandler(sys.stderr)
    if isinstance(handler, logging.StreamHandler):
        plain = logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s")
        handler.setFormatter(plain if sys.stderr.isatty() else _JsonFormatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level)


def _journal(program: str) -> logging.Handler:
    try:
        from systemd.journal import JournalHandler
    except ImportError:
        return logging.StreamHandler(sys.stderr)
    handler = JournalHandler(SYSLOG_IDENTIFIER=program)
    assert isinstance(handler, logging.Handler)
    return handler
