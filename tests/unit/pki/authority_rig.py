"""An authority on disk, and requests for it to answer."""

from __future__ import annotations

import datetime
import warnings
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ed25519
from cryptography.x509.oid import NameOID

from muster.pki.authority import Authority, Issued
from shared import certificates

NOW = datetime.datetime.now(datetime.timezone.utc).replace(microsecond=0)


def day(number: float) -> datetime.datetime:
    """So many days from now."""
    return NOW + datetime.timedelta(days=number)


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    """A new one of fleet1."""
    return Authority.create(tmp_path / "pki", "fleet1", NOW)


def request(
    name: str, key: certificates.PrivateKeyTypes | None = None, *, more: tuple[x509.NameAttribute, ...] = ()
) -> bytes:
    """A request of `name` as another program might make it: the name is not checked."""
    made = key or certificates.new_key()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the names are bad on purpose
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name, _validate=False), *more])
    builder = x509.CertificateSigningRequestBuilder().subject_name(subject)
    digest = None if isinstance(made, ed25519.Ed25519PrivateKey) else hashes.SHA256()
    return builder.sign(made, digest).public_bytes(serialization.Encoding.PEM)  # type: ignore[arg-type]  # any kind


def load(issued: Issued) -> x509.Certificate:
    """The certificate as it is on disk."""
    return x509.load_pem_x509_certificate(issued.certificate.read_bytes())
