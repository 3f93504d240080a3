"""The coordinator's machine interrupted in any phase: by a kill, a failure, a pause, a broker that was away."""

from __future__ import annotations

import dataclasses

import pytest

from coordinator.core import commands as cmd
from coordinator.core import events as ev
from coordinator.core.close import Status
from coordinator.core.collecting import statuses
from coordinator.core.transitions import TABLE
from shared import machines
from shared.messages import DeviceState, Load
from tests.unit.machine_rig import HELD_OUT, A, B, Rig, of, spec


def _to(phase: str) -> Rig:
    """A rig whose job is in `phase`."""
    rig = Rig()
    if phase == "queued":
        rig.open()
        rig.submit(job="job-2")
        return rig
    for device in ("dev-a", "dev-b"):
        rig.birth(device)
    rig.submit(spec(evaluation=HELD_OUT, rounds={"count": 1}))
    if phase == "preparing":
        return rig
    if phase == "failed":
        rig.feed(ev.WorkFailed, job="job-1", what="preparing", reason="no such model")
        return rig
    rig.prepared()
    if phase == "baseline":
        return rig
    if phase == "waiting":
        for device in ("dev-a", "dev-b"):
            rig.feed(ev.FromDevice, device=device, message=DeviceState(s="lost", epoch=1))
        rig.evaluated(9.0, round=0)
        return rig
    rig.evaluated(9.0, round=0)
    if phase == "open":
        rig.deliver("dev-a", A)
        return rig
    if phase == "cancelled":
        rig.feed(ev.CancelRequested, job="job-1")
        return rig
    rig.deliver("dev-a", A)
    rig.deliver("dev-b", B)
    if phase == "folding":
        return rig
    if phase == "paused":
        rig.feed(ev.WorkFailed, job="job-1", what="fold", reason="disk full")
        return rig
    rig.folded()
    if phase == "evaluating":
        return rig
    rig.evaluated(1.0)
    if phase == "exporting":
        return rig
    rig.feed(ev.Exported, job="job-1", path="/x")
    return rig


EXPECTED = {
    "queued": cmd.PublishAssign,  # of the job before it
    "preparing": cmd.PrepareBase,
    "baseline": cmd.EvaluateAdapter,
    "open": cmd.PublishAssign,
    "folding": cmd.FoldRound,
    "evaluating": cmd.EvaluateAdapter,
    "exporting": cmd.ExportJob,
}


@pytest.mark.parametrize("phase", machines.phases(TABLE))
def test_a_kill_in_any_phase_takes_the_work_up_again(phase: str) -> None:
    """Parametrised over the table: a phase that `_to` does not reach fails here."""
    rig = _to(phase)
    assert rig.state.jobs["job-2" if phase == "queued" else "job-1"].phase == phase
    round = rig.job.round
    commands = rig.restart()
    assert rig.job.round == round, "the same round, attempt and plan digest"
    if phase in EXPECTED:
        assert of(commands, EXPECTED[phase])
    if phase == "open":
        assert [c.device for c in of(commands, cmd.PublishAssign)] == ["dev-b"], "what the log holds is not asked again"
        rig.deliver("dev-b", B)
        assert rig.job.phase == "folding"


def test_a_restart_keeps_what_is_left_of_the_deadline() -> None:
    rig = _to("open")
    rig.now += 60
    rig.restart()
    assert rig.state.since == pytest.approx(rig.now - 60)


def test_a_paused_job_does_not_take_the_fleet_from_another() -> None:
    rig = _to("paused")
    rig.submit(spec(), job="job-2")
    assert rig.state.active is not None and rig.state.active.id == "job-2"
    rig.feed(ev.ResumeRequested, job="job-1")
    assert rig.job.phase == "paused"
    rig.feed(ev.CancelRequested, job="job-2")
    rig.feed(ev.ResumeRequested, job="job-1")
    assert rig.job.phase == "folding", "it goes on where it stopped, with the updates it has"
    assert rig.job.round is not None and rig.job.round.counted == ("dev-a", "dev-b")


def test_a_failed_export_is_tried_again_and_no_round_is_added() -> None:
    rig = _to("exporting")
    rig.feed(ev.WorkFailed, job="job-1", what="export", reason="disk full")
    assert rig.job.phase == "paused"
    commands = rig.feed(ev.ResumeRequested, job="job-1")
    assert of(commands, cmd.ExportJob) and rig.job.committed == 1


def test_silence_while_the_broker_is_away_says_nothing() -> None:
    rig = Rig()
    rig.open()
    rig.feed(ev.BrokerLost)
    rig.now += 300
    rig.feed(ev.Tick)
    assert rig.job.phase == "open", "neither silence nor the deadline ends a round that nobody can reach"
    rig.feed(ev.BrokerFound, chunk=1000)
    rig.now += 10
    rig.feed(ev.Tick)
    assert rig.job.phase == "open" and rig.job.round is not None and rig.job.round.attempt == 1
    rig.deliver("dev-a", A)
    rig.deliver("dev-b", B)
    assert rig.job.phase == "folding"


def _statuses(rig: Rig) -> dict[str, Status]:
    return statuses(rig.state, rig.job, rig.now)


def _all_lost(rig: Rig) -> None:
    for device in ("dev-a", "dev-b"):
        rig.feed(ev.FromDevice, device=device, message=DeviceState(s="lost", epoch=1))


def test_a_broker_that_is_stopped_and_sends_all_wills_ends_no_round() -> None:
    """They come before it is gone, and again, retained, once it is back and the devices are not."""
    rig = Rig()
    rig.open()
    _all_lost(rig)
    rig.now += 0.1
    rig.feed(ev.BrokerLost)
    rig.now += 60
    rig.feed(ev.Tick)
    assert set(_statuses(rig).values()) == {"assigned"}, "not told to be gone while nobody can say otherwise"
    rig.feed(ev.BrokerFound, chunk=1000)
    _all_lost(rig)
    rig.now += 11.9
    rig.feed(ev.Tick)
    assert rig.job.phase == "open" and rig.job.round is not None and rig.job.round.attempt == 1
    rig.birth("dev-a", epoch=2)
    rig.now += 0.2
    rig.feed(ev.Tick)
    assert rig.job.phase == "open", "dev-b is not waited for any more, dev-a is"
    rig.deliver("dev-a", A)
    assert rig.job.phase == "waiting", "one of two is no quorum of all"


def test_a_round_waits_for_a_daemon_that_is_restarted_before_it_is_thrown_away() -> None:
    rig = _to("open")
    rig.feed(ev.FromDevice, device="dev-b", message=DeviceState(s="disconnected", epoch=1))
    assert _statuses(rig) == {"dev-a": "done", "dev-b": "gone"}
    rig.now += 11.9
    rig.feed(ev.Tick)
    assert rig.job.phase == "open"
    rig.birth("dev-b", epoch=2)
    assert _statuses(rig)["dev-b"] == "assigned"
    rig.deliver("dev-b", B)
    assert rig.job.phase == "folding"
    assert rig.job.round is not None and (rig.job.round.attempt, rig.job.round.counted) == (1, ("dev-a", "dev-b"))


def test_a_round_waits_no_longer_than_silence_for_one_that_left() -> None:
    rig = _to("open")
    rig.feed(ev.FromDevice, device="dev-b", message=DeviceState(s="disconnected", epoch=1))
    rig.now += 12.1
    rig.feed(ev.Tick)
    assert rig.job.phase == "waiting" and "dev-b" in rig.state.silenced


def test_a_round_whose_quorum_is_there_waits_for_nobody_who_left() -> None:
    rig = Rig()
    rig.open(spec(rounds={"quorum": 0.5}))
    rig.deliver("dev-a", A)
    rig.feed(ev.FromDevice, device="dev-b", message=DeviceState(s="disconnected", epoch=1))
    assert rig.job.phase == "folding"


def test_who_is_heard_of_a_later_connection_is_not_gone() -> None:
    """Its load may overtake its birth."""
    rig = _to("open")
    rig.feed(ev.FromDevice, device="dev-b", message=DeviceState(s="disconnected", epoch=1))
    rig.feed(ev.FromDevice, device="dev-b", message=Load(epoch=2, seq=1, cores=1.0))
    assert _statuses(rig)["dev-b"] == "assigned"


def test_wills_of_before_a_start_are_doubted_as_silence_is() -> None:
    rig = _to("open")
    round = rig.job.round
    rig.restart()
    _all_lost(rig)
    rig.now += 11.9
    rig.feed(ev.Tick)
    assert rig.job.round == round
    rig.now += 0.2
    rig.feed(ev.Tick)
    assert rig.job.round != round


def test_after_a_long_absence_waiting_updates_get_a_chance() -> None:
    rig = _to("open")
    rig.now += 3600
    rig.restart()
    assert rig.job.phase == "open"
    rig.deliver("dev-b", B)
    assert rig.job.phase == "folding"


def test_a_device_that_comes_back_after_the_job_is_told_to_stop() -> None:
    rig = _to("cancelled")
    rig.restart()
    commands = rig.birth("dev-a", epoch=2)
    assert [c.assign.assignment for c in of(commands, cmd.PublishAssign)] == [None]
    assert not of(rig.birth("dev-a", epoch=3), cmd.PublishAssign), "told once"


def test_the_grace_after_a_restart_is_a_setting() -> None:
    rig = _to("open")
    rig.state = dataclasses.replace(rig.state, waits=dataclasses.replace(rig.state.waits, grace_s=3.0, silent_s=60.0))
    rig.now += 3600
    rig.restart()
    round = rig.job.round
    rig.now += 2.9
    rig.feed(ev.Tick)
    assert rig.job.round == round
    rig.now += 0.2
    rig.feed(ev.Tick)
    assert rig.job.round != round
