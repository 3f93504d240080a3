"""The files of the connection to the broker: there, closed to others, of one piece, good for how long."""

from __future__ import annotations

import os
from pathlib import Path

from cryptography import x509
from cryptography.x509.oid import NameOID

from edge_daemon.core.diagnosis import Keys, Window
from shared import certificates
from shared.errors import UserError
from shared.settings import BrokerSettings


def read(settings: BrokerSettings) -> Keys:
    """The keys as they lie on disk; nothing here raises for what is wrong with them."""
    named = {name: getattr(settings, name) for name in ("cafile", "certfile", "keyfile")}
    files = {name: path for name, path in named.items() if path}
    if settings.certfile and not settings.keyfile:
        files["keyfile"] = settings.certfile
    content: dict[str, bytes] = {}
    faults: dict[str, str] = {}
    for name, path in files.items():
        try:
            content[name] = Path(path).read_bytes()
        except OSError as error:
            faults[name] = f"{path}: {error.strerror}"
    authorities = _certificates(content, "cafile", files, faults)
    chain = _certificates(content, "certfile", files, faults)
    own = chain[0] if chain else None
    return Keys(
        files=files, faults=faults, exposed=_exposed(files.get("keyfile")),
        name=_name(own) if own else "",
        matches=_matches(own, content.get("keyfile"), files, faults),
        issued=own is None or not authorities or certificates.is_issued(own, authorities),
        windows=(
            *_windows(chain[:1], "this device's certificate"), *_windows(authorities, "the authority's certificate"),
        ),
    )  # fmt: skip


def _certificates(
    content: dict[str, bytes], name: str, files: dict[str, str], faults: dict[str, str]
) -> list[x509.Certificate]:
    if name not in content:
        return []
    try:
        return certificates.read_certificates(content[name], files[name])
    except UserError as error:
        faults[name] = str(error)
        return []


def _name(certificate: x509.Certificate) -> str:
    found = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    return str(found[0].value) if found else "nobody"


def _matches(
    certificate: x509.Certificate | None, key: bytes | None, files: dict[str, str], faults: dict[str, str]
) -> bool:
    if key is None or certificate is None:
        return True
    try:
        own = certificates.read_key(key, files["keyfile"]).public_key()
    except UserError:
        faults["keyfile"] = f"{files['keyfile']}: no unencrypted private key in PEM"
        return True
    return certificates.digest_of_key(own) == certificates.digest_of_key(certificate.public_key())


def _windows(found: list[x509.Certificate], of: str) -> list[Window]:
    return [Window(of, one.not_valid_before_utc.timestamp(), one.not_valid_after_utc.timestamp()) for one in found]


def _exposed(path: str | None) -> str:
    """The key's mode where others can read it."""
    if path is None:
        return ""
    try:
        mode = Path(path).stat().st_mode & 0o777
    except OSError:
        return ""
    # systemd gives the service's user a list of its own, which shows as the group's bits.
    handed = os.environ.get("CREDENTIALS_DIRECTORY", "")
    bits = 0o007 if handed and Path(path).is_relative_to(handed) else 0o077
    return f"{mode:04o}" if mode & bits else ""
