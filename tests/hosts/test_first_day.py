"""The first day of a fleet on real hosts: from bare machines to a round of training, and a service that is killed.

The tests are steps of one story and run in this order.
"""

from __future__ import annotations

import time

import pytest

from tests.hosts.site import DEVICES, SERVER, SMALL, TORCH, Site

pytestmark = pytest.mark.timeout(2400)


@pytest.mark.slow
def test_case_42_check_mode_works_on_a_clean_host(machines: Site) -> None:
    ran = machines.play("site", "--check", label="site --check on clean hosts")
    assert all(ran.changed[host.name] > 0 for host in machines.all), "it names what it would do"
    for host in machines.all:
        there = host.ssh("ls -d /opt/muster /etc/muster /etc/mosquitto 2>/dev/null", check=False).stdout
        assert there == "", f"{host.name}: check mode changed something"


def test_a_site_from_bare_machines(machines: Site) -> None:
    machines.install()
    assert machines.release_of(SERVER) == machines.releases["coordinator"]
    for name in DEVICES:
        assert machines.release_of(name) == machines.releases["edge-numpy"]
    states = {name: word["state"] for name, word in machines.presence().items()}
    assert states == {"coord-1": "online", TORCH: "ready", SMALL: "ready"}
    keys = [machines.hosts[name].ssh(f"stat -c '%a %U' /etc/muster/pki/{name}.key").stdout.split() for name in DEVICES]
    assert keys == [["400", "root"]] * 2
    server = machines.hosts[SERVER]
    shown = "openssl x509 -noout -subject -in /run/credentials/muster-coordinator.service/top.crt"
    assert "coord-1-top" in server.ssh(shown, root=True).stdout
    assert 'certfile = "${CREDENTIALS_DIRECTORY}/top.crt"' in server.ssh("cat /etc/muster/coordinator.toml").stdout
    settings = machines.hosts[SMALL].ssh("cat /etc/muster/edge.toml", root=True).stdout
    assert "[release]\nhold_out = 0.125\nshare = 0.25\n" in settings


def test_case_42_a_second_run_changes_nothing(machines: Site) -> None:
    ran = machines.play("site", label="site again")
    assert {name: ran.changed[name] for name in machines.hosts} == dict.fromkeys(machines.hosts, 0), ran.tail


def test_a_round_through_the_services(machines: Site) -> None:
    began = time.monotonic()
    machines.ended_well(machines.submit("first"))
    machines.controller.timings.append(("a round of 4 steps", time.monotonic() - began))


@pytest.mark.parametrize(
    "unit",
    ["muster-edge", *(pytest.param(unit, marks=pytest.mark.slow) for unit in ("muster-coordinator", "mosquitto"))],
)
def test_a_killed_service_comes_back(machines: Site, unit: str) -> None:
    """kill -9 in the middle of a round: systemd starts it again, and the round ends with both devices."""
    name = SMALL if unit == "muster-edge" else SERVER
    job = machines.submit(f"kill-{unit.removeprefix('muster-')}", steps=40)
    machines.at_work(job)
    before = machines.pid(name, unit)
    machines.hosts[name].ssh(f"kill -9 {before}", root=True)
    machines.ended_well(job)
    assert machines.pid(name, unit) not in ("0", before)
