"""Three hosts and a controller, from the first boot to the end: what the tests of a fleet on real hosts share."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from muster.testbed import least_squares
from tests.hosts import lan, machine, tree, wheels
from tests.hosts.controller import PROGRAMS, Controller, Ran
from tests.hosts.machine import SHARES, Host, HostFailed
from tests.hosts.tree import CACHE, TreeFailed

REQUIRED = "MUSTER_HOST_TESTS"
"""Set to "required" (`.ci/run` does), a run without hosts fails."""
RUN = CACHE / "run"
SERVER, TORCH, SMALL = "host-1", "host-2", "host-3"
"""Broker and coordinator; the device that gets torch later on, from a shared wheelhouse; the one that never does."""
DEVICES = (TORCH, SMALL)
SHARED = [f"{SHARES}/{folder.name}" for folder in (wheels.FOLDER, wheels.TORCH_FOLDER)]
MODEL = "12x6"
DATA = "/srv/data"
STEP_S = 0.25
TURN_WITHIN_S = 3600.0
BOOT_FIRST_S = 90.0
"""A host that takes longer is booted once more."""
JOB = """
name = "{name}"
[base]
model = "12x6"
[task]
kind = "least_squares"
dataset = "points"
[rounds]
count = {rounds}
min_devices = 2
quorum = {quorum}
local_steps = {steps}
deadline_s = 120
[strategy]
rank = 3
batch = 4
[evaluation]
data = "/srv/data/points.jsonl"
worse_by = 10.0
"""


class NotPossible(Exception):
    """No hosts can be booted here; the text says why."""


@dataclass
class Site:
    """The hosts, booted; and what the inventory says of them. `wheels`, `releases`: what is to be installed next."""

    hosts: dict[str, Host]
    controller: Controller
    wheels: Path
    releases: dict[str, str]
    device_settings: dict[str, dict[str, Any]] = field(default_factory=dict)
    server: dict[str, Any] = field(default_factory=dict)
    installed: bool = False

    @property
    def all(self) -> list[Host]:
        """In the order of their numbers."""
        return list(self.hosts.values())

    def describe(self, *, devices: tuple[str, ...] = DEVICES) -> None:
        """Write the inventory as the site is meant to be now."""
        reach = {host.name: {"ansible_host": host.address} for host in self.all}
        edge = {name: {**reach[name], **self._edge(name), **self.device_settings.get(name, {})} for name in devices}
        server = {
            **reach[SERVER],
            "muster_coordinator_profile": "coordinator",
            "muster_coordinator_top": True,
            "muster_host_wheel_folders": SHARED,
            "muster_coordinator_settings": {
                "worker": self._program("coordinator", "numpy_worker"),
                # On a busy machine a service is back later than the 12 s for which the fleet waits by default.
                "waits": {"period_s": 3.0, "silent_s": 60.0},
            },
            **self.server,
        }
        groups = {"broker": {SERVER: server}, "coordinator": {SERVER: server}, "edge": edge}
        self.controller.describe(groups, self.controller.common(self.all, self.wheels))

    def play(self, name: str, *options: str, **more: Any) -> Ran:
        """Run a playbook that has to succeed."""
        ran = self.controller.play(name, *options, **more)
        assert ran.code == 0, f"{name}: exit code {ran.code}\n{ran.tail}"
        return ran

    def submit(self, name: str, *, rounds: int = 1, steps: int = 4, quorum: float = 1.0) -> str:
        """Submit a small job on the coordinator's host, as its operator does; its id."""
        path = f"{DATA}/{name}.toml"
        text = JOB.format(name=name, rounds=rounds, steps=steps, quorum=quorum)
        self.hosts[SERVER].ssh(f"cat > {path} <<'END'\n{text}\nEND", root=True)
        return self.muster("submit", path).strip()

    def muster(self, *arguments: str) -> str:
        """A `muster` command on the coordinator's host."""
        return self.hosts[SERVER].ssh(f"/opt/muster/current/bin/muster {' '.join(arguments)}", root=True).stdout

    def view(self, job: str) -> dict[str, Any]:
        """A job as the coordinator shows it; empty while it does not answer."""
        show = f"/opt/muster/current/bin/muster show {job} --json"
        done = self.hosts[SERVER].ssh(show, root=True, check=False)
        found: dict[str, Any] = json.loads(done.stdout) if done.returncode == 0 else {}
        return found

    def until(self, job: str, met: Callable[[dict[str, Any]], bool], within_s: float = 240.0) -> dict[str, Any]:
        """Wait until `met` holds of the job's view. Raises `AssertionError` where it ends otherwise."""
        end = time.monotonic() + within_s
        view: dict[str, Any] = {}
        while time.monotonic() < end:
            view = self.view(job) or view
            if view and met(view):
                return view
            assert view.get("state") not in ("finished", "failed", "paused", "cancelled"), json.dumps(view)[-3000:]
            time.sleep(0.3)
        raise AssertionError(f"{job} is not as it should after {within_s:.0f} s: {json.dumps(view)[-3000:]}")

    def at_work(self, job: str) -> None:
        """Wait until both devices train."""
        self.until(job, lambda view: any(
            {part["status"] for part in round["participants"]} == {"training"} for round in view["rounds"]
        ))  # fmt: skip

    def ended_well(self, job: str) -> None:
        """Wait for the job's end: every round at its first attempt, with the updates of both devices."""
        view = self.until(job, lambda view: bool(view["state"] == "finished"))
        for round in view["rounds"]:
            told = {part["device"]: (part["status"], part["attempt"]) for part in round["participants"]}
            assert told == dict.fromkeys(DEVICES, ("done", 1)), json.dumps(round)[-3000:]

    def install(self) -> None:
        """Make a fleet of the bare hosts, unless that was done."""
        if not self.installed:
            self.installed = True
            self.play("site", label="site on bare hosts")

    def pid(self, name: str, unit: str) -> str:
        """Main process of a service on a host; "0": it does not run."""
        return self.hosts[name].ssh(f"systemctl show --value -p MainPID {unit}").stdout.strip()

    def presence(self) -> dict[str, dict[str, Any]]:
        """What the fleet says of itself, heard from the controller."""
        return self.controller.presence(self.all)

    def release_of(self, name: str) -> str:
        """The release in use on a host."""
        return self.hosts[name].ssh("basename $(readlink /opt/muster/current)").stdout.strip()

    def _program(self, profile: str, module: str) -> list[str]:
        """Of a release that may not be in use yet: the doctor runs before the switch."""
        return [f"/opt/muster/releases/{self.releases[profile]}/bin/python", "-m", f"muster.testbed.{module}"]

    def _edge(self, name: str) -> dict[str, Any]:
        shared = {"muster_host_wheel_folders": SHARED} if name == TORCH else {}
        return {
            **shared,
            "muster_edge_profile": "edge-numpy",
            # The test agent has no 4-bit kernel.
            "muster_edge_doctor_tolerates": ["kernel cpu"],
            "muster_edge_data": {"points": f"{DATA}/points.jsonl"},
            "muster_edge_release": {"hold_out": 0.125, "share": 0.25},
            "muster_edge_settings": {
                "agent": {"command": self._program("edge-numpy", "numpy_agent"), "gpus": ["cpu"]},
                "models": {MODEL: MODEL},
                "telemetry": {"idle_s": 2.0, "busy_s": 1.0},
                "broker": {"reconnect_max_s": 3.0},
                # All hosts share one machine: each is foreign load to the others.
                "policy": {"foreign_limit": 1000.0},
                "health": {"ready_s": 5.0},
            },
            # A step of the test agent would be over at once.
            "muster_edge_dropin": f"[Service]\nEnvironment=MUSTER_TEST_STEP_S={STEP_S}\n",
        }


@contextlib.contextmanager
def hosts() -> Iterator[Site]:
    """Boot the hosts; at the end all of it is gone but the logs in `RUN`. Raises `NotPossible`."""
    with _emptied() as stack:
        yield _boot(stack)


def probe() -> None:
    """Boot one host and end it. Raises `NotPossible`."""
    with _emptied() as stack:
        _check_machine()
        try:
            made = tree.get()
            lan.make(1)
            host = Host(1, SERVER, RUN / SERVER, made, machine.make_keys(RUN))
            host.prepare()
            host.start()
            stack.callback(host.kill)
            _wait(host)
        except (TreeFailed, lan.LanFailed, HostFailed) as error:
            raise NotPossible(str(error)) from error


@contextlib.contextmanager
def _emptied() -> Iterator[contextlib.ExitStack]:
    """What a run leaves behind is removed before and after, but for the logs; what stands on the stack goes first."""
    with _turn():
        lan.remove(RUN)
        shutil.rmtree(RUN, ignore_errors=True)
        RUN.mkdir(parents=True)
        try:
            with contextlib.ExitStack() as stack:
                stack.callback(lan.remove, RUN)
                yield stack
        finally:
            for name in (SERVER, *DEVICES):
                shutil.rmtree(RUN / name, ignore_errors=True)


def _boot(stack: contextlib.ExitStack) -> Site:
    _check_machine()
    began = time.monotonic()
    try:
        made = tree.get()
        treed = time.monotonic()
        lan.make(3)
        keys = machine.make_keys(RUN)
        found = {}
        folder, releases = wheels.good()
        wheels.clear_torch()
        wheeled = time.monotonic()
        for number, name in enumerate((SERVER, TORCH, SMALL), start=1):
            shared = () if name == SMALL else (folder, wheels.TORCH_FOLDER)
            found[name] = Host(number, name, RUN / name, made, keys, shared)
            found[name].prepare()
            found[name].start()
            stack.callback(found[name].kill)
        for host in found.values():
            _wait(host)
    except (TreeFailed, lan.LanFailed, HostFailed) as error:
        raise NotPossible(str(error)) from error
    controller = Controller(RUN, keys)
    controller.timings += [("Debian tree", treed - began), ("wheelhouse", wheeled - treed),
                           ("boot of 3 hosts", time.monotonic() - wheeled)]  # fmt: skip
    controller.prepare()
    site = Site(found, controller, folder, releases)
    _lay_data(site)
    site.describe()
    return site


def _wait(host: Host) -> None:
    """Until it has booted. Seen once in some dozens of boots, with nothing on the console: it hangs, as machines do."""
    try:
        host.wait(within_s=BOOT_FIRST_S)
    except HostFailed as error:
        sys.stderr.write(f"hosts: {error}; booted once more\n")
        host.kill()
        host.start()
        host.wait()


def _lay_data(site: Site) -> None:
    """Rows of each device, and of the coordinator for its evaluation: the owner's, not Ansible's."""
    for seed, host in enumerate(site.all):
        rows = RUN / f"{host.name}.jsonl"
        least_squares.write_rows(rows, least_squares.make_rows(MODEL, 64, seed))
        place = host.root / DATA.lstrip("/")
        place.mkdir(parents=True)
        shutil.copy(rows, place / "points.jsonl")


def _check_machine() -> None:
    if os.geteuid():
        raise NotPossible("not root")
    for program in ("debootstrap", "systemd-nspawn", "ip", "ssh", "ssh-keygen", "ansible-playbook"):
        if not shutil.which(program, path=f"{PROGRAMS}:{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"):
            raise NotPossible(f"{program} is missing: run make setup")
    if wheels.HERE != tree.PYTHON:
        raise NotPossible("the hosts' wheels are made with Python {}.{}, and this is another".format(*tree.PYTHON))


@contextlib.contextmanager
def _turn() -> Iterator[None]:
    """One set of hosts at a time on a machine."""
    CACHE.mkdir(parents=True, exist_ok=True)
    until = time.monotonic() + TURN_WITHIN_S
    with (CACHE / "turn").open("w", encoding="utf-8") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > until:
                    raise NotPossible("the hosts of another run are up") from None
                time.sleep(1.0)
        yield
