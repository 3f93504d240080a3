"""The services themselves under mutual TLS and the generated access list: a round with the test agent."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from coordinator.core import records as rec
from muster.testbed import least_squares
from muster.testbed.fleet import DeviceSpec, Fleet
from muster.testbed.machines import files
from shared import topics
from shared.enrolment import Enrolment
from shared.transport.base import Connected, Outgoing, Published
from tests.broker.owner import Owner
from tests.live.rig import ended, records_of, wait_for, wait_until_heard

DEVICES = ("edge-01", "edge-02")
JOB = """
name = "secure"
[base]
model = "12x6"
[task]
kind = "least_squares"
dataset = "points"
[rounds]
count = 1
min_devices = 2
quorum = 1.0
local_steps = 4
deadline_s = 60
[strategy]
rank = 3
batch = 4
[evaluation]
data = "{held_out}"
worse_by = 10.0
"""


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with rows of every device, and some held out."""
    for seed, name in enumerate((*DEVICES, "held-out")):
        least_squares.write_rows(tmp_path / f"{name}.jsonl", least_squares.make_rows("12x6", 32, seed))
    return tmp_path


def secure_fleet(place: Path) -> Fleet:
    devices = [
        DeviceSpec(name, data={"points": place / f"{name}.jsonl"}, settings={"policy": {"foreign_limit": 100.0}})
        for name in DEVICES
    ]
    return Fleet(
        place / "fleet", devices, {"12x6": "12x6"}, agent="numpy", secure=True, limits=False,
        broker={"log_type": "all"},  # what it denies is among its debug messages
    )  # fmt: skip


def leaked(fleet: Fleet) -> Iterator[str]:
    """Where a key or the API's token can be seen that should not be: files, arguments and environments."""
    keys = list((fleet.folder / "pki").rglob("*.key"))
    assert {path.name for path in keys} == {
        f"{name}.key" for name in ("ca", "server", "coord-1", "coord-1-top", *DEVICES)
    }
    secrets = {path: path.read_text("utf-8").splitlines()[1].encode() for path in keys}
    token = fleet.folder / "coordinator" / "token"
    secrets[token] = token.read_bytes().strip()
    for path in keys:
        assert path.stat().st_mode & 0o777 == 0o400, path
    for path in fleet.folder.rglob("*"):
        if path.is_file():
            data = path.read_bytes()
            yield from (f"{path}: of {owner}" for owner, secret in secrets.items() if secret in data and owner != path)
    programs = [fleet.coordinator, *fleet.edges.values()]
    pids = [fleet.broker.pid, *(program.pid for program in programs)]
    pids += [child.pid for program in programs for child in psutil.Process(program.pid).children(recursive=True)]
    assert len(pids) >= 1 + 3 + 3  # each service has its agent or model worker
    for pid in pids:
        for name in ("cmdline", "environ"):
            data = Path(f"/proc/{pid}/{name}").read_bytes()
            yield from (f"{pid} {name}: of {owner}" for owner, secret in secrets.items() if secret in data)


def test_a_round_and_its_export_over_mutual_tls(place: Path) -> None:
    with secure_fleet(place) as fleet:
        wait_until_heard(fleet)
        text = JOB.format(held_out=place / "held-out.jsonl")
        job = wait_for(fleet, fleet.client.submit(text).id, ended, seconds=60)
        assert job.state == "finished", job.reason
        closed = [record.devices for record in records_of(fleet, job.id) if isinstance(record, rec.RoundClosed)]
        assert closed == [list(DEVICES)]
        assert (fleet.client.export(job.id, place / "adapter") / "adapter_model.safetensors").is_file()
        broker = fleet.broker.log
        leaks = list(leaked(fleet))
        logs = {name: (fleet.folder / f"{name}.log").read_text("utf-8") for name in ("coordinator", *DEVICES)}
    # Case 40, as far as keys go.
    assert leaks == []
    # All that the services did is allowed to them, and they did it in their own names.
    assert "Denied" not in broker
    for name, log in logs.items():
        assert "the broker refused" not in log, name
    for name in ("coord-1", *DEVICES):
        assert f"as {name} (" in broker, broker


def test_its_broker_takes_no_one_else(place: Path) -> None:
    """No plain connection, and no word from one device in the name of another."""
    with secure_fleet(place) as fleet:
        plain = Owner(fleet.broker.settings(reconnect_min_s=0.05, reconnect_max_s=0.1), "edge-03")
        # As edge-01, which the broker then takes from the daemon for a moment.
        settings = fleet.broker.settings(**files(Enrolment(fleet.folder / "pki" / "edge-01", "edge-01")))
        taken = Owner(settings, "edge-01", topics.device_filters("emulated", "edge-01"))
        try:
            taken.wait(Connected)
            name = topics.ACK.name("emulated", device="edge-02")
            taken.transport.publish(Outgoing(topics.ACK, name, b"x", "foreign"))
            assert taken.wait(Published)[0].reason == "Not authorized"
            assert "Denied" in fleet.broker.log
            plain.rest(0.5)
            assert plain.of(Connected) == []
        finally:
            plain.transport.stop(graceful=False)
            taken.transport.stop(graceful=False)
