"""kill -9 of the coordinator, a device, its agent, the broker, at every stage of a release, over real processes.

The stages come from the tables; `tests/fleet/test_release_kills.py` kills at every single write, in memory.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from coordinator.core import release_transitions
from coordinator.core.release_records import Canaries, DeviceReleased
from coordinator.web.release_asks import ReleaseAsk
from coordinator.web.views import ReleaseView
from edge_daemon.core.release_transitions import STAGES
from muster.testbed.crashing import RELEASE
from shared import machines
from shared.errors import UserError
from tests.faults.phases import FIRST, POINTS
from tests.faults.scene import DEVICES, Scene, trap

PHASES = machines.phases(release_transitions.TABLE)
BACK = ("rolling_back", "rolled_back")
NO_PHASE = {"failed": "nothing was begun then; it is met in memory"}
NO_STAGE = {
    "none": "of a device that is to have no release",
    "failed": "what was in use stays, and so does the journal; it is met in memory",
    "skipped": "as failed",
}
ENDED = ("finished", "rolled_back", "failed")
PATIENCE_S = 60.0


def _cases(names: list[str]) -> list[object]:
    """Every name at every point; where the records or the journal are written and nothing is done is always run."""
    return [
        pytest.param(name, point, marks=() if point == "written" else pytest.mark.slow)
        for name in names
        for point in POINTS
    ]


def test_every_phase_and_stage_is_met() -> None:
    assert set(NO_PHASE) < set(PHASES)
    assert set(NO_STAGE) < set(STAGES)


@pytest.mark.parametrize(("phase", "point"), _cases([name for name in PHASES if name not in NO_PHASE]))
def test_coordinator_killed(tmp_path: Path, phase: str, point: str) -> None:
    scene = Scene(tmp_path, commands={"coordinator": trap("coordinator", RELEASE + phase, point)})
    _released(scene, back=phase in BACK)
    assert scene.met() == f"{RELEASE}{phase} {point}", "the trap never sprang"


@pytest.mark.parametrize(("stage", "point"), _cases([name for name in STAGES if name not in NO_STAGE]))
def test_device_killed(tmp_path: Path, stage: str, point: str) -> None:
    scene = Scene(tmp_path, commands={FIRST: trap("edge", RELEASE + stage, point)})
    _released(scene)
    assert scene.met() == f"{RELEASE}{stage} {point}", "the trap never sprang"


def test_agent_killed_in_its_trial(tmp_path: Path) -> None:
    """It is started again, and tries it once more."""
    scene = Scene(tmp_path, commands={FIRST: trap("edge", RELEASE + "staged", "done", "agent")}, step_s=0.5)
    _released(scene)
    assert scene.met() == f"{RELEASE}staged done"
    assert "the agent is gone: killed by signal 9" in scene.log(FIRST)
    assert scene.log(FIRST).count("is tried at") == 2


@pytest.mark.slow
@pytest.mark.parametrize("wipes", [False, True], ids=["with its disk", "and its disk"])
@pytest.mark.parametrize(("program", "phase"), [("coordinator", "canary"), ("edge", "wanted"), ("edge", "active")])
def test_broker_killed(tmp_path: Path, program: str, phase: str, wipes: bool) -> None:
    place = FIRST if program == "edge" else program
    commands = {place: trap(program, RELEASE + phase, "done", "{scene.victim}")}
    scene = Scene(tmp_path, commands=commands, wipes=wipes)
    _released(scene)
    assert scene.met() == f"{RELEASE}{phase} done"
    assert scene.wiped == (["mosquitto.db"] if wipes else [])


def _released(scene: Scene, *, back: bool = False) -> None:
    """A trained job is released to both devices, `back`: and taken back; whatever is killed, it ends as it should."""
    with scene.fleet:
        scene.victim.write_text(str(scene.fleet.broker.pid), encoding="ascii")
        scene.job = scene.fleet.client.submit(scene.text()).id
        _until(scene, lambda: (view := scene.look()) is not None and view.state == "finished", "the job")
        scene.marker.unlink()
        name = f"{scene.job}.r2-1"
        ask = ReleaseAsk(job=scene.job, canaries=Canaries(devices=[FIRST]), deadline_s=PATIENCE_S)
        _ask(scene, name, lambda: scene.fleet.client.release(ask), ())
        _until(scene, lambda: _state(scene, name) in ENDED, "the release")
        if back:
            _ask(scene, name, lambda: scene.fleet.client.roll_back(name), BACK)
            _until(scene, lambda: _state(scene, name) == "rolled_back", "the way back")
        _until(scene, lambda: bool(scene.met()) and not scene.dead(), "the kill")
        _until(scene, lambda: _whole(scene, name, back), "the same everywhere")
        scene.fleet.stop()
    _check(scene, name, back)


def _ask(scene: Scene, name: str, ask: Callable[[], ReleaseView], done: tuple[str, ...]) -> None:
    """Ask; where the answer is lost with the coordinator, look whether it is on disk, else ask again."""
    while True:
        try:
            ask()
            return
        except UserError:
            _until(scene, lambda: not scene.dead() and scene.look() is not None, "the coordinator")
            state = _state(scene, name)
            if state and (not done or state in done):
                return


def _until(scene: Scene, met: Callable[[], bool], what: str) -> None:
    """Restart whatever dies until `met`."""
    until = time.monotonic() + PATIENCE_S
    while not met():
        if scene.marker.exists() or not scene.met():
            _revive(scene)
        assert time.monotonic() < until, f"{what}: {scene.log('coordinator')[-2000:]} {scene.log(FIRST)[-2000:]}"
        time.sleep(0.05)


def _revive(scene: Scene) -> None:
    scene.planned = scene.planned or []  # plans are the business of other tests
    scene.revive()


def _state(scene: Scene, name: str) -> str:
    try:
        return scene.fleet.client.release_status(name).state
    except UserError:
        return ""


def _in_use(scene: Scene, device: str) -> str:
    link = scene.folder / "fleet" / device / "releases" / "current"
    return link.resolve().name if link.is_symlink() else ""


def _whole(scene: Scene, name: str, back: bool) -> bool:
    """Every device has what it is to have, and the coordinator knows it."""
    try:
        view = scene.fleet.client.release_status(name)
    except UserError:
        return False
    wanted = "" if back else name
    on_disk = {_in_use(scene, device) for device in DEVICES} == {wanted}
    return on_disk and {one.active for one in view.devices} == {wanted}


def _check(scene: Scene, name: str, back: bool) -> None:
    """The log tells each device's story once; nothing is left on any disk."""
    from coordinator.adapters.event_log import SqliteEventLog

    records = SqliteEventLog(scene.folder / "fleet" / "coordinator" / "events.sqlite").of_job(name)
    stories: dict[str, list[str]] = {}
    for record in records:
        if isinstance(record, DeviceReleased):
            stories.setdefault(record.device, []).append(record.state)
    assert all(len(story) == len(set(story)) for story in stories.values()), stories
    assert {story[-1] for story in stories.values()} == {"returned" if back else "committed"}
    for device in DEVICES:
        folder = scene.folder / "fleet" / device / "releases"
        assert sorted(path.name for path in folder.iterdir()) == ([] if back else sorted(["current", name]))
