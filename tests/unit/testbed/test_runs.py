"""A folder for a run: what Muster has not made is never touched."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from muster.testbed import runs
from muster.testbed.fleet import Fleet, Program
from shared.errors import UserError


def files(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): p.read_text() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("name", ["fleet", "adapter", "logs", "shares", "report.md"])
def test_a_folder_with_the_users_own_files_is_refused_and_left_as_it_is(tmp_path: Path, name: str) -> None:
    own = tmp_path / name if name.endswith(".md") else tmp_path / name / "README.md"
    own.parent.mkdir(exist_ok=True)
    own.write_text("mine")
    before = files(tmp_path)
    with (
        pytest.raises(UserError, match=rf"--out .*: no run of Muster has made {name} there"),
        runs.whole_or_nothing(tmp_path, "emulation"),
    ):
        pytest.fail("it has begun")
    assert files(tmp_path) == before


def test_a_run_replaces_what_an_earlier_run_has_made_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "job.toml").write_text("mine")
    with runs.whole_or_nothing(tmp_path, "emulation"):
        for name in ("adapter/weights", "fleet/state", "shares/edge-01", "report.md"):
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_text("made")
    with runs.whole_or_nothing(tmp_path, "emulation"):
        assert (tmp_path / "report.md").exists()  # the input may yet be at fault
        runs.clear(tmp_path)
        left = set(files(tmp_path))
    assert left == {"job.toml", "shares/edge-01", runs.MARK, "lock"}


def test_bad_input_takes_back_what_was_added_to_a_folder(tmp_path: Path) -> None:
    (tmp_path / "job.toml").write_text("mine")
    with pytest.raises(UserError, match="bad rows"), runs.whole_or_nothing(tmp_path, "emulation"):
        (tmp_path / "shares").mkdir()
        (tmp_path / "shares" / "edge-01").write_text("made")
        raise UserError("bad rows")
    assert set(files(tmp_path)) == {"job.toml"}
    with pytest.raises(KeyboardInterrupt), runs.whole_or_nothing(tmp_path / "new", "emulation"):
        raise KeyboardInterrupt
    assert not (tmp_path / "new").exists()


def test_a_folder_that_another_run_holds_is_named_as_the_user_named_it(tmp_path: Path) -> None:
    with runs.whole_or_nothing(tmp_path, "emulation"):
        with pytest.raises(UserError, match="another emulation runs with this --out; stop it or choose another"):
            runs.whole_or_nothing(tmp_path, "emulation").__enter__()
        assert (tmp_path / "lock").exists()


def test_a_folder_that_may_not_be_looked_at_is_one_line(tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    closed.mkdir()
    closed.chmod(0)
    tmp_path.chmod(0o755)
    if os.geteuid():
        with pytest.raises(UserError, match="can't be used: Permission denied"):
            runs.whole_or_nothing(closed / "x", "emulation").__enter__()
        closed.chmod(0o700)
        return
    child = os.fork()
    if not child:  # root may look at all
        os.setgroups([])
        os.setresgid(65534, 65534, 65534)
        os.setresuid(65534, 65534, 65534)
        try:
            runs.whole_or_nothing(closed / "x", "emulation").__enter__()
        except UserError as error:
            os._exit(0 if "can't be used: Permission denied" in str(error) else 3)
        except BaseException:  # noqa: BLE001 - the child's answer is its exit code
            os._exit(4)
        os._exit(5)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_a_fleet_empties_only_what_a_fleet_has_made(tmp_path: Path) -> None:
    own = tmp_path / "fleet" / "notes.txt"
    own.parent.mkdir()
    own.write_text("mine")
    with pytest.raises(UserError, match="no fleet of Muster has made what lies there"):
        Fleet(own.parent, [], {}).start()
    assert own.read_text() == "mine"


def test_last_words_are_the_text_of_the_last_line(tmp_path: Path) -> None:
    log = tmp_path / "edge-01.log"
    program = Program("edge-01", ["true"], log, None)  # type: ignore[arg-type]  # it is never started
    assert program.last_words() == ""
    log.write_text('{"ts": 1, "level": "INFO", "text": "began"}\n{"ts": 2, "text": "the disk is full"}\n')
    assert program.last_words() == "the disk is full"
    log.write_text("Traceback\nOSError: no space\n")
    assert program.last_words() == "OSError: no space"
