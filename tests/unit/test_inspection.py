"""What the doctor reads of a device: real keys, folders, kernels in real processes, the installed unit's text."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from edge_daemon.adapters.inspection import broker, kernel, keys, machine, sandboxed
from edge_daemon.settings import AgentSettings
from edge_daemon.training import cuda_steps
from muster.pki.authority import Authority
from muster.testbed.machines import Machines, now
from shared.errors import UserError
from shared.processes import lock_folder
from shared.settings import BrokerSettings

NUMPY = [sys.executable, "-m", "muster.testbed.numpy_agent"]
ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    made = Machines(tmp_path_factory.mktemp("pki"), "lab").authority
    for name in ("edge-01", "edge-02"):
        made.issue(name, "device", now())
    return made


def settings(authority: Authority, **changes: object) -> BrokerSettings:
    of = authority.folder / "issued/edge-01"
    files = {"cafile": str(authority.cafile), "certfile": f"{of}.crt", "keyfile": f"{of}.key"}
    return BrokerSettings(**{**files, **changes})  # type: ignore[arg-type]  # names and types are the test's to match


def test_good_keys(authority: Authority) -> None:
    found = keys.read(settings(authority))
    assert (found.name, found.matches, found.issued, found.exposed, dict(found.faults)) == (
        "edge-01",
        True,
        True,
        "",
        {},
    )
    assert [window.of for window in found.windows] == ["this device's certificate", "the authority's certificate"]
    assert all(window.begin < window.end for window in found.windows)


def test_faults_of_keys(authority: Authority, tmp_path: Path) -> None:
    folder = authority.folder / "issued"
    assert not keys.read(settings(authority, keyfile=f"{folder}/edge-02.key")).matches
    missing = keys.read(settings(authority, keyfile=f"{folder}/none.key"))
    assert "No such file" in missing.faults["keyfile"]
    garbage = tmp_path / "garbage"
    garbage.write_text("not a key\n", encoding="ascii")
    found = keys.read(settings(authority, cafile=str(garbage), keyfile=str(garbage)))
    assert "no certificate in PEM" in found.faults["cafile"]
    assert "no unencrypted private key in PEM" in found.faults["keyfile"]
    assert not any("not a key" in text for text in found.faults.values()), "never what is in them"
    stranger = Machines(tmp_path / "other", "lab").authority
    assert not keys.read(settings(authority, cafile=str(stranger.cafile))).issued


@pytest.mark.parametrize(
    ("mode", "handed", "exposed"),
    [(0o400, False, ""), (0o600, False, ""), (0o640, False, "0640"), (0o644, True, "0644"), (0o440, True, "")],
)
def test_a_key_that_others_can_read_is_noticed(
    authority: Authority, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: int, handed: bool, exposed: str
) -> None:
    key = tmp_path / "mqtt.key"
    shutil.copy(authority.folder / "issued/edge-01.key", key)
    key.chmod(mode)
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path if handed else tmp_path / "elsewhere"))
    assert keys.read(settings(authority, keyfile=str(key))).exposed == exposed


def test_disk_is_written_for_real_and_nothing_stays(tmp_path: Path) -> None:
    free, fault = machine.disk(tmp_path)
    assert free is not None
    assert (fault, list(tmp_path.iterdir())) == ("", [])
    assert machine.disk(tmp_path / "none") == (None, "")
    assert machine.disk(Path("/proc/self"))[1].startswith("can't be written")


def test_a_running_daemon_is_noticed_by_its_lock(tmp_path: Path) -> None:
    assert broker.occupied(tmp_path) == ""
    lock = lock_folder(tmp_path, "muster-edge")
    assert broker.occupied(tmp_path).startswith("the daemon runs")
    os.close(lock)
    assert broker.occupied(tmp_path) == ""


def test_a_lock_that_can_not_be_looked_at_leaves_the_session_alone(tmp_path: Path) -> None:
    """Else the doctor of any user would push the daemon out."""
    (tmp_path / "lock").symlink_to("lock")
    assert broker.occupied(tmp_path).startswith("whether the daemon runs can't be told")


def test_the_agents_own_probe_answers() -> None:
    found = kernel.probe(AgentSettings(command=NUMPY), "cpu")
    assert found.problem == ""
    assert 32 in found.bits


@pytest.mark.parametrize(
    ("command", "problem"),
    [
        (["/nowhere/agent"], "/nowhere/agent: No such file or directory"),
        ([sys.executable, "-c", "raise SystemExit(7)"], "it ended with exit status 7"),
        ([sys.executable, "-c", "import time; time.sleep(60)"], "it said nothing for 1 s"),
    ],
)
def test_an_agent_that_gives_no_answer(command: list[str], problem: str) -> None:
    assert kernel.probe(AgentSettings(command=command, silence_s=1.0), "cpu").problem == problem


LIBCUDA = """
int cuInit(unsigned flags) { return %d; }
int cuGetErrorName(int code, const char **name) { *name = "CUDA_ERROR_TEST"; return 0; }
int cuDeviceGetCount(int *count) { *count = 2; return 0; }
int cuDriverGetVersion(int *version) { *version = 12060; return 0; }
"""


def stand_in(folder: Path, code: int) -> str:
    """A library with the driver's functions of that first step; real CUDA is not run here."""
    source, library = folder / "cuda.c", folder / "libcuda.so.1"
    source.write_text(LIBCUDA % code, encoding="ascii")
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", library, source], check=True, timeout=60)
    return str(library)


def test_the_driver_says_what_it_has(tmp_path: Path) -> None:
    assert cuda_steps.driver(stand_in(tmp_path, 0)) == "2 device(s), driver for CUDA 12.6"


def test_an_error_of_the_driver_keeps_its_code(tmp_path: Path) -> None:
    with pytest.raises(cuda_steps.StepFailed, match=r"cuInit: error 304 \(CUDA_ERROR_TEST\)") as failed:
        cuda_steps.driver(stand_in(tmp_path, 304))
    assert failed.value.code == "304"


def test_without_a_driver_cuda_ends_at_its_first_step() -> None:
    if Path("/proc/driver/nvidia/version").exists():
        pytest.skip("this machine has an NVIDIA driver")
    (finding,) = kernel.cuda_steps("", 60.0)
    assert (finding.check, finding.verdict) == ("cuda driver", "fail")
    assert "libcuda.so.1" in finding.text


STEP = '{"step": "torch", "good": true, "text": "x"}'


@pytest.mark.parametrize(
    ("program", "said"),
    [
        (f"import os; print({STEP!r}, flush=True); os.abort()", "after torch"),
        ("import sys; sys.exit('no module')", "after nothing"),
        ("import time; time.sleep(60)", "no end after"),
    ],
)  # fmt: skip
def test_a_kernel_that_crashes_or_hangs_is_a_finding(program: str, said: str) -> None:
    finding = kernel.cuda_steps("", 3.0, ("-c", program))[-1]
    assert (finding.check, finding.verdict) == ("cuda end", "fail")
    assert said in finding.text


UNIT = """
# /etc/systemd/system/muster-edge.service
[Unit]
Description=x
[Service]
Type=notify
ExecStart=/opt/muster/current/bin/muster-edge --config /etc/muster/edge.toml
WatchdogSec=60s
RestartSec=5s
SyslogIdentifier=muster-edge
CapabilityBoundingSet=
SystemCallFilter=@system-service \\
  @resources
SystemCallFilter=~@privileged
Environment=HOME=%S/muster CUDA_CACHE_PATH=%C/muster/cuda SHARE=50%%

# /etc/systemd/system/muster-edge.service.d/site.conf
[Service]
; the broker
IPAddressAllow=10.0.0.7
[Install]
WantedBy=multi-user.target
"""


def test_the_doctor_runs_as_the_unit_with_its_drop_ins() -> None:
    command = sandboxed.command(UNIT, ["--json"])
    given = [word.removeprefix("--property=") for word in command if word.startswith("--property=")]
    assert given == [
        "CapabilityBoundingSet=",
        "SystemCallFilter=@system-service @resources",
        "SystemCallFilter=~@privileged",
        "Environment=HOME=/var/lib/muster CUDA_CACHE_PATH=/var/cache/muster/cuda SHARE=50%",
        "IPAddressAllow=10.0.0.7",
    ]
    assert command[:2] == ["systemd-run", "--quiet"]
    end = command[command.index("--") + 1 :]
    assert end == ["/opt/muster/current/bin/muster-edge", "doctor", "--config", "/etc/muster/edge.toml", "--json"]


def test_nothing_of_the_shipped_sandbox_is_left_out() -> None:
    text = (ROOT / "deploy/systemd/muster-edge.service").read_text(encoding="utf-8")
    _, given = sandboxed.properties(text)
    names = {one.partition("=")[0] for one in given}
    sandbox = text.partition("# ---- sandbox")[2].partition("SyslogIdentifier")[0]
    wanted = {line.partition("=")[0] for line in sandbox.splitlines() if line[:1].isupper()}
    assert len(wanted) > 25
    assert wanted | {"User", "Group", "SupplementaryGroups", "LoadCredential", "Environment", "MemoryMax"} <= names
    assert not names & {"Type", "WatchdogSec", "Restart", "ExecReload", "TimeoutStopSec", "KillMode"}


def test_a_unit_that_starts_nothing_is_refused() -> None:
    with pytest.raises(UserError, match="starts nothing"):
        sandboxed.properties("[Service]\nUser=muster\n")
