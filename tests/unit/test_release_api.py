"""Releases over the real HTTP API and by the real command, with a fleet in memory behind them."""

from __future__ import annotations

import json
import queue
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn

from coordinator.core.release_records import Canaries
from coordinator.runtime import Call
from coordinator.web import api
from coordinator.web.desk import Desk
from coordinator.web.release_asks import ReleaseAsk
from coordinator.web.shelf import Shelf
from edge_daemon import protocol
from muster.cli import following, releasing
from muster.cli import main as cli
from muster.cli.options import Place
from muster.client import Client, Unreachable
from muster.testbed.memory_fleet import MemoryFleet
from shared.errors import UserError
from tests.fleet import fleet_rig as rig
from tests.fleet import release_rig as rel

TOKEN = "a-token-of-many-letters"
DEVICES = 3


class Served:
    """A fleet whose coordinator is asked over HTTP: `while_time_passes` answers the calls and lets its clock run."""

    def __init__(self, folder: Path) -> None:
        self.members = rig.members(DEVICES)
        self.fleet = MemoryFleet(folder / "fleet", self.members)
        self.fleet.start()
        self.job = rel.trained(self.fleet, DEVICES)
        self.calls: queue.SimpleQueue[Call] = queue.SimpleQueue()
        desk = Desk(self.fleet.coordinator.runtime, self.calls.put)
        listener = socket.socket()
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        application = api.create(desk, TOKEN, Shelf(folder))
        self.server = uvicorn.Server(uvicorn.Config(application, log_level="error", lifespan="off"))
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [listener]})
        self.thread.start()
        self.url = f"http://127.0.0.1:{listener.getsockname()[1]}"

    def while_time_passes(self, ask: Callable[[], Any]) -> Any:
        """What `ask` returns (or raises) in another thread."""
        outcome: list[Any] = []

        def run() -> None:
            try:
                outcome.append(ask())
            except Exception as error:  # noqa: BLE001  # raised again in the test's thread
                outcome.append(error)

        thread = threading.Thread(target=run)
        thread.start()
        while thread.is_alive():
            try:
                self.fleet.coordinator.runtime.handle(self.calls.get(timeout=0.01))
            except queue.Empty:
                self.fleet.run(0.5)
        thread.join()
        if isinstance(outcome[0], Exception):
            raise outcome[0]
        return outcome[0]

    def close(self) -> None:
        self.server.should_exit = True
        self.thread.join()
        self.fleet.close()


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Served]:
    monkeypatch.setattr(following, "LOOK_EVERY_S", 0.05)
    made = Served(tmp_path)
    yield made
    made.close()


@pytest.fixture
def place(served: Served, tmp_path: Path) -> list[str]:
    (tmp_path / "token").write_text(f"{TOKEN}\n")
    return ["--url", served.url, "--token-file", str(tmp_path / "token")]


def test_the_client_asks_for_a_release_and_sees_it_through(served: Served) -> None:
    with Client(served.url, TOKEN) as client:
        ask = ReleaseAsk(job=served.job, canaries=Canaries(devices=["dev-001"]), worse_by=0.5)
        view = served.while_time_passes(lambda: client.release(ask))
        assert (view.id, view.state, view.worse_by, view.deadline_s) == (f"{served.job}.r3-1", "packing", 0.5, 1800.0)
        until = time.monotonic() + 60.0
        while view.state not in releasing.ENDED:
            assert time.monotonic() < until
            view = served.while_time_passes(client.release_status)
        assert (view.state, view.stands, view.committed, view.kind) == ("finished", True, DEVICES, "lora")
        assert [one.device for one in view.devices if one.canary] == ["dev-001"]
        for one in view.devices:
            assert one.after is not None and one.before is not None and one.after.loss < one.before.loss
            assert one.active == view.id
        (listed,) = served.while_time_passes(client.releases)
        assert (listed.id, listed.devices) == (view.id, [])
        back = served.while_time_passes(client.roll_back)
        assert back.state == "rolling_back"


def test_what_the_api_refuses(served: Served) -> None:
    http = httpx.Client(base_url=served.url, headers={"Authorization": f"Bearer {TOKEN}"})
    assert httpx.get(f"{served.url}/v1/releases").status_code == 401
    assert httpx.post(f"{served.url}/v1/releases", json={"job": served.job}).status_code == 401
    assert httpx.post(f"{served.url}/v1/releases/last/rollback").status_code == 401
    bodies: list[tuple[Any, int]] = [
        (b"no json", 400), (b"{}", 400), (b'{"job": 3}', 400), (b'{"job": "a", "more": 1}', 400),
        (b'{"job": "other"}', 404), (b'{"job": "a", "canaries": {"share": 2}}', 400), (b" " * 300_000, 413),
    ]  # fmt: skip
    for body, status in bodies:
        answer = served.while_time_passes(lambda body=body: http.post("/v1/releases", content=body))
        assert answer.status_code == status, body[:40]
        assert json.loads(answer.content)["error"]
    assert served.while_time_passes(lambda: http.get("/v1/releases/other")).status_code == 404
    assert served.while_time_passes(lambda: http.post("/v1/releases/last/rollback")).status_code == 409
    http.close()


def test_the_command_follows_a_good_release(
    served: Served, place: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*place, "release", served.job, "--canary", "1"]
    assert served.while_time_passes(lambda: cli.main(words)) == 0
    shown = capsys.readouterr()
    name = f"{served.job}.r3-1"
    assert shown.err.splitlines()[0] == name
    assert f"{name}: finished, in force (3 committed): 3 committed" in shown.err
    assert shown.out.startswith(f"{name}: finished, in force (3 committed)\n")
    assert shown.out.count("committed") >= 4 and "loss" in shown.out
    assert served.while_time_passes(lambda: cli.main([*place, "release", "--list"])) == 0
    assert name in capsys.readouterr().out
    assert served.while_time_passes(lambda: cli.main([*place, "release", "--status", "--json"])) == 0
    assert json.loads(capsys.readouterr().out)["state"] == "finished"
    assert served.while_time_passes(lambda: cli.main([*place, "release", "--rollback"])) == 0
    assert f"{name}: rolled back (withdrawn by an operator)" in capsys.readouterr().out
    assert set(rel.in_use(served.fleet).values()) == {""}


def test_a_bad_release_ends_the_command_with_1(
    served: Served, place: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    served.members[0].behaviour.measured = lambda order, _said: protocol.Unfit(
        release=order.release, kind="load", reason="no such tensor"
    )
    words = [*place, "release", f"{served.job}@2", "--device", "dev-000"]
    assert served.while_time_passes(lambda: cli.main(words)) == 1
    shown = capsys.readouterr()
    assert f"{served.job}.r2-1: rolled back (stopped by a canary: dev-000: no such tensor)" in shown.out
    assert set(rel.in_use(served.fleet).values()) == {""}
    assert served.while_time_passes(lambda: cli.main([*place, "release", "--status"])) == 1
    # In the rest it fails on one: the others have it, and the operator is told so.
    words = [*place, "release", served.job, "--device", "dev-001"]
    assert served.while_time_passes(lambda: cli.main(words)) == 1
    assert "finished, in force (2 committed, 1 failed)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "say which job: muster release JOB"),
        (["--status", "--list"], "exclude each other"),
        (["job@x"], "a round is a number, as in job@2"),
        (["job", "--canary", "0"], "a share such as 10%, or a count such as 3"),
        (["job", "--canary", "0%"], "a share such as 10%, or a count such as 3"),
        (["job", "--canary", "101%"], "a share such as 10%, or a count such as 3"),
        (["job", "--canary", "many"], "a share such as 10%, or a count such as 3"),
    ],
)
def test_a_command_that_makes_no_sense_is_told_so(
    tmp_path: Path, words: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "token").write_text(TOKEN)
    place = ["--url", "http://127.0.0.1:1", "--token-file", str(tmp_path / "token")]
    assert cli.main([*place, "release", *words]) == 2
    error = capsys.readouterr().err
    assert told in error and error.count("\n") == 1


def test_a_coordinator_that_is_away_is_waited_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(following, "LOOK_EVERY_S", 0.05)
    (tmp_path / "token").write_text(TOKEN)
    nowhere = Place(url="http://127.0.0.1:1", token_file=str(tmp_path / "token"), config="")
    with pytest.raises(Unreachable, match="release a.r1-1 goes on; muster release --status a.r1-1 tells"):
        releasing.follow(nowhere, "a.r1-1", 0.3)
    assert capsys.readouterr().err == "the coordinator does not answer: waiting for it, 0 s at most\n"


def test_a_missing_job_is_one_line(served: Served, place: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert served.while_time_passes(lambda: cli.main([*place, "release", "other"])) == 2
    assert capsys.readouterr().err == "error: no job 'other'; `muster list` shows all\n"
    with Client(served.url, TOKEN) as client, pytest.raises(UserError, match="muster release --list"):
        served.while_time_passes(lambda: client.release_status("last"))
