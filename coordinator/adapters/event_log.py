"""The append-only event log in SQLite, the coordinator's truth: WAL, `synchronous=FULL`, one transaction per step."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

import msgspec

from coordinator.core.job import BrokenLog
from coordinator.core.records import AnyRecord, subject
from shared.errors import MusterError, UserError

_SCHEMA = """
CREATE TABLE IF NOT EXISTS records (
    seq INTEGER PRIMARY KEY AUTOINCREMENT, job TEXT NOT NULL, kind TEXT NOT NULL, body BLOB NOT NULL);
CREATE INDEX IF NOT EXISTS records_by_job ON records (job, seq);
CREATE TABLE IF NOT EXISTS facts (name TEXT PRIMARY KEY, value INTEGER NOT NULL);
"""


class LogUnavailable(MusterError):
    """Nothing was written (disk full, file locked); try again later."""


class EventLog(Protocol):
    """Where records are kept. Another database can take SQLite's place by implementing this."""

    def append(self, records: Sequence[AnyRecord]) -> None:
        """Write all of `records` durably, or none; then raises `LogUnavailable`."""

    def replay(self) -> Iterator[AnyRecord]:
        """Every record, in the order written."""

    def of_job(self, job: str) -> list[AnyRecord]:
        """The records of one job or release, in order. Safe from any thread."""

    def next_term(self) -> int:
        """A number larger than any it gave before, durably."""


class SqliteEventLog:
    """`EventLog` in one file; written from one thread, read from any."""

    def __init__(self, path: Path, *, fsync: bool = True) -> None:
        self._path = path
        self._encode = msgspec.msgpack.Encoder().encode
        self._decoder = msgspec.msgpack.Decoder(AnyRecord)
        try:
            self._db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute(f"PRAGMA synchronous={'FULL' if fsync else 'OFF'}")
            self._db.executescript(_SCHEMA)
        except sqlite3.DatabaseError as error:
            raise UserError(
                f"{path}: not a usable event log ({error}); restore it from a backup or move it away"
            ) from error

    def append(self, records: Sequence[AnyRecord]) -> None:
        """Write all of `records` durably, or none."""
        rows = [(subject(record), type(record).__name__, self._encode(record)) for record in records]
        try:
            with _transaction(self._db):
                self._db.executemany("INSERT INTO records (job, kind, body) VALUES (?, ?, ?)", rows)
        except sqlite3.Error as error:
            raise LogUnavailable(f"{self._path}: {error}") from error

    def replay(self) -> Iterator[AnyRecord]:
        """Every record, in the order written."""
        return self._read(self._db, "SELECT seq, body FROM records ORDER BY seq", ())

    def of_job(self, job: str) -> list[AnyRecord]:
        """The records of one job or release, in order. Safe from any thread: it opens a reader of its own."""
        reader = sqlite3.connect(f"file:{self._path}?mode=ro", uri=True)
        try:
            return list(self._read(reader, "SELECT seq, body FROM records WHERE job = ? ORDER BY seq", (job,)))
        finally:
            reader.close()

    def next_term(self) -> int:
        """A number larger than any it gave before, durably. Raises `UserError` where it can't be written."""
        try:
            with _transaction(self._db):
                self._db.execute(
                    "INSERT INTO facts VALUES ('term', 1) ON CONFLICT (name) DO UPDATE SET value = value + 1"
                )
                (term,) = self._db.execute("SELECT value FROM facts WHERE name = 'term'").fetchone()
        except sqlite3.Error as error:
            raise UserError(
                f"{self._path}: can't be written ({error}); is the disk full, or another coordinator running?"
            ) from error
        return int(term)

    def close(self) -> None:
        """Close the file."""
        self._db.close()

    def _read(self, db: sqlite3.Connection, query: str, arguments: tuple[str, ...]) -> Iterator[AnyRecord]:
        for seq, body in db.execute(query, arguments):
            try:
                yield self._decoder.decode(body)
            except msgspec.MsgspecError as error:
                raise BrokenLog(f"{self._path}: record {seq} can't be read: {error}") from error


class _transaction:  # noqa: N801 - reads as a statement
    """BEGIN IMMEDIATE ... COMMIT, or ROLLBACK on an exception."""

    def __init__(self, db: sqlite3.Connection) -> None:
        self._db = db

    def __enter__(self) -> None:
        if self._db.in_transaction:
            # The last one could neither be committed nor be rolled back.
            self._db.execute("ROLLBACK")
        self._db.execute("BEGIN IMMEDIATE")

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        self._db.execute("COMMIT" if kind is None else "ROLLBACK")
