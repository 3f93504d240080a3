"""The configuration of a fleet's mosquitto, 2.0.11 or newer. `deploy/mosquitto/mosquitto.conf` has its defaults."""

from __future__ import annotations

from dataclasses import dataclass

_TEXT = """\
# mosquitto for one fleet, 2.0.11 or newer. See deploy/mosquitto/README.md. Made by muster broker config.

listener {port}
cafile   {pki}/ca.crt
certfile {pki}/{name}.crt
keyfile  {pki}/{name}.key
crlfile  {pki}/crl.pem
tls_version tlsv1.3
require_certificate true

# The certificate's CN is user name and client id: nobody can push another device's connection out.
use_identity_as_username true
use_username_as_clientid true
allow_anonymous false
allow_zero_length_clientid false
acl_file {acl}

# Explicit, because the defaults differ: none in 2.0, 2,000,000 in 2.1. message_size_limit stays unset: with it a
# message that is too large is never acknowledged at all.
max_packet_size 1048576
max_inflight_messages 32
max_queued_messages 2000
max_queued_bytes 67108864
max_keepalive 120
persistent_client_expiration 14d

persistence true
persistence_location {persistence}/
autosave_interval 30
queue_qos0_messages false
set_tcp_nodelay true
sys_interval 10

# Not stdout: to a journal or a file that comes in pieces of 4 KiB.
log_dest stderr
log_type error
log_type warning
log_type notice
connection_messages true
"""

OF_TLS = (
    "cafile", "certfile", "keyfile", "crlfile", "tls_version", "require_certificate", "use_identity_as_username",
    "use_username_as_clientid", "allow_anonymous", "allow_zero_length_clientid",
)  # fmt: skip
"""The options that make identity a matter of certificates."""


@dataclass(frozen=True)
class Places:
    """Where a broker finds its files. `name`: of its certificate and key in `pki`."""

    port: int = 8883
    pki: str = "/etc/mosquitto/pki"
    name: str = "server"
    acl: str = "/etc/mosquitto/muster.acl"
    persistence: str = "/var/lib/mosquitto"


def configuration(places: Places) -> str:
    """The text of `mosquitto.conf`."""
    return _TEXT.format(
        port=places.port, pki=places.pki, name=places.name, acl=places.acl,
        persistence=places.persistence.rstrip("/"),
    )  # fmt: skip


def options(places: Places) -> dict[str, str]:
    """The same as option -> value; an option that is given several times has its values in lines of the file."""
    found: dict[str, str] = {}
    for line in configuration(places).splitlines():
        name, _, value = line.partition(" ")
        if name and name != "#":
            value = value.strip()
            found[name] = f"{found[name]}\n{name} {value}" if name in found else value
    return found
