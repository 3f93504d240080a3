"""The coordinator's machine: its phases, what it counts and what it refuses, silence and deadlines."""

from __future__ import annotations

import dataclasses

import pytest
from msgspec.structs import replace

from coordinator.core import commands as cmd
from coordinator.core import events as ev
from coordinator.core import records as rec
from coordinator.core.transitions import TABLE
from shared import jobs, machines
from shared.codec import pack, unpack
from shared.errors import DecodeError
from shared.messages import DeviceState, Load, Manifest
from tests.unit.machine_rig import HELD_OUT, A, B, Rig, facts, of, records, spec


def test_a_job_runs_through_all_its_rounds() -> None:
    rig = Rig()
    rig.open()
    assert {c.device for c in of(rig.last, cmd.PublishAssign)} == {"dev-a", "dev-b"}
    for number in (1, 2):
        rig.deliver("dev-a", A)
        commands = rig.deliver("dev-b", B)
        assert of(commands, cmd.FoldRound) and rig.job.phase == "folding"
        commands = rig.folded()
        assert rig.job.committed == number
    assert of(commands, cmd.ExportJob)
    rig.feed(ev.Exported, job="job-1", path="/x")
    assert rig.job.phase == "finished"
    assert of(rig.last, cmd.PublishAssign)[0].assign.assignment is None


def test_stored_is_said_only_after_the_record() -> None:
    rig = Rig()
    rig.open()
    commands = rig.deliver("dev-a", A)
    assert [c.verdict for c in of(commands, cmd.Settle)] == ["stored"]
    assert records(rig, rec.UpdateAdmitted)[0].device == "dev-a"


def test_announced_again_it_is_stored_again_and_counted_once() -> None:
    rig = Rig()
    rig.open()
    rig.deliver("dev-a", A)
    commands = rig.deliver("dev-a", A)
    assert [c.verdict for c in of(commands, cmd.Settle)] == ["stored"] and not of(commands, cmd.Pull)
    commands = rig.deliver("dev-a", B)
    assert [c.verdict for c in of(commands, cmd.Settle)] == ["late"]
    assert len(records(rig, rec.UpdateAdmitted)) == 1


@pytest.mark.parametrize("samples", [0, 17, 10**9])
def test_impossible_sample_counts_are_refused_unseen(samples: int) -> None:
    rig = Rig()
    rig.open()
    commands = rig.deliver("dev-a", A, facts=facts(samples))
    assert not of(commands, cmd.Pull)
    assert of(commands, cmd.Settle)[0].verdict == "refused" and str(samples) in of(commands, cmd.Settle)[0].reason


def test_updates_of_other_rounds_attempts_and_devices_do_not_count() -> None:
    rig = Rig()
    rig.open()
    for device, changes, verdict in (
        ("dev-a", {"round": 7}, "late"),
        ("dev-a", {"attempt": 9}, "late"),
        ("dev-x", {}, "refused"),
    ):
        commands = rig.deliver(device, A, **changes)
        assert [c.verdict for c in of(commands, cmd.Settle)] == [verdict]
    assert not records(rig, rec.UpdateAdmitted)


def test_a_refused_update_ends_the_wait_and_the_round_repeats_without_quorum() -> None:
    rig = Rig()
    rig.open()
    rig.deliver("dev-a", A)
    rig.deliver("dev-b", B, refusal="not finite")
    assert records(rig, rec.UpdateRefused)[0].reason == "not finite"
    assert rig.job.phase == "waiting" and rig.job.attempt == 1
    rig.now += 10
    rig.feed(ev.Heard, device="dev-a")
    rig.feed(ev.Heard, device="dev-b")
    assert rig.job.phase == "open" and rig.job.round is not None and rig.job.round.attempt == 2
    commands = rig.deliver("dev-a", A, attempt=1)
    assert [c.verdict for c in of(commands, cmd.Settle)] == ["late"], "work of the first attempt must not count"


def test_a_job_that_never_gets_its_quorum_pauses() -> None:
    rig = Rig()
    rig.open()
    for _ in range(400):
        if rig.job.phase == "paused":
            break
        if rig.job.phase == "open":
            rig.ack("dev-a", "reject", "too warm")
            rig.ack("dev-b", "reject", "too warm")
        rig.now += 5
        rig.feed(ev.Heard, device="dev-a")
        rig.feed(ev.Heard, device="dev-b")
    assert rig.job.phase == "paused" and "8 times" in rig.job.reason


def test_silence_ends_the_wait_and_a_late_update_still_counts() -> None:
    rig = Rig()
    rig.open(spec(rounds={"quorum": 0.5, "min_devices": 3}), devices=("dev-a", "dev-b", "dev-c"))
    rig.deliver("dev-a", A)
    rig.now += 11
    rig.feed(ev.Heard, device="dev-c")
    assert rig.job.phase == "open"
    rig.now += 2
    rig.feed(ev.Heard, device="dev-c")
    assert rig.job.phase == "open", "dev-b is silent, dev-c is not"
    rig.deliver("dev-b", B)
    assert records(rig, rec.UpdateAdmitted)[-1].device == "dev-b"
    rig.now += 13
    rig.feed(ev.Tick)
    assert rig.job.phase == "folding"
    assert records(rig, rec.RoundClosed)[0].devices == ["dev-a", "dev-b"]


def test_the_will_ends_the_wait_once_it_is_believed_and_is_no_sign_of_life() -> None:
    rig = Rig()
    rig.open(spec(rounds={"quorum": 0.5}))
    rig.deliver("dev-a", A)
    rig.feed(ev.FromDevice, device="dev-b", message=DeviceState(s="lost", epoch=1))
    rig.now += 1.9
    rig.feed(ev.Tick)
    assert rig.job.phase == "open"
    rig.now += 0.2
    rig.feed(ev.Tick)
    assert rig.job.phase == "folding"


def test_a_stale_will_changes_nothing() -> None:
    rig = Rig()
    rig.birth("dev-a", epoch=5)
    rig.feed(ev.FromDevice, device="dev-a", message=DeviceState(s="lost", epoch=4))
    assert rig.state.fleet["dev-a"].present


def test_the_deadline_closes_with_quorum() -> None:
    rig = Rig()
    rig.open(spec(rounds={"quorum": 0.5}))
    rig.deliver("dev-a", A)
    for _ in range(11):
        rig.now += 10
        rig.feed(ev.Heard, device="dev-b")
    assert rig.job.phase == "folding"
    assert "deadline" in records(rig, rec.RoundClosed)[0].reason


def test_load_without_a_birth_asks_for_one() -> None:
    rig = Rig()
    rig.feed(ev.FromDevice, device="dev-a", message=Load(epoch=3, seq=1))
    assert of(rig.last, cmd.AskRebirth)
    rig.feed(ev.FromDevice, device="dev-a", message=Load(epoch=3, seq=2))
    assert not of(rig.last, cmd.AskRebirth), "not at every message"


def test_worse_aggregates_are_refused_and_three_pause_the_job() -> None:
    rig = Rig()
    for device in ("dev-a", "dev-b"):
        rig.birth(device)
    rig.submit(spec(evaluation=HELD_OUT, rounds={"count": 9}))
    rig.prepared()
    assert rig.job.phase == "baseline"
    rig.evaluated(1.0, round=0)
    kept = rig.job.adapter
    for _ in range(3):
        rig.deliver("dev-a", A)
        rig.deliver("dev-b", B)
        rig.folded()
        assert rig.job.phase == "evaluating"
        rig.evaluated(5.0)
    assert rig.job.adapter == kept and rig.job.phase == "paused"
    rig.feed(ev.ResumeRequested, job="job-1")
    assert rig.job.phase == "open" and rig.job.round is not None and rig.job.round.number == 4


def test_what_is_exported_has_its_own_metrics_and_not_the_best_there_were() -> None:
    rig = Rig()
    for device in ("dev-a", "dev-b"):
        rig.birth(device)
    rig.submit(spec(evaluation=jobs.EvaluationSpec(data="held-out.jsonl", worse_by=0.5), rounds={"count": 9}))
    rig.prepared()
    rig.evaluated(2.0, round=0)
    assert rig.job.metrics is not None and rig.job.metrics.loss == 2.0
    for loss, told, best in ((1.0, 1.0, 1.0), (1.2, 1.2, 1.0), (5.0, 1.2, 1.0)):
        rig.deliver("dev-a", A)
        rig.deliver("dev-b", B)
        rig.folded()
        rig.evaluated(loss)
        assert rig.job.metrics is not None
        assert (rig.job.metrics.loss, rig.job.judged[0].loss) == (told, best)


def test_the_second_job_waits_for_the_first() -> None:
    rig = Rig()
    rig.open()
    rig.submit(job="job-2")
    assert rig.state.jobs["job-2"].phase == "queued"
    rig.feed(ev.CancelRequested, job="job-1")
    assert rig.state.jobs["job-1"].phase == "cancelled"
    assert rig.state.jobs["job-2"].phase == "preparing"


def test_answers_out_of_phase_are_dropped() -> None:
    rig = Rig()
    rig.open()
    before = rig.state.jobs
    rig.evaluated(0.1, round=1)
    rig.feed(ev.Exported, job="job-1", path="/x")
    rig.feed(ev.WorkFailed, job="job-1", what="fold", reason="late answer")
    assert rig.state.jobs == before and rig.state.counters["answers out of phase"] == 3


def test_the_machine_raises_rather_than_leave_its_table() -> None:
    with pytest.raises(machines.InvalidTransition):
        machines.check(TABLE, "queued", "Tick", "finished")


def test_cancelling_a_queued_job_leaves_the_running_one_alone() -> None:
    rig = Rig()
    rig.open()
    rig.submit(job="job-2")
    rig.feed(ev.FromDevice, device="dev-a", message=rig.manifest("dev-a", A))
    before = rig.state
    commands = rig.feed(ev.CancelRequested, job="job-2")
    assert rig.state.jobs["job-2"].phase == "cancelled"
    assert not of(commands, cmd.PublishAssign) and rig.state.announced == before.announced
    assert rig.state.since == before.since and rig.job.round == before.jobs["job-1"].round


def test_an_update_of_impossible_size_is_not_fetched() -> None:
    rig = Rig()
    rig.open()
    manifest = replace(rig.manifest("dev-a", A), size=400 * 1024 * 1024)
    commands = rig.feed(ev.FromDevice, device="dev-a", message=manifest)
    assert not of(commands, cmd.Pull) and "bytes" in of(commands, cmd.Settle)[0].reason


def test_a_counted_update_is_stored_even_after_the_commit() -> None:
    rig = Rig()
    rig.open()
    manifest = rig.manifest("dev-a", A)
    rig.deliver("dev-a", A)
    rig.deliver("dev-b", B)
    rig.folded()
    commands = rig.feed(ev.FromDevice, device="dev-a", message=manifest)
    assert [c.verdict for c in of(commands, cmd.Settle)] == ["stored"]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), -1.0])
@pytest.mark.parametrize("field", ["train_s", "cores_used", "step_s", "load_s"])
def test_numbers_that_would_poison_what_is_learned_do_not_decode(field: str, value: float) -> None:
    rig = Rig()
    rig.open()
    poisoned = pack(rig.manifest("dev-a", A, facts=facts(**{field: value})))
    with pytest.raises(DecodeError):
        unpack(poisoned, Manifest)
    with pytest.raises(DecodeError):
        unpack(pack(Load(epoch=1, seq=1, cores=value)), Load)


@pytest.mark.parametrize("job", ["../../etc", "a/b", "a\n", "", "A"])
def test_a_job_name_that_is_a_path_does_not_decode(job: str) -> None:
    rig = Rig()
    rig.open()
    with pytest.raises(DecodeError):
        unpack(pack(replace(rig.manifest("dev-a", A), job=job)), Manifest)


def test_when_an_assignment_is_said_again_is_a_setting() -> None:
    rig = Rig()
    rig.open()
    rig.state = dataclasses.replace(rig.state, waits=dataclasses.replace(rig.state.waits, remind_s=1.0))
    rig.now += 0.9
    assert not of(rig.feed(ev.Tick), cmd.PublishAssign)
    rig.now += 0.2
    assert {c.device for c in of(rig.feed(ev.Tick), cmd.PublishAssign)} == {"dev-a", "dev-b"}


@pytest.mark.parametrize("known", ["announced", "stored", "not yet announced"])
def test_case_33_what_a_device_that_left_the_fleet_has_under_way_is_not_aggregated(known: str) -> None:
    """Its certificate was revoked, and it was forgotten; the broker may still hold messages of it."""
    rig = Rig()
    rig.open()
    manifest = rig.manifest("dev-b", B)
    where = {"job": manifest.job, "round": manifest.round, "attempt": manifest.attempt}
    if known != "not yet announced":
        rig.feed(ev.FromDevice, device="dev-b", message=manifest)
    if known == "stored":
        rig.feed(ev.UpdateStored, device="dev-b", sha=B)
    rig.feed(ev.Decommissioned, device="dev-b")
    rig.feed(ev.Decommissioned, device="dev-b")
    assert [record.reason for record in records(rig, rec.UpdateRefused)] == ["the device left the fleet"]
    assert not of(rig.feed(ev.FromDevice, device="dev-b", message=manifest), cmd.Pull)
    rig.feed(ev.UpdateStored, device="dev-b", sha=B)
    rig.feed(ev.UpdateChecked, device="dev-b", sha=B, reason="", **where)
    rig.deliver("dev-a", A)
    assert not records(rig, rec.RoundFolded)
    assert {record.device for record in records(rig, rec.UpdateAdmitted)} <= {"dev-a"}


def test_a_device_that_leaves_takes_nothing_back_that_is_counted() -> None:
    rig = Rig()
    rig.open()
    rig.deliver("dev-b", B)
    rig.feed(ev.Decommissioned, device="dev-b")
    rig.deliver("dev-a", A)
    assert rig.job.phase == "folding"
    assert not records(rig, rec.UpdateRefused)
