"""Both services as processes that systemd started, with the test at its end of the protocol and a real broker."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from muster.testbed import least_squares
from muster.testbed.broker import Broker, free_port
from tests.systemd.notify_socket import NotifySocket

EDGE, COORDINATOR = "edge_daemon.service", "coordinator.service"
BOTH = pytest.mark.parametrize("module", [EDGE, COORDINATOR])
HEAD = """
fleet = "lab"
state_dir = "{folder}/state"
{name}
[broker]
port = {port}
reconnect_max_s = 1.0
[health]
ready_s = {ready_s}
network_s = 4.0
tick_s = {tick_s}
extend_s = 0.5
"""
OWN = {
    EDGE: """
[data]
points = "{folder}/points.jsonl"
[agent]
command = ["{python}", "-m", "muster.testbed.numpy_agent"]
""",
    COORDINATOR: "[api]\nport = 0\n",
}
HANGING = """
import sys, threading, signal
from {module} import main
from {package}.runtime import Runtime
def hang(self):
    threading.Event().wait(3600)
tick = Runtime.tick
signal.signal(signal.SIGUSR1, lambda *_: setattr(Runtime, "tick", hang))
sys.exit(main(sys.argv[1:]))
"""
DYING = """
import sys, threading, signal
from {module} import main
def die(*_):
    threading.Thread(target=lambda: 1 / 0, name="telemetry").start()
signal.signal(signal.SIGUSR1, die)
sys.exit(main(sys.argv[1:]))
"""


class Started:
    """A service under the protocol; `program`: what runs instead of the module itself."""

    def __init__(self, folder: Path, module: str, *, port: int, watchdog_s: float = 0.0, program: str = "",
                 ready_s: float = 1.0, tick_s: float = 30.0) -> None:  # fmt: skip
        self.folder = folder
        self.config = folder / "settings.toml"
        name = 'device = "edge-01"' if module == EDGE else 'name = "coord-1"'
        values = {"folder": folder, "port": port, "python": sys.executable, "name": name, "ready_s": ready_s}
        self.text = (HEAD + OWN[module]).format(**values, tick_s=tick_s)
        self.config.write_text(self.text, encoding="utf-8")
        least_squares.write_rows(folder / "points.jsonl", least_squares.make_rows("6x4", 40, seed=1))
        self.socket = NotifySocket(folder, watchdog_s)
        code = program.format(module=module, package=module.split(".")[0])
        command = [sys.executable, *(("-c", code) if program else ("-m", module)), "--config", str(self.config)]
        self.log = folder / "log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(command, env=self.socket.environment, stderr=log, stdout=log)

    def records(self) -> list[dict[str, str]]:
        """The log's lines."""
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()
        return [json.loads(line) for line in lines if line.startswith("{")]

    def end(self) -> None:
        """Whatever still runs is killed."""
        self.process.kill()
        self.process.wait()
        self.socket.close()


Start = Callable[..., Started]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    made: list[Started] = []

    def begin(module: str, **options: object) -> Started:
        made.append(Started(tmp_path, module, **{"port": free_port(), **options}))  # type: ignore[arg-type]  # its own names
        return made[-1]

    yield begin
    for one in made:
        one.end()


def said(text: str) -> Callable[[list[str]], bool]:
    return lambda lines: any(line.startswith(text) for line in lines)


@BOTH
def test_ready_comes_with_the_broker_and_stopping_with_the_signal(module: str, start: Start, tmp_path: Path) -> None:
    with Broker(tmp_path / "broker") as broker:
        service = start(module, port=broker.port, ready_s=600.0)
        before = service.socket.until(said("READY=1"))
        assert said("EXTEND_TIMEOUT_USEC=1000000")(before), "it never asked for time to start"
        service.socket.until(said("STATUS=idle" if module == EDGE else "STATUS=0 device(s) able, no job"))
        service.process.send_signal(signal.SIGTERM)
        service.socket.until(said("STOPPING=1"))
        assert service.process.wait(60) == 0
    left = [record for record in service.records() if record.get("event") == "left"]
    assert len(left) == 1


@BOTH
def test_without_a_broker_it_is_ready_after_a_while_and_says_that_it_is_offline(module: str, start: Start) -> None:
    service = start(module, ready_s=3.0)
    early = service.socket.until(said("STATUS=offline, retrying"))
    assert "READY=1" not in early
    service.socket.until(said("READY=1"))
    service.process.send_signal(signal.SIGTERM)
    assert service.process.wait(60) == 0


@BOTH
def test_case_27_a_service_that_hangs_is_told_dead_and_leaves_a_traceback(module: str, start: Start) -> None:
    service = start(module, program=HANGING, watchdog_s=1.5, tick_s=3.0)
    service.socket.until(said("WATCHDOG=1"))
    service.process.send_signal(signal.SIGUSR1)
    service.socket.until(said("STATUS=not well: the main loop does not turn"))
    assert "WATCHDOG=1" not in service.socket.quiet(2.0)
    # What systemd does then.
    service.process.send_signal(signal.SIGABRT)
    assert service.process.wait(60) == -signal.SIGABRT
    log = service.log.read_text(encoding="utf-8")
    assert "Fatal Python error: Aborted" in log
    assert "in hang" in log


@BOTH
def test_a_thread_that_dies_ends_the_service_to_be_started_again(module: str, start: Start) -> None:
    service = start(module, program=DYING)
    service.socket.until(said("READY=1"))
    service.process.send_signal(signal.SIGUSR1)
    assert service.process.wait(60) == 1
    texts = [record["text"] for record in service.records() if record["level"] == "ERROR"]
    assert texts[0] == "thread telemetry died"
    assert "thread telemetry died of ZeroDivisionError: division by zero: leaving, to be started again" in texts


@pytest.mark.parametrize(
    ("module", "old", "new", "told"),
    [
        (EDGE, "[data]", "[policy]\ntemperature_limit_c = 1.0\nhours = []\n[data]", "policy.temperature_limit_c"),
        (COORDINATOR, "[api]", "[waits]\nsilent_s = 5.0\n[api]", "waits.silent_s"),
    ],
)
def test_case_46_a_reload_takes_new_limits_without_dropping_the_session(
    module: str, old: str, new: str, told: str, start: Start, tmp_path: Path
) -> None:
    with Broker(tmp_path / "broker") as broker:
        service = start(module, port=broker.port)
        service.socket.until(said("READY=1"))
        changed = service.text.replace(old, new, 1).replace('fleet = "lab"', 'fleet = "lab"\nlog_level = "DEBUG"')
        service.config.write_text(changed.replace("port = ", "keepalive_s = 20\nport = ", 1), encoding="utf-8")
        service.process.send_signal(signal.SIGHUP)
        lines = service.socket.until(said("READY=1"))
        assert "RELOADING=1" in lines
        assert said("MONOTONIC_USEC=")(lines)
        broken = service.text.replace("[broker]", "[brokr]")
        service.config.write_text(broken, encoding="utf-8")
        service.process.send_signal(signal.SIGHUP)
        service.socket.until(lambda lines: any("reload refused:" in line and "brokr" in line for line in lines))
        service.config.write_text(service.text, encoding="utf-8")
        service.process.send_signal(signal.SIGHUP)
        service.socket.until(lambda lines: any(line.startswith("STATUS=") and "refused" not in line for line in lines))
        service.process.send_signal(signal.SIGTERM)
        assert service.process.wait(60) == 0
        log = broker.log
    events = {record["event"]: record["text"] for record in service.records() if "event" in record}
    first = next(record["text"] for record in service.records() if record.get("event") == "reloaded")
    assert first == f"reloaded, new: {told}, log_level; only after a restart: broker" or (
        first == f"reloaded, new: log_level, {told}; only after a restart: broker"
    ), first
    assert "the old settings stay" in events["reload-refused"]
    assert log.count("New client connected") == 1, "the session was dropped"


def test_the_agents_of_a_daemon_can_not_speak_for_it(start: Start) -> None:
    """NotifyAccess=main: systemd hears the daemon alone, so an agent must not hold its watchdog either."""
    service = start(EDGE, watchdog_s=30.0)
    service.socket.until(said("READY=1"))
    service.socket.until(lambda _: any("numpy_agent" in " ".join(child.cmdline()) for child in children(service)))
    (agent,) = [child for child in children(service) if "numpy_agent" in " ".join(child.cmdline())]
    adjusted = Path(f"/proc/{agent.pid}/oom_score_adj").read_text(encoding="ascii").strip()
    assert adjusted == "1000", "it must die before the daemon"
    assert int(Path(f"/proc/{service.process.pid}/oom_score_adj").read_text(encoding="ascii")) < 1000
    assert "NOTIFY_SOCKET" not in agent.environ()
    service.process.send_signal(signal.SIGTERM)
    assert service.process.wait(60) == 0


def children(service: Started) -> list[psutil.Process]:
    """Processes that the service started, and that can be looked at."""
    found = []
    for child in psutil.Process(service.process.pid).children():
        try:
            child.cmdline()
        except psutil.Error:
            continue
        found.append(child)
    return found


@BOTH
@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("[healt]\n", "healt: unknown key, did you mean 'health'?"),
        ("[health]\ntick_s = 0\n", "health.tick_s"),
        ('[broker]\ncafile = "${CREDENTIALS_DIRECTORY}/ca.crt"\n', "${CREDENTIALS_DIRECTORY} is not set"),
    ],
)
def test_a_bad_configuration_ends_with_78(module: str, text: str, fault: str, tmp_path: Path) -> None:
    name = 'device = "edge-01"\n' if module == EDGE else ""
    config = tmp_path / "settings.toml"
    config.write_text(f'fleet = "lab"\nstate_dir = "{tmp_path}/state"\n{name}{text}', encoding="utf-8")
    clean = {key: value for key, value in os.environ.items() if key != "CREDENTIALS_DIRECTORY"}
    done = subprocess.run(
        [sys.executable, "-m", module, "--config", str(config)], env=clean, capture_output=True, text=True, timeout=60,
        check=False,
    )  # fmt: skip
    assert done.returncode == 78
    assert done.stderr.count("\n") == 1
    assert fault in done.stderr
