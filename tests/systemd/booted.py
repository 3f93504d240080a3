"""A host that really boots: systemd as process 1 in a container whose root is this machine's, under an overlay.

What is installed here is installed there; what the tests write there goes to a folder of theirs. Not enforced in it:
memory limits, CPU weights, device and address filters (no controllers are delegated); tests of those run in a real
control group of this machine.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from shared.processes import die_with_parent
from tests.systemd.units import DEPLOY, ROOT, SERVICES

BOOT_S = 120.0
_TARGET = "[Unit]\nRequires=basic.target\nWants=dbus.service\n"
_LAUNCHER = """#!/opt/python/bin/{python}
import sys
sys.path[:0] = ["/opt/source", "/opt/packages"]  # the agents find them by PYTHONPATH of the site's drop-in
from {module} import main
sys.exit(main())
"""


class NotBooted(Exception):
    """No host can be booted here; the text says why."""


class Host:
    """A booted host; `close` ends it. Its programs lie in /opt/muster, as a release does."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.root = folder / "root"
        self._process: subprocess.Popen[bytes] | None = None
        self._mounted = False
        self._leader = 0

    def boot(self) -> None:
        """Make the root and start it. Raises `NotBooted`."""
        if os.geteuid() or not shutil.which("systemd-nspawn"):
            raise NotBooted("root and systemd-nspawn are needed (apt-get install systemd-container)")
        try:
            self._mount()
            self._furnish()
            self._start()
        except (OSError, subprocess.SubprocessError, NotBooted) as error:
            self.close()
            raise NotBooted(str(error)) from error

    def close(self) -> None:
        """End it."""
        if self._process is not None:
            if self._leader:
                self.run("systemctl", "poweroff", "--force", check=False)
            try:
                self._process.wait(30)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            self._process = None
        for path in (self.root, self.folder / "upper") if self._mounted else ():
            subprocess.run(["umount", "--lazy", str(path)], check=False, capture_output=True)
        self._mounted = False

    def run(self, *command: str, check: bool = True, timeout: float = 120.0) -> subprocess.CompletedProcess[str]:
        """A command as its root."""
        inside = ["nsenter", f"--target={self._leader}", "--all", "--", *command]
        done = subprocess.run(inside, capture_output=True, text=True, timeout=timeout, check=False)
        assert not check or done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done

    def show(self, unit: str, name: str) -> str:
        """A property of a unit."""
        return self.run("systemctl", "show", "--value", f"--property={name}", unit).stdout.strip()

    def until(self, met: Callable[[], bool], what: str, seconds: float = 60.0) -> None:
        """Wait until `met`."""
        end = time.monotonic() + seconds
        while not met():
            assert time.monotonic() < end, f"not within {seconds:.0f} s: {what}\n{self.journal()[-4000:]}"
            time.sleep(0.2)

    def journal(self, *options: str) -> str:
        """Of this boot, with the options of journalctl."""
        return self.run("journalctl", "--no-pager", "--boot", *options, check=False).stdout

    def write(self, path: str, text: str, mode: int = 0o644) -> None:
        """A file of the host."""
        target = self.root / path.lstrip("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text, encoding="utf-8")
        target.chmod(mode)

    def _mount(self) -> None:
        """The machine's root below, a file system in memory above: an upper folder can't lie on what is below."""
        for name in ("root", "upper"):
            (self.folder / name).mkdir(parents=True)
        self._mounted = True
        upper = self.folder / "upper"
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2g", "tmpfs", upper], check=True, capture_output=True)
        for name in ("changed", "work"):
            (upper / name).mkdir()
        options = f"lowerdir=/,upperdir={upper}/changed,workdir={upper}/work"
        subprocess.run(["mount", "-t", "overlay", "-o", options, "overlay", self.root], check=True, capture_output=True)

    def _furnish(self) -> None:
        """Our units and user; of the machine's own services only what a booted host needs."""
        system = self.root / "etc/systemd/system"
        for wants in system.glob("*.wants"):
            shutil.rmtree(wants)
        self.write("/etc/systemd/system/muster-test.target", _TARGET)
        default = system / "default.target"
        default.unlink(missing_ok=True)
        default.symlink_to("muster-test.target")
        for name in SERVICES:
            shutil.copy(DEPLOY / name, system)
        shutil.copytree(DEPLOY / "mosquitto.service.d", system / "mosquitto.service.d", dirs_exist_ok=True)
        for kind in ("sysusers", "tmpfiles"):
            shutil.copy(DEPLOY / f"muster.{kind}.conf", self.root / f"usr/lib/{kind}.d/muster.conf")
        python = Path(sys.executable).resolve().name
        for name, module in (("muster-edge", "edge_daemon.service"), ("muster-coordinator", "coordinator.service")):
            self.write(f"/opt/muster/current/bin/{name}", _LAUNCHER.format(python=python, module=module), 0o755)

    def _start(self) -> None:
        # Where an interpreter lies in somebody's home, ProtectHome= hides it: bound elsewhere it is found.
        packages = Path(next(path for path in sys.path if path.endswith("site-packages"))).resolve()
        bound = {Path(sys.base_prefix): "/opt/python", packages: "/opt/packages", ROOT: "/opt/source"}
        command = [
            "systemd-nspawn", "--quiet", f"--directory={self.root}", "--register=no", "--keep-unit", "--boot",
            f"--machine=muster-test-{os.getpid()}", "--private-network",
            *(f"--bind-ro={path}:{there}" for path, there in bound.items()),
        ]  # fmt: skip
        console = (self.folder / "console").open("wb")
        with console:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=console, stderr=console, preexec_fn=die_with_parent
            )
        end = time.monotonic() + BOOT_S
        while not self._is_up():
            words = (self.folder / "console").read_text(encoding="utf-8", errors="replace")[-1000:]
            if self._process.poll() is not None or time.monotonic() > end:
                raise NotBooted(f"it does not come up: {words}")
            time.sleep(0.3)

    def _is_up(self) -> bool:
        assert self._process is not None
        children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children")
        found = re.findall(r"\d+", children.read_text(encoding="ascii"))
        if not found:
            return False
        self._leader = int(found[0])
        try:
            done = self.run("systemctl", "is-active", "muster-test.target", check=False, timeout=30.0)
        except subprocess.TimeoutExpired:
            return False
        return done.stdout.strip() == "active"

    def kill(self, unit: str, name: signal.Signals) -> None:
        """Signal a unit's main process."""
        self.run("systemctl", "kill", "--kill-who=main", f"--signal={name.name}", unit)
