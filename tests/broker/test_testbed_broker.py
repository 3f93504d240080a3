"""The testbed's own mosquitto."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from muster.testbed.broker import Broker
from shared.errors import UserError


def gone(pid: int) -> bool:
    """Whether the process ends within some seconds."""
    for _ in range(200):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        if Path(f"/proc/{pid}/stat").read_text("utf-8").rsplit(")", 1)[1].split()[0] == "Z":
            return True  # dead; whoever inherited it has not looked yet
        time.sleep(0.05)
    return False


def test_it_leaves_nothing_behind() -> None:
    with Broker() as broker:
        pid, folder = broker.pid, broker.folder
        assert pid
        assert (folder / "mosquitto.conf").exists()
    assert broker.pid == 0
    assert gone(pid)
    assert not folder.exists()


def test_a_port_in_use_is_one_line(broker: Broker, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"port {broker.port} is in use"), Broker(tmp_path / "two", port=broker.port):
        pass


def test_a_missing_program_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MUSTER_MOSQUITTO", str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="apt-get install mosquitto"), Broker(tmp_path / "b"):
        pass


def test_it_dies_with_its_parent() -> None:
    lines = (
        "import time",
        "from muster.testbed.broker import Broker",
        "broker = Broker()",
        "broker.start()",
        "print(broker.pid, flush=True)",
        "time.sleep(60)",
    )
    with subprocess.Popen([sys.executable, "-c", "\n".join(lines)], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        os.kill(parent.pid, signal.SIGKILL)
    assert gone(pid)
