"""Machines of an emulated fleet, enrolled as real ones are: each makes its own key, the authority answers requests."""

from __future__ import annotations

import datetime
from pathlib import Path

from muster.pki.authority import Authority
from muster.pki.register import Role
from shared.enrolment import Enrolment
from shared.files import write_owned

BROKER = "server"
LOCAL = ("localhost", "127.0.0.1")


def now() -> datetime.datetime:
    """The time, as certificates have it."""
    return datetime.datetime.now(datetime.timezone.utc)


class Machines:
    """An authority in `folder/authority`, and a folder beside it for each machine that it enrolled."""

    def __init__(self, folder: Path, fleet: str) -> None:
        self.folder = folder
        self.authority = Authority.create(folder / "authority", fleet, now())

    def enrol(self, name: str, role: Role = "device", *, hosts: tuple[str, ...] = ()) -> Enrolment:
        """The files of a machine of this name, enrolled."""
        machine = Enrolment(self.folder / name, name)
        machine.request(now())
        issued = self.authority.sign(name, machine.request_file.read_bytes(), role, now(), hosts=hosts)
        machine.install(issued.certificate.read_bytes(), self.authority.cafile.read_bytes(), now())
        return machine

    def broker(self) -> Path:
        """A broker's folder: `ca.crt`, `server.crt`, `server.key` and `crl.pem`."""
        folder = self.enrol(BROKER, "server", hosts=LOCAL).folder
        self.publish_revocations()
        return folder

    def publish_revocations(self) -> None:
        """Bring the present revocation list to the broker; it takes it when it is told to reload."""
        write_owned(self.folder / BROKER / "crl.pem", self.authority.crlfile.read_bytes(), mode=0o644)


def files(machine: Enrolment) -> dict[str, object]:
    """What `[broker]` of its settings says."""
    return {"cafile": str(machine.cafile), "certfile": str(machine.certfile), "keyfile": str(machine.keyfile)}
