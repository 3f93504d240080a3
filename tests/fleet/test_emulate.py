"""`muster emulate` as a process: end to end with the small agent, interrupted, and given bad input."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from muster.cli.main import main
from muster.testbed import least_squares as ls

JOB = """
name = "squares"
[base]
model = "16x8"
[task]
kind = "least_squares"
[rounds]
count = {rounds}
[strategy]
rank = 4
[training]
lr = 0.05
"""
MARK = "MUSTER_TEST_EMULATION"


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    """A folder with data and a job; afterwards no process that was started for it may be left."""
    data = tmp_path / "points"
    data.mkdir()
    ls.write_rows(data / "train.jsonl", ls.make_rows("16x8", 300, 1))
    ls.write_rows(data / "test.jsonl", ls.make_rows("16x8", 100, 2))
    (tmp_path / "job.toml").write_text(JOB.format(rounds=2))
    (tmp_path / "held-out.toml").write_text(JOB.format(rounds=2) + '[evaluation]\ndata = "nowhere.jsonl"\n')
    (tmp_path / "many.toml").write_text(JOB.format(rounds=2).replace("count", "min_devices = 4\ncount"))
    yield tmp_path
    assert _left(tmp_path) == []


def _left(place: Path) -> list[str]:
    """Processes with the mark of this test; a moment is theirs to be reaped."""
    until = time.monotonic() + 5.0
    while True:
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get(MARK) == str(place) and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(" ".join(process.cmdline()))
            except psutil.Error:
                continue
        if not found or time.monotonic() > until:
            return found
        time.sleep(0.1)


def _start(place: Path, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "muster.cli.main", "emulate", "--agent", "numpy", *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=place,
        env={**os.environ, MARK: str(place), **environment},
    )  # fmt: skip


def _run(place: Path, *arguments: str, **environment: str) -> tuple[int, str, str]:
    process = _start(place, *arguments, **environment)
    output, errors = process.communicate(timeout=90)
    return process.returncode, output, errors


def _refused(place: Path, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line that says why, of a command that starts nothing; in this process, which is quicker."""
    before = sorted(p.name for p in place.iterdir())
    code = main(["emulate", "--agent", "numpy", *arguments])
    output, errors = capsys.readouterr()
    assert (code, output) == (2, "")
    assert errors.startswith("error: ") and errors.count("\n") == 1, errors
    assert sorted(p.name for p in place.iterdir()) == before
    return errors


def test_three_devices_work_on_a_job_to_its_report(place: Path) -> None:
    options = ("--devices", "3", "--data", "points", "--job", "job.toml", "--out", "run")
    code, output, errors = _run(place, *options)
    assert (code, errors) == (0, "")
    assert "round 2 committed: loss" in output
    assert "\x1b" not in output
    assert "exported to" not in output  # a folder that is gone by now
    out = place / "run"
    assert "squares: finished" in (out / "report.md").read_text()
    assert (out / "adapter" / "adapter_config.json").is_file()
    assert (out / "quality.png").is_file()
    assert sorted(p.name for p in (out / "logs").iterdir()) == [
        "coordinator.log", "edge-01.log", "edge-02.log", "edge-03.log", "mosquitto.log",
    ]  # fmt: skip
    assert not (out / "fleet").exists()
    code, output, _ = _run(place, *options, "--keep", "--rounds", "1", "--seed", "5")
    assert code == 0
    assert "round 2 committed" not in output
    assert (out / "fleet" / "edge-01.toml").is_file()


def test_a_secure_fleet_works_on_a_job_under_mutual_tls(place: Path) -> None:
    options = ("--devices", "2", "--data", "points", "--job", "job.toml", "--out", "run", "--secure", "--keep")
    code, output, errors = _run(place, *options)
    assert (code, errors) == (0, "")
    assert "starting mosquitto (mutual TLS 1.3, access list)" in output
    assert "squares: finished" in (place / "run" / "report.md").read_text()
    fleet = place / "run" / "fleet"
    broker = (fleet / "broker" / "mosquitto.log").read_text()
    for name in ("coord-1", "edge-01", "edge-02"):
        assert f"as {name} (" in broker, broker
        assert f'"keyfile" = "{fleet}/pki/{name}/{name}.key"' in "".join(
            path.read_text() for path in fleet.glob("*.toml")
        )
    assert (fleet / "broker" / "mosquitto.conf").read_text().count("tls_version tlsv1.3") == 1
    code, output, _ = _run(place, *options[:-1], "--rounds", "1")
    assert code == 0
    assert not fleet.exists()  # the keys have gone with it


@pytest.mark.parametrize("name", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_all_of_it(place: Path, name: signal.Signals) -> None:
    (place / "job.toml").write_text(JOB.format(rounds=100000))
    process = _start(place, "--devices", "2", "--data", "points", "--job", "job.toml", "--out", "run")
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("round 1 committed"):
            break
    process.send_signal(name)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors == "interrupted: job cancelled, everything stopped\n"
    assert not (place / "run" / "fleet").exists()


def test_a_killed_run_leaves_no_process_and_the_next_takes_its_folder(place: Path) -> None:
    (place / "job.toml").write_text(JOB.format(rounds=100000))
    options = ("--devices", "2", "--data", "points", "--job", "job.toml", "--out", "run")
    process = _start(place, *options)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("round 1 committed"):
            break
    process.kill()
    process.communicate(timeout=30)
    assert _left(place) == []
    code, _, errors = _run(place, *options, "--rounds", "1")
    assert (code, errors) == (0, "")


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--job", "none.toml"), "none.toml: no such file"),
        (("--data", "nowhere"), "--data nowhere: no such folder"),
        (("--profile", "huge"), "unknown profile 'huge'; there are"),
        (("--agent", "magic"), "--agent magic: there are numpy, torch"),
        (("--strategy", "magic"), "strategy.name: unknown 'magic'; known: "),
        (("--model", "nonsense"), "--model nonsense: expected NAME=FOLDER"),
        (("--by-field", "site"), "has no plain value in field 'site'"),
        (("--devices", "100"), "300 rows are too few for 100 devices"),
        (("--agent", "torch"), "the numpy agent does least_squares"),
        (("--data", "docstrings"), "--agent numpy works on points"),
        (("--devices", "none"), "Invalid value for '--devices'"),
        (
            ("--job", "held-out.toml"),
            "held-out.toml: evaluation.data: nowhere.jsonl: no such file; without that key",
        ),
        (("--job", "many.toml", "--devices", "3"), "many.toml: rounds.min_devices: 4 wanted, and --devices is 3"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(
    place: Path,
    options: tuple[str, ...],
    told: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(place)
    assert told in _refused(place, capsys, "--data", "points", "--job", "job.toml", "--out", "run", *options)


def test_bad_files_are_one_line_too(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    (place / "job.toml").write_text(JOB.format(rounds=2) + "[rouns]\ncount = 1\n")
    errors = _refused(place, capsys, "--data", "points", "--job", "job.toml", "--out", "run")
    assert "rouns: unknown key, did you mean 'rounds'?" in errors
    (place / "job.toml").write_text(JOB.format(rounds=2))
    (place / "points" / "train.jsonl").write_text("")
    assert "train.jsonl: no rows" in _refused(place, capsys, "--data", "points", "--job", "job.toml", "--out", "run")


def test_without_mosquitto_it_says_how_to_get_it(place: Path) -> None:
    """As a process, as a user would meet it."""
    options = ("--data", "points", "--job", "job.toml", "--out", "run")
    code, output, errors = _run(place, *options, MUSTER_MOSQUITTO="/no/such/mosquitto")
    assert (code, output, errors.count("\n")) == (2, "", 1)
    assert "apt-get install mosquitto" in errors
    assert not (place / "run").exists()


def test_a_program_that_ends_by_itself_ends_the_run_and_leaves_its_log(place: Path) -> None:
    (place / "job.toml").write_text(JOB.format(rounds=100000))
    process = _start(place, "--devices", "2", "--data", "points", "--job", "job.toml", "--out", "run")
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("round 1 committed"):
            break
    device = next(p for p in psutil.Process(process.pid).children() if "edge-02.toml" in " ".join(p.cmdline()))
    device.kill()
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    log = Path("run/logs/edge-02.log")
    assert errors == f"error: edge-02 was killed by signal 9; its log: {log}\n"
    assert (place / log).is_file()


def test_a_broker_that_is_killed_ends_the_run_and_leaves_its_log(place: Path) -> None:
    (place / "job.toml").write_text(JOB.format(rounds=100000))
    process = _start(place, "--devices", "2", "--data", "points", "--job", "job.toml", "--out", "run")
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("round 1 committed"):
            break
    next(p for p in psutil.Process(process.pid).children() if "mosquitto.conf" in " ".join(p.cmdline())).kill()
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    log = Path("run/logs/mosquitto.log")
    assert errors == f"error: mosquitto was killed by signal 9; its log: {log}\n"
    assert "mosquitto version" in (place / log).read_text()


def test_work_that_the_deadline_would_cut_off_counts(place: Path) -> None:
    rounds = "count = 1\nlocal_steps = 10000000\ndeadline_s = 16"
    (place / "job.toml").write_text(JOB.format(rounds=1).replace("count = 1", rounds))
    code, output, errors = _run(place, "--devices", "2", "--data", "points", "--job", "job.toml", "--out", "run")
    assert (code, errors) == (0, ""), output
    assert "round 1 committed" in output
    assert "2 of 2 updates" in output


def test_an_interrupted_run_leaves_no_report_of_an_earlier_one(place: Path) -> None:
    options = ("--devices", "2", "--data", "points", "--job", "job.toml", "--out", "run")
    assert _run(place, *options)[0] == 0
    (place / "job.toml").write_text(JOB.format(rounds=100000))
    process = _start(place, *options)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("round 1 committed"):
            break
    process.terminate()
    process.communicate(timeout=60)
    assert process.returncode == 130
    assert {p.name for p in (place / "run").iterdir()} == {".muster-run", "logs", "shares"}


def test_the_users_own_folders_stay_as_they_are(place: Path) -> None:
    for name in ("fleet", "adapter"):
        (place / "run" / name).mkdir(parents=True)
        (place / "run" / name / "README.md").write_text("mine")
    before = sorted(str(p) for p in place.rglob("*"))
    code, _, errors = _run(place, "--devices", "2", "--data", "points", "--job", "job.toml", "--out", "run")
    assert (code, errors.count("\n")) == (2, 1)
    assert "no run of Muster has made adapter, fleet there" in errors
    assert sorted(str(p) for p in place.rglob("*")) == before


def test_two_runs_do_not_share_a_folder(place: Path) -> None:
    (place / "job.toml").write_text(JOB.format(rounds=100000))
    options = ("--devices", "2", "--data", "points", "--job", "job.toml", "--out", "run")
    first = _start(place, *options)
    assert first.stdout is not None
    for line in first.stdout:
        if line.startswith("round 1 committed"):
            break
    code, _, errors = _run(place, *options)
    assert code == 2
    assert "another emulation runs with this --out" in errors
    assert (place / "run" / "fleet" / "coordinator").is_dir()
    first.terminate()
    first.communicate(timeout=60)
    assert first.returncode == 130
