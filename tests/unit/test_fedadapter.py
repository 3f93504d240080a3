"""`fedadapter`: the rule of growth, trial groups, what a round teaches, reasons; and a replay of the log's records."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from coordinator.core import records as rec
from coordinator.core import strategies
from coordinator.core.aggregation import registry as aggregators
from coordinator.core.facts import ModelFacts, ModuleSpec
from coordinator.core.job import Job, apply
from coordinator.core.planning import registry
from coordinator.core.planning.base import FleetView, Plan, Planner, RoundReport
from coordinator.core.planning.demand import demand
from coordinator.core.planning.digest import plan_digest
from coordinator.core.planning.fedadapter import FedAdapterPlanner, common_seconds, shape_of, widths
from coordinator.core.planning.progressive import Limits, Progress, Shape, candidates, fastest
from coordinator.core.planning.reasons import PATTERN
from shared.codec import pack, unpack
from shared.errors import UserError
from shared.jobs import JobSpec, StrategySpec, TaskSpec
from shared.messages import BlobRef
from tests.unit.planning_cases import Candidate, device, job, minilm, result

LIMITS = Limits(depth=6, width=64)


def shape(depth: int, width: int) -> Shape:
    return Shape(depth=depth, width=width)


# ---- the rule


def test_it_begins_small_and_within_the_limits() -> None:
    assert Progress().at(LIMITS, 8) == shape(2, 8)
    assert Progress().at(Limits(depth=1, width=4), 8) == shape(1, 4)


@pytest.mark.parametrize(
    ("limits", "present", "further"),
    [
        (LIMITS, shape(2, 8), [shape(3, 8), shape(2, 16)]),
        (Limits(depth=24, width=64), shape(2, 8), [shape(6, 8), shape(2, 16)]),
        (LIMITS, shape(6, 8), [shape(6, 16)]),
        (LIMITS, shape(5, 48), [shape(6, 48), shape(5, 64)]),
        (LIMITS, shape(4, 64), [shape(5, 64)]),
        (LIMITS, shape(6, 64), []),
    ],
)
def test_the_next_deeper_and_the_next_wider(limits: Limits, present: Shape, further: list[Shape]) -> None:
    assert candidates(present, limits) == [present, *further]


@pytest.mark.parametrize(
    ("losses", "stalled"),
    [
        ([1.0, 1.0, 1.0], False),  # three rounds make no window of three
        ([1.0, 0.9, 0.9, 0.98], True),  # 2 % in three rounds
        ([1.0, 0.99, 0.98, 0.97], False),  # 3 %
        ([2.0, 1.0, 1.0, 0.99, 0.98], True),  # the last three alone
        ([1.0, 1.1, 1.2, 1.3], True),
    ],
)
def test_when_progress_stalls(losses: list[float], stalled: bool) -> None:
    progress = Progress()
    for loss in losses:
        progress = progress.seen(loss)
    assert progress.stalled == stalled
    assert not progress.decided(shape(2, 8)).stalled and progress.decided(shape(2, 8)).losses == []


def test_without_a_trial_depth_and_width_grow_in_turn() -> None:
    progress, found = Progress(), []
    for _ in range(9):
        progress = progress.grown(progress.at(LIMITS, 8), LIMITS)
        assert progress.shape is not None
        found.append((progress.shape.depth, progress.shape.width))
    assert found == [(3, 8), (3, 16), (4, 16), (4, 32), (5, 32), (5, 64), (6, 64), (6, 64), (6, 64)]


def test_the_fastest_wins_and_the_smaller_of_equals() -> None:
    assert fastest({shape(2, 8): 0.1, shape(3, 8): 0.3, shape(2, 16): 0.2}) == shape(3, 8)
    assert fastest({shape(3, 8): 0.1, shape(2, 16): 0.1, shape(2, 8): 0.1}) == shape(2, 8)
    assert fastest({shape(2, 8): -0.2, shape(3, 8): -0.1}) == shape(3, 8)


# ---- the planner


def blocks() -> ModelFacts:
    """MiniLM's six blocks."""
    modules = [ModuleSpec(name=f"layer.{block}", out=384, inp=384, block=block) for block in range(6)]
    return replace(minilm(), modules=modules, largest=384 * 1536)


def spec() -> JobSpec:
    made = job()
    return replace(made, strategy=replace(made.strategy, name="fedadapter"))


FLEET = tuple(device(name, cores=cores) for name, cores in zip("abcdef", (4.0, 2.0, 1.0, 1.0, 0.5, 0.5), strict=True))


def planned(planner: Planner, fleet: tuple[Candidate, ...] = FLEET, round: int = 1) -> Plan:
    return planner.plan(FleetView(round=round, candidates=fleet, facts=blocks()), spec())


def shapes_of(plan: Plan) -> dict[str, tuple[int, int]]:
    found = {name: shape_of(work.ranks) for name, work in plan.participants.items()}
    return {name: (one.depth, one.width) for name, one in found.items()}


def after(planner: Planner, plan: Plan, falls: dict[tuple[int, int], float], loss: float = 1.0) -> Planner:
    """`planner` after a round in which each group's loss fell by so much from `loss`."""
    results = {
        name: replace(
            result(batch=work.batch, step_s=0.1, cores_used=1.0), loss_first=loss,
            loss_last=loss - falls[shapes_of(plan)[name]],
        )
        for name, work in plan.participants.items()
    }  # fmt: skip
    loads = {one.device: one.load for one in FLEET if one.load}
    return planner.learn(
        RoundReport(round=1, works=plan.participants, results=results, loads=loads, facts=blocks(), job=spec())
    )


def stalled(planner: Planner, fleet: tuple[Candidate, ...] = FLEET) -> tuple[Planner, Plan]:
    """Four rounds without progress, and the next plan."""
    for _ in range(4):
        plan = planned(planner, fleet)
        assert len(set(shapes_of(plan).values())) == 1
        planner = after(planner, plan, dict.fromkeys(shapes_of(plan).values(), 0.0))
    return planner, planned(planner, fleet)


def test_the_first_rounds_tune_the_top_two_blocks_everywhere() -> None:
    plan = planned(registry.create(StrategySpec(name="fedadapter")))
    assert all(work.ranks == {"layer.4": 8, "layer.5": 8} for work in plan.participants.values())
    told = plan.participants["a"].reasons["rank"]
    assert told == "rank 8: width 8 in the top 2 blocks, all devices alike meets width 64 and 6 blocks at most"
    assert [plan.participants[name].batch for name in "abcdef"] == [16] * 6


def test_a_stall_leads_to_a_trial_whose_fastest_group_is_followed() -> None:
    planner, trial = stalled(FedAdapterPlanner())
    # Dealt out from the fastest to the slowest, which were measured alike but for the cores.
    assert sorted(shapes_of(trial).values()) == [(2, 8)] * 2 + [(2, 16)] * 2 + [(3, 8)] * 2
    assert "a trial of (depth 2, width 8), (depth 3, width 8), (depth 2, width 16)" in trial.reason
    for falls, winner in (
        ({(2, 8): 0.1, (3, 8): 0.4, (2, 16): 0.2}, (3, 8)),
        ({(2, 8): 0.1, (3, 8): 0.1, (2, 16): 0.3}, (2, 16)),
        # Equal falls: the smaller one takes less time.
        ({(2, 8): 0.1, (3, 8): 0.1, (2, 16): 0.1}, (2, 8)),
    ):
        learned = after(planner, trial, falls)
        plan = planned(learned)
        assert set(shapes_of(plan).values()) == {winner}
        # No new trial before a window of losses has been seen.
        _, again = stalled(learned)
        assert len(set(shapes_of(again).values())) == 3


def test_deeper_takes_longer_so_it_must_fall_by_more() -> None:
    planner, trial = stalled(FedAdapterPlanner())
    assert isinstance(planner, FedAdapterPlanner)
    slow, fast = (common_seconds(shape(depth, 8), blocks(), spec(), planner.model) for depth in (3, 2))
    flops = [demand(blocks(), spec(), widths(shape(depth, 8), blocks())).flop for depth in (3, 2)]
    assert 1.0 < slow / fast <= flops[0] / flops[1] * 1.0001
    for factor, winner in ((0.99, (2, 8)), (1.01, (3, 8))):
        falls = {(2, 8): 0.1, (3, 8): 0.1 * factor * slow / fast, (2, 16): 0.0}
        assert set(shapes_of(planned(after(planner, trial, falls))).values()) == {winner}


def test_a_fleet_smaller_than_the_groups_grows_without_a_trial() -> None:
    fleet = FLEET[:2]
    planner, plan = stalled(FedAdapterPlanner(), fleet)
    assert set(shapes_of(plan).values()) == {(3, 8)}
    _, plan = stalled(planner, fleet)
    assert set(shapes_of(plan).values()) == {(3, 16)}


def test_progress_keeps_the_configuration() -> None:
    planner: Planner = FedAdapterPlanner()
    for loss in (2.0, 1.8, 1.6, 1.4, 1.3, 1.2):
        plan = planned(planner)
        assert set(shapes_of(plan).values()) == {(2, 8)}
        planner = after(planner, plan, {(2, 8): 0.1}, loss)


def test_a_device_that_can_not_hold_the_trial_stays_with_the_present_one() -> None:
    small = tuple(device(name, cores=1.0, memory=465) for name in "abc")
    wide = replace(spec(), strategy=replace(spec().strategy, rank=300, global_rank=4096, batch=1))
    view = FleetView(round=1, candidates=small, facts=blocks())
    planner = FedAdapterPlanner(progress=Progress(losses=[1.0] * 4))
    plan = planner.plan(view, wide)
    assert shapes_of(plan) == {"a": (2, 300), "b": (2, 300), "c": (2, 384)}
    told = plan.participants["b"].reasons["rank"]
    assert told.endswith("the trial of depth 3, width 300 would leave memory for 16 bits only, this leaves it for 32")
    assert PATTERN.fullmatch(told) and {work.bits for work in plan.participants.values()} == {32}


def test_every_reason_is_in_the_form_of_the_house() -> None:
    planner, trial = stalled(FedAdapterPlanner())
    for plan in (planned(FedAdapterPlanner()), trial, planned(after(planner, trial, dict.fromkeys(
        shapes_of(trial).values(), 0.2)))):  # fmt: skip
        for work in plan.participants.values():
            assert set(work.reasons) == {"rank", "batch", "bits", "steps"}
            for name, reason in work.reasons.items():
                match = PATTERN.fullmatch(reason)
                assert match and match["name"] == name, reason
                assert any(c.isdigit() for c in match["reading"]) and any(c.isdigit() for c in match["bound"])
            assert int(PATTERN.fullmatch(work.reasons["rank"])["value"]) == max(work.ranks.values())  # type: ignore[index]  # it matched


def test_growth_is_replayed_from_the_reports_and_survives_the_disk() -> None:
    planner, trial = stalled(FedAdapterPlanner())
    grown = after(planner, trial, {(2, 8): 0.1, (3, 8): 0.4, (2, 16): 0.2})
    again, same = stalled(FedAdapterPlanner())
    assert after(again, same, {(2, 8): 0.1, (3, 8): 0.4, (2, 16): 0.2}) == grown
    back = unpack(pack(grown), FedAdapterPlanner)
    assert back == grown and planned(back) == planned(grown)


def committed(job_id: str, plan: Plan, number: int, falls: dict[tuple[int, int], float]) -> list[rec.AnyRecord]:
    """The log's records of a round in which each group's loss fell by so much."""
    blob = BlobRef(sha="a" * 64, size=1)
    loads = {one.device: one.load for one in FLEET if one.load}
    found: list[rec.AnyRecord] = [
        rec.RoundPlanned(
            job=job_id, round=number, attempt=1, plan=plan, digest=plan_digest(plan), loads=loads, ts=0.0
        )
    ]  # fmt: skip
    for name, work in sorted(plan.participants.items()):
        facts = result(batch=work.batch, step_s=0.1, cores_used=1.0)
        facts = replace(facts, loss_first=1.0, loss_last=1.0 - falls[shapes_of(plan)[name]])
        found.append(rec.UpdateAdmitted(job=job_id, round=number, attempt=1, device=name, blob=blob, facts=facts))
    return [
        *found, rec.RoundClosed(job=job_id, round=number, devices=sorted(plan.participants), reason="all"),
        rec.RoundFolded(job=job_id, round=number, adapter=blob),
        rec.RoundCommitted(job=job_id, round=number, accepted=True, reason="", metrics=None, ts=0.0),
    ]  # fmt: skip


def test_a_restart_finds_the_growth_in_the_event_log() -> None:
    asked = replace(spec(), rounds=replace(spec().rounds, count=9))
    records: list[rec.AnyRecord] = [
        rec.JobSubmitted(job="j", spec=asked, ts=0.0), rec.JobStarted(job="j"),
        rec.JobPrepared(job="j", facts=blocks(), adapter=BlobRef(sha="b" * 64, size=1)),
    ]  # fmt: skip
    live: Job | None = None
    for record in records:
        live = apply(live, record)
    found = []
    falls = {(2, 8): 0.0, (3, 8): 0.4, (2, 16): 0.2}
    for number in range(1, 7):
        assert live is not None
        plan = planned(live.planner, round=number)
        found.append(sorted(set(shapes_of(plan).values())))
        # Through its bytes, as the log keeps it.
        for record in committed("j", plan, number, falls):
            back = unpack(pack(record), type(record))
            records.append(back)
            live = apply(live, back)
    assert found == [[(2, 8)]] * 4 + [[(2, 8), (2, 16), (3, 8)], [(3, 8)]]
    again: Job | None = None
    for record in records:
        again = apply(again, record)
    assert again is not None and live is not None and again.planner == live.planner
    assert planned(again.planner, round=7) == planned(live.planner, round=7)


def test_a_round_without_results_teaches_nothing() -> None:
    planner, trial = stalled(FedAdapterPlanner())
    assert isinstance(planner, FedAdapterPlanner)
    learned = planner.learn(RoundReport(round=5, works=trial.participants, results={}, facts=blocks(), job=spec()))
    assert learned.progress == planner.progress
    assert shapes_of(planned(learned)) == shapes_of(trial)


# ---- faults


def test_what_a_job_of_fedadapter_may_ask() -> None:
    assert strategies.job_faults(spec()) == []
    least = replace(spec(), task=TaskSpec(kind="least_squares", dataset="points"))
    assert strategies.job_faults(least) == [
        "task.kind: least_squares has no transformer block to put a bottleneck adapter into"
    ]
    named = replace(spec(), base=replace(spec().base, targets=["query"]))
    assert strategies.job_faults(named) == ["base.targets: fedadapter chooses what is tuned by itself; leave it empty"]
    (fault,) = strategies.faults(StrategySpec(name="fedadapter", aggregator="fsr"))
    assert fault == "strategy.aggregator: fsr can't fold what fedadapter trains"
    assert aggregators.create(StrategySpec(name="fedadapter")).name == "bottleneck"
    with pytest.raises(UserError, match="no device can do job"):
        planned(FedAdapterPlanner(), (device("a", bits=()),))
