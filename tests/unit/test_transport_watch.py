"""A network thread that ended or hangs: the watch is sure before it says so, and both services then leave."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from muster.testbed.broker import free_port
from shared.settings import BrokerSettings
from shared.transport import watch
from shared.transport.mqtt import MqttTransport
from shared.transport.paho_client import CONNECT_TIMEOUT_S

SETTINGS = {
    "edge_daemon.service": 'device = "edge-01"\n[agent]\ncommand = ["{python}", "-m", "muster.testbed.numpy_agent"]\n',
    "coordinator.service": "[api]\nport = 0\n",
}
BROKEN = {
    "dead": "mqtt.MqttTransport._run = lambda self: None",
    # Its promise runs out at once here, not after most of a minute.
    "hanging": (
        "mqtt.MqttTransport._connection = lambda self: threading.Event().wait()\n"
        "mqtt.MqttTransport._promise = lambda self, seconds: setattr(self, '_due', time.monotonic() + 0.5)"
    ),
}
PROGRAM = """
import sys, threading, time
from shared.transport import mqtt
{broken}
from {module} import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("module", list(SETTINGS))
@pytest.mark.parametrize("how", list(BROKEN))
def test_a_service_whose_network_thread_is_lost_leaves_to_be_started_again(
    tmp_path: Path, module: str, how: str
) -> None:
    config = tmp_path / "settings.toml"
    more = SETTINGS[module].format(python=sys.executable)
    config.write_text(
        f'fleet = "lab"\nstate_dir = "{tmp_path}/state"\nbroker = {{ port = {free_port()} }}\n{more}', encoding="utf-8"
    )
    program = PROGRAM.format(broken=BROKEN[how], module=module)
    done = subprocess.run(
        [sys.executable, "-c", program, "--config", str(config)], capture_output=True, text=True, timeout=90
    )
    assert done.returncode == 1, done.stderr
    errors = [line for line in map(json.loads, done.stderr.splitlines()) if line["level"] == "ERROR"]
    assert [line["text"] for line in errors] == ["the network thread is dead or hangs: leaving, to be started again"]


class Parked(MqttTransport):
    """A transport whose network thread only waits, so that a test alone makes its promises."""

    def __init__(self, **changes: int) -> None:
        super().__init__(BrokerSettings(port=free_port(), **changes), "dev-1", lambda: 1, rng=random.Random(1))
        self.done = threading.Event()
        self._thread = threading.Thread(target=self.done.wait, daemon=True)

    def promise(self, seconds: float) -> None:
        self._promise(seconds)

    def overdue(self) -> None:
        self._due = 0.0

    def left(self) -> float:
        """Seconds until what was promised is overdue."""
        return self._due - time.monotonic()


def test_an_overdue_promise_that_is_kept_after_all_is_no_loss() -> None:
    """As after the process was stopped for a minute, and its network thread turns a moment later than its loop."""
    now = 100.0
    transport = Parked()
    seen = watch.Watch(transport, lambda: now)
    transport.start(lambda _event: None)
    assert not seen.lost()
    for _ in range(3):
        transport.overdue()
        assert not transport.alive
        assert not seen.lost()
        now += 0.9 * watch.SURE_S
        assert not seen.lost()
        transport.promise(1.0)
        assert not seen.lost()
    transport.overdue()
    assert not seen.lost()
    now += watch.SURE_S
    assert seen.lost()
    transport.done.set()


def test_a_thread_that_ended_is_a_loss() -> None:
    now = 100.0
    transport = Parked()
    seen = watch.Watch(transport, lambda: now)
    transport.start(lambda _event: None)
    transport.done.set()
    transport._thread.join()
    assert not seen.lost()
    now += watch.SURE_S
    assert seen.lost()


@pytest.mark.parametrize("keepalive_s", [2, 30, 120])
def test_whatever_the_keepalive_the_owner_knows_within_a_minute(keepalive_s: int) -> None:
    transport = Parked(keepalive_s=keepalive_s)
    transport.promise(
        2 * CONNECT_TIMEOUT_S
    )  # longer than the thread of a connection is away without waiting on purpose
    assert transport.left() + watch.SURE_S < 60.0


def test_a_network_that_is_down_is_no_hung_thread() -> None:
    """A look-up with three silent name servers and one domain to search takes a minute; each address 5 seconds more.

    A daemon that was started again for it would lose what its agent trains meanwhile.
    """
    transport = Parked()
    transport.start(lambda _event: None)
    assert transport.left() > 60.0 + 12 * CONNECT_TIMEOUT_S
    assert transport.late_s == 0.0
    transport.done.set()
