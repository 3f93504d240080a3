"""The Python client and the commands over a real HTTP server: the coordinator's own API over a desk held in memory."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import msgspec
import pytest

from coordinator.core.facts import Metrics
from coordinator.web.views import JobView, ParticipantView, RoundView
from muster.cli import main as cli
from muster.cli import tables
from muster.client import Client, Unreachable
from muster.testbed.broker import free_port
from shared.errors import SettingsError, UserError
from shared.messages import UpdateFacts, Work
from tests.unit.client_rig import TOKEN, MemoryDesk, Server

JOB = """
name = "demo"
[base]
model = "16x8"
[task]
kind = "least_squares"
dataset = "local"
"""


@pytest.fixture
def desk(tmp_path: Path) -> MemoryDesk:
    export = tmp_path / "export"
    export.mkdir()
    (export / "adapter_config.json").write_text('{"r": 8}')
    (export / "adapter_model.safetensors").write_bytes(bytes(range(256)) * 40)
    return MemoryDesk(export)


@pytest.fixture
def url(desk: MemoryDesk, tmp_path: Path) -> Iterator[str]:
    """Address of a server over `desk`."""
    server = Server(desk, tmp_path)
    yield server.url
    server.stop()


@pytest.fixture
def client(url: str) -> Iterator[Client]:
    with Client(url, TOKEN) as found:
        yield found


@pytest.fixture
def place(url: str, tmp_path: Path) -> list[str]:
    """Options that lead the command to the server."""
    (tmp_path / "token").write_text(f"{TOKEN}\n")
    return ["--url", url, "--token-file", str(tmp_path / "token")]


@pytest.fixture
def job_file(tmp_path: Path) -> Path:
    path = tmp_path / "job.toml"
    path.write_text(JOB)
    return path


def finished_round() -> RoundView:
    facts = UpdateFacts(
        samples=80, steps=10, batch=8, bits=8, loss_first=2.0, loss_last=1.0, step_s=0.1, train_s=1.25,
    )  # fmt: skip
    work = Work(ranks={"a": 4, "b": 8}, batch=16, bits=8, steps=10, reasons={"bits": "bits 8: memory meets 480 MiB"})
    part = ParticipantView(device="edge-01", work=work, status="done", facts=facts, predicted_s=1.5, update_bytes=2048)
    metrics = Metrics(loss=1.5, rows=100, accuracy=0.625)
    return RoundView(round=1, phase="committed", participants=[part], metrics=metrics, accepted=True)


# ---- client ----------------------------------------------------------------------------------------------------------


def test_a_job_from_submission_to_cancellation(client: Client) -> None:
    assert client.health()["broker"] == "connected"
    assert client.jobs() == []
    job = client.submit(JOB)
    assert (job.id, job.state) == ("demo-0", "queued")
    assert client.jobs() == [job]
    assert client.job("demo-0") == job
    assert client.cancel("demo-0").state == "cancelled"


def test_every_fault_of_a_job_file_comes_back(client: Client) -> None:
    with pytest.raises(SettingsError) as refused:
        client.submit(JOB.replace("model", "modell").replace('kind = "least_squares"', 'kind = "poetry"'))
    assert len(refused.value.faults) == 3
    assert any("did you mean 'model'" in fault for fault in refused.value.faults)


def test_rounds_and_devices_arrive_typed(client: Client, desk: MemoryDesk) -> None:
    view = finished_round()
    desk.found["x"] = JobView(id="x", name="x", state="finished", rounds=[view])
    assert client.job("x").rounds == [view]
    assert client.devices() == desk.devices()


def test_refusals_are_one_line_with_the_reason(client: Client) -> None:
    client.submit(JOB)
    with pytest.raises(UserError, match="no job 'other'"):
        client.job("other")
    with pytest.raises(UserError, match="demo-0 is not paused: it is queued"):
        client.resume("demo-0")


def test_an_export_is_unpacked_into_a_new_folder(client: Client, desk: MemoryDesk, tmp_path: Path) -> None:
    client.submit(JOB)
    folder = client.export("demo-0", tmp_path / "new" / "adapter")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {
        path.name: path.read_bytes() for path in desk.folder.iterdir()
    }
    assert [path.name for path in folder.parent.iterdir()] == ["adapter"]
    with pytest.raises(UserError, match="exists already"):
        client.export("demo-0", folder)


def test_a_failed_export_leaves_nothing(client: Client, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no job"):
        client.export("other", tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_a_wrong_token_says_so(url: str) -> None:
    with Client(url, "wrong") as stranger, pytest.raises(UserError, match="token"):
        stranger.jobs()


def test_no_coordinator_says_so() -> None:
    with Client(f"http://127.0.0.1:{free_port()}", TOKEN) as alone, pytest.raises(Unreachable, match="--url"):
        alone.jobs()


def test_the_coordinator_of_this_machine_is_found(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MUSTER_URL", raising=False)
    monkeypatch.delenv("MUSTER_TOKEN_FILE", raising=False)
    (tmp_path / "token").write_text(TOKEN)
    (tmp_path / "api.json").write_text(json.dumps({"url": url, "token_file": str(tmp_path / "token")}))
    config = tmp_path / "coordinator.toml"
    config.write_text(f'fleet = "lab"\nstate_dir = "{tmp_path}"\n')
    with Client.find(config=str(config)) as found:
        assert found.jobs() == []
    (tmp_path / "api.json").unlink()
    with pytest.raises(UserError, match="no coordinator found"):
        Client.find(config=str(config))
    with pytest.raises(UserError, match="token file"):
        Client.find(url=url, token_file=str(tmp_path / "none"))


# ---- command ---------------------------------------------------------------------------------------------------------


def test_commands_print_what_was_asked(
    place: list[str], desk: MemoryDesk, job_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def said(*arguments: str) -> str:
        assert cli.main([*place, *arguments]) == 0
        return capsys.readouterr().out

    assert "no jobs yet" in said("list")
    assert said("submit", str(job_file)).strip() == "demo-0"
    assert "demo-0" in said("list")
    desk.found["demo-0"] = JobView(
        id="demo-0", name="demo", state="finished", rounds=[finished_round()], rounds_total=1
    )
    shown = said("show", "demo-0")
    for part in ("accuracy 0.625", "16 -> 8", "4-8", "1.5 s", "bits 8: memory meets 480 MiB", "2.0 kB"):
        assert part in shown
    assert msgspec.json.decode(said("show", "demo-0", "--round", "1", "--json"), type=RoundView) == finished_round()
    assert "edge-02" in said("devices")
    assert "edge-02" not in said("devices", "edge-01")
    assert [d["device"] for d in json.loads(said("devices", "edge-02", "--json"))] == ["edge-02"]
    assert cli.main([*place, "devices", "edge-99"]) == 2
    assert "no device 'edge-99' has reported yet" in capsys.readouterr().err
    assert said("forget", "edge-02").strip() == "edge-02: forgotten"
    assert cli.main([*place, "forget", "edge-02"]) == 2
    assert "no device 'edge-02'" in capsys.readouterr().err
    assert said("export", "demo-0", str(tmp_path / "adapter")).strip() == str(tmp_path / "adapter")
    assert "cancelled" in said("cancel", "demo-0")


@pytest.mark.parametrize(("state", "code"), [("finished", 0), ("failed", 1), ("paused", 1)])
def test_waiting_for_a_job_tells_how_it_ended(
    place: list[str], desk: MemoryDesk, job_file: Path, state: str, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    submit = desk.submit

    def submit_and_end(text: str) -> JobView:
        job = submit(text)
        desk.found[job.id] = msgspec.structs.replace(job, state=state)
        return job

    monkeypatch.setattr(desk, "submit", submit_and_end)
    assert cli.main([*place, "submit", str(job_file), "--wait"]) == code


def test_bad_input_is_one_line_and_exit_code_2(
    place: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "faulty.toml").write_text("name = 'X Y'\n[base]\n[task]\nkind = 'poetry'\n")
    (tmp_path / "no.toml").write_text("name = ")
    nowhere = ["--url", f"http://127.0.0.1:{free_port()}", *place[2:]]
    for arguments, reason in [
        ([*place, "submit", str(tmp_path / "none.toml")], "no such file"),
        ([*place, "submit", str(tmp_path / "faulty.toml")], "base.model: missing"),
        ([*place, "submit", str(tmp_path / "no.toml")], "not TOML"),
        ([*place, "show", "other"], "no job 'other'"),
        ([*place, "show"], "Missing argument"),
        ([*place, "shove"], "No such command"),
        ([*place, "export", "demo-0", str(tmp_path / "out"), "--base", "minilm"], "it goes with --merged"),
        ([*place, "export", "other", str(tmp_path / "out"), "--merged"], "no job 'other'"),
        ([*nowhere, "list"], "no coordinator answers"),
        (["--url", "http://x", "--token-file", str(tmp_path / "none"), "list"], "--token-file"),
    ]:
        assert cli.main(arguments) == 2, arguments
        said = capsys.readouterr()
        assert said.out == ""
        assert said.err.startswith("error: ")
        assert said.err.count("\n") == 1
        assert reason in said.err


def test_faults_of_a_job_are_told_of_its_file(
    place: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, text in (("faulty.toml", JOB + "labls = []"), ("no.toml", "name = ")):
        (tmp_path / name).write_text(text)
        assert cli.main([*place, "submit", str(tmp_path / name)]) == 2
        assert capsys.readouterr().err.startswith(f"error: {tmp_path / name}: ")


@pytest.mark.parametrize("merged", [[], ["--merged"]])
def test_an_export_to_where_nothing_can_be_made_is_one_line(
    place: list[str], job_file: Path, merged: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([*place, "submit", str(job_file)]) == 0
    capsys.readouterr()
    assert cli.main([*place, "export", "demo-0", "/proc/x/adapter", *merged]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: /proc/x/adapter: can't be made: ")
    assert said.count("\n") == 1


def test_an_address_without_a_token_says_what_to_do(
    url: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MUSTER_TOKEN_FILE", raising=False)
    assert cli.main(["--url", url, "list"]) == 2
    assert "--url goes with --token-file: name a file with the API's token" in capsys.readouterr().err


def test_without_a_command_there_is_help_and_no_empty_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 2
    said = capsys.readouterr()
    assert "submit" in said.out + said.err
    assert "error" not in said.err


def test_the_list_shows_where_a_job_began(
    place: list[str], desk: MemoryDesk, capsys: pytest.CaptureFixture[str]
) -> None:
    metrics = Metrics(loss=2.5, rows=100, accuracy=0.125)
    desk.found["demo-0"] = JobView(id="demo-0", name="demo", state="open", baseline=metrics)
    assert cli.main([*place, "list"]) == 0
    assert "accuracy 0.125" in capsys.readouterr().out


def test_the_outcome_tells_the_best_round_and_the_one_that_the_adapter_is_of() -> None:
    first, last = finished_round(), Metrics(loss=1.6, rows=100, accuracy=0.5)
    rounds = [
        first,
        RoundView(round=2, phase="committed", metrics=last, accepted=True),
        RoundView(round=3, phase="committed", metrics=Metrics(loss=9.0, rows=100), accepted=False),
    ]
    job = JobView(id="x", name="x", state="finished", round=3, rounds_total=3, best=first.metrics, rounds=rounds)
    said = tables.outcome(job)
    assert "best accuracy 0.625" in said
    assert said.endswith("; the adapter is round 2's, accuracy 0.500, loss 1.600")
    assert "adapter" not in tables.outcome(msgspec.structs.replace(job, rounds=rounds[2:]))


# ---- waiting, with a coordinator that comes and goes -----------------------------------------------------------------


def waiting(server: Server, tmp_path: Path, job_file: Path, patience: float) -> subprocess.Popen[str]:
    (tmp_path / "token").write_text(TOKEN)
    options = ["--url", server.url, "--token-file", str(tmp_path / "token")]
    process = subprocess.Popen(
        [sys.executable, "-m", "muster.cli.main", *options, "submit", str(job_file), "--wait",
         "--patience", str(patience)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        # Where the tests run in the background of a shell, interrupts are ignored, which a child inherits.
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    assert process.stderr is not None
    assert process.stderr.readline() == "demo-0\n"
    assert "queued" in process.stderr.readline()
    return process


def test_waiting_goes_on_over_a_restart_of_the_coordinator(desk: MemoryDesk, tmp_path: Path, job_file: Path) -> None:
    server = Server(desk, tmp_path)
    process = waiting(server, tmp_path, job_file, 60.0)
    assert process.stderr is not None
    server.stop()
    assert process.stderr.readline() == "the coordinator does not answer: waiting for it, 60 s at most\n"
    desk.found["demo-0"] = msgspec.structs.replace(desk.found["demo-0"], state="finished")
    server.start()
    try:
        output, errors = process.communicate(timeout=60)
    finally:
        server.stop()
    assert (process.returncode, output.count("finished"), errors.count("finished")) == (0, 1, 1)


def test_waiting_ends_where_the_coordinator_stays_away(desk: MemoryDesk, tmp_path: Path, job_file: Path) -> None:
    server = Server(desk, tmp_path)
    process = waiting(server, tmp_path, job_file, 1.5)
    server.stop()
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 2
    last = errors.splitlines()[-1]
    assert last.startswith("error: no coordinator answers")
    assert last.endswith("job demo-0 goes on; muster show demo-0 tells how it stands, muster cancel demo-0 ends it")


def test_an_interrupt_says_that_the_job_goes_on(desk: MemoryDesk, tmp_path: Path, job_file: Path) -> None:
    server = Server(desk, tmp_path)
    process = waiting(server, tmp_path, job_file, 60.0)
    process.send_signal(signal.SIGINT)
    try:
        _, errors = process.communicate(timeout=60)
    finally:
        server.stop()
    assert process.returncode == 130
    assert errors.startswith("interrupted: job demo-0 goes on; muster show demo-0 tells how it stands")
    assert desk.found["demo-0"].state == "queued"
