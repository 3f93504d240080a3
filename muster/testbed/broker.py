"""A real mosquitto of our own, for tests and emulated fleets."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

from muster import mosquitto
from muster.testbed.machines import BROKER
from shared.errors import UserError
from shared.processes import die_with_parent, how_it_ended
from shared.settings import BrokerSettings

_START_S = 10.0
_RELOADS = "Reloading config."
_LOWEST_PORT, _PORT_TRIES = 20_000, 100
_OURS = {
    # A broker that is killed keeps sessions and retained messages only if it writes after every change.
    "autosave_interval": "1",
    "autosave_on_changes": "true",
    "sys_interval": "1",
    "log_type": "error\nlog_type warning\nlog_type notice\nlog_type information",  # by which it says that it reloads
}


def find_mosquitto() -> str:
    """Path of the program: `MUSTER_MOSQUITTO`, the PATH, /usr/sbin. Raises `UserError` where there is none."""
    path = os.environ.get("MUSTER_MOSQUITTO") or shutil.which(
        "mosquitto", path=f"{os.environ.get('PATH', '')}:/usr/sbin"
    )
    if not path or not os.access(path, os.X_OK):
        raise UserError("mosquitto not found: apt-get install mosquitto (or set MUSTER_MOSQUITTO)")
    return path


def free_port() -> int:
    """A TCP port of 127.0.0.1 that is free now, and that no outgoing connection takes before it is used.

    Raises `OSError` where there is none.
    """
    ephemeral = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text(encoding="ascii").split()[0])
    choices = random.SystemRandom()  # a test that seeds the other one would get one port again and again
    for _ in range(_PORT_TRIES):
        # Not by port 0: the kernel would give one that it may give to a connection a moment later.
        with socket.socket() as probe, contextlib.suppress(OSError):
            port = choices.randrange(_LOWEST_PORT, max(ephemeral, _LOWEST_PORT + 1000))
            probe.bind(("127.0.0.1", port))
            return port
    raise OSError(errno.EADDRINUSE, "no free port")


class Broker:
    """A mosquitto on a free port of 127.0.0.1; a context manager.

    It has the configuration of a fleet's broker, but for what is said here. `folder`: configuration, log, persistence
    (a temporary one, removed at the end, where None). `tls`: folder with `ca.crt`, `server.crt`, `server.key` and
    `crl.pem` (see `muster.testbed.machines`); without it, it is open to all. `passwords`: user -> password. `acl`: text
    of the ACL. `overrides`: option -> value, None to leave one out.
    """

    def __init__(
        self,
        folder: Path | None = None,
        *,
        port: int = 0,
        acl: str = "",
        tls: Path | None = None,
        passwords: Mapping[str, str] | None = None,
        overrides: Mapping[str, str | None] | None = None,
    ) -> None:
        self._temporary = None if folder else tempfile.TemporaryDirectory(prefix="muster-broker-")
        self.folder = folder or Path(self._temporary.name if self._temporary else "")
        self.port = port or free_port()
        self._tls = tls
        self._acl = acl
        self._passwords = passwords or {}
        self._overrides = overrides or {}
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Broker:
        try:
            self.start()
        except UserError:
            self._clean()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.stop()
        self._clean()

    @property
    def pid(self) -> int:
        """Of the running process; 0: it does not run."""
        return self._process.pid if self._process and self._process.poll() is None else 0

    @property
    def end(self) -> str:
        """How it ended, in words; "" while it runs."""
        return how_it_ended(self._process.poll() if self._process else None)

    @property
    def log_path(self) -> Path:
        """Where mosquitto writes."""
        return self.folder / "mosquitto.log"

    @property
    def log(self) -> str:
        """What mosquitto has written."""
        return self.log_path.read_text("utf-8", errors="replace")

    def settings(self, **changes: object) -> BrokerSettings:
        """How to reach it, with `changes` of the other fields."""
        values: dict[str, object] = {"host": "127.0.0.1", "port": self.port, **changes}
        return BrokerSettings(**values)  # type: ignore[arg-type]  # names and types are the caller's to match

    def start(self) -> None:
        """Start it and wait until it accepts. Raises `UserError` with its last words where it does not."""
        if self._accepts():
            raise UserError(f"port {self.port} is in use: choose another one, or 0 for a free one")
        self.folder.mkdir(parents=True, exist_ok=True)
        configuration = self.folder / "mosquitto.conf"
        configuration.write_text(self._configuration(), "utf-8")
        with self.log_path.open("ab") as log:
            self._process = subprocess.Popen(
                [find_mosquitto(), "-c", str(configuration)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                preexec_fn=die_with_parent,
                start_new_session=True,  # Ctrl-C on a terminal is for the owner alone
            )
        until = time.monotonic() + _START_S
        while not self._accepts():
            if self._process.poll() is not None or time.monotonic() > until:
                self.kill()
                words = " | ".join(self.log.strip().splitlines()[-3:])
                raise UserError(f"mosquitto does not start on port {self.port}: {words}")
            time.sleep(0.01)

    def kill(self) -> None:
        """SIGKILL."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def stop(self) -> None:
        """SIGTERM, then wait; the persistence is written."""
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(5)
            except subprocess.TimeoutExpired:
                self.kill()

    def reload(self) -> None:
        """SIGHUP: it reads certificates, revocation list and ACL anew; returns when it says that it began to."""
        before = self.log.count(_RELOADS)
        os.kill(self.pid, signal.SIGHUP)
        until = time.monotonic() + _START_S
        while self.log.count(_RELOADS) == before:
            if not self.pid or time.monotonic() > until:
                raise UserError("mosquitto does not reload")
            time.sleep(0.01)

    def restart(self) -> None:
        """Start it again on the same port and persistence, after `kill` or `stop` (else it is stopped first)."""
        self.stop()
        self.start()

    def _accepts(self) -> bool:
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=1.0):
                return True
        except OSError:
            return False

    def _configuration(self) -> str:
        acl = self.folder / "acl"
        places = mosquitto.Places(self.port, str(self._tls), BROKER, str(acl), str(self.folder))
        options: dict[str, str | None] = {**mosquitto.options(places), **_OURS}
        options["listener"] = f"{self.port} 127.0.0.1"
        if os.geteuid() == 0:
            options["user"] = "root"  # else it drops its rights and can't read a private folder
        if not self._tls:
            options |= {**dict.fromkeys(mosquitto.OF_TLS), "allow_anonymous": "true"}
        if self._passwords:
            options |= {"password_file": str(self._password_file()), "allow_anonymous": "false"}
        if self._acl:
            acl.write_text(self._acl, "utf-8")
            acl.chmod(0o600)
        else:
            options["acl_file"] = None
        options |= self._overrides
        lines = [f"{name} {value}" for name, value in options.items() if value is not None]
        return "\n".join(lines) + "\n"

    def _password_file(self) -> Path:
        path = self.folder / "passwords"
        path.write_text("".join(f"{user}:{password}\n" for user, password in self._passwords.items()), "utf-8")
        path.chmod(0o600)
        passwd = shutil.which("mosquitto_passwd", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
        if not passwd:
            raise UserError("mosquitto_passwd not found: apt-get install mosquitto")
        subprocess.run([passwd, "-U", str(path)], check=True, capture_output=True)
        return path

    def _clean(self) -> None:
        if self._temporary is not None:
            self._temporary.cleanup()
