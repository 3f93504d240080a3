"""Works that no time ends yet: once half of the devices delivered, the others are asked for what they have done."""

from __future__ import annotations

from msgspec.structs import replace

from coordinator.core import commands as cmd
from coordinator.core import events as ev
from coordinator.core import records as rec
from coordinator.core.planning import registry
from coordinator.core.planning.base import RoundReport
from edge_daemon import protocol
from edge_daemon.core import commands as edge_cmd
from edge_daemon.core import events as edge_ev
from shared.jobs import JobSpec
from shared.messages import Command
from tests.unit.machine_rig import Rig, of, records, spec
from tests.unit.planning_cases import device, job, minilm, result, view
from tests.unit.session_rig import Rig as DeviceRig

DEVICES = ("dev-a", "dev-b", "dev-c", "dev-d")
ASK = edge_ev.CommandReceived


def named(name: str, asked: JobSpec) -> JobSpec:
    return replace(asked, strategy=replace(asked.strategy, name=name))


def opened(name: str) -> Rig:
    rig = Rig()
    rig.open(named(name, spec()), DEVICES)
    for one in DEVICES:
        rig.ack(one, "accept")
    return rig


def asked(commands: list[cmd.Command]) -> list[str]:
    return [one.device for one in of(commands, cmd.AskDelivery)]


def later(rig: Rig, seconds: float) -> list[cmd.Command]:
    """Time passes; all devices are heard."""
    rig.now += seconds
    commands: list[cmd.Command] = []
    for one in DEVICES:
        commands += rig.feed(ev.Heard, device=one)
    return commands


def test_once_half_have_delivered_the_others_are_asked_until_they_have() -> None:
    for name in ("fedpipe", "legend"):
        rig = opened(name)
        (planned,) = records(rig, rec.RoundPlanned)
        assert planned.plan.together
        assert asked(rig.deliver("dev-a", "a" * 64)) == [], "three are at work"
        commands = rig.deliver("dev-b", "b" * 64)
        assert asked(commands) == ["dev-c", "dev-d"]
        (told, _) = of(commands, cmd.AskDelivery)
        assert told.message == Command(
            kind="deliver", job="job-1", round=1, attempt=1, reason="2 of 4 devices have delivered"
        )
        assert asked(later(rig, 1.0)) == [], "once, and not at every tick"
        assert asked(rig.deliver("dev-c", "c" * 64)) == []
        assert asked(later(rig, rig.state.waits.remind_s)) == ["dev-d"], "it may have been lost"
        rig.deliver("dev-d", "d" * 64)
        assert rig.job.phase == "folding"


def test_who_will_not_deliver_is_not_waited_for_by_this() -> None:
    rig = Rig()
    rig.open(named("fedpipe", spec(rounds={"quorum": 0.5})), DEVICES)
    rig.deliver("dev-a", "a" * 64)
    assert asked(rig.ack("dev-b", "reject")) == [], "two are at work, one has delivered"
    assert asked(rig.ack("dev-c", "reject")) == ["dev-d"]


def test_a_restart_asks_again_and_a_new_round_anew() -> None:
    rig = opened("fedpipe")
    rig.deliver("dev-a", "a" * 64)
    assert asked(rig.deliver("dev-b", "b" * 64)) == ["dev-c", "dev-d"]
    assert asked(rig.restart() + later(rig, 0.1)) == ["dev-c", "dev-d"]
    rig.deliver("dev-c", "c" * 64)
    rig.deliver("dev-d", "d" * 64)
    assert rig.job.phase == "folding" and rig.state.hurried == {}


def test_only_methods_whose_rounds_end_together_ask_and_only_while_no_time_is_known() -> None:
    rig = opened("uniform")
    assert not records(rig, rec.RoundPlanned)[0].plan.together
    rig.deliver("dev-a", "a" * 64)
    assert asked(rig.deliver("dev-b", "b" * 64)) == []
    here = tuple(map(device, ("a", "b")))
    for name, together in (("fedpipe", True), ("legend", True), ("uniform", False), ("fedlora", False)):
        given = named(name, job(batch=8))
        planner = registry.create(given.strategy)
        first = planner.plan(view(*here), given)
        results = {one: result(batch=8, step_s=1.0) for one in first.participants}
        works = {one: replace(work, batch=8) for one, work in first.participants.items()}
        loads = {one.device: one.load for one in here if one.load is not None}
        report = RoundReport(round=1, works=works, results=results, loads=loads, facts=minilm(), job=given)
        second = planner.learn(report).plan(view(*here, round=2), given)
        assert (first.together, second.together) == (together, False), name


def test_a_device_ends_the_work_that_is_named_and_no_other() -> None:
    rig = DeviceRig().training()
    work = rig.state.work
    assert work is not None
    right = Command(kind="deliver", job=work.job, round=work.round, attempt=work.attempt, reason="why")
    for wrong in (replace(right, attempt=work.attempt + 1), replace(right, job="job-9"), Command(kind="deliver")):
        rig.feed(ASK, command=wrong)
        assert tells(rig) == []
    rig.feed(ASK, command=right)
    assert tells(rig) == [protocol.Stop(after_step=True)]
    rig.feed(ASK, command=right)
    assert tells(rig) == [protocol.Stop(after_step=True)], "asked again it tells again: the agent may be another"
    rig.trained()
    rig.feed(ASK, command=right)
    assert tells(rig) == [], "it is done"
    early = DeviceRig().up()
    early.feed(ASK, command=right)
    assert tells(early) == []


def tells(rig: DeviceRig) -> list[protocol.ToAgent]:
    """What the last event told the agent."""
    return [one.message for one in rig.last if isinstance(one, edge_cmd.Tell)]
