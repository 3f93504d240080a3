"""Later days of the fleet on real hosts: reboots, releases good and bad, certificates, torch, a backup, a farewell.

The tests are steps of one story and run in this order, after those of the first day or from bare machines.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from shared import certificates
from tests.hosts import lan, wheels
from tests.hosts.controller import BROKER_PORT, FLEET, PASSPHRASE, Ran
from tests.hosts.site import DATA, DEVICES, RUN, SERVER, SMALL, TORCH, Site
from tests.training import tiny_models

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2400)]
COLOURS = """
name = "colours"
[base]
model = "tiny"
[task]
kind = "classification"
dataset = "colours"
labels = ["red", "green", "blue"]
max_tokens = 16
[rounds]
count = 1
local_steps = 4
deadline_s = 300
[strategy]
rank = 2
batch = 4
[evaluation]
data = "/srv/data/colours.jsonl"
worse_by = 10.0
"""


@pytest.fixture(scope="module")
def fleet(machines: Site) -> Site:
    """The fleet at work."""
    machines.install()
    return machines


def test_a_host_that_reboots_in_a_round_comes_back_into_it(fleet: Site) -> None:
    host = fleet.hosts[SMALL]
    job = fleet.submit("reboot", steps=60)
    fleet.at_work(job)
    boots = host.boots
    host.ssh("systemctl reboot", root=True, check=False)
    host.wait(boots + 1)
    fleet.ended_well(job)


def test_the_server_loses_its_power_in_a_round(fleet: Site) -> None:
    """Broker and coordinator at once; the devices hold what they have."""
    host = fleet.hosts[SERVER]
    job = fleet.submit("power", steps=60)
    fleet.at_work(job)
    host.kill()
    host.start()
    host.wait(host.boots)
    fleet.ended_well(job)


def test_case_45_a_tampered_wheel_is_refused_on_its_way(fleet: Site) -> None:
    """The hosts reach no network at all; and what is not as the lock says is not installed."""
    routes = fleet.hosts[SMALL].ssh("ip route").stdout.splitlines()
    assert [route.split()[0] for route in routes] == [f"{lan.NETWORK}.0/24"]
    before = fleet.release_of(SMALL), fleet.pid(SMALL, "muster-edge")
    folder, releases = _whole_release()
    wheel = folder / "muster-0.1.1-py3-none-any.whl"
    whole = wheel.read_bytes()
    at = len(whole) // 2
    wheel.write_bytes(
        whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :]
    )  # this version alone: no other folder has it
    ran = _canary(fleet, folder, releases, SMALL)
    assert ran.code != 0
    wheel.write_bytes(whole)
    assert _refused(ran, "muster-0.1.1"), ran.tail
    assert (fleet.release_of(SMALL), fleet.pid(SMALL, "muster-edge")) == before


def test_case_45_a_tampered_wheel_is_refused_on_the_host(fleet: Site) -> None:
    host = fleet.hosts[SMALL]
    before = fleet.release_of(SMALL), fleet.pid(SMALL, "muster-edge")
    folder, releases = _whole_release()
    place = "/opt/muster/wheels/msgspec-*.whl"
    host.ssh(f"cp {place} /root/ && printf x | dd of=$(ls {place}) bs=1 seek=999 conv=notrunc status=none", root=True)
    ran = _canary(fleet, folder, releases, SMALL)
    assert ran.code != 0
    assert _refused(ran, "msgspec-"), ran.tail
    wheel = next(folder.glob("muster-*.whl"))
    there = host.root / "opt/muster/wheels" / wheel.name
    assert there.read_bytes() == wheel.read_bytes(), "what an earlier build of this version left, of the same size"
    assert (fleet.release_of(SMALL), fleet.pid(SMALL, "muster-edge")) == before
    host.ssh("mv /root/msgspec-*.whl /opt/muster/wheels/", root=True)


def test_case_43_a_bad_release_is_taken_back_and_the_rest_is_untouched(fleet: Site) -> None:
    before = {name: fleet.release_of(name) for name in fleet.hosts}
    process = fleet.pid(SMALL, "muster-edge")
    epochs = {name: word["epoch"] for name, word in fleet.presence().items()}
    good = fleet.wheels, fleet.releases
    fleet.wheels, fleet.releases = wheels.other(RUN / "bad", "0.2.0", wheels.NEVER_READY)
    fleet.describe()
    ran = fleet.controller.play("site", "--limit", "localhost,edge", label="site with a bad release")
    fleet.wheels, fleet.releases = good
    fleet.describe()
    assert ran.code != 0
    assert f"back on {before[TORCH]}, and the fleet hears it" in ran.output, ran.tail
    assert {name: fleet.release_of(name) for name in fleet.hosts} == before
    assert fleet.pid(SMALL, "muster-edge") == process, "the second device was not restarted"
    assert SMALL not in ran.changed, "it was not even visited"
    words = fleet.presence()
    assert words[TORCH]["state"] == "ready"
    assert words[TORCH]["version"] == words[SMALL]["version"]
    assert words[TORCH]["epoch"] > epochs[TORCH]
    assert words[SMALL]["epoch"] == epochs[SMALL]
    fleet.ended_well(fleet.submit("after"))


def test_a_good_release_and_the_way_back(fleet: Site) -> None:
    before = fleet.release_of(SMALL)
    good = fleet.wheels, fleet.releases
    fleet.wheels, fleet.releases = wheels.other(RUN / "next", "0.3.0", {})
    fleet.describe()
    fleet.play("canary", muster_canary=SMALL, label="canary with a good release")
    assert fleet.release_of(SMALL) == fleet.releases["edge-numpy"]
    assert fleet.presence()[SMALL]["version"] == "0.3.0"
    fleet.ended_well(fleet.submit("mixed"))
    fleet.play("rollback", "--limit", SMALL)
    assert fleet.release_of(SMALL) == before
    assert fleet.presence()[SMALL]["version"] != "0.3.0"
    fleet.wheels, fleet.releases = good
    fleet.describe()


def test_new_certificates_in_the_middle_of_a_round(fleet: Site) -> None:
    """Of broker, coordinator and devices, all restarted while they work: no round is lost.

    The job has more rounds than the playbook takes on any machine: it is cancelled once it went on after it.
    """
    before = {name: _serial(fleet, name) for name in (*DEVICES, "coord-1", "server")}
    job = fleet.submit("rotation", rounds=200, steps=60)
    fleet.at_work(job)
    fleet.play("rotate_certs", muster_renew=True, muster_drain_s=0)
    assert all(_serial(fleet, name) != serial for name, serial in before.items())
    rounds = len(_committed(fleet.view(job)))
    view = fleet.until(job, lambda view: len(_committed(view)) >= rounds + 2)
    fleet.muster("cancel", job)  # whatever is found: the jobs of the days after it wait for its end
    for round in _committed(view):
        told = {part["device"]: (part["status"], part["attempt"]) for part in round["participants"]}
        assert told == dict.fromkeys(DEVICES, ("done", 1)), json.dumps(round)[-3000:]
    for host, unit, name in ((TORCH, "edge", TORCH), (SMALL, "edge", SMALL), (SERVER, "coordinator", "coord-1")):
        handed = f"cat /run/credentials/muster-{unit}.service/mqtt.crt"
        assert _serial_of(fleet.hosts[host].ssh(handed, root=True).stdout) == _serial(fleet, name), unit
    assert _serial_of(_shown_by_broker(fleet)) == _serial(fleet, "server")


def test_case_33_a_suspended_device_is_out_of_the_round_until_it_is_resumed(fleet: Site) -> None:
    """Its update is not aggregated; resumed, it works on with the key that it has."""
    job = fleet.submit("suspended", steps=60, quorum=0.5)
    fleet.at_work(job)
    _tell_broker(fleet, "suspend")
    passphrase = {"MUSTER_PKI_PASSPHRASE": PASSPHRASE}
    where = ["--host", fleet.hosts[SERVER].address, "--port", str(BROKER_PORT), "--folder", str(fleet.controller.pki)]
    fleet.controller.muster("broker", "kick", SMALL, *where, env=passphrase)
    view = fleet.until(job, lambda view: bool(view["state"] == "finished"))
    ends = {part["device"]: part["status"] for part in view["rounds"][0]["participants"]}
    assert (ends.pop(TORCH), len(ends), "done" in ends.values()) == ("done", 1, False)
    assert fleet.presence()[SMALL]["state"] != "ready"
    _tell_broker(fleet, "resume")
    _wait_until(lambda: fleet.presence()[SMALL]["state"] == "ready")
    fleet.ended_well(fleet.submit("resumed"))


def test_torch_on_one_device(fleet: Site, tmp_path_factory: pytest.TempPathFactory) -> None:
    """From the shared wheelhouse, with a base model that Ansible brings; a round of real training, in the sandbox."""
    # It stays for the tests after this one: the inventory names it from now on.
    model = tiny_models.make_bert(tmp_path_factory.mktemp("model") / "tiny")
    rows = "".join(json.dumps({"text": f"the {word} sea", "label": n % 3}) + "\n"
                   for n, word in enumerate(("red", "green", "blue") * 8))  # fmt: skip
    for name in (SERVER, TORCH):
        (fleet.hosts[name].root / DATA.lstrip("/") / "colours.jsonl").write_text(rows, encoding="utf-8")
    torch = {"muster_wheelhouse": str(wheels.with_torch()[0])}
    fleet.server = {
        **torch, "muster_coordinator_profile": "coordinator-train", "muster_coordinator_models": {"tiny": str(model)},
        "muster_coordinator_settings": {},
    }  # fmt: skip
    fleet.device_settings[TORCH] = {
        **torch, "muster_edge_profile": "edge-train", "muster_edge_models": {"tiny": str(model)},
        "muster_edge_data": {"colours": f"{DATA}/colours.jsonl"}, "muster_edge_doctor_tolerates": [],
        "muster_edge_settings": {"agent": {"gpus": ["cpu"]}, "policy": {"foreign_limit": 1000.0}},
    }  # fmt: skip
    fleet.describe()
    fleet.play("site", label="site with torch on two hosts")
    _train_colours(fleet)


def test_case_41_the_doctor_passes_in_the_sandbox_of_the_unit(fleet: Site) -> None:
    """With the real agent: settings, keys, broker, disk, data and a real 4-bit kernel."""
    done = fleet.hosts[TORCH].ssh("/opt/muster/current/bin/muster-edge doctor --sandbox --json", root=True, check=False)
    report = json.loads(done.stdout)
    assert (done.returncode, report["fit"]) == (0, True), done.stdout
    verdicts = {finding["check"]: finding["verdict"] for finding in report["findings"]}
    assert verdicts["sandbox"] == verdicts["kernel cpu"] == verdicts["broker TLS"] == "ok", done.stdout


def test_a_coordinator_from_its_backup(fleet: Site, tmp_path: Path) -> None:
    jobs = fleet.muster("list", "--json")
    assert json.loads(jobs)
    fleet.play("backup", muster_coordinator_backup=str(tmp_path))
    (archive,) = tmp_path.glob("*.tar")
    fleet.hosts[SERVER].ssh(
        "systemctl stop muster-coordinator && rm -r /var/lib/muster-coordinator && systemctl start muster-coordinator",
        root=True,
    )
    _wait_until(lambda: fleet.muster("list", "--json") == "[]\n")
    fleet.play("restore", muster_archive=str(archive))
    _wait_until(lambda: fleet.muster("list", "--json") == jobs)
    _train_colours(fleet)  # devices take no order of a coordinator that is older than the last they heard


def test_a_device_leaves_the_fleet(fleet: Site, tmp_path: Path) -> None:
    """What it knew lets nobody in any more."""
    pki = fleet.hosts[SMALL].root / "etc/muster/pki"
    for name in (f"{SMALL}.crt", f"{SMALL}.key", "ca.crt"):
        shutil.copy(pki / name, tmp_path)
    fleet.play("decommission", muster_decommission=SMALL)
    assert set(fleet.presence()) == {"coord-1", TORCH}
    assert [view["device"] for view in json.loads(fleet.muster("devices", "--json"))] == [TORCH]
    left = fleet.hosts[SMALL].ssh("systemctl is-active muster-edge; ls /etc/muster/pki", check=False).stdout.split()
    assert left == ["inactive", "ca.crt"]
    options = ["--fleet", FLEET, "--name", SMALL, "--broker", f"{fleet.hosts[SERVER].address}:{BROKER_PORT}",
               "--cafile", "ca.crt", "--certfile", f"{SMALL}.crt", "--keyfile", f"{SMALL}.key",
               "--expect", '{"coord-1": {}}', "--within", "5"]  # fmt: skip
    command = [sys.executable, "-m", "muster.cli.main", "presence", *options]
    done = subprocess.run(lan.on_controller(command), cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "no connection" in done.stderr or "refuses" in done.stderr
    fleet.describe(devices=(TORCH,))
    ran = fleet.play("site", "--limit", "localhost,edge", label="site after the farewell, devices alone")
    assert set(ran.changed.values()) == {0}, ran.tail


def _refused(ran: Ran, wheel: str) -> bool:
    """Whether this wheel is what the host did not take."""
    return re.search(rf"DO NOT MATCH THE HASHES.{{,500}}file:///opt/muster/wheels/{wheel}", ran.output) is not None


def _whole_release() -> tuple[Path, dict[str, str]]:
    """A release that nothing is wrong with; both tests of tampered wheels begin with it."""
    folder = RUN / "whole"
    if not folder.exists():
        return wheels.other(folder, "0.1.1", {})
    described = json.loads((folder / "wheels/wheelhouse.json").read_text(encoding="utf-8"))
    return folder / "wheels", {name: profile["release"] for name, profile in described["profiles"].items()}


def _committed(view: dict[str, Any]) -> list[dict[str, Any]]:
    return [round for round in view["rounds"] if round["phase"] == "committed"]


def _train_colours(fleet: Site) -> None:
    path = f"{DATA}/colours.toml"
    fleet.hosts[SERVER].ssh(f"cat > {path} <<'END'\n{COLOURS}\nEND", root=True)
    view = fleet.until(fleet.muster("submit", path).strip(), lambda view: bool(view["state"] == "finished"))
    parts = view["rounds"][0]["participants"]
    assert [(part["device"], part["status"]) for part in parts] == [(TORCH, "done")]


def _canary(fleet: Site, folder: Path, releases: dict[str, str], name: str) -> Ran:
    good = fleet.wheels, fleet.releases
    fleet.wheels, fleet.releases = folder, releases
    fleet.describe()
    ran = fleet.controller.play("canary", "-e", f"muster_canary={name}", label="canary with a tampered wheel")
    fleet.wheels, fleet.releases = good
    fleet.describe()
    return ran


def _tell_broker(fleet: Site, word: str) -> None:
    """`muster pki suspend` or `resume`, and what the papers say of the list: by a rename, then a reload."""
    folder = fleet.controller.pki
    fleet.controller.muster("pki", word, SMALL, "--folder", str(folder), env={"MUSTER_PKI_PASSPHRASE": PASSPHRASE})
    host = fleet.hosts[SERVER]
    shutil.copy(folder / "crl.pem", host.root / "etc/mosquitto/pki/crl.new")
    host.ssh(
        "cd /etc/mosquitto/pki && openssl crl -in crl.new -noout && chown mosquitto crl.new && chmod 644 crl.new"
        " && mv crl.new crl.pem && systemctl reload mosquitto",
        root=True,
    )


def _shown_by_broker(fleet: Site) -> str:
    ask = "import ssl, sys; print(ssl.get_server_certificate((sys.argv[1], int(sys.argv[2]))))"
    command = [sys.executable, "-c", ask, fleet.hosts[SERVER].address, str(BROKER_PORT)]
    return subprocess.run(lan.on_controller(command), capture_output=True, text=True, check=True).stdout


def _serial_of(pem: str) -> str:
    return certificates.serial_of(certificates.read_certificate(pem.encode(), "a certificate"))


def _serial(fleet: Site, name: str) -> str:
    shown = json.loads(fleet.controller.muster("pki", "list", "--json", "--folder", str(fleet.controller.pki)))
    (found,) = [one["serial"] for one in shown["certificates"] if one["name"] == name]
    return str(found)


def _wait_until(met: object, within_s: float = 60.0) -> None:
    end = time.monotonic() + within_s
    while True:
        try:
            if met():
                return
        except AssertionError:
            pass
        assert time.monotonic() < end
        time.sleep(0.5)
