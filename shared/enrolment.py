"""A machine's own side of the PKI: its key, which never leaves it, the request, and the certificate that comes back.

`muster-edge enroll` and `muster-coordinator enroll` are this module. It needs no more than the daemon does, and no
settings file: it runs on a bare machine, before any service is set up.

    NAME.key      the key of NAME.crt, mode 0400
    NAME.key.new  a renewal's key, until its certificate comes
    NAME.csr      the request, for the operator
    NAME.crt      the certificate
    ca.crt        the fleet's authority

Files belong to whom the folder belongs, so that a broker that gave up root can read its own.
"""

from __future__ import annotations

import argparse
import datetime
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec

from shared import certificates
from shared.errors import UserError
from shared.files import write_owned
from shared.ids import check_name

FOLDER = Path("/etc/muster/pki")
RENEW_AFTER = 2 / 3
"""Of its life a certificate may have behind it before `check` asks for a renewal: 60 of 90 days."""


@dataclass(frozen=True)
class Result:
    """What an enrolment came to: `state` is "requested", "enrolled" or "due" (for renewal)."""

    name: str
    state: str
    changed: bool
    request: str = ""
    """Path of the request that waits for its certificate."""
    until: datetime.datetime | None = None
    """When the certificate in use expires."""


class Enrolment:
    """The files of one name in a folder. Raises `UserError` for a name that may not be one."""

    def __init__(self, folder: Path, name: str) -> None:
        self.name = check_name(name, "name")
        self.folder = folder
        self.keyfile = folder / f"{name}.key"
        self.certfile = folder / f"{name}.crt"
        self.cafile = folder / "ca.crt"
        self.request_file = folder / f"{name}.csr"
        self._pending = folder / f"{name}.key.new"

    def request(self, now: datetime.datetime, *, renew: bool = False) -> Result:
        """Make the key, unless there is one, and its request. `renew`: a new key beside that of the certificate in use,
        as where that has expired.

        Called again before the certificate came, it changes nothing.
        """
        enrolled = self.certfile.exists()
        keyfile = self._pending if enrolled else self.keyfile
        if enrolled and not renew and not self._pending.exists():
            until = certificates.read_certificate(_read(self.certfile), str(self.certfile)).not_valid_after_utc
            if now < until:
                return Result(self.name, "enrolled", False, until=until)
        if keyfile.exists():
            key = certificates.read_key(_read(keyfile), str(keyfile))
        else:
            key = certificates.new_key()
            _write(keyfile, certificates.key_pem(key), mode=0o400)
        if not isinstance(key, ec.EllipticCurvePrivateKey):
            raise UserError(f"{keyfile}: not a key made here; make its request with what made it")
        changed = not self._requests(certificates.digest_of_key(key.public_key()))
        if changed:
            _write(self.request_file, certificates.make_request(self.name, key))
        return Result(self.name, "requested", changed, request=str(self.request_file))

    def install(self, signed: bytes, authority: bytes | None, now: datetime.datetime) -> Result:
        """Take the certificate that answers the request, and the authority's; None: that of before.

        Nothing is replaced unless all fits: key, name, authority, time. It may be called again after a power cut.
        """
        known = authority if authority is not None else _read(self.cafile)
        authorities = certificates.read_certificates(known, "the authority's certificate")
        certificate = certificates.read_certificate(signed, "the new certificate")
        keyfile = self._key_of(certificate)
        reason = certificates.fault(certificate, self.name, authorities, now)
        if reason:
            raise UserError(f"the new certificate of {self.name}: {reason}")
        before = [_read(path) if path.exists() else b"" for path in (self.cafile, self.certfile)]
        changed = before != [known, signed] or keyfile != self.keyfile
        if changed:
            _write(self.cafile, known)
            if keyfile != self.keyfile:
                # From here to the next line the two don't fit; whoever connects just then tries again.
                keyfile.replace(self.keyfile)
            _write(self.certfile, signed)
        if keyfile != self.keyfile or not self._pending.exists():
            self.request_file.unlink(missing_ok=True)  # it was answered
        return Result(self.name, "enrolled", changed, until=certificate.not_valid_after_utc)

    def check(self, now: datetime.datetime) -> Result:
        """Whether the files in use are whole, fit each other and are not about to expire. Raises `UserError` if not."""
        key = certificates.read_key(_read(self.keyfile), str(self.keyfile))
        mode = self.keyfile.stat().st_mode & 0o777
        if mode & 0o077:
            raise UserError(f"{self.keyfile}: others may read it: chmod 400 {self.keyfile}")
        certificate = certificates.read_certificate(_read(self.certfile), str(self.certfile))
        digests = {certificates.digest_of_key(one.public_key()) for one in (key, certificate)}
        if len(digests) > 1:
            raise UserError(f"{self.certfile}: not of {self.keyfile}: install the certificate again")
        authorities = certificates.read_certificates(_read(self.cafile), str(self.cafile))
        reason = certificates.fault(certificate, self.name, authorities, now)
        if reason:
            raise UserError(f"{self.certfile}: {reason}")
        begin, end = certificate.not_valid_before_utc, certificate.not_valid_after_utc
        due = now >= begin + RENEW_AFTER * (end - begin)
        return Result(self.name, "due" if due else "enrolled", False, until=end)

    def _requests(self, digest: str) -> bool:
        """Whether the request that lies there is for this name and key."""
        if not self.request_file.exists():
            return False
        try:
            request = certificates.read_request(_read(self.request_file), str(self.request_file))
            name = certificates.name_of(request, str(self.request_file))
        except UserError:
            return False
        return name == self.name and certificates.digest_of_key(request.public_key()) == digest

    def _key_of(self, certificate: x509.Certificate) -> Path:
        wanted = certificates.digest_of_key(certificate.public_key())
        for path in (self._pending, self.keyfile):
            if path.exists():
                key = certificates.read_key(_read(path), str(path))
                if certificates.digest_of_key(key.public_key()) == wanted:
                    return path
        raise UserError(
            f"the new certificate of {self.name}: not of a key in {self.folder}; was it made from this request?"
        )


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except OSError as error:
        raise UserError(f"{path}: can't be read: {error.strerror}") from error


def _write(path: Path, data: bytes, *, mode: int = 0o644) -> None:
    try:
        write_owned(path, data, mode=mode)
    except OSError as error:
        raise UserError(f"{path}: can't be written: {error.strerror}") from error


def main(program: str, argv: Sequence[str]) -> int:
    """The command. 0: done; 1: a checked certificate is due for renewal; 2: the operator has to change something."""
    parser = argparse.ArgumentParser(
        prog=f"{program} enroll",
        description="Make this machine's key and signing request, or install the certificate that answers it.",
        epilog=f"Then, at the operator's: muster pki sign NAME --request NAME.csr. Example: {program} enroll edge-07",
    )
    parser.add_argument("name", help="the device id, coordinator's name or other name that the certificate is for")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where key and certificate lie (%(default)s)")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--renew", action="store_true", help="make a new key and request while the present ones serve")
    what.add_argument("--install", type=Path, metavar="FILE", help="take the certificate that the operator signed")
    what.add_argument("--check", action="store_true", help="whether key and certificate are good; exit code 1: renew")
    parser.add_argument("--ca", type=Path, metavar="FILE", help="with --install: the authority's certificate, ca.crt")
    parser.add_argument("--json", action="store_true", help="print JSON")
    given = parser.parse_args(argv)
    now = datetime.datetime.now(datetime.timezone.utc)
    try:
        if given.ca and not given.install:
            raise UserError("--ca goes with --install")
        enrolment = Enrolment(given.folder, given.name)
        if given.install:
            result = enrolment.install(_read(given.install), _read(given.ca) if given.ca else None, now)
        else:
            result = enrolment.check(now) if given.check else enrolment.request(now, renew=given.renew)
    except UserError as error:
        print(f"{program} enroll: {error}", file=sys.stderr)  # noqa: T201 - the one line the operator sees
        return 2
    print(msgspec.json.encode(result).decode() if given.json else _said(result))  # noqa: T201 - its answer
    return 1 if result.state == "due" else 0


def _said(result: Result) -> str:
    if result.state == "requested":
        return f"{result.name}: sign {result.request} with muster pki sign, then call this with --install"
    until = f"{result.until:%Y-%m-%d}" if result.until else "?"
    return f"{result.name}: enrolled until {until}" + ("; it is time to renew" if result.state == "due" else "")
