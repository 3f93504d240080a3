"""What the authority signs, in X.509: its own certificate, those it issues, the revocation list."""

from __future__ import annotations

import datetime
import ipaddress
from collections.abc import Iterable

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.types import CertificatePublicKeyTypes, PrivateKeyTypes
from cryptography.x509.oid import NameOID

from muster.pki.register import SKEW, Entry, Reason, Register
from shared import certificates
from shared.errors import UserError

_FLAGS: dict[Reason, x509.ReasonFlags] = {
    "key_compromise": x509.ReasonFlags.key_compromise,
    "cessation_of_operation": x509.ReasonFlags.cessation_of_operation,
    "superseded": x509.ReasonFlags.superseded,
    "certificate_hold": x509.ReasonFlags.certificate_hold,
}
"""An unspecified reason is told by saying none (RFC 5280, 5.3.1)."""


def new_serial() -> str:
    """A random serial number in hex."""
    return f"{x509.random_serial_number():x}"


def authority(fleet: str, key: ec.EllipticCurvePrivateKey, now: datetime.datetime, end: datetime.datetime) -> bytes:
    """The authority's own certificate, in PEM. It may sign certificates of machines, but no other authority."""
    name = _name(f"muster authority of {fleet}")
    identifier = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
    builder = x509.CertificateBuilder().issuer_name(name).subject_name(name).public_key(key.public_key())
    builder = builder.serial_number(x509.random_serial_number()).not_valid_before(now - SKEW).not_valid_after(end)
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    builder = builder.add_extension(_usage(signs=False), critical=True).add_extension(identifier, critical=False)
    return _pem(builder.sign(key, hashes.SHA256()))


class Signer:
    """An authority whose key is open."""

    def __init__(self, certificate: x509.Certificate, key: PrivateKeyTypes) -> None:
        self.key_digest = certificates.digest_of_key(certificate.public_key())
        self.until = certificate.not_valid_after_utc
        if not isinstance(key, ec.EllipticCurvePrivateKey) or (
            certificates.digest_of_key(key.public_key()) != self.key_digest
        ):
            raise UserError("ca.key is not the key of ca.crt")
        self._key = key
        self._name = certificate.subject
        identifier = certificate.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
        self._issuer = x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(identifier)

    def certificate(self, entry: Entry, key: CertificatePublicKeyTypes) -> bytes:
        """The certificate of an entry, in PEM. What a client's is for, a server's is not, and the other way round."""
        server = entry.role == "server"
        builder = x509.CertificateBuilder().issuer_name(self._name).subject_name(_name(entry.name)).public_key(key)
        builder = builder.serial_number(int(entry.serial, 16))
        builder = builder.not_valid_before(entry.not_before).not_valid_after(entry.not_after)
        usage = x509.ExtendedKeyUsage([certificates.SERVER if server else certificates.CLIENT])
        builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        builder = builder.add_extension(_usage(signs=True), critical=True).add_extension(usage, critical=False)
        builder = builder.add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
        builder = builder.add_extension(self._issuer, critical=False)
        if entry.hosts:
            names = x509.SubjectAlternativeName([_host(host) for host in entry.hosts])
            builder = builder.add_extension(names, critical=False)
        return _pem(builder.sign(self._key, hashes.SHA256()))

    def revocations(self, register: Register, entries: Iterable[Entry]) -> bytes:
        """The revocation list of `entries` with the register's number and times, in PEM."""
        assert register.crl_from is not None and register.crl_until is not None
        builder = x509.CertificateRevocationListBuilder().issuer_name(self._name)
        builder = builder.last_update(register.crl_from).next_update(register.crl_until)
        builder = builder.add_extension(x509.CRLNumber(register.crl_number), critical=False)
        builder = builder.add_extension(self._issuer, critical=False)
        for entry in entries:
            builder = builder.add_revoked_certificate(_revoked(entry))
        return _pem(builder.sign(self._key, hashes.SHA256()))


def _revoked(entry: Entry) -> x509.RevokedCertificate:
    assert entry.revoked_at is not None
    builder = x509.RevokedCertificateBuilder().serial_number(int(entry.serial, 16))
    builder = builder.revocation_date(entry.revoked_at)
    if entry.reason in _FLAGS:
        builder = builder.add_extension(x509.CRLReason(_FLAGS[entry.reason]), critical=False)
    return builder.build()


def _usage(*, signs: bool) -> x509.KeyUsage:
    """`signs`: handshakes, as a machine does; else certificates and lists, as an authority does."""
    return x509.KeyUsage(
        digital_signature=signs, key_cert_sign=not signs, crl_sign=not signs, content_commitment=False,
        key_encipherment=False, data_encipherment=False, key_agreement=False, encipher_only=False, decipher_only=False,
    )  # fmt: skip


def _host(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _name(common: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common)])


def _pem(signed: x509.Certificate | x509.CertificateRevocationList) -> bytes:
    return signed.public_bytes(serialization.Encoding.PEM)
