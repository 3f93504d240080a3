"""An authority on disk: who may read its files, damage, its revocation list, rotation, and several at once."""

from __future__ import annotations

import os
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec

from muster.pki.authority import Authority, Issued, Rotation, read_passphrase
from muster.pki.register import REASONS, Role, Terms
from shared import certificates
from shared.errors import UserError
from tests.unit.pki.authority_rig import NOW, day, load, request
from tests.unit.pki.authority_rig import authority as authority  # a fixture

PASSPHRASE = b"correct horse battery"


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_case_40_keys_are_for_their_owner_alone(tmp_path: Path) -> None:
    before = os.umask(0)  # the worst that a shell can have
    try:
        authority = Authority.create(tmp_path / "deep" / "pki", "fleet1", NOW, passphrase=PASSPHRASE)
        issued = authority.issue("coord-1", "coordinator", NOW)
    finally:
        os.umask(before)
    assert mode(authority.folder) == 0o700
    assert mode(authority.folder / "ca.key") == 0o400
    assert mode(authority.folder / "register.json") == 0o600
    assert issued.key is not None
    assert mode(issued.key) == 0o400
    assert b"ENCRYPTED" in (authority.folder / "ca.key").read_bytes()
    body = issued.key.read_text().splitlines()[1]
    others = [path for path in authority.folder.rglob("*") if path.is_file() and path != issued.key]
    assert len(others) >= 5
    assert not [path for path in others if body in path.read_text()]
    assert not list(authority.folder.rglob(".*"))


def test_case_40_an_open_key_is_refused(authority: Authority) -> None:
    (authority.folder / "ca.key").chmod(0o440)
    with pytest.raises(UserError, match=r"ca.key: others may read it: chmod 400"):
        authority.issue("edge-01", "device", NOW)


def test_a_passphrase_opens_the_key_and_is_not_needed_to_look(tmp_path: Path) -> None:
    authority = Authority.create(tmp_path / "pki", "fleet1", NOW, passphrase=PASSPHRASE)
    authority.issue("edge-01", "device", NOW)
    assert Authority(authority.folder).register.entries[0].name == "edge-01"
    for given, told in ((b"", "the key is encrypted, and no passphrase was given"), (b"wrong", "passphrase is wrong")):
        with pytest.raises(UserError, match=told) as caught:
            Authority(authority.folder, given).issue("edge-02", "device", NOW)
        assert "wrong" not in str(caught.value).replace("the passphrase is wrong", "")
    with pytest.raises(UserError, match="the passphrase is short"):
        Authority.create(tmp_path / "other", "fleet1", NOW, passphrase=b"short")
    assert not (tmp_path / "other").exists()


def test_where_a_passphrase_comes_from(tmp_path: Path) -> None:
    file = tmp_path / "passphrase"
    file.write_bytes(b"from the file\n")
    environment = {"MUSTER_PKI_PASSPHRASE": "from the environment"}
    assert read_passphrase(str(file), environment) == b"from the file"
    assert read_passphrase("", environment) == b"from the environment"
    assert read_passphrase("", {}) == b""
    file.write_bytes(b"\n")
    with pytest.raises(UserError, match="it is empty"):
        read_passphrase(str(file), environment)
    with pytest.raises(UserError, match="No such file"):
        read_passphrase(str(tmp_path / "none"), environment)


def test_an_authority_is_made_in_a_folder_of_its_own(authority: Authority, tmp_path: Path) -> None:
    key = (authority.folder / "ca.key").read_bytes()
    with pytest.raises(UserError, match="there is something already"):
        Authority.create(authority.folder, "fleet1", NOW)
    assert (authority.folder / "ca.key").read_bytes() == key
    with pytest.raises(UserError, match="no authority here: make one with muster pki init"):
        Authority(tmp_path / "none")
    with pytest.raises(UserError, match="fleet 'F 1'"):
        Authority.create(tmp_path / "other", "F 1", NOW)


def test_a_damaged_folder_is_told_in_one_line(authority: Authority) -> None:
    register = authority.folder / "register.json"
    whole = register.read_bytes()
    register.write_bytes(whole[:-20])
    with pytest.raises(UserError, match="register.json: damaged: .*; take it from your backup"):
        authority.issue("edge-01", "device", NOW)
    register.write_bytes(whole.replace(b'"version": 1', b'"version": 2'))
    with pytest.raises(UserError, match="register.json: damaged"):
        authority.issue("edge-01", "device", NOW)
    register.write_bytes(whole)
    other = Authority.create(authority.folder.parent / "other", "fleet1", NOW)
    (authority.folder / "ca.crt").write_bytes(other.cafile.read_bytes())
    with pytest.raises(UserError, match="ca.key is not the key of ca.crt"):
        authority.issue("edge-01", "device", NOW)
    (authority.folder / "ca.key").unlink()
    with pytest.raises(UserError, match="ca.key: can't be read: No such file"):
        authority.issue("edge-01", "device", NOW)


def test_a_folder_that_can_not_be_written_is_one_line(authority: Authority) -> None:
    (authority.folder / "lock").unlink()
    (authority.folder / "lock").mkdir()
    with pytest.raises(UserError, match="pki: can't be written: Is a directory"):
        authority.revoke("edge-01", NOW)


def crl_of(authority: Authority) -> x509.CertificateRevocationList:
    return x509.load_pem_x509_crl(authority.crlfile.read_bytes())


def test_the_revocation_list_holds_what_was_revoked_and_is_refreshed(authority: Authority) -> None:
    first = crl_of(authority)
    assert list(first) == []
    assert first.next_update_utc == day(90)
    serials = {}
    for number, reason in enumerate(REASONS):
        name = f"edge-{number:02}"
        serials[reason] = load(authority.sign(name, request(name), "device", NOW)).serial_number
        authority.revoke(name, day(1), reason=reason)
    listed = crl_of(authority)
    assert {entry.serial_number for entry in listed} == set(serials.values())
    for reason in REASONS:
        entry = listed.get_revoked_certificate_by_serial_number(serials[reason])
        assert entry is not None
        assert entry.revocation_date_utc == day(1)
        if reason == "unspecified":  # said by saying nothing
            assert list(entry.extensions) == []
        else:
            assert entry.extensions.get_extension_for_class(x509.CRLReason).value.reason.name == reason
    number = listed.extensions.get_extension_for_class(x509.CRLNumber).value.crl_number
    assert number == authority.register.crl_number == 5
    authority.refresh(day(80))
    refreshed = crl_of(authority)
    assert refreshed.next_update_utc == day(170)
    assert {entry.serial_number for entry in refreshed} == set(serials.values())
    authority.refresh(day(91.1))
    assert list(crl_of(authority)) == []  # they have expired
    ca = x509.load_pem_x509_certificate(authority.cafile.read_bytes()).public_key()
    assert isinstance(ca, ec.EllipticCurvePublicKey)
    assert crl_of(authority).is_signature_valid(ca)


def test_rotation_renews_what_is_due_each_in_its_way(authority: Authority) -> None:
    own, new, fresh = certificates.new_key(), certificates.new_key(), certificates.new_key()
    authority.sign("edge-01", request("edge-01", own), "device", NOW)
    authority.sign("edge-02", request("edge-02"), "device", NOW)
    authority.issue("broker-1", "server", NOW, hosts=("broker.example",))
    authority.sign("edge-03", request("edge-03", fresh), "device", day(30))
    before = authority.certificate("broker-1").with_suffix(".key").read_bytes()
    assert authority.rotate(day(59)) == Rotation([], {})
    done = authority.rotate(day(60), requests={"edge-02": request("edge-02", new)})
    renewed = {one.entry.name: one for one in done.renewed}
    assert done.refused == {}
    assert set(renewed) == {"edge-01", "edge-02", "broker-1"}
    assert load(renewed["edge-01"]).public_key() == own.public_key()
    assert load(renewed["edge-02"]).public_key() == new.public_key()
    server = renewed["broker-1"]
    assert server.entry.hosts == ("broker.example",)
    assert server.key is not None and server.key.read_bytes() != before
    assert certificates.read_key(server.key.read_bytes(), "key").public_key() == load(server).public_key()
    for one in renewed.values():
        assert load(one).not_valid_after_utc == day(150)
    assert crl_of(authority).next_update_utc == day(150)
    assert list(crl_of(authority)) == []  # what was replaced stays good until it is everywhere
    assert authority.rotate(day(61)) == Rotation([], {})
    early = authority.rotate(day(61), requests={"edge-03": request("edge-03")})  # it asked, so it is due
    assert [one.entry.name for one in early.renewed] == ["edge-03"]
    assert [one.entry.name for one in authority.rotate(day(62), only=["edge-03"]).renewed] == ["edge-03"]


def test_what_can_not_be_renewed_does_not_stop_the_others(authority: Authority) -> None:
    for name in ("edge-01", "edge-02", "edge-03", "edge-04"):
        authority.sign(name, request(name), "device", NOW)
    authority.revoke("edge-02", NOW)
    other = authority.certificate("edge-04").read_bytes()
    authority.certificate("edge-03").write_bytes(other)
    done = authority.rotate(day(60), requests={"edge-01": b"junk", "edge-09": request("edge-09")})
    assert [one.entry.name for one in done.renewed] == ["edge-04"]
    assert done.refused == {
        "edge-01": "request of edge-01: no certificate signing request in PEM",
        "edge-03": f"{authority.certificate('edge-03')}: not the newest that was issued: "
        "sign a new request of edge-03 with --renew",
        "edge-09": "edge-09: nothing to renew: it has no certificate that was not revoked",
    }
    assert authority.rotate(day(60), only=["edge-02"]).refused.keys() == {"edge-02"}
    assert crl_of(authority).next_update_utc == day(150)


def test_a_node_that_makes_its_own_key_takes_the_place_of_one_made_here(authority: Authority) -> None:
    issued = authority.issue("edge-01", "device", NOW)
    assert issued.key is not None and issued.key.exists()
    authority.sign("edge-01", request("edge-01"), "device", NOW, renew=True)
    assert not issued.key.exists()
    assert not authority.register.entries[-1].kept


def test_what_the_register_could_not_note_is_not_issued(authority: Authority) -> None:
    """A certificate that is nowhere written down could not be revoked."""
    blocked = authority.folder / ".register.json.tmp"
    blocked.mkdir()
    with pytest.raises(UserError, match="register.json: can't be written"):
        authority.issue("edge-01", "device", NOW)
    assert not authority.certificate("edge-01").exists()
    blocked.rmdir()
    authority.issue("edge-01", "device", NOW)


def test_what_was_killed_while_it_wrote_does_not_stop_the_next(authority: Authority) -> None:
    authority.issue("edge-01", "device", NOW)
    torn = authority.folder / "issued" / ".edge-01.key.tmp"
    torn.write_bytes(b"half a key")
    torn.chmod(0o400)
    issued = authority.issue("edge-01", "device", NOW, renew=True)
    assert issued.key is not None and mode(issued.key) == 0o400
    assert not torn.exists()


def test_several_at_once_take_turns(authority: Authority) -> None:
    names = [f"edge-{number:02}" for number in range(12)]

    def enrol(name: str) -> Issued:
        return Authority(authority.folder).sign(name, request(name), "device", NOW)

    with ThreadPoolExecutor(6) as pool:
        serials = {one.entry.serial for one in pool.map(enrol, names)}
    assert {entry.serial for entry in authority.register.entries} == serials
    assert len(serials) == len(names)


def test_shorter_terms_hold(tmp_path: Path) -> None:
    terms = Terms(certificate_days=10, rotate_days=5, crl_days=3, authority_days=12)
    authority = Authority.create(tmp_path / "pki", "fleet1", NOW, terms=terms)
    role: Role = "device"
    assert load(authority.sign("edge-01", request("edge-01"), role, NOW)).not_valid_after_utc == day(10)
    assert crl_of(authority).next_update_utc == day(3)
    (renewed,) = authority.rotate(day(5)).renewed
    assert load(renewed).not_valid_after_utc == day(12)  # its authority's own end
    assert "the authority itself expires" in authority.rotate(day(11.5)).refused["edge-01"]
    with pytest.raises(UserError, match="days: rotation"):
        Authority.create(tmp_path / "other", "fleet1", NOW, terms=Terms(rotate_days=90))
