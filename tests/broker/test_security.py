"""Mutual TLS and the generated ACL on a real mosquitto, with the configuration that `muster broker config` prints."""

from __future__ import annotations

import shutil
import ssl
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from cryptography import x509

from muster import mosquitto
from muster.cli.main import main
from muster.kick import kick
from muster.testbed.broker import Broker, find_mosquitto, free_port
from muster.testbed.machines import LOCAL, Machines, now
from shared import topics
from shared.certificates import serial_of
from shared.enrolment import Enrolment
from shared.errors import UserError
from shared.settings import BrokerSettings
from shared.transport.base import Connected, Disconnected, Outgoing, Published, Received, TransportFailed
from tests.broker.owner import Owner
from tests.broker.security import ACL, DEVICE, FLEET, Secure, handshake, issued_at

Own = Callable[..., Owner]


@pytest.fixture
def secure(tmp_path: Path) -> Iterator[Secure]:
    made = Secure(tmp_path)
    with made.broker:
        yield made


def publish(owner: Owner, topic: topics.Topic, **parts: object) -> str:
    """Why it was refused; "": it was not."""
    before = len(owner.of(Published))
    owner.transport.publish(Outgoing(topic, topic.name(FLEET, **parts), b"x", topic.pattern))
    return owner.wait(Published, before + 1)[-1].reason


def test_case_30_the_acl_lets_each_side_do_its_part_and_surfaces_what_it_denies(secure: Secure, own: Own) -> None:
    """Cases 9 and 30: denied once, named, not tried again."""
    coordinator = own(secure.settings("coord-1", "coordinator"), "coord-1", topics.coordinator_filters(FLEET))
    coordinator.wait(Connected)
    device = own(secure.settings("dev-1"), "dev-1", DEVICE)
    device.wait(Connected)
    assert publish(device, topics.STATE, device="dev-1") == ""
    assert publish(device, topics.UP_CHUNK, device="dev-1", sha="a" * 64, index=3) == ""
    assert publish(device, topics.ACK, device="dev-2") == "Not authorized"
    assert publish(device, topics.ASSIGN, device="dev-1") == "Not authorized"
    assert publish(coordinator, topics.ASSIGN, device="dev-1") == ""
    assert publish(coordinator, topics.ASSIGN, device="dev-2") == ""
    assert publish(coordinator, topics.ROUND) == ""
    assert publish(coordinator, topics.ACK, device="dev-1") == "Not authorized"
    coordinator.wait(Received, 2)
    device.wait(Received, 3)
    device.rest(0.5)
    assert {event.name.split("/", 3)[3] for event in device.of(Received)} == {
        "device/dev-1/state",
        "device/dev-1/down/assign",
        "fleet/round",
    }
    assert len(coordinator.of(Received)) == 2
    assert device.transport.stats.denials == 2
    assert device.transport.stats.messages_sent == 4


@pytest.mark.parametrize(("name", "role"), [("coord-1", "coordinator"), ("board", "reader"), ("gate-1", "gate")])
def test_case_30_who_is_no_device_is_none_of_its_own_name(secure: Secure, own: Own, name: str, role: str) -> None:
    """Case 30: patterns of an access list hold for every user; without deny lines a dashboard could play a device."""
    other = own(secure.settings(name, role), name)
    other.wait(Connected)
    assert publish(other, topics.STATE, device=name) == "Not authorized"
    assert publish(other, topics.ACK, device=name) == "Not authorized"
    assert publish(other, topics.ACK, device="dev-1") == "Not authorized"
    if role != "coordinator":
        assert publish(other, topics.ASSIGN, device="dev-1") == "Not authorized"
        assert publish(other, topics.STATE, device="dev-1") == "Not authorized"


def test_case_30_a_gate_sees_presence_and_nothing_else(secure: Secure, own: Own) -> None:
    """Case 30."""
    everything = [(f"{topics.PREFIX}/{FLEET}/#", 1)]
    gate = own(secure.settings("gate-1", "gate"), "gate-1", everything)
    board = own(secure.settings("board", "reader"), "board", everything)
    device = own(secure.settings("dev-1"), "dev-1")
    for owner in (gate, board, device):
        owner.wait(Connected)
    assert publish(device, topics.ACK, device="dev-1") == ""
    assert publish(device, topics.STATE, device="dev-1") == ""
    seen = {
        owner: [event.name.split("/", 3)[3] for event in owner.wait(Received, n)]
        for owner, n in ((board, 2), (gate, 1))
    }
    assert seen == {board: ["device/dev-1/up/ack", "device/dev-1/state"], gate: ["device/dev-1/state"]}


def test_the_certificate_names_the_client(secure: Secure, own: Own) -> None:
    """A device that calls itself dev-1 does not push dev-1 out: its certificate says dev-2."""
    first = own(secure.settings("dev-1"), "dev-1", DEVICE)
    first.wait(Connected)
    own(secure.settings("dev-2"), "dev-1", DEVICE).wait(Connected)
    first.rest(0.5)
    assert len(first.events) == 1


def test_case_33_a_revoked_certificate_is_refused_after_a_reload(secure: Secure, own: Own) -> None:
    """Case 33: the connection that stands ends when it is kicked or by itself; then there is no way back."""
    device = own(secure.settings("dev-1", reconnect_max_s=0.2), "dev-1", DEVICE)
    other = own(secure.settings("dev-2"), "dev-2")
    for owner in (device, other):
        owner.wait(Connected)
    secure.authority.revoke("dev-1", now(), reason="key_compromise")
    secure.reload()
    assert publish(device, topics.STATE, device="dev-1") == ""  # mosquitto looks when a connection begins
    where = ["--host", "127.0.0.1", "--port", str(secure.broker.port), "--folder", str(secure.authority.folder)]
    assert main(["broker", "kick", "dev-1", *where]) == 0
    device.wait(Disconnected)
    assert "revoked" in device.wait(TransportFailed)[0].reason.lower()
    device.rest(1.0)
    assert len(device.of(Connected)) == 1
    assert publish(other, topics.STATE, device="dev-2") == ""
    assert other.of(Disconnected) == []


def test_case_33_a_suspended_device_is_out_until_it_is_resumed(secure: Secure, own: Own) -> None:
    """With the certificate and the key that it has; what was queued for it meanwhile is gone."""
    device = own(secure.settings("dev-1", reconnect_max_s=0.2), "dev-1", DEVICE)
    device.wait(Connected)
    folder = ["--folder", str(secure.authority.folder)]
    assert main(["pki", "suspend", "dev-1", *folder]) == 0
    secure.reload()
    where = ["--host", "127.0.0.1", "--port", str(secure.broker.port)]
    assert main(["broker", "kick", "dev-1", *where, *folder]) == 0
    device.wait(Disconnected)
    assert "revoked" in device.wait(TransportFailed)[0].reason.lower()
    device.rest(1.0)
    assert len(device.of(Connected)) == 1
    assert main(["pki", "resume", "dev-1", *folder]) == 0
    secure.reload()
    device.wait(Connected, 2)
    assert publish(device, topics.STATE, device="dev-1") == ""


def test_case_33_what_a_kick_used_is_worth_nothing_after_the_next_list(secure: Secure, own: Own) -> None:
    """Case 33."""
    device = own(secure.settings("dev-1"), "dev-1", DEVICE)
    device.wait(Connected)
    certificate, key = secure.authority.brief("dev-1", now())
    stolen = secure.place / "stolen.crt"
    stolen.write_bytes(certificate)
    stolen.with_suffix(".key").write_bytes(key)
    secure.authority.refresh(now())
    secure.reload()
    assert "revoked" in own(secure.of(stolen), "dev-1").wait(TransportFailed)[0].reason.lower()
    assert secure.authority.register.entries[-2].revoked_at is None  # the device's own is none the worse
    again = own(secure.settings("dev-1"), "dev-1")
    again.wait(Connected)


def test_case_33_a_second_revocation_within_the_same_second_counts(secure: Secure, own: Own) -> None:
    """Case 33."""
    for name in ("dev-1", "dev-2"):
        secure.settings(name)
    moment = now()
    for name in ("dev-1", "dev-2"):
        secure.authority.revoke(name, moment)
        secure.reload()
    for name in ("dev-1", "dev-2"):
        assert "revoked" in own(secure.settings(name), name).wait(TransportFailed)[0].reason.lower()


def test_a_kick_needs_a_broker_and_a_name(secure: Secure) -> None:
    with pytest.raises(UserError, match="dev-9: no client of this name"):
        kick(secure.authority, "dev-9", "127.0.0.1", secure.broker.port, now=now())
    with pytest.raises(UserError, match="server: no client of this name"):
        kick(secure.authority, "server", "127.0.0.1", secure.broker.port, now=now())
    secure.settings("dev-1")
    with pytest.raises(UserError, match="can't connect: .*refused"):
        kick(secure.authority, "dev-1", "127.0.0.1", free_port(), now=now(), timeout_s=1.0)
    assert not list(secure.authority.folder.glob(".kick*"))


def test_case_34_a_client_without_a_good_certificate_is_refused(secure: Secure, own: Own) -> None:
    """Case 34: of another authority, none, expired, not yet valid, a broker's."""
    stranger = Machines(secure.place / "stranger", FLEET).authority
    good = str(secure.authority.cafile)
    offered = {
        "stranger": secure.of(stranger.issue("dev-1", "device", now()).certificate, cafile=good),
        "none": secure.settings("dev-1", certfile="", keyfile=""),
        "expired": secure.of(issued_at(secure.authority, "dev-old", 91).certificate),
        "early": secure.of(issued_at(secure.authority, "dev-new", -2).certificate),
        "server": secure.of(secure.authority.issue("other", "server", now(), hosts=LOCAL).certificate),
    }
    for what, chosen in offered.items():
        owner = own(chosen, "dev-1", DEVICE)
        reason = owner.wait(TransportFailed)[0].reason
        assert "alert" in reason.lower(), (what, reason)
        assert owner.of(Connected) == []


def test_case_34_nothing_below_tls_1_3_is_spoken(secure: Secure) -> None:
    """Case 34."""
    settings = secure.settings("dev-1")
    context = ssl.create_default_context(cafile=settings.cafile)
    context.load_cert_chain(settings.certfile, settings.keyfile)
    assert handshake(secure.broker.port, context)
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    with pytest.raises(ssl.SSLError, match="(?i)protocol"):
        handshake(secure.broker.port, context)


def impostor(place: Path, authority_of: Machines, certificate: Path, **overrides: str | None) -> Broker:
    """A broker with a certificate that is not this fleet's broker's."""
    folder = place / "impostor"
    shutil.copytree(authority_of.folder / "server", folder)
    shutil.copyfile(certificate, folder / "server.crt")
    shutil.copyfile(certificate.with_suffix(".key"), folder / "server.key")
    return Broker(place / "impostor-broker", tls=folder, acl=ACL, overrides=overrides)


@pytest.mark.parametrize(
    ("what", "told"),
    [
        ("other host", "IP address mismatch"),
        ("a device's", "unsuitable certificate purpose"),
        ("expired", "certificate has expired"),
        ("another authority", "self-signed certificate in certificate chain"),
    ],
)
def test_case_34_our_client_refuses_a_broker_not_its_own(secure: Secure, own: Own, what: str, told: str) -> None:
    """Case 34, the other way round."""
    machines = secure.machines
    if what == "another authority":
        machines = Machines(secure.place / "stranger", FLEET)
        machines.broker()
        certificate = machines.authority.issue("fake", "server", now(), hosts=LOCAL).certificate
    elif what == "other host":
        elsewhere = ("broker.example", "10.0.0.1")
        certificate = machines.authority.issue("fake", "server", now(), hosts=elsewhere).certificate
    elif what == "a device's":
        certificate = machines.authority.issue("fake", "device", now()).certificate
    else:
        certificate = issued_at(machines.authority, "fake", 91, "server", LOCAL).certificate
    with impostor(secure.place, machines, certificate) as fake:
        owner = own(secure.settings("dev-1", port=fake.port), "dev-1", DEVICE)
        assert told in owner.wait(TransportFailed)[0].reason
        assert owner.of(Connected) == []
        assert "New client connected" not in fake.log


def test_case_34_our_client_speaks_nothing_below_tls_1_3(secure: Secure, own: Own) -> None:
    """Case 34: to a broker that knows TLS 1.2 alone: `openssl s_server`, since mosquitto would offer 1.3 beside it."""
    folder, port = secure.machines.folder / "server", free_port()
    server = subprocess.Popen(
        ["openssl", "s_server", "-accept", f"127.0.0.1:{port}", "-tls1_2", "-quiet",
         "-cert", str(folder / "server.crt"), "-key", str(folder / "server.key")],
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        owner = own(secure.settings("dev-1", port=port), "dev-1", DEVICE)
        while "protocol version" not in str(owner.wait(Disconnected, len(owner.of(Disconnected)) + 1)[-1]).lower():
            assert "refused" in owner.of(Disconnected)[-1].reason.lower()  # it does not listen yet
        assert owner.of(Connected) == []
    finally:
        server.kill()
        server.wait()


def test_case_34_a_revoked_broker_is_refused_by_clients_that_have_the_list(secure: Secure, own: Own) -> None:
    """Cases 33 and 34."""
    secure.authority.revoke("server", now(), reason="key_compromise")
    crl = str(secure.authority.crlfile)
    owner = own(secure.settings("dev-1", crlfile=crl), "dev-1", DEVICE)
    assert "certificate revoked" in owner.wait(TransportFailed)[0].reason
    secure.machines.authority.issue("server-2", "server", now(), hosts=LOCAL)
    for suffix in ("crt", "key"):
        new = secure.authority.folder / "issued" / f"server-2.{suffix}"
        shutil.copyfile(new, secure.machines.folder / "server" / f"server.{suffix}")
    secure.broker.reload()
    own(secure.settings("dev-1", crlfile=crl), "dev-1", DEVICE).wait(Connected)


def test_a_renewed_certificate_keeps_the_session(secure: Secure, own: Own) -> None:
    """What was sent to the device while it was away waits for it, though key and certificate are others."""
    machine = secure.machines.enrol("dev-1")
    files = {"certfile": str(machine.certfile), "keyfile": str(machine.keyfile)}
    settings = secure.settings("dev-1", reconnect_max_s=0.2, **files)
    coordinator = own(secure.settings("coord-1", "coordinator"), "coord-1")
    device = own(settings, "dev-1", DEVICE)
    for owner in (coordinator, device):
        owner.wait(Connected)
    before = serial_of(x509.load_pem_x509_certificate(machine.certfile.read_bytes()))
    request = machine.request(now(), renew=True)
    assert device.of(Disconnected) == []
    (renewed,) = secure.authority.rotate(now(), requests={"dev-1": Path(request.request).read_bytes()}).renewed
    machine.install(renewed.certificate.read_bytes(), None, now())
    secure.authority.revoke("dev-1", now(), reason="superseded", only_old=True)
    secure.reload()
    secure.broker.stop()
    device.wait(Disconnected)
    secure.broker.start()
    assert [event.session_present for event in device.wait(Connected, 2)] == [False, True]
    coordinator.wait(Connected, 2)
    assert publish(coordinator, topics.COMMAND, device="dev-1") == ""
    assert device.wait(Received)[0].payload == b"x"
    after = serial_of(x509.load_pem_x509_certificate(machine.certfile.read_bytes()))
    assert after != before


def test_a_broker_takes_its_renewed_certificate_at_a_reload(secure: Secure, own: Own) -> None:
    device = own(secure.settings("dev-1"), "dev-1", DEVICE)
    device.wait(Connected)
    server = Enrolment(secure.machines.folder / "server", "server")
    request = server.request(now(), renew=True)
    (renewed,) = secure.authority.rotate(now(), requests={"server": Path(request.request).read_bytes()}).renewed
    server.install(renewed.certificate.read_bytes(), None, now())
    secure.broker.reload()
    settings = secure.settings("dev-2")
    context = ssl.create_default_context(cafile=settings.cafile)
    context.load_cert_chain(settings.certfile, settings.keyfile)
    shown = x509.load_der_x509_certificate(handshake(secure.broker.port, context))
    assert serial_of(shown) == renewed.entry.serial
    device.rest(0.5)
    assert device.of(Disconnected) == []


def test_the_printed_configuration_loads(tmp_path: Path, own: Own) -> None:
    machines = Machines(tmp_path / "pki", FLEET)
    acl = tmp_path / "muster.acl"
    acl.write_text(ACL, "utf-8")
    acl.chmod(0o600)
    port = free_port()
    places = mosquitto.Places(port, str(machines.broker()), "server", str(acl), str(tmp_path))
    text = mosquitto.configuration(places).replace(f"listener {port}", f"listener {port} 127.0.0.1\nuser root")
    (tmp_path / "mosquitto.conf").write_text(text, "utf-8")
    command = [find_mosquitto(), "-c", str(tmp_path / "mosquitto.conf")]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        machine = machines.enrol("dev-1")
        chosen = BrokerSettings(
            port=port, cafile=str(machine.cafile), certfile=str(machine.certfile), keyfile=str(machine.keyfile),
            reconnect_min_s=0.05,
        )  # fmt: skip
        device = own(chosen, "dev-1", DEVICE)
        assert device.wait(Connected)[0].max_packet == 1048576
    finally:
        process.terminate()
        process.wait(5)


def test_while_one_authority_follows_another_both_are_believed(secure: Secure, own: Own) -> None:
    """Certificates and revocation lists of both lie in one file each."""
    following = Machines(secure.place / "following", FLEET)
    folder = secure.machines.folder / "server"
    files = [following.authority.issue(name, "device", now()).certificate for name in ("dev-2", "dev-3")]
    following.authority.revoke("dev-3", now())
    both = secure.authority.cafile.read_bytes() + following.authority.cafile.read_bytes()
    (folder / "ca.crt").write_bytes(both)
    (secure.place / "both.crt").write_bytes(both)
    lists = [one.crlfile.read_bytes() for one in (secure.authority, following.authority)]
    (folder / "crl.pem").write_bytes(b"".join(lists))
    secure.broker.reload()
    for name, certificate in (("dev-1", None), ("dev-2", files[0])):
        found = secure.of(certificate) if certificate else secure.settings(name)
        own(found, name).wait(Connected)
    own(secure.of(files[0], cafile=str(secure.place / "both.crt")), "dev-2").wait(Connected)
    assert "revoked" in own(secure.of(files[1]), "dev-3").wait(TransportFailed)[0].reason.lower()


def test_a_broker_does_not_start_with_a_damaged_list(secure: Secure) -> None:
    secure.broker.stop()
    (secure.machines.folder / "server" / "crl.pem").write_text("junk")
    with suppress(UserError):  # it may listen for a moment before it reads the list
        secure.broker.start()
    until = time.monotonic() + 20.0
    while secure.broker.pid:
        assert time.monotonic() < until
        time.sleep(0.05)
    assert "Unable to load certificate revocation file" in secure.broker.log
