"""The hosts' network: a bridge in a network namespace of its own, with no way out.

The controller (`CONTROLLER`) sits on it too: `on_controller` runs Ansible and `muster` there. So whatever the tests
install, they install without a network. Names are fixed: there is one set of hosts at a time, and what a killed run
left is found by its names.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from pathlib import Path

PREFIX = "muster-hosts-"
CONTROLLER = f"{PREFIX}controller"
NETWORK = "10.213.77"
"""The first three numbers of every address; they exist in these namespaces alone."""
_BRIDGE = "lan"
_KILL_WITHIN_S = 10.0


class LanFailed(Exception):
    """A command of `ip` or `mount` failed; the text has its words."""


def address(number: int) -> str:
    """Of host `number`, from 1; the controller is 0."""
    return f"{NETWORK}.{number + 10}"


def namespace(number: int) -> str:
    """Name of the network namespace of host `number`."""
    return f"{PREFIX}{number}"


def make(hosts: int) -> None:
    """The bridge and the namespaces of the controller and of `hosts` hosts. Raises `LanFailed`."""
    run("ip", "netns", "add", CONTROLLER)
    inside = ["ip", "-n", CONTROLLER]
    run(*inside, "link", "set", "lo", "up")
    run(*inside, "link", "add", _BRIDGE, "type", "bridge")
    run(*inside, "addr", "add", f"{address(0)}/24", "dev", _BRIDGE)
    run(*inside, "link", "set", _BRIDGE, "up")
    for number in range(1, hosts + 1):
        name = namespace(number)
        run("ip", "netns", "add", name)
        run(*inside, "link", "add", f"to{number}", "type", "veth", "peer", "name", "eth0", "netns", name)
        run(*inside, "link", "set", f"to{number}", "master", _BRIDGE, "up")
        run("ip", "-n", name, "addr", "add", f"{address(number)}/24", "dev", "eth0")
        for device in ("lo", "eth0"):
            run("ip", "-n", name, "link", "set", device, "up")


def on_controller(command: list[str]) -> list[str]:
    """`command` as it runs on the controller."""
    return ["ip", "netns", "exec", CONTROLLER, *command]


def remove(folder: Path) -> None:
    """End every process in the namespaces, unmount what is mounted below `folder`, remove the namespaces.

    What is not there is no fault: a run that was killed leaves any part of it behind.
    """
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
    names = [line.split()[0] for line in listed.splitlines() if line.startswith(PREFIX)]
    until = time.monotonic() + _KILL_WITHIN_S
    while (pids := [pid for name in names for pid in processes(name)]) and time.monotonic() < until:
        for pid in pids:
            _kill(pid)
        time.sleep(0.05)
    for place in _mounts(folder):
        run("umount", "--lazy", place)
    for name in names:
        run("ip", "netns", "delete", name)


def processes(name: str) -> list[int]:
    """Ids of all that runs in a namespace."""
    listed = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True, check=False).stdout
    return [int(pid) for pid in listed.split()]


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):  # it ended while we looked
        os.kill(pid, signal.SIGKILL)


def _mounts(folder: Path) -> list[str]:
    """Mount points below `folder`, the innermost first."""
    lines = Path("/proc/self/mounts").read_text(encoding="utf-8").splitlines()
    places = [line.split()[1].encode().decode("unicode_escape") for line in lines]
    return sorted((place for place in places if place.startswith(f"{folder}/")), reverse=True)


def run(*command: str) -> str:
    """Standard output of `command`. Raises `LanFailed` with its words."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    except OSError as error:
        raise LanFailed(f"{command[0]}: {error.strerror}") from error
    if done.returncode:
        raise LanFailed(f"{' '.join(command)}: {(done.stderr or done.stdout).strip()}")
    return done.stdout
