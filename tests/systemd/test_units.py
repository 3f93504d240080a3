"""The shipped units: exposure, faults, and that nothing the papers promise is missing. systemd-analyze, offline."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from coordinator.settings import CoordinatorSettings
from edge_daemon.settings import EdgeSettings
from tests.systemd.units import DEPLOY, ROOT, install, lines_of

THRESHOLD = 20
"""Exposure of 2.0, in tenths."""
UNITS = ("muster-edge.service", "muster-coordinator.service", "mosquitto.service")
GOODBYE_S = 10.0
"""Of the transport and the sampler, at the most."""
SINCE_254 = {"RestartSteps", "RestartMaxDelaySec"}
"""Older versions warn that they ignore these; the units say so beside them."""


@pytest.fixture(scope="session")
def analyze() -> str:
    """Path of systemd-analyze. Its absence fails the test: `make setup` installs it."""
    found = shutil.which("systemd-analyze")
    assert found, "systemd-analyze is missing: run make setup"
    return found


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A root folder with the units as they are installed, and Debian's own mosquitto.service under the drop-in."""
    install(tmp_path)
    return tmp_path


def exposure(analyze: str, tree: Path, unit: str) -> float:
    command = [analyze, "security", "--offline=true", f"--root={tree}", f"--threshold={THRESHOLD}", "--no-pager", unit]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    found = re.search(r"Overall exposure level for \S+: ([\d.]+)", done.stdout)
    assert found, done.stdout + done.stderr
    assert done.returncode == 0, f"{unit}: exposure {found[1]}\n{done.stdout}"
    return float(found[1])


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("drop_ins", [(), ("muster-edge.conf",)], ids=["plain", "jetson"])
def test_case_41_exposure_of_the_units(analyze: str, tree: Path, unit: str, drop_ins: tuple[str, ...]) -> None:
    folder = tree / "etc/systemd/system/muster-edge.service.d"
    for name in drop_ins:
        folder.mkdir(exist_ok=True)
        shutil.copy(DEPLOY / "jetson" / name, folder / f"10-{name}")
    score = exposure(analyze, tree, unit)
    assert score <= THRESHOLD / 10
    papers = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
    assert f"| `{unit}` | {score} |" in papers, "docs/operations.md has another score"


def test_the_broker_without_the_drop_in_is_exposed(analyze: str, tree: Path) -> None:
    """So that the scores above are those of what we ship."""
    shutil.rmtree(tree / "etc/systemd/system/mosquitto.service.d")
    command = [analyze, "security", "--offline=true", f"--root={tree}", f"--threshold={THRESHOLD}", "mosquitto.service"]
    assert subprocess.run(command, capture_output=True, timeout=60, check=False).returncode != 0


@pytest.mark.parametrize("unit", UNITS)
def test_the_units_hold(analyze: str, tree: Path, unit: str) -> None:
    command = [analyze, "verify", "--man=no", "--recursive-errors=no", f"--root={tree}", unit]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    known = [line for line in done.stderr.splitlines() if any(f"'{key}'" in line for key in SINCE_254)]
    faults = [line for line in done.stderr.splitlines() if line not in known]
    assert faults == []


@pytest.mark.parametrize("name", ["jetson/muster-edge.conf", "jetson/degraded.conf"])
def test_the_jetson_drop_ins_hold(analyze: str, tree: Path, name: str) -> None:
    folder = tree / "etc/systemd/system/muster-edge.service.d"
    folder.mkdir()
    shutil.copy(DEPLOY / name, folder)
    test_the_units_hold(analyze, tree, "muster-edge.service")


@pytest.mark.parametrize("program", ["systemd-sysusers", "systemd-tmpfiles"])
def test_user_and_folders_are_made(tree: Path, program: str) -> None:
    (tree / "etc/passwd").write_text("root:x:0:0:root:/root:/bin/sh\n", encoding="ascii")
    (tree / "etc/group").write_text("root:x:0:\n", encoding="ascii")
    subprocess.run(["systemd-sysusers", f"--root={tree}"], check=True, capture_output=True, timeout=60)
    assert re.search(r"^muster:.*:/var/lib/muster:/usr/sbin/nologin$", (tree / "etc/passwd").read_text(), re.MULTILINE)
    groups = {line.split(":")[0] for line in (tree / "etc/group").read_text().splitlines()}
    assert {"muster", "video", "render"} <= groups
    if program == "systemd-tmpfiles":
        subprocess.run([program, "--create", f"--root={tree}"], check=True, capture_output=True, timeout=60)
        assert (tree / "etc/muster/pki").stat().st_mode & 0o777 == 0o755


@pytest.mark.parametrize("unit", UNITS[:2])
def test_the_services_are_watched_and_started_again_but_not_for_a_bad_configuration(unit: str) -> None:
    found = dict(lines_of(DEPLOY / unit))
    assert found["Type"] == "notify"
    assert found["NotifyAccess"] == "main"
    assert found["WatchdogSec"] == "60s"
    assert found["WatchdogSignal"] == "SIGABRT"
    assert found["Restart"] == "always"
    assert found["RestartPreventExitStatus"] == "78"
    assert found["OOMPolicy"] == "continue"
    assert any(key == "Environment" and value.startswith("MALLOC_ARENA_MAX=") for key, value in lines_of(DEPLOY / unit))


def seconds(text: str) -> float:
    return float(text.removesuffix("s").removesuffix("min")) * (60.0 if text.endswith("min") else 1.0)


def test_case_28_the_waits_of_the_units_are_longer_than_what_they_wait_for() -> None:
    edge = EdgeSettings(fleet="lab", device="edge-01")
    for unit, health in ((UNITS[0], edge.health), (UNITS[1], CoordinatorSettings(fleet="lab").health)):
        found = dict(lines_of(DEPLOY / unit))
        assert seconds(found["TimeoutStartSec"]) > health.ready_s + health.extend_s
        # The thread that feeds it looks every third of it.
        assert seconds(found["WatchdogSec"]) > health.tick_s
        assert seconds(found["TimeoutStopSec"]) > health.extend_s
    found = dict(lines_of(DEPLOY / UNITS[0]))
    assert seconds(found["TimeoutStopSec"]) > edge.agent.drain_s + GOODBYE_S


def test_plain_files_without_placeholders() -> None:
    files = [path for path in DEPLOY.rglob("*") if path.is_file()]
    assert len(files) >= 7
    assert not [path.name for path in files if re.search(r"\{\{|@[A-Z_]+@|<[a-z ]+>", path.read_text(encoding="utf-8"))]
