"""What an authority issues: what a certificate says, what is refused, the same request twice; openssl's opinion."""

from __future__ import annotations

import datetime
import subprocess
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from muster.pki.authority import Authority
from shared import certificates
from shared.errors import UserError
from tests.unit.pki.authority_rig import NOW, day, load, request
from tests.unit.pki.authority_rig import authority as authority  # a fixture


def openssl(*arguments: str) -> str:
    done = subprocess.run(["openssl", *arguments], capture_output=True, text=True, timeout=60, check=False)
    return done.stdout + done.stderr


def verified(authority: Authority, certificate: Path, purpose: str, at: datetime.datetime = NOW) -> str:
    """What `openssl verify` says, the revocation list included, as strictly as it can."""
    return openssl(
        "verify", "-x509_strict", "-crl_check", "-purpose", purpose, "-attime", str(int(at.timestamp())),
        "-CAfile", str(authority.cafile), "-CRLfile", str(authority.crlfile), str(certificate),
    )  # fmt: skip


def test_openssl_agrees_with_what_is_issued(authority: Authority) -> None:
    device = authority.sign("edge-01", request("edge-01"), "device", NOW).certificate
    server = authority.issue("broker-1", "server", NOW, hosts=("broker.example", "10.0.0.1")).certificate
    assert verified(authority, device, "sslclient") == f"{device}: OK\n"
    assert verified(authority, server, "sslserver") == f"{server}: OK\n"
    assert "unsuitable certificate purpose" in verified(authority, device, "sslserver")
    assert "unsuitable certificate purpose" in verified(authority, server, "sslclient")
    assert "certificate has expired" in verified(authority, device, "sslclient", day(90))
    assert "not yet valid" in verified(authority, device, "sslclient", day(-1))
    for host, told in (("broker.example", "OK"), ("other.example", "hostname mismatch")):
        assert told in openssl("verify", "-CAfile", str(authority.cafile), "-verify_hostname", host, str(server))


def test_openssl_agrees_with_what_is_revoked(authority: Authority) -> None:
    certificate = authority.sign("edge-01", request("edge-01"), "device", NOW).certificate
    other = authority.sign("edge-02", request("edge-02"), "device", NOW).certificate
    authority.revoke("edge-01", NOW, reason="key_compromise")
    assert "certificate revoked" in verified(authority, certificate, "sslclient")
    assert verified(authority, other, "sslclient") == f"{other}: OK\n"
    assert "CRL has expired" in verified(authority, other, "sslclient", day(90.1))
    told = openssl("crl", "-in", str(authority.crlfile), "-noout", "-text", "-CAfile", str(authority.cafile))
    assert "verify OK" in told
    assert "Key Compromise" in told
    assert f"Serial Number: {authority.register.entries[0].serial.upper()}" in told.replace("Number: 0", "Number: ")


def test_a_request_of_openssl_is_answered(authority: Authority, tmp_path: Path) -> None:
    """For a broker's machine that has nothing of Muster."""
    files = ["-keyout", str(tmp_path / "server.key"), "-out", str(tmp_path / "server.csr")]
    curve = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-subj", "/CN=server"]
    assert "error" not in openssl("req", *curve, *files).lower()
    data = (tmp_path / "server.csr").read_bytes()
    issued = authority.sign("server", data, "server", NOW, hosts=("broker.example",))
    assert verified(authority, issued.certificate, "sslserver") == f"{issued.certificate}: OK\n"


def test_a_certificate_says_what_it_is_for_and_no_more(authority: Authority) -> None:
    device = load(authority.sign("edge-01", request("edge-01"), "device", NOW))
    assert device.subject.rfc4514_string() == "CN=edge-01"
    assert device.not_valid_after_utc == day(90)
    uses = {"device": ExtendedKeyUsageOID.CLIENT_AUTH, "server": ExtendedKeyUsageOID.SERVER_AUTH}
    server = load(authority.issue("broker-1", "server", NOW, hosts=("broker.example", "10.0.0.1")))
    for certificate, use in ((device, uses["device"]), (server, uses["server"])):
        extensions = certificate.extensions
        assert list(extensions.get_extension_for_class(x509.ExtendedKeyUsage).value) == [use]
        assert not extensions.get_extension_for_class(x509.BasicConstraints).value.ca
        usage = extensions.get_extension_for_class(x509.KeyUsage)
        assert usage.critical and usage.value.digital_signature and not usage.value.key_cert_sign
    names = server.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["broker.example"]
    assert [str(address) for address in names.get_values_for_type(x509.IPAddress)] == ["10.0.0.1"]
    with pytest.raises(x509.ExtensionNotFound):
        device.extensions.get_extension_for_class(x509.SubjectAlternativeName)


def test_of_a_request_nothing_but_the_key_is_taken(authority: Authority) -> None:
    """A device that asks to be an authority, the broker and another organization stays a device."""
    key = certificates.new_key()
    attributes = [(NameOID.ORGANIZATION_NAME, "admins"), (NameOID.COMMON_NAME, "edge-01")]
    subject = x509.Name([x509.NameAttribute(oid, value) for oid, value in attributes])
    builder = x509.CertificateSigningRequestBuilder().subject_name(subject)
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
    builder = builder.add_extension(x509.SubjectAlternativeName([x509.DNSName("broker.example")]), critical=False)
    builder = builder.add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
    data = builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)
    certificate = load(authority.sign("edge-01", data, "device", NOW))
    assert certificate.subject.rfc4514_string() == "CN=edge-01"
    assert not certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    uses = list(certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value)
    assert uses == [ExtendedKeyUsageOID.CLIENT_AUTH]
    assert certificate.public_key() == key.public_key()
    assert len(list(certificate.extensions)) == 5


NAMES_35 = [
    "edge/01", "edge+01", "edge#01", "edge 01", "Edge-01", "EDGE", "e" * 64, "e" * 100, "e", "", "-edge", "edge_01",
    "edge.01", "edge-01/up", "edge-01\n", "edge-01\x00", "édge", "%u", "edge-01\u200b",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES_35)
def test_case_35_a_common_name_that_is_no_device_id_is_refused(authority: Authority, name: str) -> None:
    """In the request, and as the operator's word."""
    with pytest.raises(UserError, match="^name .*: use 2 to 63 of a-z, 0-9 and '-'"):
        authority.sign(name, request("edge-01"), "device", NOW)
    with pytest.raises(UserError, match="^request of edge-01: common name .*: use 2 to 63 of a-z"):
        authority.sign("edge-01", request(name), "device", NOW)
    with pytest.raises(UserError, match="use 2 to 63 of a-z"):
        authority.issue(name, "device", NOW)
    assert authority.register.entries == ()
    assert not (authority.folder / "issued").exists()


@pytest.mark.parametrize("name", ["ed", "edge-01", "e" * 63, "9-", "coord-1-top"])
def test_case_35_a_device_id_is_taken(authority: Authority, name: str) -> None:
    certificate = load(authority.sign(name, request(name), "device", NOW))
    assert certificates.name_of(certificate, "certificate") == name


def weak(kind: str) -> bytes:
    keys = {
        "rsa-2048": lambda: rsa.generate_private_key(65537, 2048),
        "p-192": lambda: ec.generate_private_key(ec.SECP224R1()),
        "k1": lambda: ec.generate_private_key(ec.SECP256K1()),
        "ed25519": ed25519.Ed25519PrivateKey.generate,
    }
    return request("edge-01", keys[kind]())


def forged() -> bytes:
    """A request for a key that its maker does not have: a byte of the signature is another."""
    made = x509.load_pem_x509_csr(request("edge-01"))
    data = bytearray(made.public_bytes(serialization.Encoding.DER))
    data[-1] ^= 1
    return x509.load_der_x509_csr(bytes(data)).public_bytes(serialization.Encoding.PEM)


def nameless() -> bytes:
    builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
    return builder.sign(certificates.new_key(), hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


def test_a_request_that_is_none_or_weak_is_refused(authority: Authority) -> None:
    two = (x509.NameAttribute(NameOID.COMMON_NAME, "edge-02"),)
    cases = [
        (b"", "no certificate signing request in PEM"),
        (b"-----BEGIN CERTIFICATE REQUEST-----\nAAAA\n-----END CERTIFICATE REQUEST-----\n", "no certificate signing"),
        (authority.cafile.read_bytes(), "no certificate signing request in PEM"),
        (request("edge-02"), "it asks to be edge-02"),
        (request("edge-01", more=two), "2 common names, expected one"),
        (nameless(), "0 common names, expected one"),
        (forged(), "not signed by its own key|no certificate signing request"),
        *((weak(kind), "use a key on P-256 or P-384, or RSA") for kind in ("rsa-2048", "p-192", "k1", "ed25519")),
        (request("edge-01", certificates.read_key((authority.folder / "ca.key").read_bytes(), "ca")), "its key is the"),
    ]
    for data, told in cases:
        with pytest.raises(UserError, match=told):
            authority.sign("edge-01", data, "device", NOW)
    assert authority.register.entries == ()


def test_strong_keys_of_other_kinds_are_taken(authority: Authority) -> None:
    for name, key in (
        ("edge-01", ec.generate_private_key(ec.SECP384R1())),
        ("edge-02", rsa.generate_private_key(65537, 3072)),
    ):
        certificate = authority.sign(name, request(name, key), "device", NOW).certificate
        assert verified(authority, certificate, "sslclient") == f"{certificate}: OK\n"


def test_rules_of_the_register_hold_on_disk(authority: Authority) -> None:
    key = certificates.new_key()
    authority.sign("edge-01", request("edge-01", key), "device", NOW)
    with pytest.raises(UserError, match="has a certificate until"):
        authority.sign("edge-01", request("edge-01"), "device", NOW)
    with pytest.raises(UserError, match="its key is edge-01's too"):
        authority.sign("edge-02", request("edge-02", key), "device", NOW)
    renewed = authority.sign("edge-01", request("edge-01"), "device", day(1), renew=True)
    assert load(renewed).not_valid_after_utc == day(91)
    assert [entry.name for entry in authority.register.entries] == ["edge-01", "edge-01"]
    assert f"{load(renewed).serial_number:x}" == authority.register.entries[1].serial


def test_a_request_that_was_answered_gets_the_same_certificate(authority: Authority) -> None:
    """Whoever was cut off on the way asks again."""
    data = request("edge-01")
    first = authority.sign("edge-01", data, "device", NOW)
    before = first.certificate.read_bytes()
    again = authority.sign("edge-01", data, "device", day(1))
    assert (again.entry, again.changed, first.changed) == (first.entry, False, True)
    assert first.certificate.read_bytes() == before
    first.certificate.unlink()  # killed between register and certificate
    authority.sign("edge-01", data, "device", day(1))
    assert f"{load(first).serial_number:x}" == first.entry.serial
    assert len(authority.register.entries) == 1
    with pytest.raises(UserError, match="given to a device"):
        authority.sign("edge-01", data, "gate", day(1))
    authority.revoke("edge-01", day(2))
    with pytest.raises(UserError, match="its key was revoked"):
        authority.sign("edge-01", data, "device", day(2))
