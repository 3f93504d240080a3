"""What systemd is told, and when: nothing of a service that is not well, more time for one that starts or stops."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from shared.lifeline import Lifeline
from shared.notify import notifier, reloading, watchdog_s
from shared.settings import HealthSettings
from tests.systemd.notify_socket import NotifySocket

HEALTH = HealthSettings(start_s=100.0, extend_s=20.0)
EXTEND = "EXTEND_TIMEOUT_USEC=40000000"


class Told:
    """A lifeline without its thread, on a clock that the test moves."""

    def __init__(self, watchdog: float | None = 30.0) -> None:
        self.lines: list[str] = []
        self.now = 0.0
        self.complaint = ""
        self.line = Lifeline(self.lines.append, watchdog, lambda: self.complaint, HEALTH, lambda: self.now)

    def speak(self) -> list[str]:
        """What one call says."""
        before = len(self.lines)
        self.line.speak()
        return self.lines[before:]


def test_a_starting_service_asks_for_time_up_to_a_bound() -> None:
    told = Told()
    assert told.speak() == [EXTEND]
    told.now = 99.0
    assert told.speak() == [EXTEND]
    told.now = 100.0
    assert told.speak() == []


def test_a_running_service_is_alive_only_while_it_is_well(caplog: pytest.LogCaptureFixture) -> None:
    told = Told()
    told.line.running()
    assert told.speak() == ["WATCHDOG=1"]
    told.complaint = "the main loop does not turn for 31 s"
    assert told.speak() == ["STATUS=not well: the main loop does not turn for 31 s"]
    told.complaint = "the main loop does not turn for 41 s"
    assert told.speak() == []
    told.complaint = ""
    assert told.speak() == ["WATCHDOG=1"]
    assert [record.levelname for record in caplog.records] == ["ERROR", "WARNING"]
    assert "will end this process" in caplog.text


def test_a_stopping_service_asks_for_time_only_while_it_is_well() -> None:
    told = Told()
    told.line.running()
    told.line.stopping()
    told.now = 1000.0
    assert told.speak() == [EXTEND]
    told.complaint = "the main loop does not turn for 31 s"
    assert EXTEND not in told.speak()


def test_without_a_watchdog_nobody_is_threatened(caplog: pytest.LogCaptureFixture) -> None:
    told = Told(watchdog=None)
    told.line.running()
    told.complaint = "hangs"
    told.speak()
    assert "nobody watches" in caplog.text


@pytest.fixture
def notify_socket(tmp_path: Path) -> Iterator[NotifySocket]:
    listener = NotifySocket(tmp_path, watchdog_s=0.3)
    yield listener
    listener.close()


def test_the_thread_speaks_three_times_within_the_watchdogs_time(
    notify_socket: NotifySocket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", notify_socket.environment["NOTIFY_SOCKET"])
    line = Lifeline(notifier(), 0.3, lambda: "", HEALTH)
    line.start()
    line.running()
    notify_socket.until(lambda lines: lines.count("WATCHDOG=1") >= 4)
    line.stop()
    notify_socket.quiet(0.2)
    assert notify_socket.quiet(0.5) == []
    times = [at for at, text in notify_socket.lines if text == "WATCHDOG=1"]
    assert len(times) >= 4


@pytest.mark.parametrize(
    ("environment", "seconds"),
    [
        ({}, None),
        ({"WATCHDOG_USEC": "60000000"}, 60.0),
        ({"WATCHDOG_USEC": "60000000", "WATCHDOG_PID": str(os.getpid())}, 60.0),
        ({"WATCHDOG_USEC": "60000000", "WATCHDOG_PID": "1"}, None),
        ({"WATCHDOG_USEC": "0"}, None),
        ({"WATCHDOG_USEC": "soon"}, None),
    ],
)
def test_whether_systemd_watches_this_process(environment: dict[str, str], seconds: float | None) -> None:
    assert watchdog_s(environment) == seconds


def test_a_reload_is_announced_with_the_time() -> None:
    assert reloading(12.5) == "RELOADING=1\nMONOTONIC_USEC=12500000"


WITHOUT_LIBRARY = """
import sys
sys.modules["systemd"] = sys.modules["systemd.daemon"] = None
from {module} import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("module", ["edge_daemon.service", "coordinator.service"])
def test_without_its_library_a_service_that_systemd_waits_for_says_so_at_once(
    module: str, notify_socket: NotifySocket, settings_file: Callable[[str], Path]
) -> None:
    """It would never become ready, and be killed after five minutes, for ever."""
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_LIBRARY.format(module=module), "--config", str(settings_file(module))],
        env=notify_socket.environment, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 78
    assert done.stderr.count("\n") == 1
    assert "pip install 'muster[systemd]'" in done.stderr


@pytest.fixture
def settings_file(tmp_path: Path) -> Callable[[str], Path]:
    def write(module: str) -> Path:
        more = 'device = "edge-01"\n' if module.startswith("edge") else "[api]\nport = 0\n"
        path = tmp_path / "settings.toml"
        path.write_text(f'fleet = "lab"\nstate_dir = "{tmp_path}/state"\n{more}', encoding="utf-8")
        return path

    return write
