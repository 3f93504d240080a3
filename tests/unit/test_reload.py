"""What a reload changes, what waits for a restart, and what the session machine makes of it."""

from __future__ import annotations

import dataclasses

import msgspec
import pytest

from coordinator import service as coordinator_service
from coordinator.core import events as coordinator_events
from coordinator.core.round_machine import step
from coordinator.core.turn import State, Waits
from coordinator.runtime import waits_of
from coordinator.settings import CoordinatorSettings, WaitSettings
from edge_daemon import protocol
from edge_daemon import service as edge_service
from edge_daemon.core import commands as cmd
from edge_daemon.core import events as ev
from edge_daemon.core.state import Machine
from edge_daemon.settings import AgentSettings, EdgeSettings, PolicySettings
from shared import reload
from shared.settings import BrokerSettings
from tests.unit.session_rig import Rig

OLD = EdgeSettings(fleet="lab", device="edge-01")


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({}, "nothing new"),
        ({"policy": PolicySettings(foreign_limit=0.5, hub=True)}, "new: policy.foreign_limit, policy.hub"),
        ({"log_level": "DEBUG"}, "new: log_level"),
        ({"data": {"a": "/a"}}, "new: data"),
        ({"device": "edge-02"}, "nothing new; only after a restart: device"),
        ({"broker": BrokerSettings(host="b")}, "nothing new; only after a restart: broker"),
        (
            {"agent": AgentSettings(gpus=["cpu"], silence_s=9.0), "state_dir": "/x"},
            "new: agent.silence_s; only after a restart: state_dir, agent.gpus",
        ),
    ],
)
def test_what_is_taken_over_and_what_waits(changes: dict[str, object], told: str) -> None:
    new = msgspec.structs.replace(OLD, **changes)
    taken = reload.take_over(OLD, new, edge_service.FIXED)
    assert reload.told(taken) == told
    for key in taken.waiting:
        table, _, name = key.rpartition(".")
        kept, before = (getattr(one, table) if table else one for one in (taken.settings, OLD))
        assert getattr(kept, name) == getattr(before, name)


@pytest.mark.parametrize(
    ("fixed", "settings"), [(edge_service.FIXED, EdgeSettings), (coordinator_service.FIXED, CoordinatorSettings)]
)
def test_what_only_a_restart_changes_exists(fixed: set[str], settings: type[msgspec.Struct]) -> None:
    for key in fixed:
        kind = settings
        for name in key.split("."):
            field = next(field for field in msgspec.structs.fields(kind) if field.name == name)
            kind = field.type


def changed(rig: Rig, **changes: object) -> EdgeSettings:
    return msgspec.structs.replace(rig.state.settings, **changes)


def test_new_limits_pause_and_resume_work_at_once() -> None:
    rig = Rig().training()
    minute = rig.state.minute
    closed = f"{(minute // 60 + 2) % 24:02d}:00-{(minute // 60 + 3) % 24:02d}:00"
    rig.feed(ev.Reconfigured, settings=changed(rig, policy=PolicySettings(hours=[closed])))
    assert rig.state.phase == "paused"
    assert "the owner allows" in rig.state.paused
    rig.feed(ev.Reconfigured, settings=changed(rig, policy=PolicySettings()))
    assert rig.state.phase == "training"


def test_a_data_set_that_could_not_be_read_is_looked_at_again() -> None:
    """Its settings are as they were; its file may have been mended."""
    rig = Rig()
    rig.link()
    rig.feed(ev.MachineRead, machine=Machine(cores=4.0, memory_bytes=2**31))
    rig.feed(ev.AgentProbed, probed=protocol.Probed(bits=[32], notes={"points": "row 3 is no JSON"}))
    rig.feed(ev.Reconfigured, settings=rig.state.settings)
    assert rig.did(cmd.Tell)[-1:] == [cmd.Tell(protocol.Shutdown())]


def test_data_that_are_well_leave_the_agent_alone() -> None:
    rig = Rig().up()
    rig.feed(ev.Reconfigured, settings=rig.state.settings)
    assert rig.did(cmd.Tell) == []


def test_new_data_start_the_agent_anew_but_never_in_the_middle_of_work() -> None:
    rig = Rig().training()
    more = {**rig.state.settings.data, "more": "/srv/more.jsonl"}
    rig.feed(ev.Reconfigured, settings=changed(rig, data=more))
    assert rig.state.agent.status == "busy"
    rig.trained()
    assert rig.state.agent.status == "stopping"
    assert rig.did(cmd.Tell)[-1] == cmd.Tell(protocol.Shutdown())
    rig.gone()
    rig.tick(1.0)
    (started,) = [order for order in rig.did(cmd.StartAgent) if order.probe.datasets == more][-1:]
    assert started.probe.datasets["more"] == "/srv/more.jsonl"
    assert rig.state.agent.failures == 0, "its end was asked for"


def test_an_idle_agent_is_left_alone_by_limits_that_are_not_its_own() -> None:
    rig = Rig().up()
    rig.feed(ev.Reconfigured, settings=changed(rig, policy=PolicySettings(temperature_limit_c=50.0)))
    assert rig.state.agent.status == "ready"


def test_the_coordinators_waits_change_without_a_restart() -> None:
    waits = Waits(silent_s=3.0)
    result = step(State(), coordinator_events.Reconfigured(now=1.0, ts=1.0, waits=waits))
    assert result.state.waits == waits
    assert result.records == []


def test_every_wait_of_the_machine_comes_from_the_settings() -> None:
    """By the same name and as it is by default; one that was changed arrives changed."""
    settings = WaitSettings()
    for field in dataclasses.fields(Waits):
        if field.name == "fresh_s":  # of two settings: periods of telemetry
            continue
        assert getattr(Waits(), field.name) == getattr(settings, field.name)
        changed = WaitSettings(**{field.name: getattr(settings, field.name) + 1.0})
        waits = waits_of(CoordinatorSettings(fleet="lab", waits=changed))
        assert getattr(waits, field.name) == getattr(changed, field.name)
