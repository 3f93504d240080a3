"""Mutual TLS and the generated ACL on a real mosquitto, with the shipped configuration."""

from __future__ import annotations

import shutil
import socket
import ssl
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from muster.testbed.broker import Broker, find_mosquitto, free_port
from muster.testbed.certs import Authority
from shared import topics
from shared.settings import BrokerSettings
from shared.transport.base import Connected, Outgoing, Published, Received, TransportFailed
from tests.broker.owner import Owner

Own = Callable[..., Owner]
FLEET = "f1"
DEVICE = topics.device_filters(FLEET, "dev-1")


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path / "pki")


@pytest.fixture
def secure(tmp_path: Path, authority: Authority) -> Iterator[Broker]:
    acl = topics.acl(FLEET, "coord-1")
    overrides = {"crlfile": str(authority.folder / "crl.pem")}
    with Broker(tmp_path / "secure", tls=authority.folder, acl=acl, overrides=overrides) as running:
        yield running


def settings(broker: Broker, authority: Authority, name: str, **changes: object) -> BrokerSettings:
    certificate, key = authority.client(name)
    files = {"cafile": str(authority.cafile), "certfile": str(certificate), "keyfile": str(key)}
    return broker.settings(**{**files, "reconnect_min_s": 0.05, "reconnect_max_s": 60.0, **changes})


def publish(owner: Owner, topic: topics.Topic, **parts: object) -> Published:
    before = len(owner.of(Published))
    owner.transport.publish(Outgoing(topic, topic.name(FLEET, **parts), b"x", topic.pattern))
    return owner.wait(Published, before + 1)[-1]


def test_the_acl_lets_each_side_do_its_part_and_surfaces_what_it_denies(
    secure: Broker, authority: Authority, own: Own
) -> None:
    """Cases 9 and 30: denied once, named, not tried again."""
    coordinator = own(settings(secure, authority, "coord-1"), "coord-1", topics.coordinator_filters(FLEET))
    coordinator.wait(Connected)
    device = own(settings(secure, authority, "dev-1"), "dev-1", DEVICE)
    device.wait(Connected)
    assert publish(device, topics.STATE, device="dev-1").reason == ""
    assert publish(device, topics.UP_CHUNK, device="dev-1", sha="a" * 64, index=3).reason == ""
    assert publish(device, topics.ACK, device="dev-2").reason == "Not authorized"
    assert publish(device, topics.ASSIGN, device="dev-1").reason == "Not authorized"
    assert publish(coordinator, topics.ASSIGN, device="dev-1").reason == ""
    assert publish(coordinator, topics.ASSIGN, device="dev-2").reason == ""
    assert publish(coordinator, topics.ROUND).reason == ""
    assert publish(coordinator, topics.ACK, device="dev-1").reason == "Not authorized"
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


def test_the_certificate_names_the_client(secure: Broker, authority: Authority, own: Own) -> None:
    """A device that calls itself dev-1 does not push dev-1 out: its certificate says dev-2."""
    first = own(settings(secure, authority, "dev-1"), "dev-1", DEVICE)
    first.wait(Connected)
    own(settings(secure, authority, "dev-2"), "dev-1", DEVICE).wait(Connected)
    first.rest(0.5)
    assert len(first.events) == 1


def test_a_broker_of_an_unknown_authority_is_refused(secure: Broker, authority: Authority, own: Own) -> None:
    stranger = Authority(authority.folder.parent / "stranger")
    device = own(settings(secure, authority, "dev-1", cafile=str(stranger.cafile)), "dev-1", DEVICE)
    assert "certificate" in device.wait(TransportFailed)[0].reason


def test_a_client_without_a_good_certificate_is_refused(secure: Broker, authority: Authority, own: Own) -> None:
    """Cases 33 and 34: of another authority, none, expired, revoked."""
    stranger = Authority(authority.folder.parent / "stranger")
    good = str(authority.cafile)
    expired_files = authority.client("dev-old", days=-1)
    offered = {
        "stranger": settings(secure, stranger, "dev-1", cafile=good),
        "none": settings(secure, authority, "dev-1", certfile="", keyfile=""),
        "expired": settings(secure, authority, "dev-1", certfile=str(expired_files[0]), keyfile=str(expired_files[1])),
        "revoked": settings(secure, authority, "dev-bad"),
    }
    authority.revoke("dev-bad")
    secure.restart()
    for what, chosen in offered.items():
        owner = own(chosen, "dev-1", DEVICE)
        reason = owner.wait(TransportFailed)[0].reason
        assert "alert" in reason.lower(), (what, reason)
        assert owner.of(Connected) == []


def test_nothing_below_tls_1_3_is_spoken(secure: Broker, authority: Authority) -> None:
    context = ssl.create_default_context(cafile=str(authority.cafile))
    context.load_cert_chain(*authority.client("dev-1"))
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    with (
        socket.create_connection(("127.0.0.1", secure.port)) as sock,
        pytest.raises(ssl.SSLError, match="(?i)protocol"),
        context.wrap_socket(sock, server_hostname="127.0.0.1"),
    ):
        pass


def test_the_shipped_configuration_loads(tmp_path: Path, authority: Authority, own: Own) -> None:
    text = (Path(__file__).parents[2] / "deploy" / "mosquitto" / "mosquitto.conf").read_text("utf-8")
    acl = tmp_path / "muster.acl"
    acl.write_text(topics.acl(FLEET, "coord-1", "board"), "utf-8")
    port = free_port()
    for old, new in (
        ("listener 8883", f"listener {port} 127.0.0.1\nuser root"),
        ("/etc/mosquitto/pki", str(authority.folder)),
        ("/etc/mosquitto/muster.acl", str(acl)),
        ("/var/lib/mosquitto/", f"{tmp_path}/"),
    ):
        assert old in text
        text = text.replace(old, new)
    configuration = tmp_path / "mosquitto.conf"
    configuration.write_text(text, "utf-8")
    process = subprocess.Popen([find_mosquitto(), "-c", str(configuration)], stdout=subprocess.DEVNULL)
    try:
        certificate, key = authority.client("dev-1")
        chosen = BrokerSettings(
            port=port,
            cafile=str(authority.cafile),
            certfile=str(certificate),
            keyfile=str(key),
            reconnect_min_s=0.05,
        )
        device = own(chosen, "dev-1", DEVICE)
        assert device.wait(Connected)[0].max_packet == 1048576
    finally:
        process.terminate()
        process.wait(5)


def test_keys_are_private(authority: Authority) -> None:
    _, key = authority.client("dev-1")
    assert key.stat().st_mode & 0o077 == 0
    shutil.rmtree(authority.folder)
