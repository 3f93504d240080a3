"""What each number in the notes of a reason must be."""

from __future__ import annotations

import math
from collections.abc import Callable

from tests.unit.reason_checks import judged
from tests.unit.reason_plans import LEFT_OUT, check_refused, matched
from tests.unit.reason_scene import ONE_BATCH, Said, Spot, close, close_mib, close_s, equal
from tests.unit.second import fedpipe, legend
from tests.unit.second.costs import MIB, Need, need_of, tuned
from tests.unit.second.seats import fits, held, limit_of, moved, sizes_of, transfer, usual_link


def _old(spot: Spot, said: Said) -> None:
    """Why the reading is not to be trusted."""
    record = spot.scene.planned.record
    assert spot.seat.careful
    if spot.device not in record.loads:
        assert "unheard" in said
    else:
        close(said["age"], record.load_ages[spot.device])
        equal(said["fresh"], record.fresh_s)
        assert record.load_ages[spot.device] > record.fresh_s


def clipped(spot: Spot, said: Said) -> None:
    wanted, modules = (
        spot.reason.value,
        [one for one in tuned(spot.scene.facts, spot.job) if one.name in spot.work.ranks],
    )
    by_block = dict(enumerate(spot.round.chosen.by_block)) if spot.round.name == "legend" else {}
    equal(said["clipped"], sum(spot.work.ranks[one.name] < by_block.get(one.block, wanted) for one in modules))


def least_rank(spot: Spot, said: Said) -> None:
    assert spot.reason.verb == "exceeds" and spot.reason.value == min(2, spot.job.strategy.rank)


def _of_rank(spot: Spot, rank: int) -> Need:
    ranks = {one.name: min(rank, one.out, one.inp) for one in tuned(spot.scene.facts, spot.job)}
    return need_of(spot.scene.facts, spot.job, ranks, spot.round.bound)


def _fits_rank(spot: Spot, rank: int, bits: int) -> bool:
    return fits(spot.scene, spot.seat, _of_rank(spot, rank), bits, min(sizes_of(spot.job)[0], spot.seat.rows))


def _larger(spot: Spot, said: Said) -> int:
    """The rank above, which memory does not hold at these bits."""
    larger = int(said["larger"])
    assert larger in (2 * spot.reason.value, spot.job.strategy.rank) and larger > spot.reason.value
    return larger


def rank_by_bits(spot: Spot, said: Said) -> None:
    larger, fewer = _larger(spot, said), int(said["fewer"])
    assert (int(said["bits"]), int(said["rank"])) == (spot.work.bits, spot.reason.value) and fewer < spot.work.bits
    assert _fits_rank(spot, larger, fewer)
    assert not _fits_rank(spot, larger, spot.work.bits) or spot.seat.careful
    assert _fits_rank(spot, spot.reason.value, spot.work.bits)


def rank_by_memory(spot: Spot, said: Said) -> None:
    larger = _larger(spot, said)
    kind, refused = matched(LEFT_OUT, said["refused"], said["refused"])
    assert kind == "memory"
    check_refused(spot.round, spot.seat, _of_rank(spot, larger), refused)
    assert not any(_fits_rank(spot, larger, bits) for bits in _allowed(spot))


def nothing_measured(spot: Spot, said: Said) -> None:
    assert not spot.scene.fleet.known


def not_measured_itself(spot: Spot, said: Said) -> None:
    known = spot.scene.fleet.known.get(spot.device)
    assert spot.scene.fleet.known and (known is None or not known.speeds)


def _trial_fits(spot: Spot, said: Said, bits: int) -> bool:
    """Whether memory holds the trial, a larger shape than the one that is trained."""
    depth, width = int(said["depth"]), int(said["width"])
    assert depth * width > len(spot.work.ranks) * spot.reason.value
    modules = sorted(spot.scene.facts.modules, key=lambda one: one.block)[-depth:]
    need = need_of(spot.scene.facts, spot.job, dict.fromkeys((one.name for one in modules), width))
    return fits(spot.scene, spot.seat, need, bits, _least(spot))


def _least(spot: Spot) -> int:
    """The batch that bits are chosen for: the smallest, of rivals the one that they train with."""
    return spot.work.batch if spot.round.name in ONE_BATCH else min(sizes_of(spot.job)[0], spot.seat.rows)


def trial_too_large(spot: Spot, said: Said) -> None:
    assert not any(_trial_fits(spot, said, bits) for bits in _allowed(spot))


def _allowed(spot: Spot) -> list[int]:
    """The bits that the device could take for that batch, as far as memory did not run out."""
    asked, least = spot.job.strategy.bits, _least(spot)
    return [
        bits for bits in spot.seat.info.bits
        if asked in ("auto", bits) and limit_of(spot.scene, spot.seat, bits) >= least
    ]  # fmt: skip


def trial_by_bits(spot: Spot, said: Said) -> None:
    fewer = int(said["fewer"])
    assert int(said["bits"]) == spot.work.bits > fewer and _trial_fits(spot, said, fewer)
    assert spot.seat.careful or not _trial_fits(spot, said, spot.work.bits)


def rising(spot: Spot, said: Said) -> None:
    by_block = spot.round.chosen.by_block
    assert (int(said["first"]), int(said["blocks"]), int(said["sum"])) == (by_block[0], len(by_block), sum(by_block))


def worth(spot: Spot, said: Said) -> None:
    task, (scores, _) = spot.round.task, spot.round.scores
    cap, under = min(spot.job.strategy.rank, 32), int(said["under"]) / 100
    gains = {name: math.log2(1 + rank) / math.log2(1 + cap) for name, rank in spot.work.ranks.items()}
    close(said["worth"], sum(scores[name] * gains[name] for name in gains))
    close(said["most"], task.mixes[0].worth)
    assert spot.work.steps == max(1, math.ceil((1 - under) * spot.job.rounds.local_steps - 1e-9))


def least_ranks(spot: Spot, said: Said) -> None:
    assert spot.reason.verb == "exceeds" and tuple(spot.work.ranks.values()) == spot.round.task.least.ranks


def _held(spot: Spot) -> list[int]:
    sizes = legend.offered(spot.scene, spot.seat) if spot.round.name == "legend" else sizes_of(spot.job)
    return held(spot.scene, spot.seat, spot.batch_need, sizes)


def _before(spot: Spot) -> int:
    """The batch before it was halved for an old reading."""
    halved = spot.reason.note("old: batch")
    return int(halved["batch"]) if halved else spot.work.batch


def largest_batch(spot: Spot, said: Said) -> None:
    equal(said["size"], sizes_of(spot.job)[-1])
    assert _before(spot) == sizes_of(spot.job)[-1]


def jobs_batch(spot: Spot, said: Said) -> None:
    equal(said["size"], spot.job.strategy.batch)
    assert spot.work.batch == spot.job.strategy.batch


def not_passed(spot: Spot, said: Said) -> None:
    jobs_batch(spot, said)
    assert spot.round.name == "legend" and spot.seat.careful


def alike(spot: Spot, said: Said) -> None:
    jobs_batch(spot, said)
    assert spot.round.name in ONE_BATCH


def rows(spot: Spot, said: Said) -> None:
    equal(said["rows"], spot.seat.rows)
    assert spot.seat.rows < sizes_of(spot.job)[-1]


def ran_out(spot: Spot, said: Said) -> None:
    equal(said["limit"], limit_of(spot.scene, spot.seat, spot.work.bits))
    assert int(said["size"]) in sizes_of(spot.job) and int(said["size"]) > int(said["limit"]) >= _before(spot)


def batch_by_memory(spot: Spot, said: Said) -> None:
    size = int(said["size"])
    close_mib(said["size_mib"], spot.size(spot.batch_need, spot.work.bits, size))
    close_mib(said["budget_mib"], spot.seat.budget)
    assert _next(spot) == size and not fits(spot.scene, spot.seat, spot.batch_need, spot.work.bits, size)


def _next(spot: Spot) -> int:
    return min(size for size in sizes_of(spot.job) if size > _before(spot))


def batch_by_time(spot: Spot, said: Said) -> None:
    size = int(said["size"])
    took = spot.work.steps * spot.step_s(spot.round.need(spot.device), size)
    close_s(said["took_s"], took)
    assert size == min(one for one in _held(spot) if one > _before(spot))
    assert took > spot.round.lefts[spot.device]


def no_room(spot: Spot, said: Said) -> None:
    close_mib(said["budget_mib"], spot.seat.budget)
    batches = fedpipe.batches_of(spot.scene, spot.seat, spot.round.task)
    assert int(said["size"]) == min(size for size in sizes_of(spot.job) if size > max(batches))
    assert _before(spot) == max(batches)


def _rival(spot: Spot, size: int) -> float:
    """The best J at another batch."""
    batches = fedpipe.batches_of(spot.scene, spot.seat, spot.round.task)
    assert size == min(one for one in batches if one > _before(spot))
    found = fedpipe.options_of(
        spot.scene, spot.seat, spot.round.task, {size: batches[size]}, spot.round.lefts[spot.device]
    )
    return max((option.objective for option in found), default=0.0)


def no_room_in_time(spot: Spot, said: Said) -> None:
    equal(said["under"], 30)
    assert _rival(spot, int(said["size"])) == 0.0


def bounded_j(spot: Spot, said: Said) -> None:
    """A bound between the best of that batch and what was taken."""
    taken = spot.reason.note("J")
    assert taken is not None
    assert _rival(spot, int(said["size"])) - 0.0005 <= float(said["rival"]) <= float(taken["objective"]) + 0.001


def greedy_j(spot: Spot, said: Said) -> None:
    """The greedy gets half of the best at least."""
    best = _rival(spot, int(said["size"]))
    assert 0.5 * best - 0.0005 <= float(said["rival"]) <= best + 0.0005 and len(spot.round.works) > 32


def objective(spot: Spot, said: Said) -> None:
    task, batches = spot.round.task, fedpipe.batches_of(spot.scene, spot.seat, spot.round.task)
    found = fedpipe.options_of(spot.scene, spot.seat, task, batches, spot.round.lefts[spot.device])
    best = max(option.objective for option in found)
    if len(spot.round.works) <= 32:
        close(said["objective"], best)
    assert 0.5 * best - 0.0005 <= float(said["objective"]) <= best + 0.0005


def least_batch(spot: Spot, said: Said) -> None:
    assert spot.reason.verb == "exceeds" and spot.work.batch in (min(sizes_of(spot.job)), spot.seat.rows)


def old_batch(spot: Spot, said: Said) -> None:
    _old(spot, said)
    assert int(said["halved"]) == spot.reason.value and 2 * spot.reason.value <= int(said["batch"])


def old_least_batch(spot: Spot, said: Said) -> None:
    _old(spot, said)
    assert int(said["batch"]) == spot.work.batch in (min(sizes_of(spot.job)), spot.seat.rows)


def old_bits(spot: Spot, said: Said) -> None:
    _old(spot, said)
    bits = int(said["bits"])
    assert int(said["fewer"]) == spot.work.bits < bits
    sizes = {spot.size(spot.bits_need, bits, batch) for batch in judged(spot)}
    assert any(abs(int(said["size_mib"]) - size / MIB) <= 0.5 and size > 0.8 * spot.seat.budget for size in sizes)


def old_depth(spot: Spot, said: Said) -> None:
    _old(spot, said)
    reached = _reached(spot)
    assert (int(said["halved"]), int(said["depth"])) == (
        spot.reason.value,
        reached,
    ) and reached // 2 == spot.reason.value


def old_least_depth(spot: Spot, said: Said) -> None:
    _old(spot, said)
    assert int(said["depth"]) == spot.reason.value == 1


def bits_ran_out(spot: Spot, said: Said) -> None:
    bits = int(said["bits"])
    equal(said["limit"], limit_of(spot.scene, spot.seat, bits))
    assert bits > spot.work.bits and bits in spot.seat.info.bits


def bits_by_memory(spot: Spot, said: Said) -> None:
    bits = int(said["bits"])
    sizes = [(batch, spot.size(spot.bits_need, bits, batch)) for batch in judged(spot)]
    assert bits > spot.work.bits and any(
        abs(int(said["size_mib"]) - size / MIB) <= 0.5 and not fits(spot.scene, spot.seat, spot.bits_need, bits, batch)
        for batch, size in sizes
    )


def bits_proven(spot: Spot, said: Said) -> None:
    assert int(said["bits"]) == spot.work.bits == max(spot.seat.info.bits) < 32


def bits_asked(spot: Spot, said: Said) -> None:
    assert int(said["bits"]) == spot.work.bits == spot.job.strategy.bits


def _reached(spot: Spot) -> int:
    chosen = spot.round.chosen
    return chosen.reached[[one.seat.device for one in chosen.places].index(spot.device)]


def all_blocks(spot: Spot, said: Said) -> None:
    equal(said["blocks"], len(spot.round.chosen.ladder))
    assert spot.place.held == len(spot.round.chosen.ladder) == _reached(spot)


def depth_by_memory(spot: Spot, said: Said) -> None:
    k = int(said["depth"])
    close_mib(said["size_mib"], spot.size(spot.round.chosen.needs[k - 1], spot.work.bits, spot.place.batch))
    close_mib(said["budget_mib"], spot.seat.budget)
    assert k == spot.place.held + 1 == _reached(spot) + 1


def depth_by_deadline(spot: Spot, said: Said) -> None:
    k, late = int(said["depth"]), 0.9 * spot.job.rounds.deadline_s
    close_s(said["took_s"], spot.place.times[k - 1])
    close(said["late_s"], late)
    equal(said["share"], 90)
    assert k == spot.place.in_time + 1 == _reached(spot) + 1 and spot.place.times[k - 1] > late


def depth_by_time(spot: Spot, said: Said) -> None:
    k = int(said["depth"])
    close_s(said["took_s"], spot.place.times[k - 1])
    assert k == _reached(spot) + 1


def partial_work(spot: Spot, said: Said) -> None:
    assert spot.reason.verb == "exceeds" and spot.work.train_for_s > 0


def more(spot: Spot, said: Said) -> None:
    """A quarter of the steps."""
    assert spot.work.train_for_s > 0 and spot.round.name in ("fedpipe", "legend")
    equal(said["extra"], spot.work.extra_steps)
    assert 4 * (spot.work.extra_steps - 1) < spot.work.steps <= 4 * spot.work.extra_steps


def lost(spot: Spot, said: Said) -> None:
    assert spot.reason.verb == "exceeds" and not spot.work.train_for_s


def undone(spot: Spot, said: Said) -> None:
    asked = spot.job.rounds.local_steps
    assert (int(said["undone"]), int(said["asked"])) == (asked - spot.work.steps, asked) and spot.work.steps < asked


def transferred(spot: Spot, said: Said) -> None:
    if spot.round.name == "legend":
        k = spot.depth
        byte_s, size = spot.place.byte_s, sum(spot.place.moved[k - 1])
        known = spot.scene.fleet.known.get(spot.device)
        took, rate = size * byte_s, 1 / byte_s if known and known.byte_s else 0.0
    else:
        ranks, bound = spot.round.ranks(spot.device), spot.round.bound
        if spot.round.name == "fedpipe" and not spot.round.over_all:
            ranks, bound = spot.round.task.most, spot.round.task.bound
        took = transfer(spot.scene, spot.seat, ranks, bound)
        size = sum(moved(spot.scene, spot.seat, ranks, bound))
        known = spot.scene.fleet.known.get(spot.device)
        rate = known.link if known else 0.0
    close_s(said["transfer_s"], took)
    assert ("unmeasured" in said) == (rate == 0.0)
    usual = usual_link(spot.scene)
    assert ("usual" in said) == (rate == 0.0 and usual > 0)
    if rate == 0.0 and usual:
        close(said["usual"], usual / 1e6)
    if rate:
        close_mib(said["moved_mib"], size)
        close(said["rate"], rate / 1e6)


def only_the_head(spot: Spot, said: Said) -> None:
    assert spot.round.name == "head" and spot.work.ranks == {}


def all_tuned(spot: Spot, said: Said) -> None:
    assert not spot.work.score
    _at_low_rank(spot, said)


def all_scored(spot: Spot, said: Said) -> None:
    assert spot.work.score
    _at_low_rank(spot, said)


def _at_low_rank(spot: Spot, said: Said) -> None:
    equal(said["rank"], min(8, spot.scene.job.strategy.rank))
    assert spot.reason.value == len(spot.work.ranks)


def most(spot: Spot, said: Said) -> None:
    scores, _ = spot.round.scores
    best = sorted((-scores[one.name], one.name) for one in spot.round.task.chosen)[:3]
    told = [part.rsplit(" ", 1) for part in said["most"].split(", ")]
    assert [name for name, _ in told] == [name for _, name in best]
    for (_, share), (less, _) in zip(told, best, strict=True):
        close(share, -less)


NOTES: dict[str, Callable[[Spot, Said], None]] = {
    "clipped": clipped, "least rank": least_rank, "rank by bits": rank_by_bits, "rank by memory": rank_by_memory,
    "nothing measured": nothing_measured, "not measured itself": not_measured_itself,
    "trial too large": trial_too_large, "trial by bits": trial_by_bits, "rising": rising, "worth": worth,
    "least ranks": least_ranks,
    "largest batch": largest_batch, "the job's batch": not_passed, "alike": alike, "rows": rows,
    "ran out": ran_out,
    "batch by memory": batch_by_memory, "batch by time": batch_by_time, "no room": no_room,
    "no room in time": no_room_in_time, "bounded J": bounded_j, "greedy J": greedy_j, "J": objective,
    "least batch": least_batch,
    "old: batch": old_batch, "old: least batch": old_least_batch, "old: bits": old_bits, "old: depth": old_depth,
    "old: least depth": old_least_depth, "bits ran out": bits_ran_out, "bits by memory": bits_by_memory,
    "bits proven": bits_proven, "bits asked": bits_asked, "all blocks": all_blocks,
    "depth by memory": depth_by_memory, "depth by deadline": depth_by_deadline, "depth by time": depth_by_time,
    "partial work": partial_work, "more": more, "lost": lost, "undone": undone, "transfer": transferred,
    "only the head": only_the_head, "all tuned": all_tuned, "all scored": all_scored, "most": most,
}  # fmt: skip
"""Kind of a note -> its check."""
