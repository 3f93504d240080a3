"""The trial of a release on a device: what the agent is asked, what it waits for, and whose fault a bad end is."""

from __future__ import annotations

import msgspec
import pytest

from edge_daemon import protocol
from edge_daemon.core import agents
from edge_daemon.core import commands as cmd
from edge_daemon.core import events as ev
from edge_daemon.core.state import Machine
from edge_daemon.settings import EdgeSettings, PolicySettings, ReleaseSettings
from shared.release_messages import ReleaseState, Score, Stage
from tests.unit.releasing_rig import GOOD, Device, kinds
from tests.unit.releasing_rig import device as device  # a fixture
from tests.unit.session_rig import ADAPTER, GIB, SETTINGS, assignment, load
from tests.unit.test_rollout import R1, R2, spec


def test_a_worse_release_is_left(device: Device) -> None:
    device.in_use(1)
    device.tried(2)
    assert device.did(cmd.Evaluate)[0].previous == R1
    device.evaluated(2, (GOOD[1], Score(loss=1.2, rows=10)))
    assert (device.rollout.stage, device.rollout.active) == ("failed", R1)
    assert kinds(device.last) == ["DropRelease"]
    (said,) = device.said(ReleaseState)
    assert said.reason.startswith("worse here: loss 1.2 on 10 rows, before 1, the limit is 1.1")
    # It stays so, however often it is said and whoever starts anew.
    assert kinds(device.want(spec(2))) == []
    other = device.again(there={R1}, active=R1)
    assert other.rollout.stage == "failed"


@pytest.mark.parametrize(
    ("kind", "stage"),
    [("load", "failed"), ("score", "failed"), ("base", "skipped"), ("data", "skipped"), ("stopped", "staged")],
)
def test_whose_fault_it_is(device: Device, kind: str, stage: Stage) -> None:
    device.tried()
    device.unfit(kind)
    assert device.rollout.stage == stage
    assert device.rollout.active == ""


def test_memory_that_runs_out_leads_to_fewer_bits(device: Device) -> None:
    device.tried()
    assert device.did(cmd.Evaluate)[0].bits == 32
    device.unfit("memory")
    assert [one.bits for one in device.did(cmd.Evaluate)] == [16]
    device.gone(out_of_memory=True)
    assert device.rollout.stage == "skipped"
    assert device.rollout.reason == "memory ran out, at 16 bits, and no fewer are proven here"


def test_an_agent_that_dies_over_it_is_tried_again_and_then_the_release_is_at_fault(device: Device) -> None:
    device.tried()
    for deaths in (1, 2):
        device.gone()
        assert (device.rollout.stage, device.rollout.deaths) == ("staged", deaths)
        for _ in range(40):
            device.tick(1.0)
        device.probe()
        assert device.state.agent.status == "evaluating"
    device.gone()
    assert device.rollout.stage == "failed"
    assert device.rollout.reason == "the agent died 3 times over it, last: exit status 1"


def test_an_agent_that_hangs_over_it_is_killed(device: Device) -> None:
    device.tried()
    assert not device.tick(170.0) or not device.did(cmd.KillAgent)
    device.tick(20.0)
    assert len(device.did(cmd.KillAgent)) == 1


def test_the_precision_of_a_trial_stays_with_the_release(device: Device) -> None:
    device.tried(1, commit=True)
    device.unfit("memory")
    device.evaluated()
    device.activated(R1)
    device.in_use(2)
    assert [(one.id, one.bits) for one in device.rollout.installed] == [(R1, 16), (R2, 32)]


def test_a_broken_gpu_is_waited_for(device: Device) -> None:
    device.want(spec(1))
    device.fetched()
    device.checked()
    device.feed(ev.LoadRead, reading=load(hung={"gpu": 99.0}))
    assert kinds(device.staged()) == ["DropBlob"]
    assert device.said(ReleaseState)[0].waits.startswith("GPU driver: no answer")
    device.feed(ev.LoadRead, reading=load())
    assert kinds(device.last) == ["Evaluate"]


def test_a_whole_model_needs_no_base() -> None:
    device = Device(settings=EdgeSettings(fleet="f1", device="dev-1"))
    device.up()
    task = msgspec.structs.replace(spec(1).task, kind="classification", labels=["a", "b"])
    device.want(spec(1, task=task, kind="model"))
    device.fetched()
    device.checked()
    device.staged()
    (order,) = device.did(cmd.Evaluate)
    assert (order.base_path, order.source, order.data_path) == ("", None, "")
    device.evaluated(1, (None, None))
    assert kinds(device.last) == ["ActivateRelease"], "there are no rows: that it loads is enough"


def test_a_file_of_held_out_rows_is_taken_whole() -> None:
    release = ReleaseSettings(data={"points": "held-out.jsonl"}, rows=99)
    device = Device(settings=msgspec.structs.replace(SETTINGS, release=release))
    device.up()
    device.tried()
    (order,) = device.did(cmd.Evaluate)
    assert (order.data_path, order.share, order.rows) == ("held-out.jsonl", 1.0, 99)
    assert (order.hold_out, order.trained_on) == (0.0, False)


def test_rows_left_out_of_training_are_told_to_the_agent() -> None:
    """When it is probed, and with a release."""
    settings = msgspec.structs.replace(SETTINGS, release=ReleaseSettings(hold_out=0.2))
    device = Device(settings=settings)
    device.up()
    assert agents.probe_of(device.state).hold_out == 0.2
    device.tried()
    (order,) = device.did(cmd.Evaluate)
    assert (order.data_path, order.hold_out, order.trained_on) == ("points.jsonl", 0.2, True)


def test_work_comes_first_and_waits_for_a_trial_under_way(device: Device) -> None:
    device.assign(assignment(1))
    device.feed(ev.AdapterStored, sha=ADAPTER)
    assert device.state.phase == "training"
    device.want(spec(1))
    device.fetched()
    device.checked()
    assert kinds(device.staged()) == ["DropBlob"]
    (said,) = device.said(ReleaseState)
    assert (said.stage, said.waits) == ("staged", "work of a round is under way")
    device.trained()
    assert kinds(device.last)[-1] == "Evaluate"
    assert (device.state.phase, device.state.agent.status) == ("offering", "evaluating")
    device.assign(assignment(2))
    device.feed(ev.AdapterStored, sha=ADAPTER)
    assert device.state.phase == "fetching", "the agent is taken"
    device.evaluated()
    assert device.state.phase == "training"
    assert "Train" in kinds(device.last)


def test_the_owners_hours_are_kept() -> None:
    policy = PolicySettings(hours=["22:00-06:00"])
    device = Device(settings=msgspec.structs.replace(SETTINGS, policy=policy))
    device.up()
    device.feed(ev.Tick, minute=600, wall=device.wall, disk_free=10 * GIB)
    device.want(spec(1))
    device.fetched()
    device.checked()
    device.staged()
    assert device.state.agent.status == "ready"
    assert device.said(ReleaseState)[0].waits.startswith("hours: it is 10:00, the owner allows 22:00-06:00")
    device.feed(ev.Tick, minute=22 * 60, wall=device.wall, disk_free=10 * GIB)
    assert device.state.agent.status == "evaluating"


def test_a_trial_rests_while_other_programs_need_the_device(device: Device) -> None:
    device.tried()
    device.feed(ev.LoadRead, reading=load(foreign_cores=4.0))
    assert [one.message.reason[:12] for one in device.did(cmd.Tell)] == ["foreign load"]
    assert device.said(ReleaseState)[0].waits.startswith("foreign load")
    device.feed(ev.LoadRead, reading=load(foreign_cores=3.5))
    assert device.did(cmd.Tell) == [], "not yet well below"
    device.feed(ev.LoadRead, reading=load())
    assert [one.message for one in device.did(cmd.Tell)] == [protocol.Resume()]


def test_a_device_without_an_agent_skips_it() -> None:
    device = Device()
    device.link()
    device.feed(ev.MachineRead, machine=Machine(cores=4.0, memory_bytes=2 * GIB))
    device.want(spec(1))
    device.fetched()
    device.checked()
    assert device.rollout.stage == "verified"
    for _ in range(3):
        device.feed(ev.AgentGone, reason="torch is not there")
        for _ in range(3):
            device.tick(0.5)
    assert device.rollout.stage == "skipped"
    assert "torch is not there" in device.rollout.reason
