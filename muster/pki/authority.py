"""An authority in a folder of its own: its key, the register, what it issued, the revocation list.

    ca.key         mode 0400, encrypted where there is a passphrase
    ca.crt         for every machine of the fleet
    crl.pem        for the broker
    register.json  every certificate ever issued, and what was revoked
    issued/        NAME.crt, the newest of each; NAME.key where the key was made here

Every file is written whole or not at all. The register comes first: what it does not know could not be revoked.
"""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
from cryptography.hazmat.primitives.asymmetric.types import CertificatePublicKeyTypes
from msgspec import structs

from muster.pki import register as rules
from muster.pki import signer as forms
from muster.pki.register import Entry, Reason, Register, Role, Terms, Wanted
from shared import certificates
from shared.errors import UserError
from shared.files import write_owned
from shared.ids import check_name

_BRIEF = datetime.timedelta(minutes=10)
_LEAST_PASSPHRASE = 12


@dataclass(frozen=True)
class Issued:
    """A certificate that was just issued, and where it lies. `key`: where its key was made here, that lies there."""

    entry: Entry
    certificate: Path
    key: Path | None = None
    changed: bool = True
    """False: it was issued before, to the same request."""


@dataclass(frozen=True)
class Rotation:
    """What was renewed; and of what was not, by name, the reason."""

    renewed: list[Issued]
    refused: dict[str, str]


class Authority:
    """The authority in `folder`. Its methods may be called by several processes at once: they take turns.

    `passphrase` opens its key where that is encrypted. Raises `UserError` where there is none.
    """

    def __init__(self, folder: Path, passphrase: bytes = b"") -> None:
        self.folder = folder
        self._passphrase = passphrase
        if not (folder / "register.json").is_file():
            raise UserError(f"{folder}: no authority here: make one with muster pki init, or name its --folder")

    @classmethod
    def create(
        cls, folder: Path, fleet: str, now: datetime.datetime, *, terms: Terms | None = None, passphrase: bytes = b""
    ) -> Authority:
        """A new one, with an empty revocation list. Raises `UserError` where there is one already."""
        terms = terms or Terms()
        check_name(fleet, "fleet")
        rules.check_terms(terms)
        if passphrase and len(passphrase) < _LEAST_PASSPHRASE:
            raise UserError(f"the passphrase is short: use at least {_LEAST_PASSPHRASE} bytes")
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise UserError(f"{folder}: there is something already; an authority needs a folder of its own")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            folder.chmod(0o700)
            key = certificates.new_key()
            write_owned(folder / "ca.key", certificates.key_pem(key, passphrase), mode=0o400)
            end = now + datetime.timedelta(days=terms.authority_days)
            write_owned(folder / "ca.crt", forms.authority(fleet, key, now, end), mode=0o644)
            write_owned(folder / "register.json", _encoded(Register(fleet=fleet, terms=terms)), mode=0o600)
        except OSError as error:
            raise UserError(f"{folder}: can't be written: {error.strerror}") from error
        made = cls(folder, passphrase)
        made.refresh(now)
        return made

    @property
    def cafile(self) -> Path:
        """The authority's certificate."""
        return self.folder / "ca.crt"

    @property
    def crlfile(self) -> Path:
        """The revocation list."""
        return self.folder / "crl.pem"

    @property
    def register(self) -> Register:
        """What is written there now."""
        path = self.folder / "register.json"
        try:
            return msgspec.json.decode(path.read_bytes(), type=Register)
        except OSError as error:
            raise UserError(f"{path}: can't be read: {error.strerror}") from error
        except msgspec.MsgspecError as error:
            raise UserError(f"{path}: damaged: {error}; take it from your backup") from error

    def certificate(self, name: str) -> Path:
        """Where the newest certificate of `name` lies."""
        return self.folder / "issued" / f"{name}.crt"

    def sign(
        self, name: str, request: bytes, role: Role, now: datetime.datetime, *, hosts: Sequence[str] = (),
        renew: bool = False,
    ) -> Issued:  # fmt: skip
        """Answer a node's request. Only its key is taken: name, role and hosts are the operator's word.

        A request that was answered before gets the same certificate while that is good. Raises `UserError` where the
        request is not of `name`, its key is weak or another's, or the name is taken.
        """
        key = self._requested(name, request)
        wanted = Wanted(
            name=name, role=role, hosts=rules.checked_hosts(hosts), key=certificates.digest_of_key(key), renew=renew
        )
        with self._turn() as signer:
            answered = rules.answered(self.register, wanted, now)
            if answered is None:
                return self._issue(signer, wanted, key, now)
            if not self._holds(answered):
                self._write(self.certificate(name), signer.certificate(answered, key))
            return Issued(answered, self.certificate(name), changed=False)

    def issue(
        self, name: str, role: Role, now: datetime.datetime, *, hosts: Sequence[str] = (), renew: bool = False
    ) -> Issued:
        """A certificate with a key made here, for what runs beside the authority: the key is not carried anywhere."""
        key = certificates.new_key()
        digest = certificates.digest_of_key(key.public_key())
        hosts = rules.checked_hosts(hosts)
        wanted = Wanted(name=name, role=role, hosts=hosts, key=digest, kept=True, renew=renew)
        with self._turn() as signer:
            return self._issue(signer, wanted, key.public_key(), now, certificates.key_pem(key))

    def rotate(
        self, now: datetime.datetime, *, only: Sequence[str] = (), requests: Mapping[str, bytes] | None = None
    ) -> Rotation:
        """Renew what is due or sent a request, or `only` these names, due or not; then the revocation list.

        A key made here is made anew. A node's new key comes by `requests`; without one its certificate alone is new.
        What one node sent does not stop the others.
        """
        given = requests or {}
        names = only or sorted({entry.name for entry in rules.due(self.register, now)} | given.keys())
        renewed: list[Issued] = []
        refused: dict[str, str] = {}
        self.refresh(now)  # first: it needs the authority's key, and without that nothing can be renewed
        for name in names:
            try:
                renewed.append(self._renewed(name, given.get(name), now))
            except UserError as error:
                refused[name] = str(error)
        return Rotation(renewed, refused)

    def revoke(
        self, name: str, now: datetime.datetime, *, reason: Reason = "unspecified", only_old: bool = False
    ) -> list[Entry]:
        """Withdraw all certificates of `name` (`only_old`: but the newest), and write the list."""
        with self._turn() as signer:
            changed, revoked = rules.revoke(self.register, name, now, reason, only_old=only_old)
            self._save(changed)
            self._list(signer, now)
        return revoked

    def resume(self, name: str, now: datetime.datetime) -> list[Entry]:
        """Take a suspension of `name` (a revocation for `rules.HOLD`) back, and write the list."""
        with self._turn() as signer:
            changed, resumed = rules.resume(self.register, name)
            self._save(changed)
            self._list(signer, now)
        return resumed

    def refresh(self, now: datetime.datetime) -> Path:
        """Write the revocation list anew, so that it does not expire. Returns its path."""
        with self._turn() as signer:
            self._list(signer, now)
        return self.crlfile

    def brief(self, name: str, now: datetime.datetime) -> tuple[bytes, bytes]:
        """Certificate and key in the name of `name` for a single connection; revoked with the next list."""
        entry = next((one for one in reversed(self.register.entries) if one.name == name), None)
        if entry is None or entry.role == "server":
            raise UserError(f"{name}: no client of this name was enrolled here")
        key = certificates.new_key()
        with self._turn() as signer:
            serial = forms.new_serial()
            entry = structs.replace(
                entry, serial=serial, key=certificates.digest_of_key(key.public_key()), kept=False,
                not_before=now.replace(microsecond=0) - rules.SKEW, not_after=now.replace(microsecond=0) + _BRIEF,
                revoked_at=now.replace(microsecond=0), reason="superseded",
            )  # fmt: skip
            found = self.register
            self._save(structs.replace(found, entries=(*found.entries, entry)))
            return signer.certificate(entry, key.public_key()), certificates.key_pem(key)

    def _requested(self, name: str, request: bytes) -> CertificatePublicKeyTypes:
        check_name(name, "name")
        asked = certificates.read_request(request, f"request of {name}")
        found = certificates.name_of(asked, f"request of {name}")
        if found != name:
            raise UserError(f"request of {name}: it asks to be {found}")
        key = asked.public_key()
        certificates.check_strength(key, f"request of {name}")
        return key

    def _holds(self, entry: Entry) -> bool:
        """Whether its certificate lies there: whoever was killed after writing the register has not written it."""
        path = self.certificate(entry.name)
        if not path.exists():
            return False
        return certificates.serial_of(certificates.read_certificate(self._read(path), str(path))) == entry.serial

    def _renewed(self, name: str, request: bytes | None, now: datetime.datetime) -> Issued:
        entry = rules.current(self.register, name)
        if entry is None:
            raise UserError(f"{name}: nothing to renew: it has no certificate that was not revoked")
        if request is not None:
            return self.sign(entry.name, request, entry.role, now, hosts=entry.hosts, renew=True)
        if entry.kept:
            return self.issue(entry.name, entry.role, now, hosts=entry.hosts, renew=True)
        path = self.certificate(entry.name)
        certificate = certificates.read_certificate(self._read(path), str(path))
        key = certificate.public_key()
        if certificates.digest_of_key(key) != entry.key:
            raise UserError(f"{path}: not the newest that was issued: sign a new request of {entry.name} with --renew")
        wanted = Wanted(name=entry.name, role=entry.role, hosts=entry.hosts, key=entry.key, renew=True)
        with self._turn() as signer:
            return self._issue(signer, wanted, key, now)

    def _issue(
        self,
        signer: forms.Signer,
        wanted: Wanted,
        key: CertificatePublicKeyTypes,
        now: datetime.datetime,
        key_pem: bytes = b"",
    ) -> Issued:
        if wanted.key == signer.key_digest:
            raise UserError(f"{wanted.name}: its key is the authority's: make a new one on the node")
        before = self.register
        rules.admit(before, wanted, now)
        changed, entry = rules.add(before, wanted, forms.new_serial(), now, signer.until)
        self._save(changed)
        path = self.certificate(wanted.name)
        self._write(path, signer.certificate(entry, key))
        if not key_pem:
            path.with_suffix(".key").unlink(missing_ok=True)  # the node has its own now
            return Issued(entry, path)
        self._write(path.with_suffix(".key"), key_pem, mode=0o400)
        return Issued(entry, path, path.with_suffix(".key"))

    def _list(self, signer: forms.Signer, now: datetime.datetime) -> None:
        changed = rules.next_list(self.register, now)
        self._save(changed)
        self._write(self.crlfile, signer.revocations(changed, rules.listed(changed, now)))

    @contextlib.contextmanager
    def _turn(self) -> Iterator[forms.Signer]:
        """Alone with the folder, and its key open."""
        try:
            lock = (self.folder / "lock").open("ab")
        except OSError as error:
            raise UserError(f"{self.folder}: can't be written: {error.strerror}") from error
        with lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            path = self.folder / "ca.key"
            if path.exists() and path.stat().st_mode & 0o077:
                raise UserError(f"{path}: others may read it: chmod 400 {path}")
            key = certificates.read_key(self._read(path), str(path), self._passphrase)
            yield forms.Signer(certificates.read_certificate(self._read(self.cafile), str(self.cafile)), key)

    def _save(self, register: Register) -> None:
        self._write(self.folder / "register.json", _encoded(register), mode=0o600)

    def _read(self, path: Path) -> bytes:
        try:
            return path.read_bytes()
        except OSError as error:
            raise UserError(f"{path}: can't be read: {error.strerror}") from error

    def _write(self, path: Path, data: bytes, *, mode: int = 0o644) -> None:
        try:
            write_owned(path, data, mode=mode)
        except OSError as error:
            raise UserError(f"{path}: can't be written: {error.strerror}") from error


def read_passphrase(file: str, environment: Mapping[str, str] = os.environ) -> bytes:
    """The passphrase from a file, else from `MUSTER_PKI_PASSPHRASE`, else none. Never from the command line."""
    if not file:
        return environment.get("MUSTER_PKI_PASSPHRASE", "").encode()
    try:
        found = Path(file).read_bytes().strip(b"\r\n")
    except OSError as error:
        raise UserError(f"--passphrase-file {file}: {error.strerror}") from error
    if not found:
        raise UserError(f"--passphrase-file {file}: it is empty")
    return found


def _encoded(register: Register) -> bytes:
    return msgspec.json.format(msgspec.json.encode(register), indent=1) + b"\n"
