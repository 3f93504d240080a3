"""Bad input as an operator gives it, to real processes: one line that says what to do, its exit code, nothing written.

What one process can tell without another is in `tests/unit` and `tests/fleet/test_emulate.py`.
"""

from __future__ import annotations

import gzip
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from muster.testbed.broker import free_port
from shared.service import EX_CONFIG, EX_TEMPFAIL

MODULES = {
    "muster": "muster.cli.main",
    "muster-coordinator": "coordinator.service",
    "muster-edge": "edge_daemon.service",
}
MARK = "MUSTER_TEST_BAD_INPUT"
JOB = """
name = "texts"
[base]
model = "{model}"
[task]
kind = "classification"
labels = ["a", "b"]
"""


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    """A folder with good data; afterwards no process that was started for it is left."""
    data = tmp_path / "texts"
    data.mkdir()
    for name in ("train", "test"):
        write_rows(data / f"{name}.jsonl", [{"text": f"word {i}", "label": i % 2} for i in range(40)])
    (tmp_path / "job.toml").write_text(JOB.format(model="minilm"), encoding="utf-8")
    yield tmp_path
    left = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK) == str(tmp_path):
                left.append(" ".join(process.cmdline()))
        except psutil.Error:
            continue
    assert left == []


def write_rows(path: Path, rows: list[dict[str, object]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def refused(place: Path, program: str, *arguments: str, **environment: str) -> str:
    """What it says on standard error: one line, with the exit code of its kind and no file made."""
    before = sorted(str(path) for path in place.rglob("*"))
    # A variable of this shell must not answer for what is missing.
    clean = {k: v for k, v in os.environ.items() if not k.startswith("MUSTER_") or k == "MUSTER_TEST_SESSION"}
    done = subprocess.run(
        [sys.executable, "-m", MODULES[program], *arguments], cwd=place, capture_output=True, text=True, timeout=90,
        stdin=subprocess.DEVNULL, env={**clean, MARK: str(place), **environment}, check=False,
    )  # fmt: skip
    assert done.returncode in ((2,) if program == "muster" else (EX_CONFIG, EX_TEMPFAIL)), done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    assert "Traceback" not in done.stdout
    assert sorted(str(path) for path in place.rglob("*")) == before
    return done.stderr


EMULATE = ("emulate", "--devices", "2", "--data", "texts", "--job", "job.toml", "--out", "run")


def test_emulate_with_an_unknown_model(place: Path) -> None:
    (place / "job.toml").write_text(JOB.format(model="bert-of-mars"), encoding="utf-8")
    said = refused(place, "muster", *EMULATE)
    assert "unknown base model 'bert-of-mars': give --model bert-of-mars=FOLDER" in said


def test_emulate_with_a_folder_that_holds_no_model(place: Path) -> None:
    (place / "empty").mkdir()
    assert "empty has no config.json" in refused(place, "muster", *EMULATE, "--model", "minilm=empty")


def test_emulate_with_labels_outside_the_range(place: Path) -> None:
    write_rows(place / "texts" / "train.jsonl", [{"text": "word", "label": i % 3} for i in range(40)])
    assert "row 3 has label 2, the job's labels are 0 to 1" in refused(place, "muster", *EMULATE)


def test_emulate_with_held_out_labels_outside_the_range(place: Path) -> None:
    write_rows(place / "texts" / "test.jsonl", [{"text": "word", "label": -1}])
    assert "test.jsonl: row 1 has label -1" in refused(place, "muster", *EMULATE)


def test_emulate_without_held_out_rows(place: Path) -> None:
    (place / "texts" / "test.jsonl").write_text("", encoding="utf-8")
    assert "test.jsonl: no rows" in refused(place, "muster", *EMULATE)


def test_emulate_without_a_data_file(place: Path) -> None:
    (place / "texts" / "test.jsonl").unlink()
    assert "no test.jsonl.gz there" in refused(place, "muster", *EMULATE)


def test_emulate_with_no_training_rows(place: Path) -> None:
    (place / "texts" / "train.jsonl").write_text("\n", encoding="utf-8")
    assert "train.jsonl: no rows" in refused(place, "muster", *EMULATE)


def test_emulate_with_a_damaged_file(place: Path) -> None:
    data = bytearray(gzip.compress((place / "texts" / "train.jsonl").read_bytes()))
    data[20] ^= 0xFF
    (place / "texts" / "train.jsonl").unlink()
    (place / "texts" / "train.jsonl.gz").write_bytes(data)
    assert "train.jsonl.gz: can't be read" in refused(place, "muster", *EMULATE)


def test_emulate_with_an_unknown_key(place: Path) -> None:
    with (place / "job.toml").open("a", encoding="utf-8") as file:
        file.write("lables = []\n[rouns]\ncount = 1\n")
    said = refused(place, "muster", *EMULATE)
    assert "rouns: unknown key, did you mean 'rounds'?" in said
    assert "task.lables: unknown key, did you mean 'labels'?" in said


def test_emulate_with_rows_that_are_no_json(place: Path) -> None:
    (place / "texts" / "train.jsonl").write_text('{"text": "a", "label": 0}\nnothing\n', encoding="utf-8")
    assert "train.jsonl" in (said := refused(place, "muster", *EMULATE))
    assert "2" in said


def test_emulate_without_mosquitto(place: Path) -> None:
    said = refused(place, "muster", *EMULATE, MUSTER_MOSQUITTO=str(place / "nowhere"))
    assert "apt-get install mosquitto (or set MUSTER_MOSQUITTO)" in said


def test_submit_without_a_coordinator(place: Path) -> None:
    (place / "token").write_text("a-token-of-many-letters", encoding="utf-8")
    url = f"http://127.0.0.1:{free_port()}"
    said = refused(place, "muster", "--url", url, "--token-file", "token", "submit", "job.toml")
    assert said.startswith("error: ")
    assert url in said
    assert "--url" in said


def test_submit_with_a_missing_file(place: Path) -> None:
    said = refused(place, "muster", "--url", "http://127.0.0.1:1", "submit", "none.toml")
    assert said == "error: none.toml: no such file\n"


@pytest.fixture
def address(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[str]]:
    """Options that lead `muster` to a coordinator, which knows one model. Its own files are outside `place`."""
    folder = tmp_path_factory.mktemp("coordinator")
    (folder / "minilm").mkdir()
    (folder / "minilm" / "config.json").write_text("{}", encoding="utf-8")
    config = folder / "coordinator.toml"
    config.write_text(
        f'fleet = "lab"\nstate_dir = "{folder}/state"\nmodels = {{ minilm = "{folder}/minilm" }}\n'
        f"[api]\nport = 0\n[broker]\nport = {free_port()}\n",
        encoding="utf-8",
    )
    command = [sys.executable, "-m", MODULES["muster-coordinator"], "--config", str(config)]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, stderr=log, env={**os.environ, MARK: str(place)})
    try:
        until = time.monotonic() + 60.0
        while not (folder / "state" / "api.json").exists():
            assert process.poll() is None and time.monotonic() < until, (folder / "log").read_text("utf-8")
            time.sleep(0.05)
        yield ["--config", str(config)]
    finally:
        process.terminate()
        process.wait(30)


def test_submit_of_a_job_that_the_coordinator_refuses(place: Path, address: list[str]) -> None:
    (place / "empty.jsonl").write_text("", encoding="utf-8")
    good = JOB.format(model="minilm") + 'dataset = "texts"\n'
    for text, told in (
        (good.replace("minilm", "bert-of-mars"), "base.model: unknown model 'bert-of-mars'"),
        (good.replace("minilm", f"{place}/none"), f"base.model: {place}/none: no such folder"),
        (good + '[evaluation]\ndata = "none.jsonl"\n', "evaluation.data: on the coordinator: none.jsonl: no such file"),
        (good + f'[evaluation]\ndata = "{place}/empty.jsonl"\n', "empty.jsonl: no rows"),
        (good + '[strategy]\nname = "magic"\n', "strategy.name: unknown 'magic'"),
        (good + "[rouns]\ncount = 1\n", "rouns: unknown key, did you mean 'rounds'?"),
    ):
        (place / "job.toml").write_text(text, encoding="utf-8")
        said = refused(place, "muster", *address, "submit", "job.toml")
        assert said.startswith("error: ")
        assert told in said
    listed = subprocess.run(
        [sys.executable, "-m", MODULES["muster"], *address, "list", "--json"], capture_output=True, text=True,
        timeout=90, check=True,
    )  # fmt: skip
    assert json.loads(listed.stdout) == []


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ('[data]\ntexts = "{place}/none.jsonl"\n', "data.texts: {place}/none.jsonl: no such file"),
        ('[models]\nminilm = "{place}/texts"\n', "models.minilm: {place}/texts: no config.json there"),
        ('log_level = "LOUD"\n', "log_level: expected one of DEBUG, INFO, WARNING, ERROR, got 'LOUD'"),
        ('[dta]\ntexts = "{place}/none.jsonl"\n', "dta: unknown key, did you mean 'data'?"),
    ],
)
def test_edge_check_of_settings_that_do_not_hold(place: Path, more: str, told: str) -> None:
    text = f'fleet = "lab"\ndevice = "edge-01"\nstate_dir = "{place}/state"\n' + more.format(place=place)
    (place / "edge.toml").write_text(text, encoding="utf-8")
    said = refused(place, "muster-edge", "--check", "--config", "edge.toml")
    assert said.startswith("muster-edge: edge.toml: ")
    assert told.format(place=place) in said


def coordinator_file(place: Path, more: str = "") -> str:
    """A coordinator's settings."""
    path = place / "coordinator.toml"
    text = f'fleet = "lab"\nstate_dir = "{place}/state"\n{more}'
    path.write_text(text, encoding="utf-8")
    return str(path)


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ("[wait]\nsilent_s = 3\n", "wait: unknown key, did you mean 'waits'?"),
        ("[waits]\nsilent_s = -1\n", "waits.silent_s"),
        ("[api]\nport = 700000\n", "api.port"),
        ("[api\n", "not TOML"),
    ],
)
def test_coordinator_with_bad_settings(place: Path, more: str, told: str) -> None:
    assert told in refused(place, "muster-coordinator", "--config", coordinator_file(place, more))


def test_coordinator_check_looks_at_its_models(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from coordinator import service

    (place / "bare").mkdir()
    config = coordinator_file(place, f'[models]\nhub = "someone/small"\nnone = "{place}/none"\nbare = "{place}/bare"\n')
    said = refused(place, "muster-coordinator", "--check", "--config", config)
    assert f"models.none: {place}/none: no such folder; models.bare: {place}/bare: no config.json there" in said
    assert "hub" not in said
    config = coordinator_file(place, '[models]\nhub = "someone/small"\n')
    assert service.main(["--check", "--config", config]) == 0
    assert capsys.readouterr().out == f"{config}: good (models: hub)\n"
    with pytest.raises(SystemExit) as leaving:
        service.main(["--version"])
    assert leaving.value.code == 0


def test_coordinator_without_settings(place: Path) -> None:
    said = refused(place, "muster-coordinator", "--config", str(place / "none.toml"))
    assert said == f"muster-coordinator: {place}/none.toml: no such file\n"


def test_coordinator_with_its_port_in_use(place: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        config = coordinator_file(place, f"[api]\nport = {taken.getsockname()[1]}\n")
        said = refused(place, "muster-coordinator", "--config", config)
    assert "Address already in use; choose another with [api] port, or 0 for a free one" in said


def test_coordinator_with_a_missing_token_file(place: Path) -> None:
    config = coordinator_file(place, f'[api]\nport = 0\ntoken_file = "{place}/none"\n')
    assert f"[api] token_file {place}/none: No such file" in refused(place, "muster-coordinator", "--config", config)


def broker_file(place: Path, program: str, more: str) -> str:
    """Settings of either service with a broker table."""
    path = place / "settings.toml"
    who = 'device = "edge-01"\n' if program == "muster-edge" else "api = { port = 0 }\n"
    path.write_text(
        f'fleet = "lab"\n{who}state_dir = "{place}/state"\n[broker]\n{more}', encoding="utf-8"
    )  # fmt: skip
    return str(path)


@pytest.mark.parametrize("program", ["muster-coordinator", "muster-edge"])
def test_a_service_with_missing_certificates(place: Path, program: str) -> None:
    nowhere = place / "none.crt"
    more = f'cafile = "{nowhere}"\ncertfile = "{nowhere}"\nkeyfile = "{nowhere}"\n'
    assert "none.crt" in refused(place, program, "--config", broker_file(place, program, more))


@pytest.mark.parametrize("program", ["muster-coordinator", "muster-edge"])
def test_a_service_with_a_folder_that_can_not_be_made(place: Path, program: str) -> None:
    (place / "state").write_text("a file", encoding="utf-8")
    assert f"{place}/state" in refused(place, program, "--config", broker_file(place, program, "port = 1883\n"))
