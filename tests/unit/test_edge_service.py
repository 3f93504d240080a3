"""`muster-edge` as a command: bad settings in one line, a broker that is away, a signal that ends it well."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from edge_daemon import service
from muster.testbed.broker import free_port
from shared.version import VERSION

GOOD = """
fleet = "lab"
device = "edge-01"
state_dir = "{folder}/state"
[broker]
port = {port}
[data]
points = "{folder}/points.jsonl"
[agent]
command = ["{python}", "-m", "muster.testbed.numpy_agent"]
"""


def written(folder: Path, more: str = "") -> Path:
    file = folder / "edge.toml"
    file.write_text(GOOD.format(folder=folder, port=free_port(), python=sys.executable) + more, encoding="utf-8")
    return file


@pytest.mark.parametrize(
    ("more", "fault"),
    [
        ("[polcy]\n", "polcy: unknown key, did you mean 'policy'?"),
        ('[policy]\nhours = ["25:00-06:00"]\n', "policy.hours: '25:00-06:00' is no span of a day"),
        ("[policy]\nforeign_limit = 0\n", "policy.foreign_limit"),
        ("[telemetry\n", "not TOML"),
    ],
)
def test_bad_settings_are_one_line_and_exit_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], more: str, fault: str
) -> None:
    assert service.main(["--config", str(written(tmp_path, more))]) == 2
    line = capsys.readouterr().err
    assert fault in line
    assert line.count("\n") == 1
    assert not (tmp_path / "state").exists()


def test_a_missing_file_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert service.main(["--config", str(tmp_path / "none.toml")]) == 2
    assert capsys.readouterr().err == f"muster-edge: {tmp_path}/none.toml: no such file\n"


def test_check_starts_nothing(tmp_path: Path) -> None:
    assert service.main(["--config", str(written(tmp_path)), "--check"]) == 0
    assert not (tmp_path / "state").exists()


def test_the_version_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        service.main(["--version"])
    assert left.value.code == 0
    assert capsys.readouterr().out.strip() == VERSION


@pytest.mark.parametrize("name", [signal.SIGTERM, signal.SIGINT])
def test_it_works_without_a_broker_and_leaves_on_a_signal(tmp_path: Path, name: signal.Signals) -> None:
    (tmp_path / "points.jsonl").write_text('{"x": [1], "y": [1]}\n', encoding="utf-8")
    command = [sys.executable, "-m", "edge_daemon.service", "--config", str(written(tmp_path))]
    log: list[str] = []
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as daemon:
        assert daemon.stderr is not None
        for line in daemon.stderr:
            log.append(line)
            if "no broker" in line or "refused" in line.lower():
                break
        second = subprocess.run(command, capture_output=True, text=True, timeout=60)
        daemon.send_signal(name)
        log += daemon.stderr.readlines()
        assert daemon.wait(60) == 0
    assert second.returncode == 2
    assert "another muster-edge runs" in second.stderr.splitlines()[-1]
    assert "left" in log[-1]
