"""How a device comes into each phase of its machine while something waits there to be killed."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import coordinator.core.transitions
import edge_daemon.core.transitions
from coordinator.web.views import JobView
from muster.testbed.fleet import start_in
from shared import machines
from tests.faults.scene import DEVICES, Scene, trap

JOB_PHASES = machines.phases(coordinator.core.transitions.TABLE)
DEVICE_PHASES = machines.phases(edge_daemon.core.transitions.TABLE)
POINTS = ("decided", "written", "done")
FIRST = DEVICES[0]
"""The device that comes into the phase."""
LEAVING = ("draining", "stopped")
BURNER = "while True: sum(i * i for i in range(10_000))"
LIMIT = 0.5
"""Share of the first device's cores that others may use, where it is to pause."""


def meet(folder: Path, phase: str, *, point: str = "done", victim: str = "self") -> tuple[Scene, JobView]:
    """A run in which `victim` is killed when the first device enters `phase`; the trap did spring, and there."""
    commands = {FIRST: trap("edge", phase, point, victim)}
    if phase == "probing":
        # It probes as soon as it starts: it is started once the job is there.
        scene = Scene(folder, commands=commands)
        view = scene.run(before=_stop_first)
    elif phase == "paused":
        scene = _crowded(folder, commands)
        view = _pause(scene, before_work=point == "written")
    elif phase in LEAVING:
        # Slow enough to be met at work: an idle device leaves without draining.
        scene = Scene(folder, commands=commands, step_s=0.2)
        view = _leave(scene)
    else:
        scene = Scene(folder, commands=commands)
        view = scene.run()
    assert scene.met() == f"{phase} {point}", "the trap never sprang"
    return scene, view


def _stop_first(scene: Scene) -> None:
    scene.fleet.edges[FIRST].terminate()
    scene.fleet.edges[FIRST].wait()


def _leave(scene: Scene) -> JobView:
    """Once at work, the first device is told to leave."""
    told: list[str] = []

    def act(scene: Scene, view: JobView | None) -> None:
        if not told and trains(view):
            scene.fleet.edges[FIRST].terminate()
            told.append("leave")

    return scene.run(act)


def trains(view: JobView | None) -> bool:
    """Whether the first device has told of a step in the latest round."""
    parts = view.rounds[-1].participants if view is not None and view.rounds else []
    return any(part.device == FIRST and part.status == "training" for part in parts)


# ---- pauses


def _crowded(folder: Path, commands: dict[str, list[str]]) -> Scene:
    """A first device with a control group of its own, so that a load can be put on it alone and taken away again."""
    telemetry = {"idle_s": 0.5, "busy_s": 0.5}
    first = {"policy": {"foreign_limit": LIMIT}, "telemetry": telemetry}
    return Scene(folder, commands=commands, first=first, cores=0.5, step_s=0.2)


def _pause(scene: Scene, *, before_work: bool) -> JobView:
    """Another program uses the first device until the trap has sprung; nobody else lifts the pause.

    `before_work`: it runs before the job comes, so that the pause begins with the work, in the step that writes the
    journal; else it comes while the device trains.
    """
    burners: list[subprocess.Popen[bytes]] = []

    def burn(scene: Scene) -> None:
        group = scene.fleet.edges[FIRST].group
        burners.append(start_in(group, [sys.executable, "-c", BURNER], scene.folder / "burner.log"))

    def burn_first(scene: Scene) -> None:
        burn(scene)
        until = time.monotonic() + 30.0
        while not _busy(scene):
            assert time.monotonic() < until, "the load is not seen"
            time.sleep(0.1)

    def act(scene: Scene, view: JobView | None) -> None:
        if not burners and trains(view):
            burn(scene)
        if burners and scene.met():
            burners[0].kill()

    try:
        return scene.run(act, before=burn_first if before_work else None)
    finally:
        for burner in burners:
            burner.kill()
            burner.wait()


def _busy(scene: Scene) -> bool:
    loads = [view.load for view in scene.fleet.client.devices() if view.device == FIRST]
    return any(load is not None and load.foreign_cores > LIMIT * load.cores for load in loads)
