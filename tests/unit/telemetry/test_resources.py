"""Disk, network and pressure stall: on hand-written files, and on this machine."""

from __future__ import annotations

from pathlib import Path

import pytest

from edge_daemon.adapters.telemetry.resources import ResourceReader
from shared.messages import HostLoad
from tests.unit.telemetry.jetson_trees import put
from tests.unit.telemetry.test_nvidia import Clock

HEAD = (
    "Inter-|   Receive                                                |  Transmit\n"
    " face |bytes    packets errs drop fifo frame compressed multicast|bytes    packets errs drop fifo colls carrier\n"
)


def traffic(root: Path, **cards: tuple[int, int]) -> None:
    rows = [f"{name}: {received} 1 0 0 0 0 0 0 {sent} 1 0 0 0 0 0 0\n" for name, (received, sent) in cards.items()]
    put(root, "proc/net/dev", HEAD + "".join(rows))


def test_rates_are_those_of_the_cards(tmp_path: Path) -> None:
    clock = Clock()
    reader = ResourceReader(tmp_path, root=tmp_path, clock=clock)
    put(tmp_path, "sys/class/net/eth0/device/vendor", "0x10de\n")
    put(tmp_path, "sys/class/net/wlan0/device/vendor", "0x10de\n")
    put(tmp_path, "sys/class/net/docker0/mtu", "1500\n")
    traffic(tmp_path, lo=(0, 0), eth0=(1000, 500), wlan0=(0, 0), docker0=(0, 0))
    first = reader.read()
    assert (first.received_per_s, first.sent_per_s) == (None, None)
    clock.now += 10.0
    traffic(tmp_path, lo=(999_999, 9), eth0=(21_000, 1500), wlan0=(5000, 0), docker0=(77_777, 7))
    found = reader.read()
    assert (found.received_per_s, found.sent_per_s) == (2500.0, 100.0)
    clock.now += 0.1
    traffic(tmp_path, eth0=(99_000, 1500), wlan0=(5000, 0))
    assert reader.read().received_per_s == 2500.0, "too soon to be a rate"


def test_in_a_container_everything_but_the_loopback_counts(tmp_path: Path) -> None:
    clock = Clock()
    reader = ResourceReader(tmp_path, root=tmp_path, clock=clock)
    traffic(tmp_path, lo=(0, 0), eth0=(0, 0))
    reader.read()
    clock.now += 2.0
    traffic(tmp_path, lo=(500, 500), eth0=(200, 100))
    found = reader.read()
    assert (found.received_per_s, found.sent_per_s) == (100.0, 50.0)


def test_a_card_that_goes_away_makes_no_negative_rate(tmp_path: Path) -> None:
    clock = Clock()
    reader = ResourceReader(tmp_path, root=tmp_path, clock=clock)
    traffic(tmp_path, eth0=(1000, 0), usb0=(9000, 0))
    reader.read()
    for _ in range(2):
        clock.now += 1.0
        traffic(tmp_path, eth0=(1000, 0))
        found = reader.read()
        assert found.received_per_s in (None, 0.0)


@pytest.mark.parametrize(
    ("text", "share"),
    [
        ("some avg10=60.39 avg60=63.49 avg300=57.23 total=7716984757\nfull avg10=1.00 avg60=0.00 total=0\n", 0.6039),
        ("some avg10=0.00 avg60=0.00 avg300=0.00 total=0\n", 0.0),
        ("", None),
        ("some avg10=x\n", None),
        ("full avg10=1.00\n", None),
    ],
)
def test_pressure_stall(tmp_path: Path, text: str, share: float | None) -> None:
    put(tmp_path, "proc/pressure/memory", text)
    found = ResourceReader(tmp_path, root=tmp_path).read()
    assert found.memory_stalled == share
    assert (found.cpu_stalled, found.disk_stalled) == (None, None), "absent on old kernels"


def test_what_can_not_be_read_is_absent(tmp_path: Path) -> None:
    assert ResourceReader(tmp_path / "gone", root=tmp_path).read() == HostLoad()


def test_this_machine(tmp_path: Path) -> None:
    found = ResourceReader(tmp_path).read()
    assert found.disk_free is not None and found.disk_free > 0
    for share in (found.cpu_stalled, found.memory_stalled, found.disk_stalled):
        assert (share is not None) == Path("/proc/pressure/cpu").exists()
