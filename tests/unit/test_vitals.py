"""Is this health? Bounds, signs and status lines of both services, by table."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from coordinator.core import vitals as coordinator
from coordinator.core.fleet import Presence
from coordinator.core.turn import State as CoordinatorState
from edge_daemon import protocol
from edge_daemon.core import vitals as edge
from edge_daemon.core.session_machine import initial
from edge_daemon.core.state import Agent, AgentStatus, Capability, Journal, State
from edge_daemon.settings import AgentSettings, EdgeHealthSettings, EdgeSettings
from shared.jobs import BaseSpec, TaskSpec, TrainingSpec
from shared.messages import Assignment, BlobRef, DeviceInfo, DeviceState, Work
from shared.vitals import Sign, complaint, of_service, ready

NOW = 1000.0
SETTINGS = EdgeSettings(
    fleet="lab", device="edge-01", agent=AgentSettings(silence_s=100.0),
    health=EdgeHealthSettings(network_s=20.0, tick_s=10.0, agent_s=50.0),
)  # fmt: skip
WORK = Assignment(
    job="toy", round=12, attempt=1, work=Work(ranks={"m": 2}, batch=4, bits=8, steps=200), base=BaseSpec(model="m"),
    base_digest="d", task=TaskSpec(kind="least_squares", dataset="points"), training=TrainingSpec(), rounds=20, seed=1,
    adapter=BlobRef(sha="0" * 64, size=1),
)  # fmt: skip


@pytest.mark.parametrize(
    ("age", "bound", "dead"),
    [(0.0, 30.0, False), (30.0, 30.0, False), (30.1, 30.0, True), (math.inf, 30.0, True), (math.nan, 30.0, True)],
)
def test_a_sign_beyond_its_bound_is_a_complaint(age: float, bound: float, dead: bool) -> None:
    assert bool(complaint([Sign("x is late", age, bound)])) is dead


def test_every_dead_sign_is_named_with_its_bound() -> None:
    signs = [Sign("a is late", 31.4, 30.0), Sign("b is well", 1.0, 30.0), Sign("c hangs", 60.0, 10.0)]
    assert complaint(signs) == "a is late for 31 s, the bound is 30 s; c hangs for 60 s, the bound is 10 s"


@pytest.mark.parametrize(
    ("connected", "waited", "bound", "is_ready"),
    [(True, 0.0, 30.0, True), (False, 29.9, 30.0, False), (False, 30.0, 30.0, True), (False, 0.0, 0.0, True)],
)
def test_a_service_has_started_with_a_broker_or_after_a_while(
    connected: bool, waited: float, bound: float, is_ready: bool
) -> None:
    assert ready(connected, waited, bound) is is_ready


def daemon(status: AgentStatus = "ready", heard_ago: float = 0.0, **changes: object) -> State:
    state = replace(initial(SETTINGS, Journal()), phase="idle", now=NOW, connected=True)
    state = replace(state, agent=Agent(status=status, heard_at=NOW - heard_ago), capability=Capability())
    return replace(state, **changes)  # type: ignore[arg-type]  # names are checked at run time


@pytest.mark.parametrize(
    ("status", "heard_ago", "turned_ago", "late", "said"),
    [
        ("ready", 0.0, 1.0, 0.0, ""),
        ("ready", 9999.0, 1.0, 0.0, ""),
        ("absent", 9999.0, 1.0, 0.0, ""),
        ("busy", 100.0, 1.0, 0.0, ""),
        ("busy", 150.0, 1.0, 0.0, ""),
        ("busy", 151.0, 1.0, 0.0, "the agent is silent and not gone for 151 s, the bound is 150 s"),
        ("starting", 151.0, 1.0, 0.0, "the agent is silent and not gone for 151 s, the bound is 150 s"),
        ("stopping", 151.0, 1.0, 0.0, "the agent is silent and not gone for 151 s, the bound is 150 s"),
        ("ready", 0.0, 10.5, 0.0, "the main loop does not turn for 10 s, the bound is 10 s"),
        ("ready", 0.0, 1.0, 21.0, "the network thread is late for 21 s, the bound is 20 s"),
        ("ready", 0.0, 1.0, math.inf, "the network thread is late for inf s, the bound is 20 s"),
    ],
)
def test_the_daemon_is_well_or_says_what_is_not(
    status: AgentStatus, heard_ago: float, turned_ago: float, late: float, said: str
) -> None:
    state = daemon(status, heard_ago)
    assert complaint(edge.signs(state, now=NOW, turned_at=NOW - turned_ago, network_late_s=late)) == said


PROGRESS = protocol.Progressed(step=40, steps=200, samples=160, loss=1.934, samples_per_s=3.0)
ASSIGNED = Journal(assignment=WORK)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({}, "idle"),
        ({"phase": "probing"}, "finding out what this device can do"),
        ({"connected": False}, "offline, retrying; idle"),
        ({"connected": False, "no_broker": "Connection refused"}, "offline, retrying (Connection refused); idle"),
        ({"capability": Capability(problem="the agent does not start")}, "no work possible: the agent does not start"),
        ({"phase": "fetching", "journal": ASSIGNED}, "round 12 fetches the global adapter"),
        ({"phase": "fetching", "journal": ASSIGNED, "adapter_there": True}, "round 12 waits for the agent"),
        ({"phase": "training", "journal": ASSIGNED}, "round 12 begins bits=8"),
        (
            {"phase": "training", "journal": ASSIGNED, "progressed": PROGRESS},
            "round 12 step 40/200 loss 1.93 bits=8",
        ),
        (
            {"phase": "paused", "journal": ASSIGNED, "progressed": PROGRESS, "paused": "heat: 99 °C"},
            "round 12 step 40/200 loss 1.93 bits=8, rests: heat: 99 °C",
        ),
        ({"phase": "draining", "journal": ASSIGNED, "connected": False}, "leaving: the agent saves its work"),
    ],
)
def test_the_daemon_says_what_it_does(changes: dict[str, object], line: str) -> None:
    assert edge.status(daemon(**changes)) == line  # type: ignore[arg-type]  # names are checked at run time


@pytest.mark.parametrize(
    ("turned_ago", "late", "said"),
    [
        (1.0, 0.0, ""),
        (31.0, 0.0, "the main loop does not turn for 31 s, the bound is 30 s"),
        (1.0, 41.0, "the network thread is late for 41 s, the bound is 40 s"),
    ],
)
def test_the_coordinator_is_well_or_says_what_is_not(turned_ago: float, late: float, said: str) -> None:
    found = of_service(now=NOW, turned_at=NOW - turned_ago, network_late_s=late, network_s=40.0, tick_s=30.0)
    assert complaint(found) == said


def test_the_coordinator_says_what_it_does() -> None:
    able = Presence(device="a", state=DeviceState(s="ready", epoch=1), info=DeviceInfo(epoch=1, bits=[32]))
    state = CoordinatorState(fleet={"a": able, "b": Presence(device="b")})
    assert coordinator.status(state, connected=True, problem="") == "1 device(s) able, no job"
    away = coordinator.status(state, connected=False, problem="refused")
    assert away == "offline, retrying (refused); 1 device(s) able, no job"
    full = coordinator.status(state, connected=True, problem="no space left")
    assert full == "1 device(s) able, no job; no space left"
