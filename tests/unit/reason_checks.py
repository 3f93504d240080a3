"""What each number in a reason must be: recomputed by the second implementation from what the planner was given."""

from __future__ import annotations

import math
from collections.abc import Callable

from shared.jobs import JobSpec
from tests.unit.reason_grammar import parse
from tests.unit.reason_scene import ONE_BATCH, Said, Spot, close, close_mib, close_s, equal
from tests.unit.second import fedpipe
from tests.unit.second.costs import MIB, Free, Need, need_of, tuned
from tests.unit.second.seats import Seat, has_run, sizes_of

# ---- parts of readings and bounds


def capacity(spot: Spot, said: Said, free: Free | None = None) -> None:
    free = free or spot.seat.free
    if free.gpu:
        close(said["gpu_free"], free.left)
        close(said["gpu_foreign"], free.foreign)
    else:
        close(said["free"], free.left)
        close(said["foreign"], free.foreign)
        close(said["cores"], free.cores)


def source(spot: Spot, said: Said) -> None:
    """Where the speed is from."""
    known = spot.scene.fleet.known.get(spot.device)
    if known is not None and spot.work.bits in known.speeds:
        equal(said["fitted"], len(known.speeds[spot.work.bits].seen))
    elif known is not None and known.speeds:
        bits, speed = known.best()
        equal(said["other"], len(speed.seen))
        equal(said["other_bits"], bits)
    else:
        assert ("median" if spot.scene.fleet.known else "assumed") in said


def own_source(spot: Spot, said: Said) -> None:
    """The same, of `legend` by its own averages."""
    known = spot.scene.fleet.known.get(spot.device)
    if spot.round.name == "legend" and known is not None and known.steps:
        equal(said["averaged"], len(known.steps))
    else:
        source(spot, said)


def budget(spot: Spot, said: Said) -> None:
    budget_of(spot.seat, said)


def budget_of(seat: Seat, said: Said) -> None:
    if not seat.limit:
        assert "unlimited" in said
        return
    close_mib(said["budget_mib"], seat.budget)
    close_mib(said["limit_mib"], seat.limit)
    close_mib(said["taken_mib"], seat.foreign)
    machine = seat.limit if seat.info.gpus else seat.limit * seat.agents
    close_mib(said["reserve_mib"], max(machine // 20, 64 * MIB) / (machine / seat.limit))


def memory(spot: Spot, said: Said, batch: int) -> None:
    """The reading of memory, and that it meets its bound."""
    need, bits, known = spot.bits_need, spot.work.bits, spot.scene.fleet.known.get(spot.device)
    size = spot.size(need, bits, batch)
    close_mib(said["size_mib"], size)
    if spot.reason.kind.endswith("/ran"):
        close_mib(said["limit_mib"], spot.seat.limit)
        assert size > spot.seat.budget and has_run(spot.scene, spot.seat, need, bits, batch)
    else:
        budget(spot, said)
        assert size <= spot.seat.budget or not spot.seat.limit
    context = 400 * MIB if spot.seat.info.gpus else 0
    if known is not None and known.peaks:
        other = int(said.get("peak_bits", bits))
        peak = known.peaks[other]
        close_mib(said["peak_mib"], peak.bytes + context)
        equal(said["samples"], peak.micro)
        return
    kept = need.on_gpu if spot.seat.info.gpus else need.activations
    activations = need.micro(batch) * kept[bits] * spot.scene.fleet.scale
    close_mib(said["base_mib"], need.base[bits])
    close_mib(said["activations_mib"], activations)
    close_mib(said["loading_mib"], 32 * MIB + 8 * need.largest)
    rest = max(activations, 32 * MIB + 8 * need.largest) + 16 * need.trained + 4 * need.frozen
    close_mib(said["agent_mib"], size - need.base[bits] - rest)
    if "tuned_mib" in said:
        close_mib(said["tuned_mib"], 16 * need.trained)


# ---- reasons


def rank_equal(spot: Spot, said: Said) -> None:
    modules, rank = tuned(spot.scene.facts, spot.job), spot.job.strategy.rank
    side = min(min(one.out, one.inp) for one in modules)
    assert (int(said["asked"]), int(said["modules"]), int(said["side"])) == (rank, len(modules), side)
    assert spot.reason.value == rank and (spot.reason.verb == "meets") == (rank <= side)
    assert spot.work.ranks == {one.name: min(rank, one.out, one.inp) for one in modules}


def rank_itself(spot: Spot, said: Said) -> None:
    equal(said["params"], spot.round.need(spot.device).trained)
    assert (spot.reason.value, said["factors"], spot.work.ranks) == (0, "0", {})


def rank_head(spot: Spot, said: Said) -> None:
    equal(said["params"], sum(math.prod(shape) for shape in spot.scene.facts.dense.values()))
    assert (spot.reason.value, said["modules"], spot.work.ranks) == (0, "0", {})


def _alone_s(spot: Spot, device: str) -> float:
    """Seconds of a step with the least rank, with nothing else running."""
    rank = min(2, spot.job.strategy.rank)
    ranks = {one.name: min(rank, one.out, one.inp) for one in tuned(spot.scene.facts, spot.job)}
    need, seat = need_of(spot.scene.facts, spot.job, ranks, spot.round.bound), spot.round.seats[device]
    alone = Free(seat.free.cores, 0.0, seat.free.cores, seat.free.gpu, seat.free.flops)
    fixed, sample = spot.scene.fleet.pace(device, need, seat.bits, alone)
    return fixed + sample * _job_batch(spot.job)


def _job_batch(job: JobSpec) -> int:
    strategy = job.strategy
    return min(max(strategy.batch, strategy.batch_min), max(strategy.batch_min, strategy.batch_max))


def rank_capability(spot: Spot, said: Said) -> None:
    largest, value = spot.job.strategy.rank, spot.reason.value
    source(spot, said)
    own = _alone_s(spot, spot.device)
    fastest = min((_alone_s(spot, device), device) for device in spot.round.seats)
    close_s(said["step_s"], own)
    close_s(said["fastest_s"], fastest[0])
    allowed = fastest[0] * largest / value * math.sqrt(2)
    close_s(said["allowed_s"], allowed)
    assert said["fastest"] == fastest[1] and (spot.reason.verb == "meets") == (own <= allowed)
    assert (int(said["rank"]), int(said["largest"]), int(said["batch"])) == (value, largest, _job_batch(spot.job))
    modules = tuned(spot.scene.facts, spot.job)
    assert spot.work.ranks == {one.name: min(value, one.out, one.inp) for one in modules}


def rank_width(spot: Spot, said: Said) -> None:
    facts, shapes = spot.scene.facts, [sorted(work.ranks) for work in spot.round.works.values()]
    assert (int(said["depth"]), int(said["width"])) == (len(spot.work.ranks), spot.reason.value)
    assert set(spot.work.ranks.values()) == {spot.reason.value}
    equal(said["deepest"], len(facts.modules))
    equal(said["widest"], min([spot.job.strategy.global_rank, *(one.out for one in facts.modules)]))
    assert ("alike" in said) == (len({(*names, max(work.ranks.values())) for names, work in
                                      zip(shapes, spot.round.works.values(), strict=True)}) == 1)  # fmt: skip
    if "group" in said:
        assert 1 <= int(said["group"]) <= int(said["groups"]) <= 3


def rank_rising(spot: Spot, said: Said) -> None:
    chosen, blocks = spot.round.chosen, sorted({one.block for one in tuned(spot.scene.facts, spot.job)})
    depth = spot.depth
    given = chosen.by_block[-depth:]
    assert [int(rank) for rank in said["ranks"].split()] == list(given)
    assert (int(said["lowest"]), int(said["highest"])) == (blocks[-depth], blocks[-1])
    equal(said["blocks"], spot.scene.facts.blocks)
    assert (int(said["total"]), int(said["mean"])) == (len(blocks) * spot.job.strategy.rank, spot.job.strategy.rank)
    assert spot.reason.value == given[-1] and spot.work.ranks == chosen.ladder[depth - 1]


def rank_mix(spot: Spot, said: Said) -> None:
    """The ranks of `fedpipe`, and the room that its bound leaves at the batch that was judged."""
    task, ranks = spot.round.task, sorted(spot.work.ranks.values())
    sides = {one.name: one.out + one.inp for one in task.chosen}
    params, batch = sum(rank * sides[name] for name, rank in spot.work.ranks.items()), int(said["batch"])
    assert (int(said["lowest"]), int(said.get("highest", said["lowest"]))) == (ranks[0], ranks[-1])
    assert (int(said["modules"]), int(said["params"]), spot.reason.value) == (len(ranks), params, ranks[-1])
    halved = spot_note(spot, "batch", "old: batch")
    assert batch == (int(halved["batch"]) if halved else spot.work.batch)
    by_memory = fedpipe.batches_of(spot.scene, spot.seat, task)[batch]
    fixed, sample = spot.scene.fleet.pace(spot.device, task.need, spot.work.bits, spot.seat.free)
    ratio = (spot.round.lefts[spot.device] / spot.work.steps - fixed) / batch / sample
    by_time = task.least.params + (ratio - 1) * task.need.flop / (6 * spot.job.task.max_tokens)
    room = max(0, int(min(by_memory, by_time)))
    assert abs(int(said["room"]) - room) <= 1 + 1e-9 * room, (said["room"], room)
    assert (spot.reason.verb == "meets") == (params <= room)
    match spot.reason.kind:
        case "rank/by memory":
            budget(spot, said)
            assert by_memory <= by_time
        case "rank/by having run":
            close_mib(said["limit_mib"], spot.seat.limit)
            assert by_memory <= by_time
        case _:
            close_s(said["left_s"], spot.round.lefts[spot.device])
            capacity(spot, said)
            assert by_time < by_memory


def spot_note(spot: Spot, name: str, kind: str) -> Said | None:
    """A note that another number's reason has."""
    return parse(name, spot.work.reasons[name]).note(kind)


def batch_time(spot: Spot, said: Said) -> None:
    batch, steps = spot.work.batch, spot.work.steps
    step_s, left = spot.step_s(_step_need(spot), batch), spot.round.lefts[spot.device]
    close_s(said["step_s"], step_s)
    own_source(spot, said)
    capacity(spot, said)
    equal(said["steps"], steps)
    close_s(said["took_s"], steps * step_s)
    close_s(said["target_s"], left)
    assert spot.reason.value == batch and (spot.reason.verb == "meets") == (steps * step_s <= left * (1 + 1e-6))


def _step_need(spot: Spot) -> Need:
    """What the batch is judged by: of `fedpipe` the ranks that were chosen."""
    return spot.round.need(spot.device)


def batch_memory(spot: Spot, said: Said) -> None:
    assert spot.reason.value == spot.work.batch
    memory(spot, said, spot.work.batch)


def bits_memory(spot: Spot, said: Said) -> None:
    batch = int(said["at_batch"])
    assert spot.reason.value == spot.work.bits and batch in judged(spot)
    memory(spot, said, batch)


def judged(spot: Spot) -> set[int]:
    """The batches that bits may be judged at: the smallest, of `legend` the job's, and of rivals all up to that."""
    sizes = sizes_of(spot.job)
    found = {min(sizes[0], spot.seat.rows)}
    if spot.round.name in ONE_BATCH:
        return found | {min(size, spot.seat.rows) for size in sizes if size <= spot.job.strategy.batch}
    if spot.round.name == "legend":
        found.add(min(max([size for size in sizes if size <= spot.job.strategy.batch] or sizes[:1]), spot.seat.rows))
    return found


def depth(spot: Spot, said: Said) -> None:
    place, chosen, steps = spot.place, spot.round.chosen, spot.work.steps
    k = spot.reason.value
    assert k == spot.depth
    close_s(said["round_s"], place.times[k - 1])
    steps *= place.grown[k - 1]
    close_s(said["forward_s"], steps * place.forward)
    close_s(said["back_s"], steps * chosen.needs[k - 1].blocks * place.block)
    close_s(said["transfer_s"], sum(place.moved[k - 1]) * place.byte_s)
    close_s(said["target_s"], chosen.best.round_s)
    equal(said["passed"], k)
    equal(said["all"], spot.scene.facts.blocks)
    capacity(spot, said)
    own_source(spot, said)
    assert place.times[k - 1] <= chosen.best.round_s * (1 + 1e-9)


def steps(spot: Spot, said: Said) -> None:
    rounds, count = spot.scene.job.rounds, spot.work.steps
    if spot.round.name == "legend":
        step_s = spot.step_s(spot.round.chosen.needs[spot.depth - 1], spot.work.batch)
    elif spot.round.name == "head":
        step_s = spot.step_s(need_of(spot.scene.facts, spot.job, {}), spot.work.batch)
    else:
        step_s = spot.step_s(_step_need(spot), spot.work.batch)
    bound = spot.work.train_for_s or rounds.deadline_s
    assert (spot.reason.kind == "steps/time") == (spot.work.train_for_s > 0)
    assert (int(said["asked"]), spot.reason.value) == (count, count)
    close_s(said["step_s"], step_s)
    close_s(said["took_s"], count * step_s)
    close_s(said["bound_s"], bound)
    if spot.work.train_for_s:
        close_s(said.get("first_s", "0"), spot.begins_s)
        close_s(said["last_s"], spot.begins_s + (count - 1) * step_s)
        assert (spot.reason.verb == "meets") == (spot.begins_s + (count - 1) * step_s < bound)
    else:
        assert (spot.reason.verb == "meets") == (count * step_s <= bound)


def agents(spot: Spot, said: Said) -> None:
    info = spot.seat.info
    rows = info.datasets[spot.job.task.dataset].rows
    assert (int(said["ready"]), int(said["rows"]), spot.reason.value) == (info.agents, rows, spot.work.agents)
    places = len(info.gpus) or math.ceil(info.cores)
    assert spot.work.agents == min(info.agents, places, rows)
    if info.gpus:
        equal(said["gpus"], len(info.gpus))
    else:
        close(said["cores"], info.cores)


def weights_scoring(spot: Spot, said: Said) -> None:
    number, (_, scored) = spot.scene.planned.record.round, spot.round.scores
    assert spot.reason.value == len(spot.work.ranks) == len(tuned(spot.scene.facts, spot.job))
    if spot.reason.kind == "weights/first":
        local, warm_up = spot.job.rounds.local_steps, spot.job.strategy.warm_up_steps
        assert (int(said["round"]), scored) == (number, 0)
        assert (int(said["steps"]), int(said["whole"])) == (local * (number - 1), warm_up)
        assert spot.work.score == (local * number >= warm_up)
    else:
        assert spot.work.score
        every = spot.job.strategy.rescore_every
        assert (int(said["scored"]), int(said["age"]), int(said["every"])) == (scored, number - scored, every)
        assert number - scored >= every


def weights_chosen(spot: Spot, said: Said) -> None:
    scores, scored = spot.round.scores
    chosen = spot.round.task.chosen
    close(said["share"], sum(scores[one.name] for one in chosen))
    assert (int(said["scored"]), float(said["wanted"])) == (scored, 0.8)
    assert int(said["chosen"]) == spot.reason.value == len(chosen)
    equal(said["modules"], len(tuned(spot.scene.facts, spot.job)))
    assert set(spot.work.ranks) <= {one.name for one in chosen}


FORMS: dict[str, Callable[[Spot, Said], None]] = {
    "rank/equal": rank_equal, "rank/itself": rank_itself, "rank/head": rank_head, "rank/capability": rank_capability,
    "rank/width": rank_width, "rank/rising": rank_rising, "rank/by memory": rank_mix, "rank/by having run": rank_mix,
    "rank/by time": rank_mix, "batch/time": batch_time, "batch/memory": batch_memory, "batch/ran": batch_memory,
    "bits/memory": bits_memory, "bits/ran": bits_memory, "depth": depth, "steps/deadline": steps, "steps/time": steps,
    "agents/cores": agents, "agents/gpus": agents, "weights/first": weights_scoring, "weights/old": weights_scoring,
    "weights/chosen": weights_chosen,
}  # fmt: skip
"""Kind of a reason -> its check."""
