"""Keys, requests and certificates, as every machine of a fleet has them. Files and clocks are the callers'."""

from __future__ import annotations

import datetime
import hashlib
import warnings

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes, PublicKeyTypes
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from shared.errors import UserError
from shared.ids import check_name

SERVER = ExtendedKeyUsageOID.SERVER_AUTH
CLIENT = ExtendedKeyUsageOID.CLIENT_AUTH
_CURVES = (ec.SECP256R1, ec.SECP384R1)
_RSA_BITS = 3072
_UNREADABLE = (ValueError, TypeError, UnsupportedAlgorithm)
"""What the library raises for bytes that are none of what was expected, or of a kind it does not know."""


def new_key() -> ec.EllipticCurvePrivateKey:
    """A fresh key on P-256, which every TLS 1.3 stack speaks."""
    return ec.generate_private_key(ec.SECP256R1())


def key_pem(key: PrivateKeyTypes, passphrase: bytes = b"") -> bytes:
    """The key as PKCS#8, encrypted where there is a passphrase."""
    encryption = serialization.BestAvailableEncryption(passphrase) if passphrase else serialization.NoEncryption()
    return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption)


def read_key(data: bytes, source: str, passphrase: bytes = b"") -> PrivateKeyTypes:
    """The private key in PEM. Raises `UserError` that tells nothing of what is in it."""
    encrypted = b"ENCRYPTED" in data
    if encrypted and not passphrase:
        raise UserError(f"{source}: the key is encrypted, and no passphrase was given")
    try:
        return serialization.load_pem_private_key(data, passphrase if encrypted else None)
    except _UNREADABLE:
        raise UserError(f"{source}: {'the passphrase is wrong' if encrypted else 'no private key in PEM'}") from None


def read_certificate(data: bytes, source: str) -> x509.Certificate:
    """The first certificate in PEM. Raises `UserError`."""
    return read_certificates(data, source)[0]


def read_certificates(data: bytes, source: str) -> list[x509.Certificate]:
    """All certificates in PEM, at least one: of authorities there are two while one follows the other."""
    try:
        return x509.load_pem_x509_certificates(data)
    except _UNREADABLE as error:
        raise UserError(f"{source}: no certificate in PEM") from error


def read_request(data: bytes, source: str) -> x509.CertificateSigningRequest:
    """A signing request in PEM, signed by the key that it names. Raises `UserError`."""
    try:
        request = x509.load_pem_x509_csr(data)
        valid = request.is_signature_valid
    except (*_UNREADABLE, InvalidSignature) as error:
        raise UserError(f"{source}: no certificate signing request in PEM") from error
    if not valid:
        raise UserError(f"{source}: the request is not signed by its own key")
    return request


def make_request(name: str, key: ec.EllipticCurvePrivateKey) -> bytes:
    """A signing request in PEM for `name`, with no more in it: what the certificate is for is the operator's to say."""
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, check_name(name, "name"))])
    request = x509.CertificateSigningRequestBuilder().subject_name(subject).sign(key, hashes.SHA256())
    return request.public_bytes(serialization.Encoding.PEM)


def name_of(holder: x509.Certificate | x509.CertificateSigningRequest, source: str) -> str:
    """The common name of the subject, which must be one, and a legal name. Raises `UserError`."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a name that is too long: we say so ourselves, in one line
            subject = holder.subject
    except _UNREADABLE as error:
        raise UserError(f"{source}: a subject that can't be read") from error
    found = [str(attribute.value) for attribute in subject.get_attributes_for_oid(NameOID.COMMON_NAME)]
    if len(found) != 1:
        raise UserError(f"{source}: {len(found)} common names, expected one")
    return check_name(found[0], f"{source}: common name")


def check_strength(key: PublicKeyTypes, source: str) -> None:
    """Raises `UserError` for a key that is weak, or of a kind that not every TLS 1.3 stack speaks."""
    if isinstance(key, ec.EllipticCurvePublicKey) and isinstance(key.curve, _CURVES):
        return
    if isinstance(key, rsa.RSAPublicKey) and key.key_size >= _RSA_BITS:
        return
    raise UserError(f"{source}: use a key on P-256 or P-384, or RSA of at least {_RSA_BITS} bits")


def digest_of_key(key: PublicKeyTypes) -> str:
    """sha256 of a public key: equal where the keys are."""
    form = serialization.PublicFormat.SubjectPublicKeyInfo
    return hashlib.sha256(key.public_bytes(serialization.Encoding.DER, form)).hexdigest()


def serial_of(certificate: x509.Certificate) -> str:
    """The serial number in hex, as `openssl x509 -serial` prints it but for the case."""
    return f"{certificate.serial_number:x}"


def fault(certificate: x509.Certificate, name: str, authorities: list[x509.Certificate], now: datetime.datetime) -> str:
    """Why `certificate` is not a good one of `name` from one of `authorities` at `now`; "": it is.

    Whether it was revoked is not seen here.
    """
    found = name_of(certificate, "certificate")
    if found != name:
        return f"it is {found}'s"
    if not is_issued(certificate, authorities):
        return "no authority given here issued it"
    if now < certificate.not_valid_before_utc:
        return f"it is valid from {_day(certificate.not_valid_before_utc)}; here it is {_day(now)}: set the clock"
    if now >= certificate.not_valid_after_utc:
        return f"it expired at {_day(certificate.not_valid_after_utc)}; here it is {_day(now)}"
    return ""


def is_issued(certificate: x509.Certificate, authorities: list[x509.Certificate]) -> bool:
    """Whether one of `authorities` signed it."""
    return any(_issued(certificate, authority) for authority in authorities)


def _issued(certificate: x509.Certificate, authority: x509.Certificate) -> bool:
    try:
        certificate.verify_directly_issued_by(authority)
    except (ValueError, TypeError, InvalidSignature):
        return False
    return True


def _day(moment: datetime.datetime) -> str:
    return f"{moment:%Y-%m-%d %H:%M} UTC"
