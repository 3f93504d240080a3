"""What one device can do to a round, to the log and to the others with what it announces."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from msgspec.structs import replace

from coordinator.core import collecting, releases
from coordinator.core import commands as cmd
from coordinator.core import events as ev
from coordinator.core import records as rec
from shared.messages import DeviceInfo, UpdateFacts, Work
from shared.release_messages import ReleaseId, ReleaseState
from tests.unit.machine_rig import A, B, Rig, facts, of, records, spec

C = "c" * 64


def on_the_wire(given: UpdateFacts) -> UpdateFacts:
    """As the coordinator reads them."""
    return msgspec.convert(msgspec.to_builtins(given), UpdateFacts)


@pytest.mark.parametrize(
    ("claimed", "reason"),
    [
        ({"steps": 5}, "5 steps claimed, the work allows 1 to 4"),
        ({"steps": 2**53, "train_s": 1e-5}, "9007199254740992 steps claimed, the work allows 1 to 4"),
        ({"steps": 0}, "0 steps claimed, the work allows 1 to 4"),
        ({"batch": 2**53}, "9007199254740992 samples in a batch claimed, the work allows 1 to 4"),
        ({"batch": 0}, "0 samples in a batch claimed, the work allows 1 to 4"),
        ({"samples": 17}, "17 samples claimed, the work allows 1 to 16"),
        ({"samples": 0}, "0 samples claimed, the work allows 1 to 16"),
        ({"agents": 2, "samples": 32}, "2 agents claimed, the work is for 1"),
    ],
)
def test_what_nobody_can_have_done_is_refused(claimed: dict[str, Any], reason: str) -> None:
    rig = Rig()
    rig.open()
    commands = rig.deliver("dev-a", A, facts=facts(**claimed))
    assert [(one.verdict, one.reason) for one in of(commands, cmd.Settle)] == [("refused", reason)]
    assert not of(commands, cmd.Pull)


def test_extra_steps_can_have_been_done_and_no_more() -> None:
    work = Work(ranks={}, batch=4, bits=32, steps=4, extra_steps=1)
    done = facts(steps=5, batch=4, samples=20)
    assert collecting.impossible(work, done, 4) == ""
    assert "6 steps claimed, the work allows 1 to 5" in collecting.impossible(work, replace(done, steps=6), 4)
    assert "21 samples claimed" in collecting.impossible(work, replace(done, samples=21), 4)


def test_progress_is_told_of_the_steps_that_were_asked_for_until_there_are_more() -> None:
    work = Work(ranks={}, batch=4, bits=32, steps=4, extra_steps=2)
    assert [work.told_steps(done) for done in (0, 3, 4, 5, 6)] == [4, 4, 4, 5, 6]


@pytest.mark.parametrize("strategy", ["uniform", "legend", "fedpipe", "fedspine", "fedadapter", "hetlora"])
@pytest.mark.parametrize(
    "told",
    [
        {"step_s": 1.0, "train_s": 5e-324}, {"step_s": 5e-324, "train_s": 0.0}, {"step_s": 1e-200, "train_s": 1e-200},
        {"cores_used": 5e-324}, {"cores_used": 1e15}, {"step_s": 1e15, "train_s": 1e15}, {"step_s": 1e-9, "train_s": 0},
        {"fetch_s": 5e-324}, {"wait_s": 1e-310}, {"step_s": 1e-9, "train_s": 1e-9, "cores_used": 1e-9},
    ],
)  # fmt: skip
def test_no_figures_of_a_device_stop_a_job(strategy: str, told: dict[str, float]) -> None:
    """The smallest and the largest numbers that messages let through."""
    rig, asked = Rig(), spec(rounds={"count": 3})
    rig.open(msgspec.structs.replace(asked, strategy=msgspec.structs.replace(asked.strategy, name=strategy)))
    for number in range(3):
        rig.deliver("dev-a", f"{number + 1:x}" * 64)
        rig.deliver("dev-b", f"{number + 8:x}" * 64, facts=on_the_wire(facts(**told)))
        rig.folded()
    assert rig.job.phase == "exporting"


@pytest.mark.parametrize("flops", [5e-324, 1e-9, 1e15])
def test_no_probe_of_a_device_stops_a_job(flops: float) -> None:
    rig = Rig()
    rig.birth("dev-a")
    rig.birth("dev-b")
    for device in ("dev-a", "dev-b"):
        info = rig.state.fleet[device].info
        assert info is not None
        told = msgspec.to_builtins(msgspec.structs.replace(info, flops=flops, cores=5e-324))
        rig.feed(ev.FromDevice, device=device, message=msgspec.convert(told, DeviceInfo))
    rig.submit(spec(rounds={"count": 3}))
    rig.prepared()
    for number in range(3):
        rig.deliver("dev-a", f"{number + 1:x}" * 64)
        rig.deliver("dev-b", f"{number + 8:x}" * 64)
        rig.folded()
    assert rig.job.phase == "exporting"


def test_a_refused_update_that_is_announced_again_is_written_down_once() -> None:
    rig = Rig()
    rig.open()
    update = rig.manifest("dev-a", A, facts=facts(999))
    settled = [
        one for _ in range(70) for one in of(rig.feed(ev.FromDevice, device="dev-a", message=update), cmd.Settle)
    ]
    assert len(records(rig, rec.UpdateRefused)) == 1
    assert {one.reason for one in settled} == {"999 samples claimed, the work allows 1 to 16"}
    assert len(settled) == 70, "the device hears it each time, or it would go on"


def test_a_device_that_left_is_not_written_down_again_for_what_it_still_sends() -> None:
    rig = Rig()
    rig.open()
    update = rig.manifest("dev-a", A)
    rig.feed(ev.Decommissioned, device="dev-a")
    for _ in range(3):
        commands = rig.feed(ev.FromDevice, device="dev-a", message=update)
        assert [(one.verdict, one.reason) for one in of(commands, cmd.Settle)] == [
            ("refused", "the device left the fleet")
        ]
    assert len(records(rig, rec.UpdateRefused)) == 1


@pytest.mark.parametrize("claims", [{}, {"facts": facts(999)}])
def test_another_update_of_the_same_attempt_ends_the_pull_of_the_first(claims: dict[str, Any]) -> None:
    """Each would hold room that is reserved for it, until none is left for other devices."""
    rig = Rig()
    rig.open()
    rig.feed(ev.FromDevice, device="dev-a", message=rig.manifest("dev-a", A))
    commands = rig.feed(ev.FromDevice, device="dev-a", message=rig.manifest("dev-a", C, **claims))
    assert of(commands, cmd.StopPull) == [cmd.StopPull("dev-a", A)]
    again = rig.feed(ev.FromDevice, device="dev-a", message=rig.manifest("dev-a", C, **claims))
    assert not of(again, cmd.StopPull)


def test_an_old_update_that_is_announced_beside_leaves_the_pull_alone() -> None:
    rig = Rig()
    rig.open()
    rig.feed(ev.FromDevice, device="dev-a", message=rig.manifest("dev-a", A))
    commands = rig.feed(ev.FromDevice, device="dev-a", message=rig.manifest("dev-a", C, round=7))
    assert [one.verdict for one in of(commands, cmd.Settle)] == ["late"]
    assert not of(commands, cmd.StopPull)


def test_a_round_that_closes_ends_what_is_still_being_pulled() -> None:
    rig = Rig()
    rig.open(spec(rounds={"quorum": 0.5}))
    rig.deliver("dev-a", A)
    rig.feed(ev.FromDevice, device="dev-b", message=rig.manifest("dev-b", B))
    rig.now += 101
    commands = rig.feed(ev.Heard, device="dev-a")
    assert rig.job.phase == "folding"
    assert of(commands, cmd.StopPull) == [cmd.StopPull("dev-b", B)]


def test_an_update_is_checked_once_however_often_it_is_announced() -> None:
    """Checks wait for each other, and the fold for them."""
    rig = Rig()
    rig.open()
    update = rig.manifest("dev-a", A)
    checks = []
    for _ in range(5):
        rig.feed(ev.FromDevice, device="dev-a", message=update)
        checks += of(rig.feed(ev.UpdateStored, device="dev-a", sha=A), cmd.CheckUpdate)
    assert len(checks) == 1
    told = {"job": "job-1", "round": 1, "attempt": 1, "device": "dev-a", "sha": A}
    rig.feed(ev.UpdateChecked, **told, reason="")
    assert len(records(rig, rec.UpdateAdmitted)) == 1 and not rig.state.checking


def test_after_a_restart_it_is_checked_again() -> None:
    rig = Rig()
    rig.open()
    for _ in range(2):
        rig.feed(ev.FromDevice, device="dev-a", message=rig.manifest("dev-a", A))
        assert len(of(rig.feed(ev.UpdateStored, device="dev-a", sha=A), cmd.CheckUpdate)) == 1
        rig.restart()
        for device in ("dev-a", "dev-b"):
            rig.birth(device)


@pytest.mark.parametrize("claimed", ["x-999999999", "demo-1.r1-999999999", "demo-1.r1-10001"])
def test_one_device_can_t_use_up_the_numbers_of_releases(claimed: str) -> None:
    number = releases.next_number({}, [ReleaseState(epoch=1, seq=1, release=claimed, active=claimed)])
    assert number == 1
    msgspec.convert(f"demo-1.r1-{number}", ReleaseId)


def test_a_number_that_a_restored_coordinator_has_forgotten_is_passed_over() -> None:
    assert releases.next_number({}, [ReleaseState(epoch=1, seq=1, active="demo-1.r1-17")]) == 18


def test_two_updates_in_turn_are_not_checked_one_after_another() -> None:
    rig = Rig()
    rig.open()
    checks = []
    for sha in (A, C) * 10:
        rig.feed(ev.FromDevice, device="dev-a", message=rig.manifest("dev-a", sha))
        checks += of(rig.feed(ev.UpdateStored, device="dev-a", sha=sha), cmd.CheckUpdate)
    assert len(checks) == 1
    told = {"job": "job-1", "round": 1, "attempt": 1, "device": "dev-a"}
    rig.feed(ev.UpdateChecked, **told, sha=A, reason="")
    assert not records(rig, rec.UpdateAdmitted), "it announced another since"
    rig.feed(ev.FromDevice, device="dev-a", message=rig.manifest("dev-a", C))
    assert len(of(rig.feed(ev.UpdateStored, device="dev-a", sha=C), cmd.CheckUpdate)) == 1
    rig.feed(ev.UpdateChecked, **told, sha=C, reason="")
    assert [one.blob.sha for one in records(rig, rec.UpdateAdmitted)] == [C]


def test_what_is_told_of_an_update_while_it_is_checked_does_not_count() -> None:
    rig = Rig()
    rig.open()
    rig.feed(ev.FromDevice, device="dev-a", message=rig.manifest("dev-a", A))
    rig.feed(ev.UpdateStored, device="dev-a", sha=A)
    rig.feed(ev.FromDevice, device="dev-a", message=rig.manifest("dev-a", A, facts=facts(5)))
    rig.feed(ev.UpdateChecked, job="job-1", round=1, attempt=1, device="dev-a", sha=A, reason="")
    assert [one.facts.samples for one in records(rig, rec.UpdateAdmitted)] == [16]
