"""kill -9 of coordinator, broker, daemon and agent while the real agent trains a real, tiny model."""

from __future__ import annotations

from pathlib import Path

import pytest

from coordinator.core import records as rec
from tests.faults.real_scene import RealScene
from tests.faults.scene import DEVICES, ROUNDS, check_whole, trap

JOB = """
name = "real"
[base]
model = "tiny"
[task]
kind = "classification"
dataset = "colours"
labels = ["red", "green", "blue"]
max_tokens = 16
[rounds]
count = {rounds}
min_devices = 2
quorum = 1.0
local_steps = 24
deadline_s = 120
[strategy]
rank = 2
batch = 4
batch_min = 4
batch_max = 4
bits = 32
[training]
lr = 0.002
checkpoint_every = 4
[evaluation]
data = "{held_out}"
worse_by = 10.0
"""


class TwoRounds(RealScene):
    """The scene with the job above."""

    def text(self) -> str:
        return JOB.format(rounds=self.rounds, held_out=self.folder / "held.jsonl")

    def plans(self) -> list[str]:
        """Digest of each plan."""
        return [record.digest for record in self.records() if isinstance(record, rec.RoundPlanned)]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Digest of the adapter of the undisturbed run."""
    scene = TwoRounds(tmp_path_factory.mktemp("undisturbed"))
    view = scene.run(seconds=120.0)
    assert view.state == "finished", view.reason
    assert [r.phase for r in view.rounds] == ["committed"] * ROUNDS
    return scene.exported()


@pytest.mark.timeout(180)
@pytest.mark.parametrize(
    ("program", "command"),
    [
        pytest.param("coordinator", trap("coordinator", "open", "done"), marks=pytest.mark.slow),
        pytest.param("broker", trap("coordinator", "open", "done", "{scene.victim}"), marks=pytest.mark.slow),
        pytest.param("daemon", trap("edge", "training", "done"), marks=pytest.mark.slow),
        ("agent", trap("edge", "training", "done", "agent")),
    ],
)
def test_killed(tmp_path: Path, undisturbed: str, program: str, command: list[str]) -> None:
    place = "coordinator" if program in ("coordinator", "broker") else DEVICES[0]
    scene = TwoRounds(tmp_path, commands={place: command})
    view = scene.run(seconds=120.0)
    assert scene.marker.exists(), "the trap never sprang"
    check_whole(scene, view, undisturbed)
    done = {device: dict.fromkeys(range(1, ROUNDS + 1), 1) for device in DEVICES}
    assert {device: scene.trainings(device) for device in DEVICES} == done, "trained again"
    assert len(set(scene.plans())) == ROUNDS
