"""`muster pki` and `muster broker` as an operator types them."""

from __future__ import annotations

import datetime
import json
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from muster import mosquitto
from muster.cli.main import main
from shared import topics
from shared.enrolment import Enrolment

Run = Callable[..., tuple[int, str, str]]
PASSPHRASE = "correct horse battery staple"


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs `muster ARGUMENTS` in an empty folder; what it returned and said."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MUSTER_PKI", raising=False)
    monkeypatch.delenv("MUSTER_PKI_PASSPHRASE", raising=False)
    monkeypatch.setenv("COLUMNS", "200")

    def call(*arguments: str) -> tuple[int, str, str]:
        code = main(list(arguments))
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


@pytest.fixture
def fleet(run: Run, tmp_path: Path) -> Path:
    """An authority in ./pki, and the request of edge-01."""
    assert run("pki", "init", "fleet1")[0] == 0
    Enrolment(tmp_path / "edge", "edge-01").request(datetime.datetime.now(datetime.timezone.utc))
    return tmp_path


def listed(run: Run, *arguments: str) -> dict[str, str]:
    code, output, _ = run("pki", "list", "--json", *arguments)
    assert code == 0
    return {one["name"]: one["state"] for one in json.loads(output)["certificates"]}


def test_from_an_authority_to_a_revoked_device(run: Run, fleet: Path) -> None:
    code, output, errors = run("pki", "sign", "edge-01", "--request", "edge/edge-01.csr")
    assert (code, errors) == (0, "")
    assert output.startswith("edge-01: pki/issued/edge-01.crt, device, until ")
    code, output, _ = run("pki", "issue", "broker-1", "--as", "server", "--host", "localhost", "--json")
    (issued,) = json.loads(output)
    assert (issued["name"], issued["hosts"], issued["key_file"]) == (
        "broker-1",
        ["localhost"],
        "pki/issued/broker-1.key",
    )
    assert stat.S_IMODE(Path(issued["key_file"]).stat().st_mode) == 0o400
    assert run("pki", "issue", "coord-1", "--as", "coordinator")[0] == 0
    assert listed(run) == {"broker-1": "good", "coord-1": "good", "edge-01": "good"}
    assert run("pki", "rotate") == (0, "nothing was renewed\n", "")
    code, output, _ = run("pki", "rotate", "edge-01", "--json")
    assert [one["name"] for one in json.loads(output)] == ["edge-01"]
    assert run("pki", "revoke", "edge-01", "--old")[1].startswith("edge-01: 1 revoked; copy pki/crl.pem to the broker")
    assert listed(run)["edge-01"] == "good"
    assert run("pki", "revoke", "edge-01", "--reason", "key_compromise")[1].startswith("edge-01: 1 revoked")
    assert run("pki", "revoke", "edge-01")[1].startswith("edge-01: 0 revoked")  # again changes nothing
    assert listed(run)["edge-01"] == "revoked"
    code, output, errors = run("pki", "show", "edge-01")
    assert "revoked: key_compromise" in output and "revoked: superseded" in output
    assert "revocation list: good until" in errors
    assert run("pki", "crl")[1].startswith("pki/crl.pem is good until ")


def test_a_device_is_suspended_and_resumed(run: Run, fleet: Path) -> None:
    assert run("pki", "sign", "edge-01", "--request", "edge/edge-01.csr")[0] == 0
    assert run("pki", "suspend", "edge-01")[1].startswith("edge-01: suspended; copy pki/crl.pem to the broker")
    assert listed(run) == {"edge-01": "suspended"}
    assert run("pki", "suspend", "edge-01")[0] == 0  # again changes nothing
    assert run("pki", "rotate", "edge-01")[0] == 1
    code, _, errors = run("pki", "sign", "edge-01", "--request", "edge/edge-01.csr")
    assert (code, errors) == (2, "error: edge-01: it is suspended: muster pki resume edge-01, or revoke it\n")
    assert run("pki", "resume", "edge-01")[1].startswith("edge-01: resumed; copy pki/crl.pem to the broker")
    assert listed(run) == {"edge-01": "good"}
    assert run("pki", "resume", "edge-01")[::2] == (2, "error: edge-01: it is not suspended\n")
    assert run("pki", "revoke", "edge-01")[0] == 0
    assert run("pki", "suspend", "edge-01")[::2] == (
        2,
        "error: edge-01: its certificates were revoked, which is for good\n",
    )
    code, _, errors = run("pki", "revoke", "edge-01", "--reason", "certificate_hold")
    assert (code, "--reason certificate_hold: there are unspecified" in errors) == (2, True)


def test_a_collected_folder_of_requests_renews_keys(run: Run, fleet: Path) -> None:
    machine = Enrolment(fleet / "edge", "edge-01")
    assert run("pki", "sign", "edge-01", "--request", str(machine.request_file))[0] == 0
    (fleet / "collected").mkdir()
    machine.request_file.rename(fleet / "collected" / "edge-01.csr")
    (fleet / "collected" / "edge-02.csr").write_text("junk")
    code, output, errors = run("pki", "rotate", "--requests", "collected", "--json")
    assert (code, errors) == (1, "not renewed: edge-02: nothing to renew: it has no certificate that was not revoked\n")
    assert (
        json.loads(output)[0]["key"] == json.loads(run("pki", "show", "edge-01", "--json")[1])["certificates"][0]["key"]
    )


def test_case_40_a_passphrase_comes_from_a_file_or_the_environment_alone(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "passphrase"
    file.write_text(PASSPHRASE + "\n")
    said = [run("pki", "init", "fleet1", "--passphrase-file", str(file))]
    said.append(run("pki", "issue", "coord-1", "--as", "coordinator"))
    assert said[-1][0] == 2
    assert said[-1][2].startswith("error: pki/ca.key: the key is encrypted, and no passphrase was given")
    monkeypatch.setenv("MUSTER_PKI_PASSPHRASE", PASSPHRASE)
    said.append(run("pki", "issue", "coord-1", "--as", "coordinator"))
    assert said[-1][0] == 0
    key = (tmp_path / "pki" / "issued" / "coord-1.key").read_text().splitlines()[1]
    told = "".join(output + errors for _, output, errors in said)
    assert PASSPHRASE not in told and key not in told
    options = run("pki", "init", "--help")[1]
    assert "--passphrase-file" in options and "--passphrase " not in options


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ("pki list --folder none", "none: no authority here: make one with muster pki init"),
        ("pki init fleet1", "pki: there is something already"),
        ("pki init F --folder other", "fleet 'F': use 2 to 63"),
        (
            "pki init f1 --folder other --days 10",
            "days: rotation at 60 must come before the end of a certificate at 10",
        ),
        ("pki init f1 --folder other --days 0", "days: expected `int` >= 1 - at `$.certificate_days`"),
        ("pki sign edge-01 --request none.csr", "--request none.csr: No such file"),
        ("pki sign edge-02 --request edge/edge-01.csr", "request of edge-02: it asks to be edge-01"),
        ("pki sign Edge-01 --request edge/edge-01.csr", "name 'Edge-01': use 2 to 63"),
        (
            "pki sign edge-01 --request edge/edge-01.csr --as boss",
            "--as boss: there are device, coordinator, top",
        ),
        ("pki sign edge-01 --request edge/edge-01.csr --host x", "--host is for servers"),
        ("pki issue broker-1 --as server", "a server needs the names that clients reach it by: --host NAME"),
        ("pki issue broker-1 --as server --host *.x", "neither a host name nor an address"),
        ("pki revoke edge-09", "edge-09: no certificate of this name was issued here"),
        ("pki revoke edge-09 --reason whim", "--reason whim: there are unspecified, key_compromise"),
        ("pki show edge-09", "edge-09: no certificate of this name"),
        ("pki issue edge-01 --passphrase-file none", "--passphrase-file none: No such file"),
        ("broker acl", "a fleet without a coordinator does nothing: enrol one"),
        ("broker acl fleet1", "or name it with --coordinator"),
        ("broker acl --reader board", "name the fleet, too"),
        ("broker acl fleet1 --coordinator c1 --gate c1", "c1: give each name one part alone"),
        ("broker acl fleet1 --coordinator C1", "coordinator 'C1': use 2 to 63"),
        ("broker config --pki here", "'here': give an absolute path without spaces"),
        ("broker config --name ../x", "--name '../x': use 2 to 63"),
        ("broker kick edge-09 --host localhost", "edge-09: no client of this name was enrolled here"),
    ],
)
def test_a_fault_is_one_line_and_changes_nothing(run: Run, fleet: Path, arguments: str, told: str) -> None:
    before = {path: path.read_bytes() for path in fleet.rglob("*") if path.is_file() and path.name != "lock"}
    code, output, errors = run(*arguments.split())
    assert (code, output) == (2, "")
    assert errors.startswith("error: ")
    assert told in errors
    assert errors.count("\n") == 1
    assert {path: path.read_bytes() for path in fleet.rglob("*") if path.is_file() and path.name != "lock"} == before


def test_the_access_list_is_printed_from_names_or_from_the_authority(run: Run, fleet: Path) -> None:
    wanted = topics.acl("fleet1", ["coord-1", "coord-1-top"], readers=["board"], gates=["gate-1"])
    names = ("--coordinator", "coord-1", "--coordinator", "coord-1-top", "--reader", "board", "--gate", "gate-1")
    assert run("broker", "acl", "fleet1", *names) == (0, wanted, "")
    for name, role in (
        ("coord-1", "coordinator"),
        ("coord-1-top", "coordinator"),
        ("board", "reader"),
        ("gate-1", "gate"),
    ):
        assert run("pki", "issue", name, "--as", role)[0] == 0
    assert run("broker", "acl") == (0, wanted, "")
    assert run("pki", "revoke", "board")[0] == 0
    assert "board" not in run("broker", "acl")[1]


def test_the_configuration_is_printed(run: Run) -> None:
    assert run("broker", "config") == (0, mosquitto.configuration(mosquitto.Places()), "")
    code, output, _ = run("broker", "config", "--port", "18883", "--name", "broker-1", "--pki", "/p")
    assert code == 0
    assert "listener 18883\n" in output
    assert "certfile /p/broker-1.crt\n" in output


def test_help_waits_for_no_library() -> None:
    code = "import sys, muster.cli.main; print(sorted(set(sys.modules) & {'cryptography', 'httpx', 'paho', 'torch'}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100, check=True)
    assert done.stdout == "[]\n"
