"""`muster devices --record`: over the real API, with rounds, a device that is gone, a restart, an interrupt; its file
replayed; and what is wrong with the asking."""

from __future__ import annotations

import resource
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import msgspec
import pytest

from coordinator.web.views import DeviceView, JobView, ParticipantView, RoundView
from muster.cli import main as cli
from muster.cli.recording import _append
from muster.testbed.broker import free_port
from muster.testbed.device_model import Foreign
from muster.testbed.replay import Reading, read
from shared.messages import Load, UpdateFacts, Work
from tests.unit.client_rig import TOKEN, MemoryDesk, Server


class FleetDesk(MemoryDesk):
    """Two devices: `edge-01` tells a new load at each look, its foreign cores rising by a quarter; `edge-02` is gone.

    One job ended before, `running` has a round more at each look."""

    looks = 0

    def devices(self) -> list[DeviceView]:
        self.looks += 1
        load = Load(
            epoch=1, seq=self.looks, cores=4.0, foreign_cores=self.looks / 4, memory_limit=1000, memory_available=600,
            own_memory=300,
        )  # fmt: skip
        return [
            DeviceView(device="edge-01", state="ready", age_s=0.0, load=load),
            DeviceView(device="edge-02", state="lost", age_s=90.0, load=load),
        ]

    def jobs(self) -> list[JobView]:
        return [
            JobView(id="ended", name="ended", state="finished", round=2),
            JobView(id="running", name="running", state="open", round=self.looks + 1),
        ]

    def job(self, job: str) -> JobView:
        count = {"ended": 2, "running": self.looks + 1}[job]
        return JobView(id=job, name=job, state="open", rounds=[downloaded(number) for number in range(1, count + 1)])


def downloaded(number: int) -> RoundView:
    """A round in which each device fetched 1 MB in `number` seconds."""
    facts = UpdateFacts(
        samples=1, steps=1, batch=1, bits=16, loss_first=1.0, loss_last=1.0, step_s=1.0, train_s=1.0,
        fetch_s=float(number),
    )  # fmt: skip
    work = Work(ranks={}, batch=1, bits=16, steps=1)
    parts = [
        ParticipantView(device=name, work=work, facts=facts, adapter_bytes=10**6) for name in ("edge-01", "edge-02")
    ]
    return RoundView(round=number, phase="committed", participants=parts)


def place(url: str, folder: Path) -> list[str]:
    (folder / "token").write_text(TOKEN)
    return ["--url", url, "--token-file", str(folder / "token")]


def test_a_recording_of_a_fleet_can_be_replayed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "fleet.jsonl"
    desk = FleetDesk(tmp_path)
    server = Server(desk, tmp_path)
    try:
        assert cli.main([*place(server.url, tmp_path), "devices", "--record", str(file), "--for", "2.5"]) == 0
    finally:
        server.stop()
    said = capsys.readouterr()
    assert said.out.startswith(f"recorded {desk.looks} loads and {desk.looks} downloads of 1 device in ")
    assert said.out.endswith(f"s; replay it with: muster simulate --profile recorded --replay {file}\n")
    found = [msgspec.json.decode(line, type=Reading) for line in file.read_bytes().splitlines()]
    assert desk.looks >= 2 and {one.device for one in found} == {"edge-01"}
    # With look n came a load, then round n + 1, which tells of a link; round 1 was before the recording.
    assert [one.foreign_cores for one in found[::2]] == [one.foreign_cores for one in found[1::2]]
    assert [one.bandwidth for one in found[1::2]] == [round(10**6 / (n + 2), 1) for n in range(desk.looks)]
    replay = read(file, ["sim-1", "sim-2"])
    for n, reading in enumerate(found[::2], 1):
        assert replay.foreign("sim-1", reading.at) == replay.foreign("sim-2", reading.at) == Foreign(n / 16, 0.1)
        assert replay.bandwidth("sim-1", reading.at) == round(10**6 / (n + 1), 1)


def recording(server: Server, folder: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-m", "muster.cli.main", *place(server.url, folder), "devices", "edge-01",
         "--record", str(folder / "fleet.jsonl")],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        # Where the tests run in the background of a shell, interrupts are ignored, which a child inherits.
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    assert process.stderr is not None
    assert process.stderr.readline() == f"recording to {folder / 'fleet.jsonl'}; Ctrl-C ends it\n"
    return process


def wait_for_lines(file: Path, count: int) -> None:
    until = time.monotonic() + 30.0
    while file.read_text().count("\n") < count:
        assert time.monotonic() < until, file.read_text()
        time.sleep(0.05)


def test_it_goes_on_over_a_restart_until_it_is_interrupted(tmp_path: Path) -> None:
    server = Server(FleetDesk(tmp_path), tmp_path)
    process = recording(server, tmp_path)
    assert process.stderr is not None
    wait_for_lines(tmp_path / "fleet.jsonl", 2)
    server.stop()
    told = process.stderr.readline()
    assert told.startswith("no coordinator answers at ") and told.endswith("; waiting for it\n")
    written = (tmp_path / "fleet.jsonl").read_text().count("\n")
    server.start()
    try:
        wait_for_lines(tmp_path / "fleet.jsonl", written + 2)
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=30)
    finally:
        server.stop()
    assert (process.returncode, errors) == (0, "")
    assert output.startswith("recorded ") and "of 1 device in" in output
    read(tmp_path / "fleet.jsonl", ["sim-1"])


class BrokenDesk(FleetDesk):
    """Each second answer about `running` is an error of its own, after loads and the list were told."""

    asked = 0

    def job(self, job: str) -> JobView:
        self.asked += job == "running"
        if job == "running" and self.asked % 2 == 0:
            raise RuntimeError("no answer in time")
        return super().job(job)


def test_what_a_look_that_fails_has_heard_is_told_by_the_next(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("muster.cli.recording.LOOK_EVERY_S", 0.2)
    file, desk = tmp_path / "fleet.jsonl", BrokenDesk(tmp_path)
    server = Server(desk, tmp_path)
    try:
        assert cli.main([*place(server.url, tmp_path), "devices", "--record", str(file), "--for", "2.0"]) == 0
    finally:
        server.stop()
    assert capsys.readouterr().err.count("; waiting for it") >= 2
    found = [msgspec.json.decode(line, type=Reading) for line in file.read_bytes().splitlines()]
    links = [one.bandwidth for one in found if one.bandwidth]
    assert links == [round(10**6 / (n + 2), 1) for n in range(len(links))], "no round is left out"
    assert len(links) >= 4


def test_a_line_that_finds_no_room_leaves_no_part_of_it(tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    with (tmp_path / "file").open("xb", buffering=0) as stream:
        _append(stream, b"a line\n")
        resource.setrlimit(resource.RLIMIT_FSIZE, (10, before[1]))
        try:
            with pytest.raises(OSError, match="space"):
                _append(stream, b"another line\n")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert (tmp_path / "file").read_bytes() == b"a line\n"


def test_what_is_wrong_with_the_asking_is_one_line_and_leaves_no_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server = Server(FleetDesk(tmp_path), tmp_path)
    here, nowhere = place(server.url, tmp_path), place(f"http://127.0.0.1:{free_port()}", tmp_path)
    (tmp_path / "there").write_text("mine")
    new = str(tmp_path / "new")
    try:
        for arguments, reason in [
            ([*here, "devices", "--record", str(tmp_path / "there")], "exists already; name another file"),
            ([*here, "devices", "--record", str(tmp_path / "none" / "x")], "can't be made: No such file or directory"),
            ([*here, "devices", "--for", "5"], "it goes with --record"),
            ([*here, "devices", "--record", new, "--json"], "it does not go with --record"),
            ([*here, "devices", "edge-02", "--record", new, "--for", "0.1"], "edge-02 told no load within 0 s"),
            ([*nowhere, "devices", "--record", new], "no coordinator answers"),
            ([*here, "devices", "edge-09", "--record", new], "no device 'edge-09' has reported yet"),
        ]:
            assert cli.main(arguments) == 2, arguments
            said = capsys.readouterr()
            last = said.err.splitlines()[-1]
            assert (said.out, last.startswith("error: ")) == ("", True)
            assert reason in last
    finally:
        server.stop()
    assert (tmp_path / "there").read_text() == "mine"
    assert not Path(new).exists()
