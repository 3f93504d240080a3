"""Broken GPUs and hung drivers: the device takes no work, says why, and the coordinator does not ask it."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from coordinator.core.fleet import Presence
from edge_daemon.core import commands as cmd
from edge_daemon.core import events as ev
from edge_daemon.core import policy
from edge_daemon.core.state import Machine
from edge_daemon.settings import AgentSettings, PolicySettings
from shared.messages import Ack, DeviceInfo, DeviceState, Gpu, GpuLoad, HostLoad, Load
from tests.unit.session_rig import Rig, assignment, load

OWNER = PolicySettings()


def broken(*xids: int, fault: str = "") -> Load:
    return load(gpus=[GpuLoad(uuid="GPU-1"), GpuLoad(uuid="GPU-2", xids=list(xids), fault=fault)])


@pytest.mark.parametrize("xid", [48, 63, 64, 79, 94, 95])
def test_a_gpu_that_reported_such_an_error_takes_no_work(xid: int) -> None:
    reason = policy.ailing(OWNER, broken(31, xid))
    assert reason.startswith(f"broken GPU: GPU-2 reported XID {xid}; ")
    assert "policy.xids" in reason


def test_errors_of_programs_and_those_that_the_owner_takes_off_are_no_reason() -> None:
    assert policy.ailing(OWNER, broken(13, 31, 43)) == ""
    assert policy.ailing(PolicySettings(xids=[]), broken(79)) == ""
    assert policy.ailing(PolicySettings(xids=[31]), broken(31)) != ""
    assert policy.ailing(OWNER, None) == ""


def test_the_fault_is_told() -> None:
    assert "(lost: GPU is lost)" in policy.ailing(OWNER, broken(79, fault="lost: GPU is lost"))


@pytest.mark.parametrize(("silent_s", "ails"), [(2.0, False), (30.0, False), (30.1, True), (9999.0, True)])
def test_a_driver_that_is_silent_for_long(silent_s: float, ails: bool) -> None:
    reason = policy.ailing(OWNER, load(hung={"gpu": silent_s}))
    assert reason == ("GPU driver: no answer for more than 30 s (policy.gpu_silence_s)" if ails else "")
    assert policy.ailing(OWNER, load(hung={"host": silent_s})) == ""


def throttled(*reasons: str) -> Load:
    return load(gpus=[GpuLoad(uuid="GPU-1", throttled=True, throttle=list(reasons))])


@pytest.mark.parametrize(
    ("reasons", "rests"),
    [(["power cap"], False), (["heat"], True), (["power cap", "hardware", "hardware heat"], True), ([], False)],
)
def test_an_owner_may_have_training_rest_while_a_gpu_is_throttled(reasons: list[str], rests: bool) -> None:
    settings = msgspec.structs.replace(Rig().settings, policy=PolicySettings(throttled=False))
    found = policy.pause(settings, throttled(*reasons), minute=0, paused=False)
    assert found.startswith("throttled: GPU-1 by ") == rests
    assert policy.pause(Rig().settings, throttled(*reasons), minute=0, paused=False) == ""


def drain(reading: Load) -> tuple[Rig, str]:
    """A device at rest that takes this reading; and the problem it tells."""
    rig = Rig().up()
    rig.feed(ev.LoadRead, reading=load())
    rig.feed(ev.LoadRead, reading=reading)
    (info,) = rig.said(DeviceInfo)
    return rig, info.problem


@pytest.mark.parametrize("reading", [broken(79), load(hung={"gpu": 31.0})])
def test_an_ailing_device_says_so_and_rejects_what_is_asked_of_it(reading: Load) -> None:
    rig, problem = drain(reading)
    assert problem == policy.ailing(OWNER, reading)
    assert rig.said(Load), "and at once, not with the next reading that is due"
    rig.assign(assignment())
    assert [(ack.verdict, ack.reason) for ack in rig.said(Ack)] == [("reject", problem)]
    rig.feed(ev.LoadRead, reading=load())
    assert [info.problem for info in rig.said(DeviceInfo)] == [""]
    rig.assign(assignment(round=2))
    assert [ack.verdict for ack in rig.said(Ack)] == ["accept"]


def test_the_problem_is_said_once_while_it_lasts() -> None:
    rig, _ = drain(load(hung={"gpu": 31.0}))
    rig.feed(ev.LoadRead, reading=load(hung={"gpu": 34.0}))
    assert rig.said(DeviceInfo) == []


def test_a_problem_is_told_before_the_agent_is_there() -> None:
    rig = Rig()
    rig.link()
    rig.feed(ev.LoadRead, reading=broken(79))
    assert [info.problem for info in rig.said(DeviceInfo)][-1:] == [policy.ailing(OWNER, broken(79))]


def test_work_under_way_goes_on() -> None:
    rig = Rig().training()
    rig.feed(ev.LoadRead, reading=broken(94))
    assert rig.state.phase == "training"
    rig.trained()
    assert rig.state.phase == "offering"


def test_the_coordinator_does_not_plan_with_it() -> None:
    _, problem = drain(broken(48))
    state = DeviceState(s="ready", epoch=1)
    well = Presence(device="edge-1", state=state, info=DeviceInfo(epoch=1, bits=[16]))
    assert well.able
    assert not Presence(device="edge-1", state=state, info=DeviceInfo(epoch=1, bits=[16], problem=problem)).able


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"hung": {"gpu": 2.0}}, True),
        ({"gpus": [GpuLoad(uuid="GPU-1", xids=[31])]}, True),
        ({"gpus": [GpuLoad(uuid="GPU-1", fault="row remapping failed")]}, True),
        ({"gpus": [GpuLoad(uuid="GPU-1", throttled=True, throttle=["power cap"])]}, False),
        ({"gpus": [GpuLoad(uuid="GPU-1", energy_j=1e6, clock_mhz=999)]}, False),
        ({"host": HostLoad(disk_free=1, cpu_stalled=1.0)}, False),
    ],
)
def test_what_is_news_is_told_at_once_and_the_rest_in_its_time(change: dict[str, Any], told: bool) -> None:
    rig = Rig().up()
    rig.feed(ev.LoadRead, reading=load(gpus=[GpuLoad(uuid="GPU-1")]))
    rig.feed(ev.LoadRead, reading=load(**{"gpus": [GpuLoad(uuid="GPU-1")], **change}))
    assert bool(rig.said(Load)) == told


LATE = Machine(cores=4.0, gpus=(Gpu(uuid="GPU-1", memory_bytes=1),))


def test_gpus_that_are_found_late_get_agents() -> None:
    """A driver that hung, or was loaded after the daemon: an agent on the CPU was started in their place."""
    rig = Rig().up()
    rig.feed(ev.MachineRead, machine=LATE)
    (kill,) = rig.did(cmd.KillAgent)
    assert kill.reason == "it is to be started for GPU-1"
    rig.tick()
    assert rig.did(cmd.KillAgent) == [], "once"
    rig.gone()
    rig.tick(10.0)
    (start,) = [command for command in rig.all if isinstance(command, cmd.StartAgent)][1:]
    assert start.gpus == ("GPU-1",)
    rig.probe()
    rig.tick()
    assert rig.did(cmd.KillAgent) == []


def test_work_under_way_is_not_cut_off_by_gpus_that_are_found_late() -> None:
    rig = Rig().training()
    rig.feed(ev.MachineRead, machine=LATE)
    assert rig.did(cmd.KillAgent) == []
    rig.trained()
    assert [kill.reason for kill in rig.did(cmd.KillAgent)] == ["it is to be started for GPU-1"]


def test_gpus_that_the_owner_listed_are_never_found_late() -> None:
    settings = msgspec.structs.replace(Rig().settings, agent=AgentSettings(gpus=["GPU-1"]))
    rig = Rig(settings=settings).up()
    rig.feed(ev.MachineRead, machine=LATE)
    assert rig.did(cmd.KillAgent) == []
