"""kill -9 of the coordinator, the broker, a daemon, an agent, in every phase of their machines.

The phases come from the transition tables: a new phase without a scenario here fails.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from pathlib import Path

import pytest

import coordinator.core.transitions
import edge_daemon.core.transitions
from coordinator.core import records as rec
from coordinator.web.views import JobView
from shared import machines
from shared.errors import UserError
from tests.faults.scene import DEVICES, ROUNDS, Scene, check_counted, check_whole, trap

JOB_PHASES = machines.phases(coordinator.core.transitions.TABLE)
DEVICE_PHASES = machines.phases(edge_daemon.core.transitions.TABLE)
WHOLE = ("queued", "preparing", "baseline", "waiting", "open", "folding", "evaluating", "exporting", "finished")
"""Phases a job that goes well passes through."""
OTHER_ENDS = ("paused", "cancelled", "failed")


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Digest of the adapter of the undisturbed run."""
    scene = Scene(tmp_path_factory.mktemp("undisturbed"))
    view = scene.run()
    assert view.state == "finished", view.reason
    assert all(scene.trainings(device) == dict.fromkeys(range(1, ROUNDS + 1), 1) for device in DEVICES)
    return scene.exported()


def test_every_phase_of_a_job_has_a_scenario() -> None:
    assert set(JOB_PHASES) == {*WHOLE, *OTHER_ENDS}


@pytest.mark.parametrize("point", ["decided", "written", "done"])
@pytest.mark.parametrize("phase", WHOLE)
def test_coordinator_killed(tmp_path: Path, reference: str, phase: str, point: str) -> None:
    scene = Scene(tmp_path, commands={"coordinator": trap("coordinator", phase, point)})
    view = scene.run()
    assert scene.marker.exists(), "the trap never sprang"
    check_whole(scene, view, reference)
    for device in DEVICES:
        assert scene.trainings(device) == dict.fromkeys(range(1, ROUNDS + 1), 1), "trained again"


@pytest.mark.parametrize("point", ["written", "done"])
@pytest.mark.parametrize("phase", OTHER_ENDS)
def test_coordinator_killed_at_another_end(tmp_path: Path, phase: str, point: str) -> None:
    scene = Scene(tmp_path, commands={"coordinator": trap("coordinator", phase, point)})
    if phase == "paused":
        # Every aggregate is worse than the base: three refusals in a row.
        scene.lr, scene.worse_by, scene.rounds = 3.0, 0.0, 9
    if phase == "failed":
        (tmp_path / "held.jsonl").write_text("not a row\n", encoding="utf-8")

    def act(scene: Scene, view: JobView | None) -> None:
        if phase == "cancelled" and view is not None and view.state == "open" and not scene.marker.exists():
            with contextlib.suppress(UserError):  # the answer dies with the coordinator
                scene.fleet.client.cancel(scene.job)

    view = scene.run(act)
    assert scene.marker.exists() and view.state == phase, view.reason
    assert [r.state for r in scene.records() if isinstance(r, rec.JobEnded)] == [phase]


def test_every_phase_of_a_device_has_a_scenario() -> None:
    assert set(DEVICE_PHASES) == {
        "probing", "idle", "fetching", "training", "paused", "offering", "draining", "stopped",
    }  # fmt: skip


@pytest.mark.parametrize("point", ["decided", "done"])
@pytest.mark.parametrize("phase", [phase for phase in DEVICE_PHASES if phase not in ("paused", "probing")])
def test_daemon_killed(tmp_path: Path, reference: str, phase: str, point: str) -> None:
    leaves = phase in ("draining", "stopped")
    # Slow enough to be met at work: an idle device leaves without draining.
    scene = Scene(tmp_path, commands={DEVICES[0]: trap("edge", phase, point)}, step_s=0.2 if leaves else 0.02)
    told: list[str] = []

    def act(scene: Scene, view: JobView | None) -> None:
        if leaves and not told and view is not None and _trains(view, DEVICES[0]):
            scene.fleet.edges[DEVICES[0]].terminate()
            told.append("leave")

    view = scene.run(act)
    assert scene.marker.exists(), "the trap never sprang"
    if leaves:
        # It leaves with partial work, which counts, or the round is planned again without it: other bytes, rightly.
        check_counted(scene, view)
        return
    check_whole(scene, view, reference)
    assert scene.trainings(DEVICES[1]) == dict.fromkeys(range(1, ROUNDS + 1), 1)


def _trains(view: JobView, device: str) -> bool:
    return (
        any(p.device == device and p.status == "training" for p in view.rounds[-1].participants)
        if view.rounds
        else False
    )


def test_daemon_killed_while_it_probes(tmp_path: Path, reference: str) -> None:
    """`probing` is its first phase, which no step enters: kill it from outside at once."""
    scene = Scene(tmp_path)
    with scene.fleet:
        scene.job = scene.fleet.client.submit(scene.text()).id
        for _ in range(3):
            scene.fleet.edges[DEVICES[0]].kill()
            scene.fleet.edges[DEVICES[0]].start()
        view = scene.watch(None, 60.0)
        scene.fleet.stop()
    assert view.state == "finished"
    assert scene.exported() == reference


@pytest.mark.parametrize("victim", ["self", "agent"])
def test_killed_while_it_pauses(tmp_path: Path, reference: str, victim: str) -> None:
    """A limit no machine keeps to makes the device pause; lifted, it goes on."""
    scene = Scene(tmp_path, commands={DEVICES[0]: trap("edge", "paused", "done", victim)})
    config = scene.folder / "fleet" / f"{DEVICES[0]}.toml"
    sources = scene.fleet.devices
    scene.fleet.devices = [
        type(sources[0])(
            sources[0].name, data=sources[0].data, settings={"policy": {"foreign_limit": 1e-9}}
        ),
        *sources[1:],
    ]  # fmt: skip

    def act(scene: Scene, view: JobView | None) -> None:
        if scene.marker.exists() and "1e-09" in config.read_text(encoding="utf-8"):
            config.write_text(config.read_text(encoding="utf-8").replace("1e-09", "100.0"), encoding="utf-8")
            if victim == "agent":
                scene.fleet.edges[DEVICES[0]].kill()

    view = scene.run(act)
    assert scene.marker.exists(), "the device never paused"
    check_whole(scene, view, reference)


@pytest.mark.parametrize("phase", ["idle", "fetching", "training", "offering"])
def test_agent_killed(tmp_path: Path, reference: str, phase: str) -> None:
    scene = Scene(tmp_path, commands={DEVICES[0]: trap("edge", phase, "done", "agent")})
    view = scene.run()
    assert scene.marker.exists(), "the trap never sprang"
    check_whole(scene, view, reference)
    assert scene.trainings(DEVICES[0]) == dict.fromkeys(range(1, ROUNDS + 1), 1)


@pytest.mark.parametrize("phase", [phase for phase in WHOLE if phase != "queued"])
def test_broker_killed(tmp_path: Path, reference: str, phase: str) -> None:
    """It comes back at once, with what it had saved; devices and coordinator heal whatever it lost."""
    scene = Scene(tmp_path, commands={"coordinator": trap("coordinator", phase, "done", "{scene.victim}")})
    view = scene.run()
    assert scene.marker.exists(), "the trap never sprang"
    check_whole(scene, view, reference)


def test_broker_killed_with_its_disk(tmp_path: Path, reference: str) -> None:
    """Sessions, queues and retained messages are all gone."""
    scene = Scene(tmp_path, commands={"coordinator": trap("coordinator", "open", "done", "{scene.victim}")})

    def act(scene: Scene, view: JobView | None) -> None:
        if scene.marker.exists() and not scene.fleet.broker.pid:
            for path in Path(scene.fleet.broker.folder).glob("**/*.db"):
                path.unlink()

    view = scene.run(act)
    check_whole(scene, view, reference)


@pytest.mark.parametrize("what", [signal.SIGSTOP, signal.SIGKILL])
def test_a_dead_or_stopped_device_ends_its_wait(tmp_path: Path, what: signal.Signals) -> None:
    scene = Scene(tmp_path)
    text = scene.text().replace("quorum = 1.0", "quorum = 0.5").replace("deadline_s = 60", "deadline_s = 600")
    with scene.fleet:
        scene.job = scene.fleet.client.submit(text).id
        until = time.monotonic() + 30
        while (view := scene.look()) is None or view.state != "open":
            assert time.monotonic() < until
            time.sleep(0.01)
        begun = time.monotonic()
        os.kill(scene.fleet.edges[DEVICES[0]].pid, what)
        until = begun + 40
        while (view := scene.look()) is None or not view.rounds or view.rounds[0].phase == "open":
            assert time.monotonic() < until, view
            time.sleep(0.05)
        waited = time.monotonic() - begun
        closed = next(r for r in scene.records() if isinstance(r, rec.RoundClosed))
        if what is signal.SIGSTOP:
            os.kill(scene.fleet.edges[DEVICES[0]].pid, signal.SIGCONT)
        scene.fleet.stop()
    assert closed.devices == [DEVICES[1]], closed.reason
    assert waited <= 15.0 + 2.0, "silence of 12 s, and the machine's own slowness"
