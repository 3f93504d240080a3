"""Releases on fleets in memory: a trained job, good and bad releases of it, and what the devices have in use."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from coordinator import runtime as coordinator_runtime
from coordinator.core import events as ev
from coordinator.core.release_records import Canaries, DeviceReleased, ReleaseRecord
from coordinator.core.releases import ENDED, Release
from coordinator.web.desk import Desk
from coordinator.web.release_asks import ReleaseAsk
from muster.testbed import least_squares, least_squares_release
from muster.testbed.least_squares import MODULE
from muster.testbed.memory_fleet import MemoryFleet
from shared import adapter as adapters
from shared.adapter import Factors
from shared.messages import BlobRef
from tests.fleet import fleet_rig as rig

DEADLINE_S = 120.0


def trained(fleet: MemoryFleet, devices: int, **rounds: Any) -> str:
    """A finished job."""
    job = fleet.finish(fleet.submit(rig.spec(devices, **rounds)))
    assert job.phase == "finished", fleet.describe(job.id)
    fleet.run(3.0)
    return job.id


def desk(fleet: MemoryFleet) -> Desk:
    """The API's view of the living coordinator."""
    runtime = fleet.coordinator.runtime
    return Desk(runtime, runtime.handle)


def start(fleet: MemoryFleet, job: str, **asked: Any) -> str:
    """Begin a release as the API does; its id."""
    ask = {"canaries": Canaries(count=1), "deadline_s": DEADLINE_S, **asked}
    return desk(fleet).releases.start(ReleaseAsk(job=job, **ask)).id


def start_of(fleet: MemoryFleet, job: str, adapter: BlobRef, *, canaries: Canaries, worse_by: float = 0.1) -> str:
    """Begin a release of any adapter in the coordinator's store."""
    runtime = fleet.coordinator.runtime
    found = fleet.job(job)
    assert found is not None
    number = len(runtime.state.releases) + 1
    release = f"{job}.r{found.committed}-{number}"

    def ask() -> None:
        runtime.step(
            ev.ReleaseRequested(
                release=release, number=number, job=job, round=found.committed, adapter=adapter, canaries=canaries,
                worse_by=worse_by, deadline_s=DEADLINE_S, bits={}, **runtime.now(),
            )
        )  # fmt: skip

    fleet.coordinator.post(coordinator_runtime.Call(ask))
    return release


def spoiled(fleet: MemoryFleet, job: str, factor: float = 50.0) -> BlobRef:
    """The job's adapter with its largest directions scaled to nonsense."""
    given = adapters.read(fleet.adapter(job))
    part = given.factors[MODULE]
    assert part.sigma is not None
    worse = Factors(b=part.b, a=part.a, scaling=part.scaling, sigma=(part.sigma * factor).astype(np.float32))
    return fleet.coordinator.blobs.put(adapters.write(dataclasses.replace(given, factors={MODULE: worse})))


def found(fleet: MemoryFleet, release: str) -> Release:
    """The release as the living coordinator has it."""
    return fleet.coordinator.runtime.state.releases[release]


def ended(fleet: MemoryFleet, release: str, within_s: float = 400.0) -> Release:
    """Run until nothing is waited for any more."""

    def over() -> bool:
        alive = fleet.coordinator.alive
        known = fleet.coordinator.runtime.state.releases.get(release) if alive else None
        return known is not None and known.phase in ENDED

    fleet.run_until(over, within_s, f"the end of {release}")
    return found(fleet, release)


def in_use(fleet: MemoryFleet) -> dict[str, str]:
    """Device -> what `current` on its disk points to; "": nothing."""
    folders = {name: node.folder / "releases" / "current" for name, node in fleet.daemons.items()}
    return {name: path.resolve().name if path.is_symlink() else "" for name, path in folders.items()}


def loss(fleet: MemoryFleet, device: str) -> float:
    """Of what is in use on a device, on all of its rows, read from the files as any program would."""
    folder = fleet.daemons[device].folder / "releases" / "current"
    return least_squares.loss_of(least_squares_release.read(folder), fleet.daemons[device].member.rows)


def told(fleet: MemoryFleet, release: str) -> dict[str, list[str]]:
    """Device -> the states that the log holds of it, in order."""
    states: dict[str, list[str]] = {}
    for record in fleet.records(release):
        if isinstance(record, DeviceReleased):
            states.setdefault(record.device, []).append(record.state)
    return states


def check(fleet: MemoryFleet, release: str) -> None:
    """What must hold whatever was killed: the log folds to the state, devices have what it says, nothing is left."""
    from coordinator.core import releases

    folded = None
    for record in fleet.records(release):
        assert isinstance(record, ReleaseRecord)
        folded = releases.apply(folded, record)
    assert folded == found(fleet, release)
    for name, node in fleet.daemons.items():
        rollout = node.runtime.state.journal.rollout
        folder = node.folder / "releases"
        names = {path.name for path in folder.iterdir()} - {"current"} if folder.is_dir() else set()
        assert names == {one.id for one in rollout.installed}, f"{name}: folders that the journal does not know"
        assert in_use(fleet)[name] == rollout.active
        blob = folded.blob.sha if folded and folded.blob else ""
        assert rollout.stage == "wanted" or blob not in node.runtime.ports.store.blobs.digests()


def paths(folder: Path) -> list[str]:
    """All files beneath `folder`."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
