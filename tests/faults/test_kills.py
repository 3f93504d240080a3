"""kill -9 of the coordinator, the broker, a daemon, an agent, in every phase of their machines.

The phases come from the transition tables: a new phase is met by every test here, and without a scenario it fails. What
can't be met stands in a table of exceptions, with the reason.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from pathlib import Path

import pytest

from coordinator.core import records as rec
from coordinator.core.fleet import WILL_S
from coordinator.web.views import JobView
from shared.errors import UserError
from tests.faults.phases import DEVICE_PHASES, FIRST, JOB_PHASES, LEAVING, POINTS, meet, trains
from tests.faults.scene import DEVICES, ROUNDS, Scene, check_counted, check_plans, check_whole, trap

WHOLE = ("queued", "preparing", "baseline", "waiting", "open", "folding", "evaluating", "exporting", "finished")
"""Phases a job that goes well passes through."""
OTHER_ENDS = ("paused", "cancelled", "failed")
BORN = "no step leads into the first phase: the kill comes after the step in it that started the agent"
NO_DAEMON_KILL = {
    ("probing", "decided"): BORN,
    ("probing", "written"): BORN,
    ("draining", "written"): "the request to leave changes nothing in the journal, so nothing is written",
}
"""(phase, point) at which no daemon can be killed, and why."""
NO_AGENT_KILL = {"stopped": "the daemon ends its agent in the very step that leads here"}
"""Phases in which no agent can be killed, and why."""
WAIT_S = 15.0
"""The longest wait for a device that is gone, from the kill to the close of its round, by the clock of the log."""
ONCE = dict.fromkeys(range(1, ROUNDS + 1), 1)
"""Every round trained once."""


QUICK = "written"
"""The point at which `make test` kills in every phase; `make test-all` kills at the others, too."""
EVERY_POINT = [pytest.param(point, marks=() if point == QUICK else pytest.mark.slow) for point in POINTS]


def _in_groups(phase: str, *points: str) -> object:
    """A case: only a device in a control group can be made to pause by a load that ends again."""
    marks = [pytest.mark.cgroup] if phase == "paused" else []
    if (phase, QUICK) not in NO_DAEMON_KILL and any(point != QUICK for point in points):
        marks.append(pytest.mark.slow)
    return pytest.param(phase, *points, marks=marks)


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Digest of the adapter of the undisturbed run."""
    scene = Scene(tmp_path_factory.mktemp("undisturbed"))
    view = scene.run()
    assert view.state == "finished", view.reason
    assert all(scene.trainings(device) == ONCE for device in DEVICES)
    return scene.exported()


def test_every_phase_of_a_job_has_a_scenario() -> None:
    assert set(JOB_PHASES) == {*WHOLE, *OTHER_ENDS}


@pytest.mark.parametrize("point", EVERY_POINT)
@pytest.mark.parametrize("phase", WHOLE)
def test_coordinator_killed(tmp_path: Path, reference: str, phase: str, point: str) -> None:
    scene = Scene(tmp_path, commands={"coordinator": trap("coordinator", phase, point)})
    view = scene.run()
    assert scene.met() == f"{phase} {point}", "the trap never sprang"
    check_whole(scene, view, reference)
    assert all(scene.trainings(device) == ONCE for device in DEVICES), "trained again"
    assert scene.planned is not None
    assert len(scene.planned) == _plans_before(phase, point)


def _plans_before(phase: str, point: str) -> int:
    """How many plans the log holds when the job enters `phase` for the first time."""
    if phase == "open":
        return 0 if point == "decided" else 1
    if phase in ("exporting", "finished"):
        return ROUNDS
    return 1 if phase in ("folding", "evaluating") else 0


@pytest.mark.parametrize("point", EVERY_POINT)
@pytest.mark.parametrize("phase", OTHER_ENDS)
def test_coordinator_killed_at_another_end(tmp_path: Path, phase: str, point: str) -> None:
    _end_otherwise(tmp_path, phase, point, "self")


@pytest.mark.parametrize("phase", OTHER_ENDS)
def test_broker_killed_at_another_end(tmp_path: Path, phase: str) -> None:
    _end_otherwise(tmp_path, phase, "done", "{scene.victim}")


def _end_otherwise(folder: Path, phase: str, point: str, victim: str) -> None:
    """A job that ends in `phase`, and stays there."""
    scene = Scene(folder, commands={"coordinator": trap("coordinator", phase, point, victim)})
    if phase == "paused":
        # Every aggregate is worse than the base: three refusals in a row.
        scene.lr, scene.worse_by, scene.rounds = 3.0, 0.0, 9
    if phase == "failed":
        (folder / "held.jsonl").write_text("not a row\n", encoding="utf-8")

    def act(scene: Scene, view: JobView | None) -> None:
        if phase == "cancelled" and view is not None and view.state == "open":
            with contextlib.suppress(UserError):  # the answer dies with the coordinator
                scene.fleet.client.cancel(scene.job)

    view = scene.run(act)
    assert scene.met() == f"{phase} {point}", "the trap never sprang"
    assert view.state == phase, view.reason
    assert [r.state for r in scene.records() if isinstance(r, rec.JobEnded)] == [phase]
    check_plans(scene)


def test_what_can_not_be_killed_is_in_the_tables() -> None:
    """An exception for a phase that no longer exists is one for nothing."""
    assert {phase for phase, _ in NO_DAEMON_KILL} | set(NO_AGENT_KILL) <= set(DEVICE_PHASES)


@pytest.mark.parametrize(
    ("phase", "point"),
    [_in_groups(phase, point) for phase in DEVICE_PHASES for point in POINTS if (phase, point) not in NO_DAEMON_KILL],
)
def test_daemon_killed(tmp_path: Path, reference: str, phase: str, point: str) -> None:
    scene, view = meet(tmp_path, phase, point=point)
    if phase in LEAVING and (phase, point) != ("draining", "decided"):
        # It leaves with partial work, which counts, or the round is planned again without it: other bytes, rightly.
        check_counted(scene, view)
        return
    check_whole(scene, view, reference)
    # What it trained is on disk at `written`; the line that tells of it died with it.
    told = {number: 1 for number in ONCE if (phase, point, number) != ("offering", "written", 1)}
    assert {device: scene.trainings(device) for device in DEVICES} == {FIRST: told, DEVICES[1]: ONCE}, "trained again"


@pytest.mark.parametrize("phase", [_in_groups(phase) for phase in DEVICE_PHASES if phase not in NO_AGENT_KILL])
def test_agent_killed(tmp_path: Path, reference: str, phase: str) -> None:
    """The daemon alone brings it back."""
    scene, view = meet(tmp_path, phase, victim="agent")
    if phase in LEAVING:
        # What it had done stays in its checkpoint; whether the device is back in time decides over the round.
        check_counted(scene, view)
        return
    check_whole(scene, view, reference)
    assert all(scene.trainings(device) == ONCE for device in DEVICES), "trained again"
    assert "the agent is gone: killed by signal 9" in scene.log(FIRST)
    # One start for the whole run, but for the device that was made to begin anew.
    assert scene.log(FIRST).count(f"device {FIRST} of fleet") == (2 if phase == "probing" else 1), "the daemon died too"


@pytest.mark.parametrize("phase", [phase for phase in JOB_PHASES if phase not in OTHER_ENDS])
def test_broker_killed(tmp_path: Path, reference: str, phase: str) -> None:
    """It comes back at once, with what it had saved; devices and coordinator heal whatever it lost."""
    scene = Scene(tmp_path, commands={"coordinator": trap("coordinator", phase, "done", "{scene.victim}")})
    view = scene.run()
    assert scene.met() == f"{phase} done", "the trap never sprang"
    check_whole(scene, view, reference)
    assert all(scene.trainings(device) == ONCE for device in DEVICES), "trained again"


@pytest.mark.parametrize("phase", [_in_groups(phase) for phase in DEVICE_PHASES])
def test_broker_killed_in_a_phase_of_a_device(tmp_path: Path, reference: str, phase: str) -> None:
    """While a device fetches, trains, delivers, or leaves."""
    scene, view = meet(tmp_path, phase, victim="{scene.victim}")
    if phase in LEAVING:
        check_counted(scene, view)  # partial work, see above
        return
    check_whole(scene, view, reference)
    assert all(scene.trainings(device) == ONCE for device in DEVICES), "trained again"


@pytest.mark.parametrize(("program", "phase"), [("coordinator", "open"), ("edge", "training"), ("edge", "offering")])
def test_broker_killed_with_its_disk(tmp_path: Path, reference: str, program: str, phase: str) -> None:
    """Sessions, queues and retained messages are all gone."""
    place = FIRST if program == "edge" else program
    scene = Scene(tmp_path, commands={place: trap(program, phase, "done", "{scene.victim}")}, wipes=True)
    view = scene.run()
    assert scene.met() == f"{phase} done", "the trap never sprang"
    assert scene.wiped == ["mosquitto.db"]
    check_whole(scene, view, reference)
    assert all(scene.trainings(device) == ONCE for device in DEVICES), "trained again"


def test_broker_restarted_while_devices_train(tmp_path: Path, reference: str) -> None:
    """As on an update of its package. Stopped, not killed, it tells of every device that it is lost, and the
    coordinator is back before any of them."""
    scene = Scene(tmp_path)

    def act(scene: Scene, view: JobView | None) -> None:
        if scene.planned is not None or view is None or view.state != "open":
            return
        scene.planned = scene.digests()
        daemons = [edge.pid for edge in scene.fleet.edges.values()]
        for pid in daemons:
            os.kill(pid, signal.SIGSTOP)
        try:
            scene.fleet.broker.restart()
            until = time.monotonic() + 10
            while {device.state for device in scene.fleet.client.devices()} != {"lost"}:
                assert time.monotonic() < until, "the wills are not there"
                time.sleep(0.05)
            time.sleep(WILL_S + 0.5)  # until they are doubted for the new connection alone
        finally:
            for pid in daemons:
                os.kill(pid, signal.SIGCONT)

    view = scene.run(act)
    check_whole(scene, view, reference)
    assert all(scene.trainings(device) == ONCE for device in DEVICES), "trained again"


def test_daemon_restarted_while_the_other_device_delivers(tmp_path: Path) -> None:
    """As on a new release of the daemon: what it had done counts, and the round is not thrown away meanwhile."""
    scene = Scene(tmp_path, step_s=0.1)

    def act(scene: Scene, view: JobView | None) -> None:
        if scene.planned is not None or not trains(view):
            return
        scene.planned = scene.digests()
        scene.fleet.edges[FIRST].terminate()
        scene.fleet.edges[FIRST].wait()
        until = time.monotonic() + 30
        while (view := scene.look()) is None or view.rounds[0].participants[1].status != "done":
            assert time.monotonic() < until, view
            time.sleep(0.05)
        assert view.rounds[0].participants[0].status == "gone"
        time.sleep(1.0)  # in which the coordinator decides over the round some times

    view = scene.run(act)
    check_counted(scene, view)
    plans = [(r.round, r.attempt) for r in scene.records() if isinstance(r, rec.RoundPlanned)]
    assert plans == [(number, 1) for number in range(1, ROUNDS + 1)]
    assert scene.trainings(FIRST) == ONCE


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
        os.kill(scene.fleet.edges[FIRST].pid, what)
        killed = time.time()
        until = time.monotonic() + 60
        while (view := scene.look()) is None or not view.rounds or view.rounds[0].phase == "open":
            assert time.monotonic() < until, view
            time.sleep(0.05)
        if what is signal.SIGSTOP:
            os.kill(scene.fleet.edges[FIRST].pid, signal.SIGCONT)
        scene.fleet.stop()
    closed = next(r for r in scene.records() if isinstance(r, rec.RoundClosed))
    assert closed.devices == [DEVICES[1]], closed.reason
    (at,) = [when for when, text in _lines(scene, "coordinator") if "round 1 closed over 1 updates" in text]
    assert at - killed <= WAIT_S, closed.reason


def _lines(scene: Scene, program: str) -> list[tuple[float, str]]:
    """What a program logged: (Unix seconds, text)."""
    found = [json.loads(line) for line in scene.log(program).splitlines() if line.startswith("{")]
    return [(line["ts"], line["text"]) for line in found]
