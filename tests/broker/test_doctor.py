"""`muster-edge doctor` against a real mosquitto, with mutual TLS and the generated access list."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from muster.testbed.broker import free_port
from muster.testbed.machines import now
from shared import topics
from shared.codec import pack
from shared.messages import CoordState
from shared.transport.base import Connected, Outgoing, Published
from tests.broker.owner import Owner
from tests.broker.security import FLEET, Secure, issued_at

DEVICE = "edge-01"
SETTINGS = """
fleet = "{fleet}"
device = "{device}"
state_dir = "{folder}/state"
[broker]
host = "{host}"
port = {port}
cafile = "{pki}/ca.crt"
certfile = "{pki}/issued/{key}.crt"
keyfile = "{pki}/issued/{key}.key"
[data]
points = "{folder}/points.jsonl"
[agent]
command = ["{python}", "-m", "muster.testbed.numpy_agent"]
"""


class Place:
    """A broker, keys, and a settings file that may be wrong in something."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.secure = Secure(folder)
        self.pki = self.secure.authority
        self.pki.issue(DEVICE, "device", now())
        self.broker = self.secure.broker
        (folder / "points.jsonl").write_text('{"x": [1], "y": [1]}\n', encoding="utf-8")
        (folder / "state").mkdir()

    def write(self, **changes: object) -> Path:
        """The settings file."""
        values = {
            "fleet": FLEET, "device": DEVICE, "folder": self.folder, "host": "127.0.0.1", "port": self.broker.port,
            "pki": self.pki.folder, "key": DEVICE, "python": sys.executable, **changes,
        }  # fmt: skip
        path = self.folder / "edge.toml"
        path.write_text(SETTINGS.format(**values), encoding="utf-8")
        return path

    def doctor(self, *options: str, **changes: object) -> tuple[int, dict[str, dict[str, str]]]:
        """Exit code, and the findings by check (of several the first)."""
        command = [sys.executable, "-m", "edge_daemon.service", "doctor", "--json", "--wait", "5"]
        done = subprocess.run(
            [*command, "--config", str(self.write(**changes)), *options], capture_output=True, text=True, timeout=110,
            check=False,
        )  # fmt: skip
        assert done.returncode in (0, 1), done.stderr
        report = json.loads(done.stdout)
        assert report["fit"] is (done.returncode == 0)
        found: dict[str, dict[str, str]] = {}
        for finding in report["findings"]:
            found.setdefault(finding["check"], finding)
        return done.returncode, found


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    made = Place(tmp_path)
    with made.broker:
        yield made


def coordinator(place: Place, own: Callable[..., Owner], ahead_s: float = 0.0) -> Owner:
    """A coordinator that told its presence, by a clock that is `ahead_s`."""
    settings = place.secure.settings("coord-1", "coordinator")
    owner = own(settings, "coord-1", topics.coordinator_filters(FLEET))
    owner.wait(Connected)
    name = topics.COORD_STATE.name(FLEET, coordinator="coord-1")
    state = CoordState(online=True, term=1, ts=time.time() + ahead_s)
    owner.transport.publish(Outgoing(topics.COORD_STATE, name, pack(state), token="presence"))
    owner.wait(Published)
    return owner


def test_a_device_that_is_fit(place: Place, own: Callable[..., Owner]) -> None:
    coordinator(place, own)
    code, found = place.doctor()
    assert code == 0, found
    assert found["keys"]["text"].startswith("edge-01, key and certificate match, good for ")
    assert found["keys"]["verdict"] == "ok"
    assert found["broker TLS"]["text"] == "TLSv1.3, its certificate names 127.0.0.1"
    assert found["broker login"]["text"] == "as edge-01, packets up to 1048576 bytes"
    assert found["broker access"]["text"] == "may write its state, hears of coord-1 (online)"
    assert found["clock"]["text"].endswith("agrees with the coordinator's")
    assert found["data and models"]["verdict"] == "ok"
    assert {path.name for path in (place.folder / "state").iterdir()} == set(), "it changes nothing"


@pytest.mark.parametrize(
    ("changes", "check", "said"),
    [
        ({"device": "edge-02"}, "keys", "the certificate is edge-01's"),
        ({"host": "muster.invalid"}, "broker address", "muster.invalid: "),
        ({"port": free_port()}, "broker address", "Connection refused"),
        ({"host": "localhost.localdomain"}, "broker address", ""),
        ({"pki": "/nowhere"}, "keys", "/nowhere/ca.crt: No such file"),
        ({"fleet": "other"}, "broker access", "Not authorized"),
    ],
    ids=["another's certificate", "no such host", "no broker", "another name", "no keys", "another fleet"],
)
def test_what_is_wrong_is_named_with_advice(place: Place, changes: dict[str, object], check: str, said: str) -> None:
    code, found = place.doctor(**changes)
    finding = found[check]
    if changes.get("host") == "localhost.localdomain" and finding["verdict"] == "ok":
        finding = found["broker TLS"]  # it resolves here, and is not a name of the broker's certificate
    assert code == 1
    assert finding["verdict"] == "fail"
    assert said in finding["text"]
    assert finding["advice"]


def test_a_revoked_certificate_is_refused_by_the_broker(place: Place) -> None:
    place.pki.revoke(DEVICE, now())
    place.secure.reload()
    code, found = place.doctor()
    assert code == 1
    assert found["keys"]["verdict"] == "ok", "nothing here tells"
    assert found["broker TLS"]["verdict"] == "fail"
    assert "revoked" in found["broker TLS"]["advice"]


def test_an_expired_certificate(place: Place) -> None:
    issued_at(place.pki, "edge-03", 92)
    code, found = place.doctor(device="edge-03", key="edge-03")
    assert code == 1
    assert "expired 2.0 days ago" in found["keys"]["text"]
    assert found["clock"]["verdict"] == "fail", "either of the two is wrong"


def test_a_clock_that_is_off_against_the_coordinators(place: Place, own: Callable[..., Owner]) -> None:
    coordinator(place, own, ahead_s=4000.0)
    code, found = place.doctor()
    assert code == 1
    assert re.match(r"-39\d\d s from the coordinator's", found["clock"]["text"])


def test_without_a_coordinator_it_is_told(place: Place) -> None:
    code, found = place.doctor()
    assert code == 0
    assert found["broker access"]["verdict"] == "warn"
    assert "hears of no coordinator" in found["broker access"]["text"]


def test_a_running_daemon_keeps_its_session(place: Place) -> None:
    """The doctor logs in with the daemon's certificate: two sessions of one name would push each other out."""
    config = place.write()
    with subprocess.Popen(
        [sys.executable, "-m", "edge_daemon.service", "--config", str(config)], stderr=subprocess.PIPE, text=True
    ) as daemon:
        assert daemon.stderr is not None
        end = time.monotonic() + 60
        while f"as {DEVICE} (" not in place.broker.log:
            assert time.monotonic() < end
            time.sleep(0.1)
        code, found = place.doctor()
        daemon.terminate()
        daemon.communicate(timeout=60)
    assert code == 0, found
    assert found["broker TLS"]["verdict"] == "ok"
    assert "the daemon runs" in found["broker login"]["text"]
    assert place.broker.log.count(f"as {DEVICE} (") == 1


def test_text_for_people_names_each_check_and_what_to_do(place: Place) -> None:
    command = [sys.executable, "-m", "edge_daemon.service", "doctor", "--config", str(place.write(device="edge-02"))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=110, check=False)
    assert done.returncode == 1
    lines = done.stdout.splitlines()
    assert any(line.startswith("FAIL  keys: the certificate is edge-01's") for line in lines)
    assert any(line.startswith("        -> correct ") for line in lines)
    assert any(line.startswith("warn  kernel cpu: 16, 32 bits proven, not 4") for line in lines)
    assert lines[-1].startswith("this device is not fit: ")


def test_settings_that_do_not_hold_leave_the_rest_to_be_examined(place: Place) -> None:
    path = place.folder / "bad.toml"
    path.write_text('fleet = "lab"\n[broker]\ncafile = "${CREDENTIALS_DIRECTORY}/ca"\n[agnt]\n', encoding="utf-8")
    command = [sys.executable, "-m", "edge_daemon.service", "doctor", "--json", "--config", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=110, check=False)
    findings = json.loads(done.stdout)["findings"]
    faults = [finding for finding in findings if finding["check"] == "configuration"]
    assert len(faults) == 3, "each fault on its own"
    assert any("doctor --sandbox" in finding["advice"] for finding in faults)
    assert any(finding["check"] == "gpu" for finding in findings)
