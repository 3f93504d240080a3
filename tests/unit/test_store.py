"""What the daemon keeps on disk: crashes, damage, a second process, a full disk."""

from __future__ import annotations

import logging
import resource
import time
from collections.abc import Callable, Iterator
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


@pytest.fixture
def full_disk() -> Iterator[Callable[[bool], None]]:
    """Fills the disk, or makes room: files can be made and emptied while it is full, but nothing be written to them."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda full: resource.setrlimit(resource.RLIMIT_FSIZE, (0 if full else soft, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_keeps_no_device_from_connecting(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, full_disk: Callable[[bool], None]
) -> None:
    store = Store(tmp_path, fsync=False)
    given = [store.next_epoch()]
    full_disk(True)
    given += [store.next_epoch() for _ in range(3)]
    assert [record.levelname for record in caplog.records] == ["WARNING"], "one, not one for each try"
    store.raise_epoch(given[-1] + 50)
    given += [store.next_epoch(), store.next_epoch()]
    assert given[-2] == given[-3] + 51
    full_disk(False)
    given.append(store.next_epoch())
    assert given == sorted(set(given))
    assert (tmp_path / "epoch").read_text() == str(given[-1])
    full_disk(True)
    store.next_epoch()
    assert len(caplog.records) == 2, "it was full a second time"


@pytest.mark.parametrize("still", [True, False])
def test_a_daemon_killed_while_the_disk_was_full_goes_on_above_all_it_said(
    tmp_path: Path, full_disk: Callable[[bool], None], still: bool
) -> None:
    store = Store(tmp_path, fsync=False)
    store.next_epoch()
    full_disk(True)
    last = max(store.next_epoch(), store.next_epoch())
    store.close()  # as far as a kill -9 does anything: it frees the lock
    full_disk(still)
    time.sleep(1.1)  # no daemon is up again within a second
    again = Store(tmp_path, fsync=False)
    assert last < again.next_epoch() < again.next_epoch()


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
