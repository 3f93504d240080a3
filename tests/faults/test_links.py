"""Rounds over real mosquitto while the devices' links are bad: every round commits, every update counts exactly once.

TCP hides loss, duplication and reordering from both ends, so over a real broker they can only show as what a reconnect
does: a message or its acknowledgement was under way when the link broke, and it is delivered again, perhaps a second
time, after later ones. Delay, silence and partition are the link's own. Loss, duplication and reordering of single
messages are drawn in `tests/fleet/test_faults.py`, over the transport in memory.
"""

from __future__ import annotations

import hashlib
import time
from pathlib import Path

import msgspec
import pytest

from coordinator.adapters.event_log import SqliteEventLog
from coordinator.core import records as rec
from coordinator.web.views import JobView
from edge_daemon.core.state import Journal
from muster.testbed import least_squares
from muster.testbed.fleet import AGENTS, DeviceSpec, Fleet
from muster.testbed.relay import BadLink

DEVICES = tuple(f"edge-{number:02d}" for number in range(1, 9))
ROUNDS = 4
MODEL = "128x64"
JOB = f"""
name = "links"
[base]
model = "{MODEL}"
[task]
kind = "least_squares"
dataset = "points"
[rounds]
count = {ROUNDS}
min_devices = {len(DEVICES)}
quorum = 1.0
local_steps = 16
deadline_s = 900
[strategy]
rank = 4
batch = 4
batch_min = 4
batch_max = 4
bits = 32
[training]
lr = 0.05
checkpoint_every = 4
"""


def _fleet(folder: Path) -> Fleet:
    """Every device behind a relay of its own. Who is away is waited for, however long."""
    specs = []
    for seed, name in enumerate(DEVICES):
        path = folder / f"{name}.jsonl"
        least_squares.write_rows(path, least_squares.make_rows(MODEL, 32, seed=seed))
        settings = {
            "policy": {"foreign_limit": 1000.0},
            "agent": {"command": ["/usr/bin/env", "MUSTER_TEST_STEP_S=0.1", *AGENTS["numpy"]]},
            # The broker gives up a link that is silent for six seconds: some of the silences are longer.
            "broker": {"keepalive_s": 4, "will_delay_s": 120},
        }
        specs.append(DeviceSpec(name, data={"points": path}, settings=settings))
    return Fleet(
        folder / "fleet", specs, {MODEL: MODEL}, agent="numpy", limits=False, relay=True,
        # Small packets: an adapter is many chunks, so that links break in the middle of it.
        broker={"max_packet_size": "4096"},
        coordinator={"waits": {"silent_s": 120.0, "absent_s": 120.0, "gather_s": 0.3, "retry_s": 1.0}},
    )  # fmt: skip


def _finish(fleet: Fleet, seconds: float) -> JobView:
    """Run the job to its end, until no device holds an update any more."""
    job = fleet.client.submit(JOB).id
    until = time.monotonic() + seconds
    while (view := fleet.client.job(job)).state != "finished" or any(_outbox(fleet, name) for name in DEVICES):
        assert not fleet.ended, fleet.ended
        assert view.state not in ("cancelled", "failed", "paused"), view.reason
        assert time.monotonic() < until, view
        time.sleep(0.2)
    return view


def _outbox(fleet: Fleet, device: str) -> int:
    """Updates that the device keeps, as not settled yet."""
    return len(msgspec.msgpack.decode((fleet.folder / device / "journal").read_bytes(), type=Journal).outbox)


def _exported(fleet: Fleet, job: str) -> str:
    path = fleet.folder / "coordinator" / "exports" / job / "adapter_model.safetensors"
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Digest of the adapter of a run over good links."""
    with _fleet(tmp_path_factory.mktemp("good")) as fleet:
        view = _finish(fleet, 100.0)
        return _exported(fleet, view.id)


@pytest.mark.timeout(360)  # the run over good links is part of the first
@pytest.mark.parametrize("seed", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_bad_links_leave_no_trace(tmp_path: Path, undisturbed: str, seed: int) -> None:
    with _fleet(tmp_path) as fleet:
        links = [
            BadLink(relay, f"{seed} {name}", calm_s=(0.3, 1.5), bad_s=(0.2, 7.0))
            for name, relay in fleet.relays.items()
        ]
        try:
            view = _finish(fleet, 200.0)
        finally:
            for link in links:
                link.stop()
        adapter = _exported(fleet, view.id)
        logs = {name: fleet.edges[name].log.read_text(encoding="utf-8") for name in DEVICES}
        records = SqliteEventLog(fleet.folder / "coordinator" / "events.sqlite").of_job(view.id)
    _check_weather(fleet, links)
    rounds = range(1, ROUNDS + 1)
    assert [(r.round, r.attempt) for r in records if isinstance(r, rec.RoundPlanned)] == [(n, 1) for n in rounds]
    admitted = [(r.round, r.device) for r in records if isinstance(r, rec.UpdateAdmitted)]
    assert sorted(admitted) == [(n, name) for n in rounds for name in DEVICES], "an update was lost, or counted twice"
    closed = [(r.round, r.devices) for r in records if isinstance(r, rec.RoundClosed)]
    assert closed == [(n, list(DEVICES)) for n in rounds]
    assert [r.round for r in records if isinstance(r, rec.RoundCommitted) and r.accepted] == list(rounds)
    assert {name: log.count(": trained ") for name, log in logs.items()} == dict.fromkeys(DEVICES, ROUNDS)
    assert adapter == undisturbed, "other bytes than over good links"


def _check_weather(fleet: Fleet, links: list[BadLink]) -> None:
    """The links were bad in every way."""
    seen = [link.weather for link in links]
    assert all(sum(getattr(one, kind) for one in seen) for kind in ("cuts", "losses", "stalls", "delays")), seen
    assert all(relay.connections > 1 for relay in fleet.relays.values()), "a device never had to connect again"
    assert sum(relay.bytes_lost for relay in fleet.relays.values()) > 0, "nothing was under way when a link broke"
