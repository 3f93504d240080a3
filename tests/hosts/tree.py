"""The Debian tree that every host starts from: made once by debootstrap, kept outside the repository.

A tree lies in `~/.cache/muster/hosts/<key>` (`MUSTER_CACHE` moves it); the key is a digest of all it is made from, so a
change of this file makes another tree. It is the tree of a server as rented: systemd, sshd, Python, a user with sudo.
Beside it lie the Debian packages that the roles install, as a repository, since the hosts reach no network.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

CACHE = Path(os.environ.get("MUSTER_CACHE") or Path.home() / ".cache" / "muster") / "hosts"
SUITE = "bookworm"
PYTHON = (3, 11)
"""The Python of that suite; wheels for the hosts are made for it."""
USER = "ops"
"""Who logs in over SSH: may become root by sudo, as on a cloud image."""
INCLUDED = (
    "systemd", "systemd-sysv", "dbus", "openssh-server", "python3", "python3-apt", "sudo", "iproute2", "procps",
)  # fmt: skip
OFFERED = ("mosquitto", "python3-venv", "openssl")
"""What the roles install by apt, with all that these need."""
REPOSITORY = "/srv/debs"
"""Where a host finds that repository."""
_MASKED = ("apt-daily.timer", "apt-daily-upgrade.timer", "e2scrub_all.timer", "e2scrub_reap.service", "fstrim.timer",
           "dpkg-db-backup.timer", "systemd-udev-trigger.service", "console-getty.service")  # fmt: skip
"""What a container has no use for; each costs time at every boot."""


class TreeFailed(Exception):
    """The tree can't be made here; the text says why."""


@dataclass(frozen=True)
class Tree:
    """A finished tree."""

    root: Path
    debs: Path


def key() -> str:
    """Of the tree that this file describes."""
    return hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:12]


def get() -> Tree:
    """The tree; it is made where the cache lacks it (some minutes). Raises `TreeFailed`."""
    folder = CACHE / key()
    CACHE.mkdir(parents=True, exist_ok=True)
    with _locked(CACHE / "lock"):
        if not folder.exists():
            sys.stderr.write(f"hosts: making {folder} by debootstrap, once\n")
            partial = CACHE / "partial"
            _remove(partial)
            _make(partial)
            partial.rename(folder)
            for other in CACHE.iterdir():
                if other.is_dir() and (other / "made").exists() and other != folder:
                    _remove(other)
    return Tree(folder / "root", folder / "debs")


def _make(folder: Path) -> None:
    root, debs = folder / "root", folder / "debs"
    debs.mkdir(parents=True)
    options = ["--variant=minbase", f"--include={','.join(INCLUDED)}", SUITE, str(root)]
    _run("debootstrap", *options, *_mirror())
    _download(root, debs)
    _index(root, debs)
    _settle(root)
    (folder / "made").touch()


def _mirror() -> list[str]:
    """The mirror that this machine's own apt uses, if it is one of the same suite; else debootstrap's default."""
    found = subprocess.run(
        ["apt-get", "indextargets", "--format", "$(SITE)", f"Codename: {SUITE}", "Component: main", "Origin: Debian"],
        capture_output=True, text=True, check=False,
    ).stdout.split()  # fmt: skip
    return found[:1]


def _download(root: Path, debs: Path) -> None:
    """Fetch `OFFERED` and what it needs beyond the tree, with the tree's own apt."""
    with _mounted(root):
        shutil.copy("/etc/resolv.conf", root / "etc/resolv.conf")
        _chroot(root, "apt-get", "clean")
        _chroot(root, "apt-get", "-qq", "update")
        _chroot(root, "apt-get", "-qq", "--no-install-recommends", "--download-only", "install", "-y", *OFFERED)
    for path in (root / "var/cache/apt/archives").glob("*.deb"):
        path.rename(debs / path.name.replace("%3a", "."))


def _index(root: Path, debs: Path) -> None:
    """Write `Packages`, the index of a flat repository."""
    entries = []
    for path in sorted(debs.glob("*.deb")):
        fields = _run("dpkg-deb", "--field", str(path)).rstrip()
        content = path.read_bytes()
        digest = hashlib.sha256(content).hexdigest()
        entries.append(f"{fields}\nFilename: ./{path.name}\nSize: {len(content)}\nSHA256: {digest}\n")
    (debs / "Packages").write_text("\n".join(entries), encoding="utf-8")


def _settle(root: Path) -> None:
    """What is the same on every host: user, sshd, sources of apt."""
    for name in ("etc/resolv.conf", "etc/machine-id"):
        (root / name).unlink(missing_ok=True)
    (root / "etc/machine-id").touch()
    for path in (root / "etc/ssh").glob("ssh_host_*"):
        path.unlink()
    for path in (root / "var/lib/apt/lists").glob("*_*"):
        path.unlink()
    (root / "etc/apt/sources.list").write_text(f"deb [trusted=yes] file:{REPOSITORY} ./\n", encoding="utf-8")
    (root / "srv/debs").mkdir(parents=True)
    (root / "srv/wheels").mkdir()
    _chroot(root, "useradd", "--create-home", "--shell", "/bin/bash", USER)
    sudoers = root / "etc/sudoers.d/ops"
    sudoers.write_text(f"{USER} ALL=(ALL) NOPASSWD: ALL\n", encoding="utf-8")
    sudoers.chmod(0o440)
    (root / "etc/ssh/sshd_config.d/hosts.conf").write_text("PasswordAuthentication no\nUseDNS no\n", encoding="utf-8")
    _chroot(root, "systemctl", "mask", *_MASKED)


def _chroot(root: Path, *command: str) -> str:
    environment = ["env", "-i", "PATH=/usr/sbin:/usr/bin:/sbin:/bin", "DEBIAN_FRONTEND=noninteractive", "LC_ALL=C"]
    return _run("chroot", str(root), *environment, *command)


@contextlib.contextmanager
def _mounted(root: Path) -> Iterator[None]:
    _run("mount", "-t", "proc", "proc", str(root / "proc"))
    try:
        yield
    finally:
        _run("umount", str(root / "proc"))


def _run(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    except OSError as error:
        raise TreeFailed(f"{command[0]}: {error.strerror}") from error
    if done.returncode:
        words = (done.stderr or done.stdout).strip().splitlines()[-3:]
        raise TreeFailed(f"{' '.join(command)[:200]}: {' | '.join(words)}")
    return done.stdout


def _remove(folder: Path) -> None:
    """A half-made tree too, with what debootstrap left mounted in it."""
    mounted = [line.split()[1] for line in Path("/proc/self/mounts").read_text(encoding="utf-8").splitlines()]
    for place in sorted((place for place in mounted if place.startswith(f"{folder}/")), reverse=True):
        subprocess.run(["umount", "--lazy", place], check=True)
    if folder.exists():
        shutil.rmtree(folder)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
