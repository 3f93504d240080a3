"""The services themselves under mutual TLS and the generated access list: a round with the test agent."""

from __future__ import annotations

from pathlib import Path

import pytest

from coordinator.core import records as rec
from muster.testbed import least_squares
from muster.testbed.fleet import DeviceSpec, Fleet
from shared import topics
from shared.settings import BrokerSettings
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
        logs = {name: (fleet.folder / f"{name}.log").read_text("utf-8") for name in ("coordinator", *DEVICES)}
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
        pki = fleet.folder / "pki"
        files = {"cafile": pki / "ca.crt", "certfile": pki / "edge-01.crt", "keyfile": pki / "edge-01.key"}
        # As edge-01, which the broker then takes from the daemon for a moment.
        settings: BrokerSettings = fleet.broker.settings(**{key: str(path) for key, path in files.items()})
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
