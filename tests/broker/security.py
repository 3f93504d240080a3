"""What the tests of certificates share: a fleet's authority, its broker, and owners in the name of its machines."""

from __future__ import annotations

import datetime
import socket
import ssl
from pathlib import Path

from muster.pki.authority import Authority, Issued
from muster.pki.register import Role
from muster.testbed.broker import Broker
from muster.testbed.machines import Machines, now
from shared import topics
from shared.settings import BrokerSettings

FLEET = "f1"
DEVICE = topics.device_filters(FLEET, "dev-1")
ACL = topics.acl(FLEET, ["coord-1"], readers=["board"], gates=["gate-1"])


class Secure:
    """A broker as a fleet has it, and the authority beside it."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.machines = Machines(place / "pki", FLEET)
        self.authority = self.machines.authority
        self.broker = Broker(
            place / "secure", tls=self.machines.broker(), acl=ACL, overrides={"log_type": "all"}
        )  # fmt: skip

    def settings(self, name: str, role: Role = "device", **changes: object) -> BrokerSettings:
        """How `name` reaches the broker; it is enrolled if it was not yet."""
        if not self.authority.certificate(name).exists():
            self.authority.issue(name, role, now())
        return self.of(self.authority.certificate(name), **changes)

    def of(self, certificate: Path, **changes: object) -> BrokerSettings:
        """How one with this certificate, and its key beside it, reaches the broker."""
        files = {"certfile": str(certificate), "keyfile": str(certificate.with_suffix(".key"))}
        values = {"cafile": str(self.authority.cafile), "reconnect_min_s": 0.05, "reconnect_max_s": 60.0}
        return self.broker.settings(**{**values, **files, **changes})

    def reload(self) -> None:
        """Bring the present revocation list to the broker and let it read that."""
        self.machines.publish_revocations()
        self.broker.reload()


def issued_at(
    authority: Authority, name: str, age_days: int, role: Role = "device", hosts: tuple[str, ...] = ()
) -> Issued:
    """A certificate that was issued so long ago."""
    return authority.issue(name, role, now() - datetime.timedelta(days=age_days), hosts=hosts)


def handshake(port: int, context: ssl.SSLContext, host: str = "127.0.0.1") -> bytes:
    """The certificate of the server; raises what the handshake, or the first word after it, raises."""
    with (
        socket.create_connection(("127.0.0.1", port), timeout=10) as sock,
        context.wrap_socket(sock, server_hostname=host) as secured,
    ):
        found = secured.getpeercert(binary_form=True)
        assert found is not None
        return found
