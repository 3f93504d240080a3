"""The event log: all or nothing, the same after a reopen, and a damaged file is said in one line."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import msgspec
import pytest

from coordinator.adapters.event_log import LogUnavailable, SqliteEventLog
from coordinator.core import events as ev
from coordinator.core import records as rec
from coordinator.core.job import BrokenLog, apply
from shared.errors import UserError
from tests.unit.machine_rig import Rig, spec


def story() -> Rig:
    rig = Rig()
    rig.open()
    rig.deliver("dev-a", "a" * 64)
    rig.ack("dev-b", "reject", "too warm")
    rig.now += 3
    rig.feed(ev.Tick)
    return rig


def test_a_reopened_log_gives_the_same_jobs(tmp_path: Path) -> None:
    rig = story()
    log = SqliteEventLog(tmp_path / "log")
    log.append(rig.log[:3])
    log.append(rig.log[3:])
    log.close()
    again = SqliteEventLog(tmp_path / "log")
    assert list(again.replay()) == rig.log
    job = None
    for record in again.of_job("job-1"):
        job = apply(job, record)
    assert job == rig.job
    assert again.of_job("another") == []


def test_a_plan_tells_only_what_changed_of_its_devices() -> None:
    rig = Rig()
    rig.open(spec(rounds={"count": 4}))
    for number in range(3):
        if number == 2:
            rig.birth("dev-b", epoch=2)
        rig.deliver("dev-a", f"{number:x}" * 64)
        rig.deliver("dev-b", f"{number + 8:x}" * 64)
        rig.folded()
    plans = [record for record in rig.log if isinstance(record, rec.RoundPlanned)]
    assert [sorted(plan.infos) for plan in plans] == [["dev-a", "dev-b"], [], [], ["dev-b"]]
    assert plans[-1].infos["dev-b"].epoch == 2


def test_a_plan_is_read_that_was_logged_without_what_its_devices_can(tmp_path: Path) -> None:
    rig = story()
    log = SqliteEventLog(tmp_path / "log")
    log.append(rig.log)
    kind, added = rec.RoundPlanned.__name__, ("infos", "load_ages", "fresh_s")
    seq, body = log._db.execute("SELECT seq, body FROM records WHERE kind = ?", (kind,)).fetchone()
    older = {key: value for key, value in msgspec.msgpack.decode(body).items() if key not in added}
    log._db.execute("UPDATE records SET body = ? WHERE seq = ?", (msgspec.msgpack.encode(older), seq))
    job = None
    for record in log.replay():
        job = apply(job, record)
    assert job == msgspec.structs.replace(rig.job, told={})


def test_terms_rise_over_restarts(tmp_path: Path) -> None:
    assert [SqliteEventLog(tmp_path / "log").next_term() for _ in range(3)] == [1, 2, 3]


def test_nothing_of_a_failed_append_is_kept(tmp_path: Path) -> None:
    rig = story()
    log = SqliteEventLog(tmp_path / "log")
    blocker = sqlite3.connect(tmp_path / "log", isolation_level=None)
    log._db.execute("PRAGMA busy_timeout=1")
    blocker.execute("BEGIN EXCLUSIVE")
    with pytest.raises(LogUnavailable):
        log.append(rig.log)
    blocker.execute("ROLLBACK")
    assert list(log.replay()) == []
    log.append(rig.log)
    assert list(log.replay()) == rig.log


def test_a_file_that_is_no_database_is_named(tmp_path: Path) -> None:
    (tmp_path / "log").write_bytes(b"not a database at all, but long enough to be looked at" * 100)
    with pytest.raises(UserError, match="not a usable event log"):
        SqliteEventLog(tmp_path / "log")


def test_an_unreadable_record_is_named(tmp_path: Path) -> None:
    log = SqliteEventLog(tmp_path / "log")
    log.append(story().log[:2])
    log._db.execute("UPDATE records SET body = X'C1' WHERE seq = 2")
    with pytest.raises(BrokenLog, match="record 2"):
        list(log.replay())


def test_a_contradictory_log_is_refused() -> None:
    rig = story()
    admitted = next(r for r in rig.log if type(r).__name__ == "UpdateAdmitted")
    with pytest.raises(BrokenLog, match="already delivered"):
        job = None
        for record in [*rig.log[: rig.log.index(admitted) + 1], admitted]:
            job = apply(job, record)
    with pytest.raises(BrokenLog, match="unknown job"):
        apply(None, admitted)
