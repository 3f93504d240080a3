"""A throwaway certificate authority for tests and emulated fleets. Never for a real fleet: its key lies beside it."""

from __future__ import annotations

import datetime
import ipaddress
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from shared.ids import check_name

_DAY = datetime.timedelta(days=1)


class Authority:
    """Makes `ca.crt`, `server.crt`, `server.key` and `crl.pem` in `folder`, and client certificates on demand."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = _name(f"muster test authority {folder.name}")
        self._revoked: list[int] = []
        self._serials: dict[str, int] = {}
        constraints = x509.BasicConstraints(ca=True, path_length=0)
        builder = self._builder(self._name, self._key.public_key()).add_extension(constraints, critical=True)
        self._write("ca.crt", builder.sign(self._key, hashes.SHA256()))
        self._issue("server", server=True)
        self.revoke()

    @property
    def cafile(self) -> Path:
        """The authority's certificate."""
        return self.folder / "ca.crt"

    def client(self, name: str, *, days: int = 1) -> tuple[Path, Path]:
        """Certificate and key of a device or coordinator; CN = `name`. `days` below 0: expired already."""
        return self._issue(check_name(name, "client"), days=days)

    def revoke(self, *names: str) -> Path:
        """Write `crl.pem` with these clients and all revoked before."""
        self._revoked += [self._serials[name] for name in names]
        now = _now()
        builder = x509.CertificateRevocationListBuilder().issuer_name(self._name)
        builder = builder.last_update(now - _DAY).next_update(now + _DAY)
        for serial in self._revoked:
            entry = x509.RevokedCertificateBuilder().serial_number(serial).revocation_date(now - _DAY).build()
            builder = builder.add_revoked_certificate(entry)
        path = self.folder / "crl.pem"
        path.write_bytes(builder.sign(self._key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM))
        return path

    def _issue(self, name: str, *, server: bool = False, days: int = 1) -> tuple[Path, Path]:
        key = ec.generate_private_key(ec.SECP256R1())
        builder = self._builder(_name(name), key.public_key(), days)
        usage = ExtendedKeyUsageOID.SERVER_AUTH if server else ExtendedKeyUsageOID.CLIENT_AUTH
        builder = builder.add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
        if server:
            names = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
            builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
        certificate = builder.sign(self._key, hashes.SHA256())
        self._serials[name] = certificate.serial_number
        path = self._write(f"{name}.crt", certificate)
        key_path = self.folder / f"{name}.key"
        key_path.touch(0o600)
        key_path.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
        )
        return path, key_path

    def _builder(
        self, subject: x509.Name, public_key: ec.EllipticCurvePublicKey, days: int = 1
    ) -> x509.CertificateBuilder:
        end = _now() + days * _DAY
        builder = x509.CertificateBuilder().subject_name(subject).issuer_name(self._name).public_key(public_key)
        builder = builder.serial_number(x509.random_serial_number())
        return builder.not_valid_before(min(_now(), end) - _DAY).not_valid_after(end)

    def _write(self, name: str, certificate: x509.Certificate) -> Path:
        path = self.folder / name
        path.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        return path


def _name(common: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common)])


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.timezone.utc)
