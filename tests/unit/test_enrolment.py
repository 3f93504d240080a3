"""A machine's own side of the PKI: key and request, the certificate that comes back, a renewal; as the command."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding

from coordinator import service as coordinator_service
from edge_daemon import service as edge_service
from muster.pki.authority import Authority
from shared import certificates
from shared.enrolment import Enrolment, main
from shared.errors import UserError
from tests.unit.pki.authority_rig import NOW, day


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority.create(tmp_path / "authority", "fleet1", NOW)


@pytest.fixture
def machine(tmp_path: Path) -> Enrolment:
    return Enrolment(tmp_path / "pki", "edge-01")


def sign(authority: Authority, machine: Enrolment, at: float = 0, *, renew: bool = False) -> bytes:
    """The certificate that answers the machine's request."""
    request = machine.request_file.read_bytes()
    return authority.sign(machine.name, request, "device", day(at), renew=renew).certificate.read_bytes()


def enrolled(authority: Authority, machine: Enrolment) -> Enrolment:
    machine.request(NOW)
    machine.install(sign(authority, machine), authority.cafile.read_bytes(), NOW)
    return machine


def names(machine: Enrolment) -> list[str]:
    return sorted(path.name for path in machine.folder.iterdir())


def test_a_machine_enrols(authority: Authority, machine: Enrolment) -> None:
    asked = machine.request(NOW)
    assert (asked.state, asked.changed, asked.request) == ("requested", True, str(machine.request_file))
    assert names(machine) == ["edge-01.csr", "edge-01.key"]
    key = machine.keyfile.read_bytes()
    assert not machine.request(NOW).changed
    assert machine.keyfile.read_bytes() == key
    signed = sign(authority, machine)
    installed = machine.install(signed, authority.cafile.read_bytes(), NOW)
    assert (installed.state, installed.changed, installed.until) == ("enrolled", True, day(90))
    assert names(machine) == ["ca.crt", "edge-01.crt", "edge-01.key"]
    assert not machine.install(signed, authority.cafile.read_bytes(), NOW).changed
    assert machine.request(NOW) == type(asked)("edge-01", "enrolled", False, until=day(90))
    assert machine.check(NOW).state == "enrolled"
    assert machine.check(day(59.9)).state == "enrolled"
    assert machine.check(day(60.1)).state == "due"


def test_a_machine_that_was_away_until_its_certificate_expired_asks_for_another(
    authority: Authority, machine: Enrolment
) -> None:
    enrolled(authority, machine)
    late = day(91)
    with pytest.raises(UserError, match="expired"):
        machine.check(late)
    asked = machine.request(late)
    assert (asked.state, asked.request) == ("requested", str(machine.request_file))
    machine.install(sign(authority, machine, 91), None, late)
    assert machine.check(late).state == "enrolled"


def test_case_40_a_key_is_for_its_owner_alone_from_the_first_byte_on(authority: Authority, machine: Enrolment) -> None:
    before = os.umask(0)
    try:
        enrolled(authority, machine)
        machine.request(NOW, renew=True)
    finally:
        os.umask(before)
    for name in ("edge-01.key", "edge-01.key.new"):
        assert stat.S_IMODE((machine.folder / name).stat().st_mode) == 0o400
    body = machine.keyfile.read_text().splitlines()[1]
    everywhere = [*machine.folder.iterdir(), *(path for path in authority.folder.rglob("*") if path.is_file())]
    assert [path for path in everywhere if body in path.read_text()] == [machine.keyfile]
    machine.keyfile.chmod(0o440)
    with pytest.raises(UserError, match="others may read it: chmod 400"):
        machine.check(NOW)


@pytest.mark.skipif(os.geteuid() != 0, reason="root (files for another user)")
def test_files_belong_to_whom_the_folder_belongs(authority: Authority, machine: Enrolment) -> None:
    machine.folder.mkdir()
    os.chown(machine.folder, 12345, 23456)
    enrolled(authority, machine)
    for path in machine.folder.iterdir():
        assert (path.stat().st_uid, path.stat().st_gid) == (12345, 23456), path


def test_a_renewal_has_a_key_of_its_own_and_the_present_one_serves_until_then(
    authority: Authority, machine: Enrolment
) -> None:
    enrolled(authority, machine)
    old = {name: (machine.folder / name).read_bytes() for name in ("edge-01.key", "edge-01.crt")}
    asked = machine.request(NOW, renew=True)
    assert asked.state == "requested"
    assert {name: (machine.folder / name).read_bytes() for name in old} == old
    assert machine.check(NOW).state == "enrolled"
    assert not machine.request(NOW, renew=True).changed  # the same request, until it is answered
    assert not machine.request(NOW).changed
    machine.install(sign(authority, machine, 60, renew=True), None, day(60))
    assert machine.keyfile.read_bytes() != old["edge-01.key"]
    assert names(machine) == ["ca.crt", "edge-01.crt", "edge-01.key"]
    assert machine.check(day(60)).until == day(150)


def test_a_certificate_alone_can_be_renewed_beside_a_request(authority: Authority, machine: Enrolment) -> None:
    """The operator rotated before the machine's own request came: both find their way."""
    enrolled(authority, machine)
    key = machine.keyfile.read_bytes()
    machine.request(NOW, renew=True)
    (rotated,) = authority.rotate(day(60)).renewed
    machine.install(rotated.certificate.read_bytes(), None, day(60))
    assert machine.keyfile.read_bytes() == key
    assert machine.request_file.exists()
    machine.install(sign(authority, machine, 61, renew=True), None, day(61))
    assert machine.keyfile.read_bytes() != key
    assert machine.check(day(61)).until == day(151)


def test_a_power_cut_between_key_and_certificate_is_mended_by_installing_again(
    authority: Authority, machine: Enrolment, monkeypatch: pytest.MonkeyPatch
) -> None:
    enrolled(authority, machine)
    machine.request(NOW, renew=True)
    signed = sign(authority, machine, 60, renew=True)
    blocked = machine.folder / ".edge-01.crt.tmp"
    blocked.mkdir()  # the certificate can't be written after the key was moved
    with pytest.raises(UserError, match="edge-01.crt: can't be written"):
        machine.install(signed, None, day(60))
    with pytest.raises(UserError, match="not of .*edge-01.key: install the certificate again"):
        machine.check(day(60))
    blocked.rmdir()
    assert machine.install(signed, None, day(60)).changed
    assert machine.check(day(60)).until == day(150)


def test_a_certificate_that_does_not_fit_replaces_nothing(
    authority: Authority, machine: Enrolment, tmp_path: Path
) -> None:
    enrolled(authority, machine)
    before = {path.name: path.read_bytes() for path in machine.folder.iterdir()}
    good = before["edge-01.crt"]
    stranger = Authority.create(tmp_path / "stranger", "fleet1", NOW)
    other = Enrolment(tmp_path / "other", "edge-01")
    other.request(NOW)
    named = Enrolment(tmp_path / "named", "edge-02")
    key = certificates.read_key(before["edge-01.key"], "key")
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    request = certificates.make_request("edge-02", key)
    fresh = Authority.create(tmp_path / "fresh", "fleet1", NOW)
    of_two = fresh.sign("edge-02", request, "device", NOW).certificate.read_bytes()
    ca, foreign, freshca = (one.cafile.read_bytes() for one in (authority, stranger, fresh))
    cases = [
        (b"", ca, NOW, "the new certificate: no certificate in PEM"),
        (before["edge-01.key"], ca, NOW, "the new certificate: no certificate in PEM"),
        (good, b"", NOW, "the authority's certificate: no certificate in PEM"),
        (good, foreign, NOW, "no authority given here issued it"),
        (good, ca, day(91), "it expired at"),
        (good, ca, day(-30), "it is valid from .*: set the clock"),
        (of_two, freshca, NOW, "the new certificate of edge-01: it is edge-02's"),
        (sign(stranger, other), foreign, NOW, "not of a key in .*was it made from this request"),
    ]
    for signed, authority_pem, at, told in cases:
        with pytest.raises(UserError, match=told):
            machine.install(signed, authority_pem, at)
    assert {path.name: path.read_bytes() for path in machine.folder.iterdir()} == before
    assert not named.folder.exists()


def test_while_one_authority_follows_another_both_are_believed(
    authority: Authority, machine: Enrolment, tmp_path: Path
) -> None:
    enrolled(authority, machine)
    following = Authority.create(tmp_path / "following", "fleet1", NOW)
    both = authority.cafile.read_bytes() + following.cafile.read_bytes()
    machine.request(NOW, renew=True)
    machine.install(sign(following, machine), both, NOW)
    assert machine.cafile.read_bytes() == both
    assert machine.check(NOW).state == "enrolled"


def test_a_name_that_can_not_be_read_is_a_fault_in_one_line(authority: Authority, machine: Enrolment) -> None:
    enrolled(authority, machine)
    der = x509.load_pem_x509_certificate(machine.certfile.read_bytes()).public_bytes(Encoding.DER)
    broken = x509.load_der_x509_certificate(der.replace(b"edge-01", b"edge\xff01"))
    with pytest.raises(UserError, match="certificate: a subject that can't be read"):
        certificates.fault(broken, "edge-01", [], NOW)


@pytest.mark.parametrize("name", ["Edge-01", "edge/01", "../x", "e", "a" * 64])
def test_case_35_a_name_that_is_no_device_id_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match="use 2 to 63 of a-z"):
        Enrolment(tmp_path, name)
    assert list(tmp_path.iterdir()) == []


# ---- the command -----------------------------------------------------------------------------------------------------


def test_the_command_from_request_to_check(
    authority: Authority, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "pki"
    where = ["edge-01", "--folder", str(folder)]
    assert main("muster-edge", where) == 0
    assert "sign " in capsys.readouterr().out
    request = (folder / "edge-01.csr").read_bytes()
    signed = authority.sign("edge-01", request, "device", NOW).certificate
    install = [*where, "--install", str(signed), "--ca", str(authority.cafile)]
    assert main("muster-edge", [*install, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["state"], told["changed"]) == ("enrolled", True)
    assert main("muster-edge", [*install, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["changed"] is False
    assert main("muster-edge", [*where, "--check"]) == 0
    assert "enrolled until" in capsys.readouterr().out
    old = authority.sign("edge-01", request, "device", day(-70), renew=True).certificate
    assert main("muster-edge", [*where, "--install", str(old)]) == 0
    assert main("muster-edge", [*where, "--check"]) == 1
    assert "it is time to renew" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["Edge"], "name 'Edge': use 2 to 63"),
        (["edge-01", "--install", "none.crt"], "none.crt: no such file"),
        (["edge-01", "--check"], "edge-01.key: no such file"),
        (["edge-01", "--ca", "ca.crt"], "--ca goes with --install"),
        (["edge-01", "--folder", "file"], "can't be written: File exists"),
    ],
)
def test_a_fault_is_one_line_and_exit_code_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], options: list[str], told: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    assert main("muster-edge", ["--folder", "pki", *options]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("muster-edge enroll: ")
    assert told in captured.err
    assert captured.err.count("\n") == 1


def test_both_services_have_the_command(tmp_path: Path) -> None:
    for service, name in ((edge_service, "edge-01"), (coordinator_service, "coord-1")):
        assert service.main(["enroll", name, "--folder", str(tmp_path)]) == 0
        assert (tmp_path / f"{name}.csr").exists()


def test_it_runs_on_a_bare_machine(tmp_path: Path) -> None:
    """With what the daemon needs and no more: neither torch, numpy nor the operator's libraries are loaded."""
    code = (
        "import sys; from edge_daemon import service; "
        f"assert service.main(['enroll', 'edge-01', '--folder', {str(tmp_path)!r}]) == 0; "
        "print(sorted(set(sys.modules) & {'torch', 'numpy', 'typer', 'rich', 'httpx', 'fastapi', 'muster'}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
