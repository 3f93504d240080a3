"""What all tests share: the real texts, needs of the machine, what was not run, and no process left behind.

A test that can't run here skips with the name of what is missing; the summary lists each as `not run: ...`.
"""

from __future__ import annotations

import os
import platform
import shutil
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
import pytest

ROOT = Path(__file__).resolve().parent.parent
DATA = Path(os.environ.get("MUSTER_DATA") or ROOT.parent / "shared" / "data")
SESSION_VARIABLE = "MUSTER_TEST_SESSION"
SLOW_TIMEOUT_S = 900
STRAYS = 7
"""Exit code where processes were left behind: no test to be tried once more."""
GRACE_S = 5.0
"""How long processes of the last test may take to end."""
VERSIONS = ("torch", "transformers", "peft", "bitsandbytes", "numpy", "paho-mqtt", "msgspec")

_not_run: Counter[str] = Counter()
_strays: list[str] = []


# ---- needs -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def muster_data() -> Path:
    """The folder of real texts, `MUSTER_DATA` (default `../shared/data`); for tests with the marker `data`."""
    if not DATA.is_dir():
        pytest.skip("MUSTER_DATA")
    return DATA


@pytest.fixture(scope="session")
def mosquitto_program() -> str:
    """Path of the mosquitto program. Its absence fails the test: `make setup` installs it."""
    found = shutil.which("mosquitto", path=os.pathsep.join((os.environ.get("PATH", os.defpath), "/usr/sbin")))
    assert found, "mosquitto is missing: run make setup"
    return found


def _can_make_cgroups() -> bool:
    for controller in ("memory", ""):  # v1 has a hierarchy per controller, v2 one for all
        parent = Path("/sys/fs/cgroup") / controller
        if not (parent / "cgroup.procs").exists():
            continue
        try:
            Path(tempfile.mkdtemp(prefix="muster-probe-", dir=parent)).rmdir()
        except OSError:
            return False
        return True
    return False


@pytest.fixture(scope="session")
def cgroups() -> None:
    """For tests with the marker `cgroup`: skips where this user may not make cgroups."""
    if not _can_make_cgroups():
        pytest.skip("cgroups (this user may not make them; root may)")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Markers bring their fixture; every slow test has a longer timeout than the default of `pyproject.toml`."""
    needs = {"data": "muster_data", "cgroup": "cgroups"}
    for item in items:
        for marker, fixture in needs.items():
            if item.get_closest_marker(marker):
                item.add_marker(pytest.mark.usefixtures(fixture))
                names = getattr(item, "fixturenames", [])
                if fixture not in names:
                    names.append(fixture)
        if item.get_closest_marker("slow") and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(SLOW_TIMEOUT_S))


# ---- no process outlives the tests -----------------------------------------------------------------------------------


def pytest_configure(config: pytest.Config) -> None:
    """Refuse to run without timeouts; mark every process that a test starts, by its environment."""
    if not config.pluginmanager.hasplugin("timeout"):
        raise pytest.UsageError("pytest-timeout is missing: a hanging test would hang the run; run make setup")
    os.environ[SESSION_VARIABLE] = uuid.uuid4().hex


def _ours() -> Iterator[psutil.Process]:
    mark = os.environ[SESSION_VARIABLE]
    for process in psutil.process_iter():
        try:
            helper = any("multiprocessing.resource_tracker" in part for part in process.cmdline())
            if process.pid != os.getpid() and not helper and process.environ().get(SESSION_VARIABLE) == mark:
                yield process
        except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess, OSError):
            continue  # it ended while we looked, or belongs to another user


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Kill what is left of the tests' processes, and fail the run that left them."""
    deadline = time.monotonic() + GRACE_S
    while (left := list(_ours())) and time.monotonic() < deadline:
        time.sleep(0.1)
    for process in left:
        try:
            _strays.append(f"{process.pid}: {' '.join(process.cmdline())[:160]}")
            process.kill()
        except psutil.NoSuchProcess:
            continue
    if hasattr(session.config, "workeroutput"):  # one of several processes: the first one tells of it
        session.config.workeroutput["strays"] = _strays
    if _strays:
        session.exitstatus = STRAYS


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: object | None) -> None:  # noqa: ARG001  # the hook's arguments
    """What one of several processes left behind fails the run, too."""
    _strays.extend(getattr(node, "workeroutput", {}).get("strays", []))


# ---- what the reader sees --------------------------------------------------------------------------------------------


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "none"


def pytest_report_header() -> list[str]:
    """Versions, so that a log explains itself."""
    versions = ", ".join(f"{name} {_version(name)}" for name in VERSIONS)
    return [
        f"muster {_version('muster')}: {versions}",
        f"machine: {platform.platform()}, {os.cpu_count()} cores, MUSTER_DATA {DATA if DATA.is_dir() else 'absent'}",
    ]


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Count the skipped tests by what they lack."""
    if report.skipped and not hasattr(report, "wasxfail") and isinstance(report.longrepr, tuple):
        _not_run[report.longrepr[2].removeprefix("Skipped: ")] += 1


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """One line for everything that did not run, and one for each process that was left behind."""
    if not DATA.is_dir():
        _not_run["MUSTER_DATA"] += 0
    for reason, count in sorted(_not_run.items()):
        number = {0: "", 1: " (1 test)"}.get(count, f" ({count} tests)")
        terminalreporter.write_line(f"not run: {reason}{number}", yellow=True)
    for stray in _strays:
        terminalreporter.write_line(f"left behind, killed: {stray}", red=True)
