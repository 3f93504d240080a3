"""`rounds.sample`: some of the ready devices are drawn; `rounds.target`: the job ends early."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import pytest

from coordinator.core import events as ev
from coordinator.core import records as rec
from coordinator.core.draw import NOT_DRAWN, TRIES, Draw, drawn, plan_over
from coordinator.core.facts import Metrics
from coordinator.core.gate import reached
from coordinator.core.planning.base import Plan
from shared.errors import UserError
from shared.jobs import EvaluationSpec
from shared.messages import Work
from tests.unit.machine_rig import Rig, spec

DEVICES = [f"dev-{number:02d}" for number in range(12)]


def test_the_smallest_hashes_are_drawn() -> None:
    ranks = {device: hashlib.sha256(f"7/3/1/{device}".encode()).digest() for device in DEVICES}
    assert drawn(DEVICES, 4, Draw(7, 3, 1)) == sorted(sorted(DEVICES, key=lambda device: ranks[device])[:4])


def test_all_are_taken_without_a_sample_or_with_fewer_devices() -> None:
    assert drawn(DEVICES[::-1], 0, Draw(1, 1, 1)) == DEVICES
    assert drawn(DEVICES[:3], 5, Draw(1, 1, 1)) == DEVICES[:3]


def test_a_device_that_leaves_moves_one_place() -> None:
    before = drawn(DEVICES, 5, Draw(0, 1, 1))
    after = drawn([device for device in DEVICES if device != before[0]], 5, Draw(0, 1, 1))
    assert set(before[1:]) < set(after) and len(after) == 5


def test_every_device_is_drawn_now_and_then() -> None:
    seen = {device for round in range(1, 40) for device in drawn(DEVICES, 3, Draw(0, round, 1))}
    assert seen == set(DEVICES)


def test_the_plan_is_over_the_drawn_devices_and_says_so() -> None:
    rig = Rig()
    rig.open(spec(rounds={"sample": 3, "min_devices": 6}), devices=tuple(DEVICES[:6]))
    planned = next(record for record in rig.log if isinstance(record, rec.RoundPlanned))
    assert sorted(planned.plan.participants) == drawn(DEVICES[:6], 3, Draw(0, 1, 1))
    assert "3 of 6 ready devices were drawn" in planned.plan.reason
    assert sorted(d for d, why in planned.plan.left_out.items() if why == NOT_DRAWN) == sorted(
        set(DEVICES[:6]) - set(planned.plan.participants)
    )
    assert planned.infos.keys() == planned.loads.keys() == planned.load_ages.keys() == planned.plan.participants.keys()
    rig.restart()
    assert rig.job.round is not None and sorted(rig.job.round.participants) == sorted(planned.plan.participants)


def _plan(taken: Sequence[str], unable: set[str]) -> Plan:
    able = [device for device in taken if device not in unable]
    if not able:
        raise UserError("nobody can")
    works = {device: Work(ranks={}, batch=1, bits=32, steps=1) for device in able}
    left_out = {device: "no data" for device in taken if device in unable}
    return Plan(participants=works, deadline_s=1.0, reason="planned", left_out=left_out)


@pytest.mark.parametrize("sample", [1, 3])
def test_in_the_place_of_those_who_cannot_others_are_drawn(sample: int) -> None:
    draw = Draw(0, 1, 1)
    unable = set(drawn(DEVICES, sample, draw))
    plan = plan_over(DEVICES, sample, draw, lambda taken: _plan(taken, unable))
    assert len(plan.participants) == sample and not unable & plan.participants.keys()
    assert {device for device, why in plan.left_out.items() if why != NOT_DRAWN} == unable


def test_where_all_are_tried_in_vain_the_reason_is_the_planners() -> None:
    calls: list[Sequence[str]] = []

    def make(taken: Sequence[str]) -> Plan:
        calls.append(taken)
        raise UserError("nobody can")

    with pytest.raises(UserError, match="nobody can"):
        plan_over(DEVICES, 1, Draw(0, 1, 1), make)
    assert len(calls) == TRIES
    with pytest.raises(UserError, match="nobody can"):
        plan_over(DEVICES, 0, Draw(0, 1, 1), make)


def test_a_round_that_is_repeated_draws_others() -> None:
    assert drawn(DEVICES, 3, Draw(0, 1, 1)) != drawn(DEVICES, 3, Draw(0, 1, 2))


def test_a_round_waits_until_enough_devices_are_ready_to_draw_from() -> None:
    rig = Rig()
    for device in DEVICES[:5]:
        rig.birth(device)
    rig.submit(spec(rounds={"sample": 3, "min_devices": 6}))
    rig.prepared()
    assert rig.job.phase == "waiting"
    rig.birth(DEVICES[5])
    assert rig.job.phase == "open"


@pytest.mark.parametrize(
    ("metrics", "target", "said"),
    [
        (Metrics(loss=1.0, rows=9, accuracy=0.9), 0.9, "accuracy 0.9 reaches the target 0.9"),
        (Metrics(loss=0.1, rows=9, accuracy=0.89), 0.9, ""),
        (Metrics(loss=1.5, rows=9), 1.5, "loss 1.5 reaches the target 1.5"),
        (Metrics(loss=1.51, rows=9), 1.5, ""),
        (Metrics(loss=0.0, rows=9, accuracy=1.0), 0.0, ""),
        (None, 0.5, ""),
    ],
)
def test_a_target_is_reached(metrics: Metrics | None, target: float, said: str) -> None:
    assert reached(metrics, target) == said


def _round(rig: Rig, loss: float) -> None:
    rig.deliver("dev-a", "a" * 63 + str(rig.job.committed))
    rig.deliver("dev-b", "b" * 63 + str(rig.job.committed))
    rig.folded()
    rig.evaluated(loss)


def _judged(target: float, count: int) -> Rig:
    rig = Rig()
    for device in ("dev-a", "dev-b"):
        rig.birth(device)
    rounds = {"count": count, "target": target}
    rig.submit(spec(rounds=rounds, evaluation=EvaluationSpec(data="held-out", worse_by=0.5)))
    rig.prepared()
    rig.evaluated(2.0, round=0)
    return rig


def test_a_job_ends_with_the_round_that_reaches_the_target() -> None:
    rig = _judged(1.0, 9)
    _round(rig, 1.2)
    assert rig.job.phase == "open"
    _round(rig, 0.95)
    assert rig.job.phase == "exporting" and rig.job.committed == 2
    committed = [record for record in rig.log if isinstance(record, rec.RoundCommitted)]
    assert "target" not in committed[0].reason and "reaches the target 1: the last round" in committed[1].reason
    rig.restart()
    assert rig.job.phase == "exporting"
    rig.feed(ev.Exported, job=rig.job.id, path="somewhere")
    assert rig.job.phase == "finished"


def test_without_a_target_all_rounds_are_done() -> None:
    rig = _judged(0.0, 2)
    _round(rig, 0.0)
    assert rig.job.phase == "open"
    _round(rig, 0.0)
    assert rig.job.phase == "exporting"
