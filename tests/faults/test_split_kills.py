"""kill -9 of a device, its agent, the top worker, the coordinator and the broker in the middle of the steps of a round
of split learning: all go back to the last checkpoint that all hold, and the round goes on."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path

import pytest

from coordinator.core import records as rec
from coordinator.web.views import JobView
from tests.faults.real_scene import RealScene
from tests.faults.scene import Scene

DEVICES = tuple(f"edge-0{n}" for n in range(1, 5))
STEPS, EVERY = 32, 4
JOB = """
name = "split"
[base]
model = "tiny"
[task]
kind = "classification"
dataset = "colours"
labels = ["red", "green", "blue"]
max_tokens = 16
[rounds]
count = 2
min_devices = 4
quorum = 1.0
local_steps = {steps}
deadline_s = 180
[strategy]
name = "mergesfl"
rank = 2
batch = 4
batch_min = 1
batch_max = 4
bits = 32
[strategy.split]
block = 1
step_s = 60.0
[training]
lr = 0.01
checkpoint_every = {every}
[evaluation]
data = "{held_out}"
worse_by = 10.0
"""


class SplitScene(RealScene):
    """Four devices that have the lower block of a BERT of two, and the coordinator's top worker with the other."""

    names = DEVICES

    def text(self) -> str:
        return JOB.format(steps=STEPS, every=EVERY, held_out=self.folder / "held.jsonl")

    def runs(self) -> list[tuple[int, int]]:
        """(run, step) from which the top worker let the devices go on, over both rounds."""
        told = re.findall(r"/1/\d+: run (\d+) begins at step (\d+)", self.log("coordinator"))
        return [(int(run), int(step)) for run, step in told]

    def saved(self) -> int:
        """The highest step of which the top worker of round 1 has a checkpoint."""
        found = self.fleet.folder.glob("coordinator/work/top/*-1-1/step-*")
        return max((int(path.name.removeprefix("step-")) for path in found), default=0)

    def tops(self) -> list[int]:
        """Process ids of the top worker."""
        return [pid for pid in _children(self.fleet.coordinator.pid) if "top_worker" in _command(pid)]

    def agents(self, device: str) -> list[int]:
        """Process ids of a device's agents."""
        return [pid for pid in _children(self.fleet.edges[device].pid) if "training.agent" in _command(pid)]


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text(encoding="utf-8")
    except OSError:
        return ""


def _children(parent: int) -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            if int(path.read_text(encoding="utf-8").rpartition(")")[2].split()[1]) == parent:
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


IN_TURN = ("daemon", "top", "coordinator")


@pytest.mark.timeout(420)
@pytest.mark.parametrize(
    "victims",
    [
        # One fleet for three deaths: starting four agents takes longer than what is shown.
        pytest.param(IN_TURN, id="in turn"),
        *(pytest.param((one,), id=one, marks=pytest.mark.slow) for one in ("agent", "broker")),
        pytest.param((), id="nobody", marks=pytest.mark.slow),
    ],
)
def test_killed_in_the_middle_of_its_steps_a_round_goes_on(tmp_path: Path, victims: tuple[str, ...]) -> None:
    scene = SplitScene(tmp_path)
    killed: list[str] = []
    saved = 0

    def pids(victim: str) -> list[int]:
        match victim:
            case "daemon":
                return [scene.fleet.edges[DEVICES[1]].pid]
            case "agent":
                return scene.agents(DEVICES[1])
            case "top":
                return scene.tops()
            case "coordinator":
                return [scene.fleet.coordinator.pid]
            case _:
                return [scene.fleet.broker.pid]

    def act(_scene: Scene, view: JobView | None) -> None:
        """The next one dies once there are two checkpoints that were not there at the last death: the top worker has
        the later one before the devices do."""
        nonlocal saved
        if len(killed) == len(victims) or view is None or scene.saved() < saved + 2 * EVERY:
            return
        now = scene.saved()
        victim = victims[len(killed)]
        found = [pid for pid in pids(victim) if pid]
        for pid in found:
            os.kill(pid, signal.SIGKILL)
        if found:  # else it is not back yet from the last death
            killed.append(victim)
            saved = now

    view = scene.run(act, seconds=360.0)
    assert view.state == "finished", view.reason
    assert tuple(killed) == victims, "not all were killed"
    records = scene.records()
    planned = [one for one in records if isinstance(one, rec.RoundPlanned)]
    tops = [one for one in records if isinstance(one, rec.TopTrained)]
    assert [(one.round, one.attempt) for one in planned] == [(1, 1), (2, 1)], "no round was planned again"
    assert [(one.round, one.steps) for one in tops] == [(1, STEPS), (2, STEPS)]
    admitted = [one for one in records if isinstance(one, rec.UpdateAdmitted)]
    assert sorted((one.round, one.device) for one in admitted) == [(r, d) for r in (1, 2) for d in DEVICES]
    assert all(one.facts.steps == STEPS for one in admitted), "every device did all steps"
    for top in tops:
        seen = sum(one.facts.samples for one in admitted if one.round == top.round)
        assert sum(update.samples for update in top.updates) == seen, "the top saw every sample of theirs, and no other"
    if victims and victims != ("broker",):
        began = [step for _, step in scene.runs()[: len(victims) + 1]]
        # A death of the top or of the coordinator begins a new run; a device that is back in time need not.
        assert len(began) > max(1, sum(one in ("top", "coordinator") for one in victims))
        assert began[0] == 0 and all(0 < one < STEPS for one in began[1:]), "they went on from a checkpoint"
        assert began == sorted(began), "no death took them further back than the one before"
    assert scene.exported()
