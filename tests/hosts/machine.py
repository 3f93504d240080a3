"""A host: a Debian tree of its own, booted by systemd-nspawn in its own network namespace, reached over SSH.

The tree is an overlay whose upper layer lies on disk: it survives a reboot and a power cut (`kill`, then `start`).
What such a host can't show: memory limits, device policy, address filters (no control groups are delegated to it), and
a kernel of its own.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from shared.processes import die_with_parent
from tests.hosts import lan
from tests.hosts.tree import REPOSITORY, USER, Tree

SHARES = "/srv"
"""Below it a host finds the shared wheelhouses, read-only and by their own names, if it has any mounted."""
BOOT_WITHIN_S = 180.0
_REBOOT = 133
"""nspawn's exit code when the host asked for a reboot."""
_LOOK_EVERY_S = 0.2
_KILL_WITHIN_S = 20.0


class HostFailed(Exception):
    """A host did not boot, or a command on it failed; the text says which."""


@dataclass(frozen=True)
class Keys:
    """What the controller logs in with."""

    identity: Path
    known_hosts: Path


class Host:
    """One host. Start it from a thread that lives as long as it shall: it dies with that thread."""

    def __init__(
        self, number: int, name: str, folder: Path, tree: Tree, keys: Keys, wheels: Sequence[Path] = ()
    ) -> None:
        self.number, self.name, self.folder = number, name, folder
        self.address = lan.address(number)
        self.boots = 0
        self._keys = keys
        self._process: subprocess.Popen[bytes] | None = None
        self._stopping = False
        self._tree, self._wheels = tree, wheels
        self._watcher: threading.Thread | None = None

    @property
    def root(self) -> Path:
        """Its tree as seen from here."""
        return self.folder / "root"

    @property
    def log(self) -> Path:
        """What it writes to its console."""
        return self.folder / "console.log"

    def prepare(self) -> None:
        """Mount the tree; a key for sshd, a name, and the controller's key."""
        for name in ("root", "upper", "work"):
            (self.folder / name).mkdir(parents=True)
        layers = f"lowerdir={self._tree.root},upperdir={self.folder / 'upper'},workdir={self.folder / 'work'}"
        lan.run("mount", "-t", "overlay", "overlay", "-o", layers, str(self.root))
        (self.root / "etc/hostname").write_text(f"{self.name}\n", encoding="utf-8")
        (self.root / "etc/hosts").write_text(f"127.0.0.1 localhost\n127.0.1.1 {self.name}\n", encoding="utf-8")
        key = self.root / "etc/ssh/ssh_host_ed25519_key"
        lan.run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", self.name, "-f", str(key))
        public = key.with_suffix(".pub").read_text(encoding="utf-8").split()
        with self._keys.known_hosts.open("a", encoding="utf-8") as file:
            file.write(f"{self.address} {public[0]} {public[1]}\n")
        allowed = self.root / "home" / USER / ".ssh"
        allowed.mkdir(mode=0o700)
        content = self._keys.identity.with_suffix(".pub").read_text(encoding="utf-8")
        (allowed / "authorized_keys").write_text(content, encoding="utf-8")
        lan.run("chroot", str(self.root), "chown", "-R", f"{USER}:{USER}", f"/home/{USER}/.ssh")

    def start(self) -> None:
        """Boot it, and again whenever it asks for a reboot; returns at once."""
        self._stopping = False
        self._watcher = threading.Thread(target=self._run, name=f"host-{self.name}", daemon=True)
        self._watcher.start()

    def wait(self, boots: int = 1, within_s: float = BOOT_WITHIN_S) -> None:
        """Wait until it was booted `boots` times and systemd has started all it has to. Raises `HostFailed`."""
        until = time.monotonic() + within_s
        state = "not booted"
        while time.monotonic() < until:
            if self.boots >= boots:
                done = self.ssh("systemctl is-system-running", check=False)
                state = done.stdout.strip() or f"exit code {done.returncode} {done.stderr.strip()}"
                if state in ("running", "degraded"):
                    return
            time.sleep(_LOOK_EVERY_S)
        running = len(lan.processes(lan.namespace(self.number)))
        words = f"{state}, {running} processes: {self.last_words()}"
        raise HostFailed(f"{self.name} did not boot in {within_s:.0f} s ({words})")

    def kill(self) -> None:
        """Cut its power. Raises `HostFailed` if anything of it runs on: beside it, another boot would prove nothing."""
        self._stopping = True
        if self._process is not None:
            # Not nspawn itself: without it the host runs on. With its first process all others of the host end.
            for pid in _children(self._process.pid):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        if self._watcher is not None:
            self._watcher.join(_KILL_WITHIN_S)
        name = lan.namespace(self.number)
        until = time.monotonic() + _KILL_WITHIN_S
        while left := lan.processes(name):
            if time.monotonic() > until:
                raise HostFailed(f"{self.name}: processes {left} run on without power")
            time.sleep(_LOOK_EVERY_S)

    def ssh(self, command: str, *, check: bool = True, root: bool = False) -> subprocess.CompletedProcess[str]:
        """Run a line of shell on it, over SSH. `check`: raises `HostFailed` where it fails."""
        options = ["-i", str(self._keys.identity), "-o", f"UserKnownHostsFile={self._keys.known_hosts}",
                   "-o", "BatchMode=yes", "-o", "ConnectTimeout=5", "-o", "LogLevel=ERROR"]  # fmt: skip
        line = ["ssh", *options, f"{USER}@{self.address}", "--", f"sudo sh -c {_quoted(command)}" if root else command]
        done = subprocess.run(
            lan.on_controller(line), capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL
        )
        if check and done.returncode:
            words = (done.stderr + done.stdout).strip()
            raise HostFailed(f"{self.name}: {command}: exit code {done.returncode}: {words[-2000:]}")
        return done

    def last_words(self) -> str:
        """The end of its console."""
        if not self.log.exists():
            return ""
        return self.log.read_text(encoding="utf-8", errors="replace")[-800:]

    def _run(self) -> None:
        while not self._stopping:
            self.boots += 1
            with self.log.open("ab") as console:
                self._process = subprocess.Popen(
                    self._command(), stdin=subprocess.DEVNULL, stdout=console, stderr=console,
                    preexec_fn=die_with_parent, start_new_session=True,
                )  # fmt: skip
                if self._process.wait() != _REBOOT:
                    return

    def _command(self) -> list[str]:
        mounts = [f"--bind-ro={self._tree.debs}:{REPOSITORY}"]
        mounts += [f"--bind-ro={folder}:{SHARES}/{folder.name}" for folder in self._wheels]
        where = f"--network-namespace-path=/run/netns/{lan.namespace(self.number)}"
        options = ["--quiet", "--register=no", "--keep-unit", "--console=pipe", "--resolv-conf=off", "--timezone=off"]
        place = [f"--directory={self.root}", f"--machine={self.name}", where]
        return ["systemd-nspawn", *options, "--boot", *place, *mounts]


def _children(pid: int) -> list[int]:
    listed = [path.read_text(encoding="ascii") for path in Path(f"/proc/{pid}/task").glob("*/children")]
    return [int(child) for child in " ".join(listed).split()]


def _quoted(command: str) -> str:
    return "'" + command.replace("'", "'\\''") + "'"


def make_keys(folder: Path) -> Keys:
    """A key pair for the controller, and a list of hosts that is still empty."""
    identity, known = folder / "identity", folder / "known_hosts"
    lan.run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "controller", "-f", str(identity))
    known.touch()
    return Keys(identity, known)
