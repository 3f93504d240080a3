"""`muster-edge` as a command: bad settings in one line, a broker that is away, a signal that ends it well."""

from __future__ import annotations

import gzip
import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from edge_daemon import service
from muster.testbed.broker import free_port
from shared.service import EX_CONFIG, EX_TEMPFAIL
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
        ("[models]\nm = 3\n", "models.m: expected `str`"),
        ("[telemetry\n", "not TOML"),
    ],
)
def test_bad_settings_are_one_line_and_exit_code_78(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], more: str, fault: str
) -> None:
    assert service.main(["--config", str(written(tmp_path, more))]) == EX_CONFIG
    line = capsys.readouterr().err
    assert fault in line
    assert line.count("\n") == 1
    assert not (tmp_path / "state").exists()


def test_a_missing_file_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert service.main(["--config", str(tmp_path / "none.toml")]) == EX_CONFIG
    assert capsys.readouterr().err == f"muster-edge: {tmp_path}/none.toml: no such file\n"


def test_check_starts_nothing_and_says_that_all_is_well(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "points.jsonl").write_text('{"x": [1], "y": [1]}\n', encoding="utf-8")
    assert service.main(["--config", str(written(tmp_path)), "--check"]) == 0
    assert capsys.readouterr().out == f"{tmp_path}/edge.toml: good (data sets: points; models: none)\n"
    assert not (tmp_path / "state").exists()


def test_check_names_the_row_that_is_damaged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "points.jsonl").write_text('{"x": [1], "y": [1]}\n\n{"x": [1], "y"\n', encoding="utf-8")
    assert service.main(["--config", str(written(tmp_path)), "--check"]) == EX_CONFIG
    assert f"data.points: {tmp_path}/points.jsonl: row 3 is no JSON object: " in capsys.readouterr().err


MISSING = """
empty = "{folder}/empty.jsonl"
cut = "{folder}/cut.jsonl.gz"
folder = "{folder}"
[models]
good = "{folder}/good"
none = "{folder}/none"
bare = "{folder}/bare"
weightless = "{folder}/weightless"
"""
FAULTS = [
    "data.points: {folder}/points.jsonl: no such file",
    "data.empty: {folder}/empty.jsonl: no rows",
    "data.cut: {folder}/cut.jsonl.gz: can't be read",
    "data.folder: {folder}: not a file",
    "models.none: {folder}/none: no such folder",
    "models.bare: {folder}/bare: no config.json there",
    "models.weightless: {folder}/weightless: no *.safetensors there",
]


def with_faults(folder: Path) -> Path:
    """Settings whose data and models, but for the model `good`, are not what the owner thinks."""
    (folder / "empty.jsonl").write_text("\n\n", encoding="utf-8")
    (folder / "cut.jsonl.gz").write_bytes(gzip.compress(b"{}\n" * 99)[:12])
    for name in ("good", "bare", "weightless"):
        (folder / name).mkdir()
    for name in ("good", "weightless"):
        (folder / name / "config.json").write_text("{}", encoding="utf-8")
    (folder / "good" / "model.safetensors").write_bytes(b"")
    file = written(folder)
    text = file.read_text(encoding="utf-8")
    file.write_text(text.replace("[agent]\n", MISSING.format(folder=folder) + "[agent]\n"), encoding="utf-8")
    return file


def test_check_names_every_file_and_folder_that_is_not_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert service.main(["--config", str(with_faults(tmp_path)), "--check"]) == EX_CONFIG
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    faults = line.split(f"{tmp_path}/edge.toml: ")[1].split("; ")
    wanted = [fault.format(folder=tmp_path) for fault in FAULTS]
    assert [found[: len(want)] for found, want in zip(faults, wanted, strict=True)] == wanted
    assert not (tmp_path / "state").exists()


@pytest.mark.parametrize(("hub", "code"), [("false", EX_CONFIG), ("true", 0)])
def test_a_hub_id_holds_where_the_owner_allows_the_hub(tmp_path: Path, hub: str, code: int) -> None:
    file = written(tmp_path, f'[models]\nsmall = "someone/small"\n[policy]\nhub = {hub}\n')
    text = file.read_text(encoding="utf-8").replace(f"{tmp_path}/points.jsonl", "someone/points:train")
    file.write_text(text, encoding="utf-8")
    assert service.main(["--config", str(file), "--check"]) == code


def test_it_starts_without_its_data_and_logs_each_fault(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "edge_daemon.service", "--config", str(with_faults(tmp_path))]
    log: list[str] = []
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as daemon:
        assert daemon.stderr is not None
        for line in daemon.stderr:
            log.append(line)
            if "of fleet lab runs" in line:
                break
        daemon.send_signal(signal.SIGTERM)
        daemon.communicate(timeout=60)
        assert daemon.returncode == 0
    errors = [json.loads(line)["text"] for line in log if json.loads(line)["level"] == "ERROR"]
    wanted = [f"{tmp_path}/edge.toml: {fault.format(folder=tmp_path)}" for fault in FAULTS]
    assert [found[: len(want)] for found, want in zip(errors, wanted, strict=True)] == wanted


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
    assert second.returncode == EX_TEMPFAIL
    assert "another muster-edge runs" in second.stderr.splitlines()[-1]
    assert "left" in log[-1]
