"""One booted host for all tests of this folder that need one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from muster import mosquitto
from muster.testbed.machines import Machines
from shared import topics
from tests.systemd.booted import Host, NotBooted

DEVICE, FLEET = "edge-01", "lab"
EDGE = """
fleet = "lab"
device = "edge-01"
[broker]
host = "127.0.0.1"
port = 8883
cafile = "${CREDENTIALS_DIRECTORY}/mqtt.ca"
certfile = "${CREDENTIALS_DIRECTORY}/mqtt.crt"
keyfile = "${CREDENTIALS_DIRECTORY}/mqtt.key"
reconnect_max_s = 2.0
[data]
texts = "/srv/texts.jsonl"
[health]
ready_s = 60.0
"""
SITE = f"""
[Service]
LoadCredential=mqtt.crt:/etc/muster/pki/{DEVICE}.crt
LoadCredential=mqtt.key:/etc/muster/pki/{DEVICE}.key
Environment=PYTHONPATH=/opt/source:/opt/packages LD_LIBRARY_PATH=/opt/python/lib
WatchdogSec=20s
RestartSec=1s
"""


@pytest.fixture(scope="session")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    """A host with broker and edge daemon installed and configured; neither is started."""
    made = Host(tmp_path_factory.mktemp("host"))
    try:
        made.boot()
    except NotBooted as error:
        pytest.skip(f"booted host ({error})")
    try:
        _configure(made, tmp_path_factory.mktemp("pki"))
        yield made
    finally:
        made.close()


def _configure(host: Host, folder: Path) -> None:
    machines = Machines(folder, FLEET)
    broker, device = machines.broker(), machines.enrol(DEVICE)
    content = {
        "ca.crt": device.cafile, "crl.pem": broker / "crl.pem", "server.crt": broker / "server.crt",
        "server.key": broker / "server.key", f"{DEVICE}.crt": device.certfile, f"{DEVICE}.key": device.keyfile,
    }  # fmt: skip
    host.run("systemd-tmpfiles", "--create", "muster.conf")
    for name, path in content.items():
        mode = 0o400 if name.endswith(".key") else 0o644
        host.write(f"/etc/muster/pki/{name}", path.read_text(encoding="ascii"), mode)
    host.run("chown", "mosquitto", "/etc/muster/pki/server.key")
    host.write("/etc/mosquitto/mosquitto.conf", mosquitto.configuration(mosquitto.Places(pki="/etc/muster/pki")))
    host.write("/etc/mosquitto/muster.acl", topics.acl(FLEET, ["coord-1"]), 0o600)
    host.run("chown", "mosquitto", "/etc/mosquitto/muster.acl")
    host.write("/etc/muster/edge.toml", EDGE)
    host.write("/srv/texts.jsonl", '{"text": "a", "label": 0}\n')
    host.write("/etc/systemd/system/muster-edge.service.d/site.conf", SITE)
    host.run("systemctl", "daemon-reload")
