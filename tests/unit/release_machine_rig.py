"""The coordinator's machine with a finished job, devices that answer about releases, and what must always hold."""

from __future__ import annotations

from typing import Any

import pytest

from coordinator.core import commands as cmd
from coordinator.core import events as ev
from coordinator.core import release_records as rec
from coordinator.core import releases
from coordinator.core.release_records import Canaries
from coordinator.core.releases import Release
from coordinator.core.turn import State
from shared.messages import BlobRef, DatasetFacts, DeviceInfo, DeviceState, Load
from shared.release_messages import ReleaseState, Score, Stage
from tests.unit.machine_rig import GIB, Rig

DEVICES = ("dev-a", "dev-b", "dev-c", "dev-d")
ADAPTER = BlobRef(sha="a" * 64, size=100)
SCORES = {"before": Score(loss=2.0, rows=9), "after": Score(loss=1.0, rows=9)}


class ReleaseRig(Rig):
    """`told`: device -> (release, to stay) that it last heard, with the broker's retained messages in mind."""

    def __init__(self) -> None:
        super().__init__()
        self.told: dict[str, tuple[str, bool]] = {}
        self.seqs: dict[str, tuple[int, int]] = {}
        self.words: dict[str, int] = {}
        self.feed(ev.Started)
        self.feed(ev.BrokerFound, chunk=1000)

    def _step(self, event: ev.Event) -> list[cmd.Command]:
        commands = super()._step(event)
        for command in commands:
            if isinstance(command, cmd.PublishRelease):
                message = command.message
                if message is None:
                    self.told.pop(command.device)
                    continue
                assert (message.term, message.seq) > self.seqs.get(command.device, (0, 0)), "an old word"
                self.seqs[command.device] = (message.term, message.seq)
                self.told[command.device] = (message.release.id if message.release else "", message.commit)
        check(self.state, self.log)
        return commands

    def birth(self, device: str, epoch: int = 1, *, data: bool = True, old: bool = False) -> list[cmd.Command]:
        """A device appears. `data`: it holds rows of the task; `old`: its daemon knows no releases."""
        datasets = {"points": DatasetFacts(rows=100)} if data else {}
        info = DeviceInfo(
            epoch=epoch, cores=1.0, memory_bytes=4 * GIB, bits=[32], datasets=datasets, releases=not old,
        )  # fmt: skip
        load = Load(epoch=epoch, seq=1, cores=1.0, memory_available=3 * GIB, memory_limit=4 * GIB)
        commands = self.feed(ev.FromDevice, device=device, message=DeviceState(s="ready", epoch=epoch))
        commands += self.feed(ev.FromDevice, device=device, message=load)
        return commands + self.feed(ev.FromDevice, device=device, message=info)

    def fleet(self, *devices: str) -> None:
        """Devices, and a job that has a round."""
        for device in devices or DEVICES:
            self.birth(device)
        if not self.state.jobs:
            self.submit()
            self.prepared()
            self.feed(ev.CancelRequested, job="job-1")

    def release(self, **asked: Any) -> str:
        """An operator asks."""
        number = len(self.state.releases) + 1
        name = f"job-1.r1-{number}"
        ask = {"canaries": Canaries(count=1), "worse_by": 0.1, "deadline_s": 100.0, "bits": {}, **asked}
        self.feed(ev.ReleaseRequested, release=name, number=number, job="job-1", round=1, adapter=ADAPTER, **ask)
        return name

    def packed(self, name: str) -> None:
        """Its files are one blob; the fleet is heard."""
        number = self.state.releases[name].number
        self.feed(ev.Packed, release=name, blob=BlobRef(sha=f"{number:064x}", size=50), kind="lora")
        self.wait(3.0)

    def say(self, device: str, release: str, stage: Stage, active: str = "", **more: Any) -> list[cmd.Command]:
        """A device reports."""
        self.words[device] = self.words.get(device, 0) + 1
        report = ReleaseState(
            epoch=1, seq=self.words[device], release=release, stage=stage, active=active, **more
        )  # fmt: skip
        return self.feed(ev.FromDevice, device=device, message=report)

    def takes(self, device: str) -> None:
        """A device does what it was last told."""
        name, stays = self.told[device]
        stage: Stage = "none" if not name else "committed" if stays else "active"
        self.say(device, name, stage, name, **(SCORES if name else {}))

    def wait(self, seconds: float) -> None:
        """Time passes, and everyone is heard meanwhile."""
        self.now += seconds
        for device, known in sorted(self.state.fleet.items()):
            if known.present:
                self.feed(ev.Heard, device=device)
        self.feed(ev.Tick)

    def found(self, name: str) -> Release:
        return self.state.releases[name]


def check(state: State, log: list[Any]) -> None:
    """What must hold after every step."""
    waited = [one for one in state.releases.values() if one.phase not in releases.ENDED]
    assert len(waited) <= 1, "two releases under way"
    assert [one.number for one in state.releases.values()] == list(range(1, len(state.releases) + 1))
    for one in state.releases.values():
        assert set(one.awaited) <= set(one.parts)
        assert set(one.chosen) <= set(one.parts)
        if one.phase == "canary":
            assert set(one.parts) == set(one.chosen), "a device beyond the canaries has a part in it"
        if one.phase in ("canary", "rest", "finished"):
            assert one.blob is not None
    widened = [record.release for record in log if isinstance(record, rec.ReleaseWidened)]
    assert len(widened) == len(set(widened))
    for name in widened:
        parts = {r.device: r.state for r in log if isinstance(r, rec.DeviceReleased) and r.release == name}
        first = next(index for index, r in enumerate(log) if isinstance(r, rec.ReleaseWidened) and r.release == name)
        before = [r for r in log[:first] if isinstance(r, rec.DeviceReleased) and r.release == name]
        assert any(r.state in ("active", "committed") for r in before), "widened though no canary took it"
        assert not any(r.state in ("failed", "silent") for r in before), "widened though a canary failed"
        assert parts


@pytest.fixture
def rig() -> ReleaseRig:
    """With its fleet there."""
    made = ReleaseRig()
    made.fleet()
    return made


def begun(rig: ReleaseRig, **asked: Any) -> str:
    """A release on its canaries."""
    name = rig.release(**asked)
    rig.packed(name)
    assert rig.found(name).phase == "canary", rig.found(name)
    return name


def finished(rig: ReleaseRig) -> str:
    """A release that every device has."""
    name = begun(rig, canaries=Canaries(devices=["dev-a"]))
    for device in DEVICES:
        if device in rig.told:
            rig.takes(device)
    for device in DEVICES:
        rig.takes(device)
    assert rig.found(name).phase == "finished", rig.found(name)
    return name
