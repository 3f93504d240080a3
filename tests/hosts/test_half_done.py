"""What runs that broke off leave on real hosts, and what the next run makes of it; certificates that ran out.

The tests are steps of one story and run in this order, after those of the first day or from bare machines.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from shared import certificates
from tests.hosts import lan, wheels
from tests.hosts.controller import PASSPHRASE, Ran
from tests.hosts.site import DEVICES, RUN, SERVER, SMALL, Site

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2400)]
STATE = "/var/lib/muster-coordinator"
ON_SERVER = ("--limit", f"localhost,{SERVER}")
NOBODY = f"{lan.NETWORK}.99"
"""No host has it."""


@pytest.fixture(scope="module")
def fleet(machines: Site) -> Site:
    """The fleet at work."""
    machines.install()
    return machines


def test_a_host_of_an_earlier_roll_out_is_not_restarted(fleet: Site) -> None:
    """That one noted nothing; what it left is told by when it was written."""
    for name in fleet.hosts:
        laid = "/etc/systemd/system/mosquitto.service.d/*.next"
        fleet.hosts[name].ssh(f"rm -f /etc/muster/*.passed /etc/mosquitto/muster.started {laid}", root=True)
    before = _pids(fleet)
    fleet.play("site", label="site where nothing was noted")
    assert _pids(fleet) == before
    assert "release " in fleet.hosts[SMALL].ssh("cat /etc/muster/edge.toml.passed").stdout
    ran = fleet.play("site", label="site once more")
    assert {name: ran.changed[name] for name in fleet.hosts} == dict.fromkeys(fleet.hosts, 0), ran.tail


def test_a_drop_in_of_an_earlier_roll_out_that_broke_off_is_put_into_use(fleet: Site) -> None:
    fleet.hosts[SMALL].ssh(
        "rm /etc/muster/edge.toml.passed && sleep 1.1 && touch /etc/systemd/system/muster-edge.service.d/10-site.conf",
        root=True,
    )
    before = fleet.pid(SMALL, "muster-edge")
    _canary(fleet, "of an earlier roll-out")
    assert fleet.pid(SMALL, "muster-edge") != before


def test_a_drop_in_is_put_into_use_by_the_run_after_one_that_broke_off(fleet: Site) -> None:
    """Settings that do not hold end the first, when the drop-in is written and the service not restarted yet."""
    before = fleet.pid(SMALL, "muster-edge")
    fleet.device_settings[SMALL] = {
        "muster_edge_settings": {"nonsense": {"is": "none"}},
        "muster_edge_dropin": "[Service]\nEnvironment=MUSTER_TEST_STEP_S=0.25 MUSTER_TEST_MARK=1\n",
    }
    fleet.describe()
    ran = fleet.controller.play("canary", "-e", f"muster_canary={SMALL}", label="canary that breaks off")
    assert ran.code != 0
    assert fleet.pid(SMALL, "muster-edge") == before
    del fleet.device_settings[SMALL]["muster_edge_settings"]
    fleet.describe()
    _canary(fleet, "after one that broke off")
    environment = f"cat /proc/{fleet.pid(SMALL, 'muster-edge')}/environ"
    assert "MUSTER_TEST_MARK=1" in fleet.hosts[SMALL].ssh(environment, root=True).stdout
    again = _canary(fleet, "after one that broke off, again")
    assert again.changed[SMALL] == 0, again.tail


def test_a_release_whose_gate_was_interrupted_is_not_what_is_gone_back_to(fleet: Site) -> None:
    """A release after it that does not pass goes back to the one that passed; it passes itself when it is run again."""
    before = fleet.release_of(SMALL)
    current = fleet.hosts[SMALL].root / "opt/muster/current"
    interrupted = wheels.other(RUN / "interrupted", "0.4.0", {})
    with _offered(fleet, interrupted):
        fleet.controller.interrupt(
            "canary", "-e", json.dumps({"muster_canary": SMALL, "muster_settle_s": 15}),
            when=lambda: current.readlink().name == fleet.releases["edge-numpy"],
        )  # fmt: skip
    with _offered(fleet, wheels.other(RUN / "never", "0.5.0", wheels.NEVER_READY)):
        ran = fleet.controller.play("canary", "-e", f"muster_canary={SMALL}", label="canary with a bad release")
    assert ran.code != 0
    assert f"back on {before}, and the fleet hears it" in ran.output, ran.tail
    assert fleet.release_of(SMALL) == before
    with _offered(fleet, interrupted):
        _canary(fleet, "with the interrupted release")
        assert fleet.presence()[SMALL]["version"] == "0.4.0"
    fleet.play("rollback", "--limit", SMALL)
    assert fleet.release_of(SMALL) == before


def test_a_switch_back_needs_no_settings_of_the_release(fleet: Site) -> None:
    """An earlier version of the role kept none where its gate was interrupted."""
    host = fleet.hosts[SMALL]
    before = fleet.release_of(SMALL)
    host.ssh(f"rm /etc/muster/edge.toml.passed /opt/muster/releases/{before}/muster-edge.toml", root=True)
    settings = host.ssh("cat /etc/muster/edge.toml", root=True).stdout
    never = json.loads((RUN / "never/wheels/wheelhouse.json").read_text(encoding="utf-8"))
    with _offered(fleet, (RUN / "never/wheels", {name: made["release"] for name, made in never["profiles"].items()})):
        ran = fleet.controller.play("canary", "-e", f"muster_canary={SMALL}", label="canary with a bad release")
    assert f"back on {before}, and the fleet hears it" in ran.output, ran.tail
    assert host.ssh("cat /etc/muster/edge.toml", root=True).stdout == settings


def test_a_broker_that_does_not_start_goes_back_to_what_served(fleet: Site) -> None:
    """Its restart is for a drop-in alone, and the configuration of before the last change is not what served."""
    host = fleet.hosts[SERVER]
    folder = "/etc/systemd/system/mosquitto.service.d"
    shown = f"cat /etc/mosquitto/mosquitto.conf {folder}/muster.conf {folder}/10-site.conf"
    served = host.ssh(shown, root=True).stdout
    host.ssh(f"printf '[Service]\\nExecStartPre=/bin/false\\n' > {folder}/zz-bad.conf", root=True)
    fleet.server = {**fleet.server, "muster_broker_addresses": [f"{lan.NETWORK}.0/24", "10.99.0.0/16"]}
    fleet.describe()
    ran = fleet.controller.play("site", *ON_SERVER, label="site with a broker that does not start")
    assert ran.code != 0
    assert host.ssh(shown, root=True).stdout == served
    host.ssh(f"rm {folder}/zz-bad.conf", root=True)
    fleet.play("site", *ON_SERVER, label="site with the broker again")
    assert "10.99.0.0/16" in host.ssh("systemctl show -p IPAddressAllow mosquitto").stdout
    again = fleet.play("site", *ON_SERVER, label="site with the broker, again")
    assert again.changed[SERVER] == 0, again.tail
    del fleet.server["muster_broker_addresses"]
    fleet.describe()
    fleet.play("site", *ON_SERVER, label="site with the broker as before")
    assert host.ssh(shown, root=True).stdout == served
    _wait_until(lambda: fleet.presence()[SMALL]["state"] == "ready")


def test_a_certificate_that_has_expired_is_renewed(fleet: Site) -> None:
    certfile = fleet.hosts[SMALL].root / f"etc/muster/pki/{SMALL}.crt"
    certfile.write_bytes(_expired(fleet, certfile))
    fleet.hosts[SMALL].ssh("systemctl restart --no-block muster-edge", root=True)
    _canary(fleet, "with an expired certificate")
    left = certificates.read_certificate(certfile.read_bytes(), "").not_valid_after_utc - _now()
    assert left > datetime.timedelta(days=80)
    assert fleet.presence()[SMALL]["state"] == "ready"


def test_a_farewell_that_broke_off_ends_the_connection(fleet: Site) -> None:
    """Of a host that is out of reach, by the run after the one that revoked; then the device comes back."""
    passphrase = {"MUSTER_PKI_PASSPHRASE": PASSPHRASE}
    fleet.controller.muster("pki", "revoke", SMALL, "--folder", str(fleet.controller.pki), env=passphrase)
    assert "offline" not in _status(fleet)
    fleet.device_settings[SMALL] = {"ansible_host": NOBODY}
    fleet.describe()
    ran = fleet.controller.play("decommission", "-e", f"muster_decommission={SMALL}", label="decommission, again")
    assert "FAILED!" not in ran.output, ran.tail
    assert PASSPHRASE not in ran.output
    _wait_until(lambda: "offline" in _status(fleet))
    ran = fleet.controller.play("decommission", "-e", f"muster_decommission={SMALL}", label="decommission, once more")
    assert ran.changed[SMALL] == 0, ran.tail
    del fleet.device_settings[SMALL]
    fleet.describe()
    _canary(fleet, "back after the farewell", muster_renew=True)
    _wait_until(lambda: fleet.presence()[SMALL]["state"] == "ready")


def test_a_restoration_that_can_not_be_leaves_all_as_it_was(fleet: Site, tmp_path: Path) -> None:
    """The copy is missing, cut, or of something else; also after one by an earlier version of the role."""
    host = fleet.hosts[SERVER]
    fleet.ended_well(fleet.submit("kept"))
    jobs = fleet.muster("list", "--json")
    fleet.play("backup", muster_coordinator_backup=str(tmp_path))
    (archive,) = tmp_path.glob("*.tar")
    cut, other = tmp_path / "cut.tar", tmp_path / "other.tar"
    cut.write_bytes(archive.read_bytes()[:2000])
    other.write_bytes(b"\0" * 10240)
    before = fleet.pid(SERVER, "muster-coordinator")
    for copy, words in ((tmp_path / "none.tar", "no copy at"), (cut, "is no copy"), (other, "is no copy")):
        for _ in range(2):
            ran = fleet.controller.play("restore", "-e", f"muster_archive={copy}", label=f"restore of {copy.name}")
            assert ran.code != 0
            assert words in ran.output, ran.tail
    assert fleet.pid(SERVER, "muster-coordinator") == before
    assert fleet.muster("list", "--json") == jobs
    host.ssh(
        f"systemctl stop muster-coordinator && rm -rf {STATE}.before && mv {STATE} {STATE}.before"
        f" && install -d -o muster -g muster -m 700 {STATE} && touch {STATE}/events.half",
        root=True,
    )
    kept = host.ssh(f"sha256sum {STATE}.before/events.sqlite", root=True).stdout
    assert fleet.controller.play("restore", "-e", f"muster_archive={cut}", label="restore of cut.tar").code != 0
    assert host.ssh(f"sha256sum {STATE}.before/events.sqlite", root=True).stdout == kept
    fleet.play("restore", muster_archive=str(archive))
    assert host.ssh(f"sha256sum {STATE}.before/events.sqlite", root=True).stdout == kept
    _wait_until(lambda: fleet.muster("list", "--json") == jobs)
    fleet.ended_well(fleet.submit("restored"))


def _pids(fleet: Site) -> dict[str, str]:
    units = [(SERVER, "mosquitto"), (SERVER, "muster-coordinator"), *((name, "muster-edge") for name in DEVICES)]
    return {f"{unit} on {name}": fleet.pid(name, unit) for name, unit in units}


def _canary(fleet: Site, what: str, **variables: object) -> Ran:
    return fleet.play("canary", muster_canary=SMALL, label=f"canary {what}", **variables)


@contextlib.contextmanager
def _offered(fleet: Site, made: tuple[Path, dict[str, str]]) -> Iterator[None]:
    """What is to be installed meanwhile."""
    good = fleet.wheels, fleet.releases
    fleet.wheels, fleet.releases = made
    fleet.describe()
    try:
        yield
    finally:
        fleet.wheels, fleet.releases = good
        fleet.describe()


def _status(fleet: Site) -> str:
    return fleet.hosts[SMALL].ssh("systemctl show --value -p StatusText muster-edge").stdout


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.timezone.utc)


def _expired(fleet: Site, certfile: Path) -> bytes:
    """The same certificate as it would be had it run out yesterday."""
    folder = fleet.controller.pki
    key = certificates.read_key((folder / "ca.key").read_bytes(), "ca.key", PASSPHRASE.encode())
    found = certificates.read_certificate(certfile.read_bytes(), str(certfile))
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    builder = x509.CertificateBuilder().issuer_name(found.issuer).subject_name(found.subject)
    builder = builder.public_key(found.public_key()).serial_number(x509.random_serial_number())
    builder = builder.not_valid_before(_now() - datetime.timedelta(days=91))
    builder = builder.not_valid_after(_now() - datetime.timedelta(days=1))
    for extension in found.extensions:
        builder = builder.add_extension(extension.value, extension.critical)
    return builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


def _wait_until(met: Callable[[], bool], within_s: float = 60.0) -> None:
    end = time.monotonic() + within_s
    while True:
        with contextlib.suppress(AssertionError, KeyError):
            if met():
                return
        assert time.monotonic() < end
        time.sleep(0.5)
