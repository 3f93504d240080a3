"""Several agents that the session takes for one: pure, message by message."""

from __future__ import annotations

from typing import Any

import pytest
from msgspec.structs import replace

from edge_daemon import protocol
from edge_daemon.core import team as crew
from edge_daemon.core.team import CPU, Team, Turn, assemble, hear, tell
from shared.jobs import Bits
from tests.unit.session_rig import assignment, facts

PROBE = protocol.Probe(datasets={"points": "points.jsonl"}, threads=5)


def probed(*bits: Bits, **values: Any) -> protocol.Probed:
    return protocol.Probed(bits=list(bits), **values)


def ready(*gpus: str) -> Team:
    """A team whose agents all proved 32 and 8 bits."""
    team = assemble(PROBE, gpus).team
    for index in range(len(gpus)):
        team = hear(team, index, probed(32, 8)).team
    return team


def order(agents: int = 2) -> protocol.Train:
    wanted = assignment()
    wanted = replace(wanted, work=replace(wanted.work, agents=agents))
    return protocol.Train(
        assignment=wanted, base_path="b", data_path="d", adapter_path="g", update_path="w/update.adapter",
        checkpoint_dir="w",
    )  # fmt: skip


def trained(**values: Any) -> protocol.Trained:
    return protocol.Trained(job="job-1", round=1, attempt=1, sha="e" * 64, size=9, facts=facts(**values))


def failed(kind: Any, batch_limit: int = 0) -> protocol.Failed:
    return protocol.Failed(job="job-1", round=1, attempt=1, kind=kind, reason=kind, batch_limit=batch_limit)


def told(turn: Turn) -> dict[int, protocol.ToAgent]:
    assert len({index for index, _ in turn.orders}) == len(turn.orders)
    return dict(turn.orders)


# ---- beginning


def test_agents_share_the_threads_and_one_describes_the_data() -> None:
    probes = told(assemble(PROBE, ["GPU-1", "GPU-2"]))
    assert [probe.gpu for probe in probes.values() if isinstance(probe, protocol.Probe)] == ["GPU-1", "GPU-2"]
    assert probes[0] == replace(PROBE, gpu="GPU-1", threads=2)
    assert probes[1] == replace(PROBE, gpu="GPU-2", threads=2, datasets={})


@pytest.mark.parametrize("gpus", [[], [CPU]])
def test_a_device_without_a_gpu_has_one_agent_on_the_cpu(gpus: list[str]) -> None:
    assert told(assemble(PROBE, gpus)) == {0: PROBE}


def test_what_all_have_proven_is_offered() -> None:
    team = hear(
        assemble(PROBE, ["GPU-1", "GPU-2"]).team, 1, probed(32, 16, hardware="L4", agent_bytes=7, flops=2e12)
    ).team
    said = hear(team, 0, probed(32, 8, hardware="L4", agent_bytes=5, flops=3e12)).said
    assert isinstance(said, protocol.Probed)
    assert (said.bits, said.agents, said.agent_bytes, said.hardware) == ([32], 2, 7, "2 x L4")
    assert said.flops == 2e12, "of the slower one"


def test_a_gpu_that_can_do_nothing_is_left_out_and_named() -> None:
    team = hear(assemble(PROBE, ["GPU-1", "GPU-2"]).team, 0, probed(notes={"gpu": "gone"})).team
    turn = hear(team, 1, probed(32, 8))
    assert isinstance(turn.said, protocol.Probed)
    assert (turn.said.bits, turn.said.agents, turn.said.notes) == ([32, 8], 1, {"gpu": "gone"})
    assert told(tell(turn.team, order())) == {1: order()}, "one that works gets the order as it is"


# ---- work


def test_each_agent_gets_its_part_in_a_folder_of_its_own() -> None:
    orders = told(tell(ready("GPU-1", "GPU-2", "GPU-3"), order()))
    assert sorted(orders) == [0, 1], "the work is for two"
    for part, given in orders.items():
        assert isinstance(given, protocol.Train)
        assert (given.part, given.parts) == (part, 2)
        assert (given.checkpoint_dir, given.update_path) == (f"w/part-{part}", f"w/part-{part}/update.adapter")


def test_the_first_merges_what_all_trained() -> None:
    team = tell(ready("GPU-1", "GPU-2"), order()).team
    turn = hear(team, 1, trained(samples=10, loss_last=3.0, train_s=9.0, steps=7, peak_bytes=1, cores_used=1.0))
    assert turn.said is None
    assert not turn.orders
    quick = trained(samples=30, loss_last=1.0, train_s=2.0, peak_bytes=5, cores_used=2.0, ended="time")
    turn = hear(turn.team, 0, quick)
    merge = told(turn)[0]
    assert isinstance(merge, protocol.Merge)
    assert [(part.update_path, part.samples) for part in merge.partials] == [
        ("w/part-0/update.adapter", 30), ("w/part-1/update.adapter", 10)
    ]  # fmt: skip
    assert (merge.update_path, merge.adapter_path) == ("w/update.adapter", "g")
    said = hear(turn.team, 0, protocol.Merged(sha="f" * 64, size=99, norm=2.5)).said
    assert isinstance(said, protocol.Trained)
    assert (said.sha, said.size) == ("f" * 64, 99)
    whole = said.facts
    assert (whole.samples, whole.agents, whole.norm, whole.loss_last) == (40, 2, 2.5, 1.5)
    assert (whole.train_s, whole.steps, whole.peak_bytes, whole.cores_used, whole.ended) == (9.0, 7, 5, 1.5, "time")


def test_the_slowest_is_whose_steps_take_longest_not_who_did_most_of_them() -> None:
    fast, slow = facts(steps=10, train_s=10.0, step_s=1.0), facts(steps=8, train_s=9.6, step_s=1.2)
    for parts in ([fast, slow], [slow, fast]):
        whole = crew.combine(parts)
        assert (whole.steps, whole.train_s, whole.step_s) == (8, 9.6, 1.2)


def test_importance_is_the_mean_over_the_agents_that_scored() -> None:
    parts = [
        facts(samples=30, importance={"q": 0.8, "v": 0.2}), facts(samples=10, importance={"q": 0.4, "o": 0.6}),
        facts(samples=500),
    ]  # fmt: skip
    assert crew.combine(parts).importance == pytest.approx({"q": 0.7, "v": 0.15, "o": 0.15})
    assert crew.combine(parts[2:]).importance == {}


def test_what_some_could_not_do_counts_with_what_the_others_did() -> None:
    turn = hear(tell(ready("GPU-1", "GPU-2"), order()).team, 0, failed("memory"))
    turn = hear(turn.team, 1, trained(samples=10))
    merge = told(turn)[1]
    assert isinstance(merge, protocol.Merge)
    assert [part.update_path for part in merge.partials] == ["w/part-1/update.adapter"]
    said = hear(turn.team, 1, protocol.Merged(sha="f" * 64, size=9, norm=1.0)).said
    assert isinstance(said, protocol.Trained)
    assert (said.facts.agents, said.facts.samples) == (1, 10)


def test_the_batch_that_did_not_fit_one_is_told_of_all() -> None:
    turn = hear(tell(ready("GPU-1", "GPU-2"), order()).team, 0, failed("memory", 2))
    turn = hear(turn.team, 1, trained(batch_limit=4))
    said = hear(turn.team, 1, protocol.Merged(sha="f" * 64, size=9, norm=1.0)).said
    assert isinstance(said, protocol.Trained)
    assert said.facts.batch_limit == 2
    turn = hear(tell(ready("GPU-1", "GPU-2"), order()).team, 0, failed("memory", 0))
    turn = hear(turn.team, 1, trained())
    said = hear(turn.team, 1, protocol.Merged(sha="f" * 64, size=9, norm=1.0)).said
    assert isinstance(said, protocol.Trained)
    assert said.facts.batch_limit == 1, "0 would say that there is no limit"


def test_only_those_at_work_are_told_to_rest_and_to_stop() -> None:
    turn = hear(tell(ready("a", "b"), order()).team, 0, trained())
    assert told(tell(turn.team, protocol.Pause())) == {1: protocol.Pause()}
    assert told(tell(turn.team, protocol.Resume())) == {1: protocol.Resume()}
    merging = hear(turn.team, 1, trained())
    stop = tell(merging.team, protocol.Stop())
    assert told(stop) == {0: protocol.Stop()}
    said = hear(stop.team, 0, protocol.Merged(sha="f" * 64, size=9, norm=1.0)).said
    assert isinstance(said, protocol.Trained), "what is merged already counts"


def test_what_a_data_set_lacks_keeps_its_name() -> None:
    team = hear(assemble(PROBE, ["a", "b"]).team, 0, probed(32, notes={"points": "no such file"})).team
    said = hear(team, 1, probed(32, notes={"8": "inexact"})).said
    assert isinstance(said, protocol.Probed)
    assert said.notes == {"points": "no such file", "b: 8": "inexact"}


def test_of_failures_the_lack_of_memory_is_told_with_the_smallest_batch() -> None:
    turn = tell(ready("a", "b", "c"), order(3))
    for index, failure in enumerate([failed("internal"), failed("memory", 4), failed("memory", 2)]):
        turn = hear(turn.team, index, failure)
    assert turn.said == failed("memory", 2)
    assert all(member.answer is None and not member.busy for member in turn.team.members)


def test_a_failed_merge_fails_the_work() -> None:
    turn = hear(tell(ready("a", "b"), order()).team, 0, trained())
    turn = hear(turn.team, 1, trained())
    assert hear(turn.team, 0, failed("internal")).said == failed("internal")


def test_discarded_work_is_not_merged() -> None:
    turn = hear(tell(ready("a", "b"), order()).team, 0, trained())
    turn = tell(turn.team, protocol.Stop(discard=True))
    assert sorted(told(turn)) == [1], "who is through has nothing to stop"
    turn = hear(turn.team, 1, failed("stopped"))
    assert isinstance(turn.said, protocol.Failed)
    assert (turn.said.kind, turn.orders) == ("stopped", [])


def test_work_that_all_finished_before_they_heard_of_the_discard_ends_as_stopped() -> None:
    turn = tell(tell(ready("a", "b"), order()).team, protocol.Stop(discard=True))
    turn = hear(hear(turn.team, 0, trained()).team, 1, trained())
    assert isinstance(turn.said, protocol.Failed)
    assert (turn.said.kind, turn.orders) == ("stopped", [])


# ---- signs of life


def test_a_sign_of_life_is_passed_on_once_all_at_work_gave_one() -> None:
    turn = tell(ready("a", "b"), order())
    for _ in range(3):
        turn = hear(turn.team, 0, protocol.Beat())
        assert turn.said is None
    turn = hear(turn.team, 1, protocol.Beat())
    assert turn.said == protocol.Beat(what="working")
    assert hear(turn.team, 1, protocol.Beat()).said is None


def test_who_is_through_is_not_waited_for() -> None:
    turn = hear(tell(ready("a", "b"), order()).team, 0, trained())
    assert isinstance(hear(turn.team, 1, protocol.Beat()).said, protocol.Beat)


def test_progress_is_that_of_all_together() -> None:
    step = protocol.Progressed(step=3, steps=8, samples=12, loss=1.0, samples_per_s=4.0)
    turn = hear(tell(ready("a", "b"), order()).team, 0, step)
    turn = hear(turn.team, 1, replace(step, step=2, samples=8, loss=3.0, samples_per_s=2.0))
    assert turn.said == protocol.Progressed(step=2, steps=8, samples=20, loss=2.0, samples_per_s=6.0)


def test_old_progress_is_not_told_again_while_all_rest() -> None:
    step = protocol.Progressed(step=3, steps=8, samples=12, loss=1.0, samples_per_s=4.0)
    turn = hear(tell(ready("a"), order(1)).team, 0, step)
    assert isinstance(turn.said, protocol.Progressed)
    turn = hear(turn.team, 0, protocol.Beat(what="paused"))
    assert isinstance(turn.said, protocol.Beat)


def test_nobody_orders_the_team_what_is_its_own_business() -> None:
    with pytest.raises(TypeError):
        crew.tell(ready("a"), PROBE)


# ---- releases


def test_one_agent_tries_a_release_and_its_signs_of_life_are_enough() -> None:
    team = assemble(PROBE, ["GPU-1", "GPU-2"]).team
    team = hear(team, 0, probed()).team
    team = hear(team, 1, probed(32)).team
    order = protocol.Evaluate(
        release="job-1.r1-1", folder="f", kind="lora", task=assignment().task, base=assignment().base, base_path="b",
        base_digest="d", bits=32,
    )  # fmt: skip
    turn = tell(team, order)
    assert told(turn) == {1: order}, "the one that has proven something"
    turn = hear(turn.team, 1, protocol.Beat(what="evaluating"))
    assert turn.said == protocol.Beat(what="working")
    pause = tell(turn.team, protocol.Pause(reason="heat"))
    assert told(pause) == {1: protocol.Pause(reason="heat")}
    done = protocol.Evaluated(release="job-1.r1-1")
    turn = hear(turn.team, 1, done)
    assert turn.said == done
    assert not any(member.busy for member in turn.team.members)
    unfit = protocol.Unfit(release="job-1.r1-1", kind="load", reason="because")
    assert hear(tell(turn.team, order).team, 1, unfit).said == unfit
