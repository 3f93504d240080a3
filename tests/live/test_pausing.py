"""The owner comes first: training rests while other programs use more of the device than he allows, then goes on."""

from __future__ import annotations

import itertools
import json
import random
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from coordinator.core import records as rec
from muster.testbed import least_squares
from muster.testbed.fleet import AGENTS, FLEET, DeviceSpec, Fleet, start_in
from shared import topics
from shared.codec import unpack
from shared.messages import Load, Progress
from shared.transport.base import Received, TransportEvent
from shared.transport.mqtt import MqttTransport
from tests.live.rig import ended, records_of, wait_for, wait_until_heard

DEVICE = "edge-01"
LIMIT = 0.2
"""The owner's, as a share of the cores: where the machine has much else to do the burner may get but half of them."""
WITHIN_S = 2.0
"""A pause comes so soon after a load began; a micro-batch that takes longer ends first."""
STEP_S = 0.05
JOB = """
name = "pause"
[base]
model = "12x6"
[task]
kind = "least_squares"
dataset = "points"
[rounds]
count = 1
min_devices = 1
local_steps = 400
deadline_s = 600
[strategy]
rank = 3
batch = 4
batch_min = 4
batch_max = 4
bits = 32
"""
# It says when it begins: starting an interpreter takes a while, and more on a busy machine.
BURNER = "import time; print(time.time(), flush=True)\nwhile True: sum(i * i for i in range(10_000))"


@dataclass
class Watcher:
    """Listens to what the device tells: (when it came in Unix seconds, message)."""

    loads: list[tuple[float, Load]] = field(default_factory=list)
    steps: list[tuple[float, Progress]] = field(default_factory=list)

    def hear(self, event: TransportEvent) -> None:
        """Called on the transport's thread."""
        if not isinstance(event, Received):
            return
        if event.name == topics.LOAD.name(FLEET, device=DEVICE):
            self.loads.append((time.time(), unpack(event.payload, Load)))
        else:
            self.steps.append((time.time(), unpack(event.payload, Progress)))


def _listen(fleet: Fleet) -> tuple[Watcher, MqttTransport]:
    watcher = Watcher()
    transport = MqttTransport(fleet.broker.settings(), "watcher", lambda: 1, rng=random.Random(1))
    transport.subscribe([(topic.name(FLEET, device=DEVICE), 0) for topic in (topics.LOAD, topics.PROGRESS)])
    transport.start(watcher.hear)
    return watcher, transport


def _fleet(folder: Path) -> Fleet:
    path = folder / "points.jsonl"
    least_squares.write_rows(path, least_squares.make_rows("12x6", 64, seed=0))
    settings = {
        "policy": {"foreign_limit": LIMIT},
        # Every reading is told.
        "telemetry": {"idle_s": 1.0, "busy_s": 1.0},
        "agent": {"command": ["/usr/bin/env", f"MUSTER_TEST_STEP_S={STEP_S}", *AGENTS["numpy"]]},
    }
    # A quota far below the machine's cores, so that only what runs in the device's own group is foreign.
    spec = DeviceSpec(DEVICE, 0.5, data={"points": path}, settings=settings)
    return Fleet(folder / "fleet", [spec], {"12x6": "12x6"}, agent="numpy", coordinator={"waits": {"gather_s": 0.3}})


def _lines(fleet: Fleet, text: str) -> list[float]:
    """When the daemon logged lines with `text` in them: Unix seconds."""
    lines = (json.loads(line) for line in fleet.edges[DEVICE].log.read_text(encoding="utf-8").splitlines())
    return [line["ts"] for line in lines if text in line["text"]]


@pytest.mark.cgroup
@pytest.mark.timeout(180)
def test_training_rests_while_the_owner_works(tmp_path: Path) -> None:
    """All times are of recorded events: of the burner's first turn, of loads as they came, of the daemon's log."""
    burner: subprocess.Popen[bytes] | None = None
    with _fleet(tmp_path) as fleet:
        wait_until_heard(fleet)
        watcher, transport = _listen(fleet)
        try:
            job = fleet.client.submit(JOB).id
            wait_for(fleet, job, lambda _: len(watcher.steps) > 1, seconds=60)
            started = time.time()
            burner = start_in(fleet.edges[DEVICE].group, [sys.executable, "-c", BURNER], tmp_path / "burner.log")
            # It rests for some readings, longer than the pause may take to come.
            wait_for(fleet, job, lambda _: sum(load.paused != "" for _, load in watcher.loads) > 4, seconds=60)
            burner.kill()
            view = wait_for(fleet, job, ended, seconds=100)
        finally:
            transport.stop(graceful=False)
            if burner is not None:
                burner.kill()
                burner.wait()
        (admitted,) = [r for r in records_of(fleet, job) if isinstance(r, rec.UpdateAdmitted)]
        rested, resumed = _lines(fleet, "training rests: foreign load"), _lines(fleet, "training goes on")
    begun = float((tmp_path / "burner.log").read_text(encoding="ascii").split()[0])
    assert view.state == "finished", view.reason
    assert len(rested) == len(resumed) == 1, (rested, resumed)
    # An interpreter that starts is a load too, so it may rest before the first turn.
    assert started < rested[0] < resumed[0]
    _check_pause(watcher, begun, rested[0], resumed[0])
    facts = admitted.facts
    assert facts.ended == "complete", "it did not go on"
    assert facts.paused_s > (resumed[0] - rested[0]) / 2, "the daemon paused, the agent did not"


def _check_pause(watcher: Watcher, begun: float, rested: float, resumed: float) -> None:
    """It came in time, and it was kept."""
    gaps = [after - before for (before, _), (after, _) in itertools.pairwise(watcher.loads)]
    usual = statistics.median(gaps)
    assert usual < WITHIN_S, "it looks too seldom"
    # A machine with much else to do reads late now and then; by how much at most, its own readings tell.
    late_s = max(gaps) - usual
    assert rested - begun <= max(WITHIN_S, STEP_S) + late_s, "it rested too late after the load began"
    for _, load in watcher.loads:
        above = load.foreign_cores > LIMIT * load.cores
        assert not above or load.phase == "paused", (
            f"{load.foreign_cores:.2f} of {load.cores:.2f} foreign, and it trains"
        )
        assert not load.paused or load.paused.startswith("foreign load: other programs use")
    late = [said.step for when, said in watcher.steps if rested + WITHIN_S < when < resumed]
    assert late == [], "it trained in its pause"
    assert max(said.step for when, said in watcher.steps if when < resumed) < 400
