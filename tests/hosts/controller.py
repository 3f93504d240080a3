"""The operator's machine: an inventory, a vault, the authority, the built collection, and the playbooks run from it."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.hosts import lan
from tests.hosts.machine import Host, Keys
from tests.hosts.tree import USER

ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = Path(sys.executable).parent
FLEET = "fleet1"
GATE = "gate-1"
BROKER_PORT = 8883
PASSPHRASE = "a passphrase of twenty-nine letters"
_RECAP = re.compile(r"^(\S+)\s+: ok=(\d+)\s+changed=(\d+)\s+unreachable=(\d+)\s+failed=(\d+)", re.MULTILINE)
PLAYBOOK_WITHIN_S = 1500


@dataclass(frozen=True)
class Ran:
    """What a playbook did. `changed`: by host, those that it was about."""

    code: int
    output: str
    seconds: float
    changed: Mapping[str, int]

    @property
    def tail(self) -> str:
        """Enough of the output to see what went wrong."""
        return self.output[-6000:]


@dataclass
class Controller:
    """Everything of it lies in `folder`. `timings`: what was run -> seconds, in order."""

    folder: Path
    keys: Keys
    timings: list[tuple[str, float]] = field(default_factory=list)

    @property
    def inventory(self) -> Path:
        """Folder of the inventory."""
        return self.folder / "inventory"

    @property
    def pki(self) -> Path:
        """Folder of the authority."""
        return self.inventory / "pki"

    def prepare(self) -> None:
        """Build and install the collection; make the authority; put its passphrase into a vault."""
        for name in ("inventory/group_vars/all", "logs", "home"):
            (self.folder / name).mkdir(parents=True)
        self._run("ansible-galaxy", "collection", "build", str(ROOT / "ansible"), "--output-path", str(self.folder))
        (archive,) = self.folder.glob("muster-fleet-*.tar.gz")
        self._run("ansible-galaxy", "collection", "install", str(archive), "--offline", "-p", self._collections)
        (self.folder / "vault-password").write_text("the vault's\n", encoding="utf-8")
        vault = self.inventory / "group_vars/all/vault.yml"
        vault.write_text(json.dumps({"vault_muster_pki_passphrase": PASSPHRASE}), encoding="utf-8")
        self._run("ansible-vault", "encrypt", str(vault))
        self.muster("pki", "init", FLEET, "--folder", str(self.pki), env={"MUSTER_PKI_PASSPHRASE": PASSPHRASE})

    def describe(self, groups: Mapping[str, Mapping[str, Mapping[str, Any]]], everywhere: Mapping[str, Any]) -> None:
        """Write the inventory (JSON, which YAML includes): group -> host -> its variables, and the variables of all."""
        children = {
            name: {"hosts": {host: {**facts} for host, facts in hosts.items()}} for name, hosts in groups.items()
        }
        (self.inventory / "hosts.yml").write_text(
            json.dumps({"all": {"children": children}}, indent=1), encoding="utf-8"
        )
        path = self.inventory / "group_vars/all/vars.yml"
        path.write_text(json.dumps(dict(everywhere), indent=1), encoding="utf-8")

    def common(self, hosts: Sequence[Host], wheels: Path) -> dict[str, Any]:
        """Variables of all hosts. Waits are a tenth of what they are on a real fleet."""
        return {
            "ansible_user": USER,
            "muster_fleet": FLEET,
            "muster_broker_host": hosts[0].address,
            "muster_broker_port": BROKER_PORT,
            "muster_addresses": [f"{lan.NETWORK}.0/24"],
            "muster_pki": str(self.pki),
            "muster_pki_passphrase": "{{ vault_muster_pki_passphrase }}",
            "muster_gate_name": GATE,
            "muster_command": [sys.executable, "-m", "muster.cli.main"],
            "muster_wheelhouse": str(wheels),
            "muster_gate_s": 45,
            "muster_settle_s": 3,
            "muster_drain_s": 60,
        }

    def play(self, name: str, *options: str, label: str = "", **variables: Any) -> Ran:
        """Run a playbook of the collection on the controller; never raises for its exit code."""
        command = ["ansible-playbook", f"muster.fleet.{name}", "-i", str(self.inventory / "hosts.yml"), *options]
        if variables:
            command += ["-e", json.dumps(variables)]
        began = time.monotonic()
        log = self.folder / "logs" / f"{len(self.timings):02d}-{name}.log"
        with log.open("w", encoding="utf-8") as output:
            done = subprocess.run(
                lan.on_controller([str(PROGRAMS / command[0]), *command[1:]]), stdin=subprocess.DEVNULL, stdout=output,
                stderr=subprocess.STDOUT, env=self._environment({}), timeout=PLAYBOOK_WITHIN_S, check=False,
            )  # fmt: skip
        seconds = time.monotonic() - began
        self.timings.append((label or " ".join([name, *options]), seconds))
        text = log.read_text(encoding="utf-8")
        changed = {found[1]: int(found[3]) for found in _RECAP.finditer(text)}
        return Ran(done.returncode, text, seconds, changed)

    def interrupt(self, name: str, *options: str, when: Callable[[], bool], label: str = "") -> None:
        """Run a playbook and end it as ^C does, once `when` holds. Raises `AssertionError` where it ends before."""
        command = ["ansible-playbook", f"muster.fleet.{name}", "-i", str(self.inventory / "hosts.yml"), *options]
        began = time.monotonic()
        log = self.folder / "logs" / f"{len(self.timings):02d}-{name}.log"
        with log.open("w", encoding="utf-8") as output:
            process = subprocess.Popen(
                lan.on_controller([str(PROGRAMS / command[0]), *command[1:]]), stdin=subprocess.DEVNULL, stdout=output,
                stderr=subprocess.STDOUT, env=self._environment({}),
            )  # fmt: skip
        try:
            while not when():
                assert process.poll() is None, log.read_text(encoding="utf-8")[-6000:]
                time.sleep(0.2)
            process.send_signal(signal.SIGINT)
            process.wait(60.0)
        finally:
            process.kill()
            process.wait()
        self.timings.append((label or f"{name}, interrupted", time.monotonic() - began))

    def muster(self, *arguments: str, env: Mapping[str, str] | None = None, check: bool = True) -> str:
        """Run a `muster` command on the controller; its standard output."""
        command = lan.on_controller([sys.executable, "-m", "muster.cli.main", *arguments])
        done = subprocess.run(
            command, capture_output=True, text=True, env=self._environment(env or {}), check=False,
            stdin=subprocess.DEVNULL,
        )  # fmt: skip
        if check and done.returncode:
            words = f"exit code {done.returncode}: {done.stderr}{done.stdout}"
            raise AssertionError(f"muster {' '.join(arguments)}: {words}")
        return done.stdout

    def presence(self, hosts: Sequence[Host]) -> dict[str, dict[str, Any]]:
        """What the fleet says of itself: name -> its presence."""
        issued = self.pki / "issued"
        options = ["--fleet", FLEET, "--name", GATE, "--broker", f"{hosts[0].address}:{BROKER_PORT}", "--json",
                   "--cafile", f"{self.pki / 'ca.crt'}", "--certfile", f"{issued / GATE}.crt",
                   "--keyfile", f"{issued / GATE}.key"]  # fmt: skip
        found: dict[str, dict[str, Any]] = json.loads(self.muster("presence", *options))
        return {name: verdict["presence"] for name, verdict in found.items()}

    @property
    def _collections(self) -> str:
        return str(self.folder / "collections")

    def _run(self, program: str, *arguments: str) -> None:
        done = subprocess.run(
            [str(PROGRAMS / program), *arguments], capture_output=True, text=True, env=self._environment({}),
            check=False, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        assert done.returncode == 0, f"{program} {' '.join(arguments)}: {done.stdout}{done.stderr}"

    def _environment(self, more: Mapping[str, str]) -> dict[str, str]:
        sockets = Path("/tmp") / f"muster-hosts-{os.getpid()}"
        sockets.mkdir(mode=0o700, exist_ok=True)
        ssh = (
            f"-o ControlMaster=auto -o ControlPersist=60s -o UserKnownHostsFile={self.keys.known_hosts}"
            f" -o StrictHostKeyChecking=yes -o BatchMode=yes -o ConnectTimeout=5"
        )
        return {
            **os.environ,
            "HOME": str(self.folder / "home"),
            "PYTHONPATH": str(ROOT),
            "PATH": f"{PROGRAMS}:{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin",
            "ANSIBLE_HOME": str(self.folder / "home"),
            "ANSIBLE_COLLECTIONS_PATH": self._collections,
            "ANSIBLE_PRIVATE_KEY_FILE": str(self.keys.identity),
            "ANSIBLE_SSH_ARGS": ssh,
            "ANSIBLE_SSH_CONTROL_PATH_DIR": str(sockets),
            "ANSIBLE_PIPELINING": "true",
            "ANSIBLE_INJECT_FACT_VARS": "false",
            "ANSIBLE_VAULT_PASSWORD_FILE": str(self.folder / "vault-password"),
            "ANSIBLE_LOCALHOST_WARNING": "false",
            "ANSIBLE_NOCOLOR": "true",
            **more,
        }


def _write(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=1), encoding="utf-8")
