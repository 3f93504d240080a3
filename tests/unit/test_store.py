"""What the daemon keeps on disk: crashes, damage, a second process, a full disk."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from edge_daemon.adapters.store import UPDATE_FILE, Store
from edge_daemon.core.state import Finished, Identity, Journal, Offer
from shared.errors import UserError
from tests.unit.session_rig import UPDATE, assignment, facts

JOURNAL = Journal(
    term=3, assignment=assignment(), boot_id="boot-1", received_at=12.5, batch_limit=2,
    outbox=(Offer(job="job-1", round=1, attempt=1, sha=UPDATE, size=9, facts=facts()),),
    finished=(Finished(job="job-0", round=4, attempt=2, verdict="failed", out_of_memory=True),),
)  # fmt: skip


def test_a_journal_comes_back_as_it_was(tmp_path: Path) -> None:
    store = Store(tmp_path)
    assert store.load() == Journal()
    store.save(JOURNAL)
    store.close()
    assert Store(tmp_path, fsync=False).load() == JOURNAL


@pytest.mark.parametrize("damage", [b"", b"\xc1\xc1", b"half"])
def test_a_damaged_journal_is_moved_aside(tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: bytes) -> None:
    store = Store(tmp_path, fsync=False)
    store.save(JOURNAL)
    path = tmp_path / "journal"
    path.write_bytes(path.read_bytes()[:40] if damage == b"half" else damage)
    with caplog.at_level(logging.ERROR):
        assert store.load() == Journal()
    assert "damaged" in caplog.text
    assert len(list(tmp_path.glob("journal.damaged-*"))) == 1
    store.save(JOURNAL)
    assert store.load() == JOURNAL


def test_a_save_that_fails_leaves_the_old_journal(tmp_path: Path) -> None:
    store = Store(tmp_path, fsync=False)
    store.save(JOURNAL)
    (tmp_path / ".journal.tmp").mkdir()  # nothing can be written there, as on a full disk
    with pytest.raises(OSError, match=r"\.journal\.tmp"):
        store.save(Journal())
    assert store.load() == JOURNAL


def test_a_second_process_is_refused(tmp_path: Path) -> None:
    store = Store(tmp_path, fsync=False)
    with pytest.raises(UserError, match="another muster-edge"):
        Store(tmp_path, fsync=False)
    store.close()
    Store(tmp_path, fsync=False).close()


def test_a_folder_that_cannot_be_made_is_the_owners_fault(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="state_dir"):
        Store(tmp_path / "file" / "state")


def test_epochs_rise_over_restarts_and_damage(tmp_path: Path) -> None:
    store = Store(tmp_path, fsync=False)
    assert [store.next_epoch(), store.next_epoch()] == [1, 2]
    store.raise_epoch(50)
    store.raise_epoch(7)
    store.close()
    again = Store(tmp_path, fsync=False)
    assert again.next_epoch() == 51
    (tmp_path / "epoch").write_text("garbage")
    assert again.next_epoch() > 1_000_000_000


def test_tidy_removes_all_that_nothing_refers_to(tmp_path: Path) -> None:
    store = Store(tmp_path, fsync=False)
    kept, gone = Identity("job-1", 2, 1), Identity("job-1", 1, 1)
    for identity in (kept, gone):
        folder = store.work_folder(identity)
        folder.mkdir()
        (folder / UPDATE_FILE).write_bytes(b"update")
    wanted, other = store.blobs.put(b"wanted"), store.blobs.put(b"other")
    part = store.blobs.spool("e" * 64, 100, 10)
    part.write(0, b"x" * 10)
    store.tidy((kept,), (wanted.sha,))
    assert store.work_folder(kept).exists()
    assert not store.work_folder(gone).exists()
    assert store.blobs.digests() == {wanted.sha}
    assert store.blobs.path(other.sha) is None
    assert store.blobs.parts() == set()
    store.drop_work(kept)
    store.drop_work(kept)
    assert not store.work_folder(kept).exists()
    assert store.disk_free() > 0
