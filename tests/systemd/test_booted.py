"""The units on a host that booted with them: what systemd enforces and does, the doctor in the same sandbox."""

from __future__ import annotations

import json
import signal

import pytest

from tests.systemd.booted import Host
from tests.systemd.conftest import EDGE

UNIT = "muster-edge.service"
pytestmark = pytest.mark.timeout(600)


@pytest.fixture
def broker(host: Host) -> Host:
    """The host with its broker up."""
    host.run("systemctl", "start", "mosquitto.service")
    return host


@pytest.fixture
def daemon(broker: Host) -> Host:
    """The host with the daemon connected."""
    broker.write("/etc/muster/edge.toml", EDGE)
    broker.run("systemctl", "reset-failed", UNIT, check=False)
    broker.run("systemctl", "restart", UNIT, timeout=180.0)
    broker.until(lambda: "offline" not in broker.show(UNIT, "StatusText"), "the daemon is connected")
    return broker


def doctor(host: Host) -> tuple[int, dict[str, dict[str, str]]]:
    done = host.run("/opt/muster/current/bin/muster-edge", "doctor", "--sandbox", "--json", check=False, timeout=300.0)
    assert done.returncode in (0, 1), done.stdout + done.stderr
    return done.returncode, {finding["check"]: finding for finding in json.loads(done.stdout)["findings"]}


def test_the_hardened_broker_starts_reloads_and_has_lost_its_privileges(broker: Host) -> None:
    pid = broker.show("mosquitto.service", "MainPID")
    broker.run("systemctl", "reload", "mosquitto.service")
    assert broker.show("mosquitto.service", "MainPID") == pid
    status = broker.run("cat", f"/proc/{pid}/status").stdout
    assert "CapEff:\t0000000000000000" in status
    assert "Seccomp:\t2" in status
    assert "\nUid:\t0\t" not in status


def test_case_41_the_doctor_passes_in_the_units_sandbox(broker: Host) -> None:
    """The agent's own probe among it: torch and a real 4-bit kernel under the unit's filters."""
    broker.run("systemctl", "stop", UNIT)
    code, found = doctor(broker)
    assert code == 0, found
    assert found["sandbox"]["verdict"] == "ok"
    assert found["kernel cpu"]["text"] == "32, 16, 8, 4 bits proven by a product within its bound"
    assert found["broker login"]["text"].startswith("as edge-01")
    assert found["disk"]["verdict"] in ("ok", "skip"), found["disk"]
    assert found["data and models"]["verdict"] == "ok"


def test_the_daemon_becomes_ready_with_keys_that_systemd_handed_over(daemon: Host) -> None:
    assert daemon.show(UNIT, "ActiveState") == "active"
    pid = daemon.show(UNIT, "MainPID")
    status = daemon.run("cat", f"/proc/{pid}/status").stdout
    assert "CapEff:\t0000000000000000" in status
    assert "NoNewPrivs:\t1" in status
    assert "Seccomp:\t2" in status
    assert daemon.run("cat", f"/proc/{pid}/oom_score_adj").stdout.strip() == "500"
    assert "mqtt.key" in daemon.run("ls", f"/run/credentials/{UNIT}").stdout
    code, found = doctor(daemon)
    assert code == 0, found
    assert "the daemon runs" in found["broker login"]["text"]


def test_lines_of_the_journal_can_be_filtered_by_what_they_are_about(daemon: Host) -> None:
    lines = daemon.journal("MUSTER_DEVICE=edge-01", "MUSTER_EVENT=started", "--output=json").splitlines()
    line = json.loads(lines[-1])
    assert line["MESSAGE"] == "device edge-01 of fleet lab runs"
    assert line["PRIORITY"] == "6"
    assert line["MUSTER_FLEET"] == "lab"
    assert len(line["MESSAGE_ID"]) == 32
    assert line["CODE_FILE"].endswith("edge_daemon/service.py")
    assert line["SYSLOG_IDENTIFIER"] == "muster-edge"


def test_case_46_a_reload_keeps_process_and_session_and_a_bad_file_changes_nothing(daemon: Host) -> None:
    pid = daemon.show(UNIT, "MainPID")
    daemon.write("/etc/muster/edge.toml", EDGE + "[policy]\ntemperature_limit_c = 80.0\n")
    daemon.run("systemctl", "reload", UNIT)
    daemon.until(lambda: "new: policy.temperature_limit_c" in daemon.journal(), "the new limit")
    daemon.write("/etc/muster/edge.toml", EDGE + "[polcy]\n")
    daemon.run("systemctl", "reload", UNIT)
    daemon.until(lambda: "reload refused" in daemon.show(UNIT, "StatusText"), "the refusal")
    assert daemon.show(UNIT, "ActiveState") == "active"
    assert daemon.show(UNIT, "MainPID") == pid
    assert "policy.temperature_limit_c" not in daemon.show(UNIT, "StatusText")


def test_case_27_a_daemon_that_stands_still_is_killed_with_a_traceback_and_started_again(daemon: Host) -> None:
    pid = daemon.show(UNIT, "MainPID")
    daemon.kill(UNIT, signal.SIGSTOP)
    daemon.until(lambda: daemon.show(UNIT, "MainPID") not in (pid, "0"), "another process", seconds=120.0)
    daemon.until(lambda: daemon.show(UNIT, "ActiveState") == "active", "the daemon is up again", seconds=120.0)
    journal = daemon.journal(f"--unit={UNIT}")
    assert "Watchdog timeout" in journal
    assert "Fatal Python error: Aborted" in journal


def test_a_killed_daemon_is_started_again_and_its_agent_does_not_live_on(daemon: Host) -> None:
    pid = daemon.show(UNIT, "MainPID")
    daemon.until(lambda: "training.agent" in daemon.run("ps", "axww").stdout, "an agent", seconds=120.0)
    daemon.kill(UNIT, signal.SIGKILL)
    daemon.until(lambda: daemon.show(UNIT, "MainPID") not in (pid, "0"), "another process")
    daemon.until(lambda: daemon.show(UNIT, "ActiveState") == "active", "the daemon is up again", seconds=120.0)
    agents = [line for line in daemon.run("ps", "axwwo", "ppid,args").stdout.splitlines() if "training.agent" in line]
    assert {line.split()[0] for line in agents} <= {daemon.show(UNIT, "MainPID")}


def test_a_stop_is_clean(daemon: Host) -> None:
    daemon.run("systemctl", "stop", UNIT, timeout=180.0)
    assert daemon.show(UNIT, "Result") == "success"
    assert daemon.show(UNIT, "ActiveState") == "inactive"
    assert "mqtt.key" not in daemon.run("ls", "/run/credentials", check=False).stdout


def test_a_bad_configuration_is_not_tried_again(broker: Host) -> None:
    broker.write("/etc/muster/edge.toml", EDGE.replace("[broker]", "[brokr]"))
    assert broker.run("systemctl", "restart", UNIT, check=False, timeout=180.0).returncode != 0
    broker.until(lambda: broker.show(UNIT, "ActiveState") == "failed", "it failed for good")
    assert broker.show(UNIT, "ExecMainStatus") == "78"
    assert broker.show(UNIT, "NRestarts") == "0"
    assert "did you mean 'broker'?" in broker.journal(f"--unit={UNIT}")
