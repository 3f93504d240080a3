"""Memory that runs out under a unit's limit, in a real control group: nspawn hosts enforce none.

The daemon of these tests holds more than its agent, so that the kernel would choose the daemon, were it not for the
scores: OOMScoreAdjust=500 of the unit, and 1000 that the daemon gives its agents.
"""

from __future__ import annotations

import re
import sys
import time
from pathlib import Path

import pytest

from muster.testbed import least_squares, profiles
from muster.testbed.fleet import AGENTS, DeviceSpec, Fleet
from tests.live.rig import ended, parts_of, wait_for, wait_until_heard
from tests.live.test_out_of_memory import DAEMON_BYTES, MIB, SETTINGS, SQUARES

pytestmark = [pytest.mark.cgroup, pytest.mark.timeout(180)]
DEVICE = "edge-01"
BALLAST = 600 * MIB
SAMPLE = 48 * MIB
UNIT = Path(__file__).resolve().parent.parent.parent / "deploy/systemd/muster-edge.service"
HEAVY = """
import sys
from edge_daemon import service
from edge_daemon.adapters import trainer
open("/proc/self/oom_score_adj", "w").write("{own}")
trainer.FIRST_TO_DIE = {agents}
ballast = bytearray(b"x") * {ballast}
sys.exit(service.main(sys.argv[1:]))
"""


def unit_score() -> int:
    """What the unit gives the daemon."""
    found = re.search(r"^OOMScoreAdjust=(\d+)$", UNIT.read_text(encoding="utf-8"), re.MULTILINE)
    assert found
    return int(found[1])


def fleet(folder: Path, agents: int) -> Fleet:
    """One device with room for a batch of four of eight; `agents`: the score that agents get."""
    path = folder / "points.jsonl"
    least_squares.write_rows(path, least_squares.make_rows("12x6", 64, seed=1))
    agent = profiles.measure_agent(AGENTS["numpy"], {"points": str(path)})
    hungry = ["/usr/bin/env", f"MUSTER_TEST_SAMPLE_BYTES={SAMPLE}", *AGENTS["numpy"]]
    spec = DeviceSpec(
        DEVICE, cores=0.5, memory_bytes=agent + DAEMON_BYTES + BALLAST + 6 * SAMPLE, data={"points": path},
        settings={**SETTINGS, "agent": {"command": hungry}},
    )  # fmt: skip
    code = HEAVY.format(own=unit_score(), agents=agents, ballast=BALLAST)
    return Fleet(
        folder / "fleet", [spec], {"12x6": "12x6"}, agent="numpy", commands={DEVICE: [sys.executable, "-c", code]},
        coordinator={"waits": {"gather_s": 0.3}},
    )  # fmt: skip


def test_case_26_the_agent_dies_the_daemon_lives_and_says_what_fits(tmp_path: Path) -> None:
    with fleet(tmp_path, agents=1000) as running:
        wait_until_heard(running)
        daemon = running.edges[DEVICE].pid
        job = running.client.submit(SQUARES.format(rounds=2)).id
        view = wait_for(running, job, ended, seconds=120)
        assert running.edges[DEVICE].pid == daemon, "the daemon died"
        log = running.edges[DEVICE].log.read_text(encoding="utf-8")
    assert view.state == "finished", view.reason
    first, second = parts_of(view, DEVICE)
    assert first.facts is not None
    assert first.work.batch == 8, first.work.reasons["batch"]
    assert first.facts.batch_limit == 4
    assert "out of memory with a batch of 8: again with 4" in log
    assert second.work.batch <= 4, "the next plan knows"


def test_without_the_scores_the_daemon_would_die(tmp_path: Path) -> None:
    """So that the test above says something."""
    with fleet(tmp_path, agents=unit_score()) as running:
        wait_until_heard(running)
        running.client.submit(SQUARES.format(rounds=2))
        end = time.monotonic() + 120
        while running.edges[DEVICE].pid:
            assert time.monotonic() < end, "nobody died, or the agent did"
            time.sleep(0.1)
