"""The words of a whole plan, and why a candidate takes no part: grammar and checks."""

from __future__ import annotations

import re
from collections.abc import Callable

from coordinator.core.planning.base import Plan
from tests.unit.reason_checks import budget_of
from tests.unit.reason_grammar import BUDGET, f, m, n, parse, parts, s
from tests.unit.reason_scene import ONE_BATCH, Round, Said, close, close_mib, close_s, equal
from tests.unit.second.costs import Need
from tests.unit.second.seats import Seat, limit_of, median_s, seats, sizes_of

SHAPE = r"depth \d+, width \d+"

PARTS: dict[str, str] = {
    "target": rf"round target {s('target')}: {n('steps')} steps? at batch {n('batch')} take the median of "
    rf"{n('devices')} devices? {s('median')} undisturbed(?:, \+ {n('slack')}%)?",
    "alike": rf"batch {n('batch')} for every device that holds it",
    "lowered": rf"lowered to {s('bound')}, {n('share')}% of the deadline",
    "taking": rf"{n('taking')} of {n('candidates')} candidates? take part",
    "head": rf"only the head is trained, {s('longest')} at most expected",
    "exactly": r"ranks (?P<how>exactly|greedily) by J",
    "depths": rf"round target {s('target')}, of {n('deadlines')} candidates: depths {n('least')} to {n('most')} of "
    rf"{n('blocks')} \(mean {f('mean')}\), utility (?P<utility>[\d.e+-]+) per second",
    "at batch": rf"all that at batch {n('batch')}",
    "batches": rf"batches for {s('target')}",
    "waiting": rf"waiting {n('waiting')}% meets {n('bound')}%(?:, relaxed from {n('strict')}%)?",
    "coverage": rf"{n('share')}% of the devices tune the lowest block, at least {n('asked')}% asked",
    "seen": rf"adapters of (?P<shape>{SHAPE}), {n('rounds')} rounds? of them seen",
    "trial": rf"a trial of (?P<shapes>\({SHAPE}\)(?:, \({SHAPE}\))*): the loss went from (?P<before>[\d.]+) to "
    rf"(?P<now>[\d.]+) in {n('rounds')} rounds",
}  # fmt: skip
"""Kind -> form of a part of `Plan.reason`; before them stands the reason of the weights, where there is one."""

LEFT_OUT: dict[str, str] = {
    "memory": rf"memory: (?P<told>.+) at batch {n('batch')}, over {BUDGET}",
    "not proven": rf"{n('bits')} bits not proven here \(proven: (?P<proven>\d+(?:, \d+)*)\)",
    "no rows": rf"data set '(?P<data>\w+)' has {n('rows')} rows",
    "no data": r"no data set '(?P<data>\w+)' \(it has (?P<has>\w+)\)",
}
_TAKES = re.compile(rf"{n('bits')} bits would take {m('size')}")
_RAN_OUT = re.compile(rf"{n('bits')} bits ran out of memory above batch {n('limit')}")


def plan_parts(plan: Plan) -> list[tuple[str, Said]]:
    """`Plan.reason`, parsed."""
    text = plan.reason
    weights = next(iter(plan.participants.values())).reasons.get("weights", "")
    if weights:
        parse("weights", weights)
        assert text.startswith(f"{weights}; "), text
        text = text.removeprefix(f"{weights}; ")
    return [matched(PARTS, part, text) for part in parts(text)]


def matched(forms: dict[str, str], text: str, whole: str) -> tuple[str, Said]:
    """The only form that `text` has."""
    found = [(kind, match) for kind, form in forms.items() if (match := re.fullmatch(form, text))]
    assert len(found) == 1, (whole, text)
    return found[0][0], {name: told for name, told in found[0][1].groupdict().items() if told is not None}


def _median(round: Round) -> float:
    return median_s(round.scene, list(round.seats.values()), round.needs)


def _target(round: Round, said: Said) -> None:
    strategy, median = round.job.strategy, _median(round)
    close_s(said["median_s"], median)
    close_s(said["target_s"], round.slack * median)
    allowance = 1 + int(said.get("slack", "0")) / 100
    assert (int(said["steps"]), allowance) == (round.job.rounds.local_steps, round.slack)
    assert int(said["batch"]) == min(max(strategy.batch, strategy.batch_min), strategy.batch_max)
    equal(said["devices"], len(round.works))


def _alike(round: Round, said: Said) -> None:
    strategy = round.job.strategy
    assert round.name in ONE_BATCH
    equal(said["batch"], min(max(strategy.batch, strategy.batch_min), strategy.batch_max))
    assert max(work.batch for work in round.works.values()) == int(said["batch"])


def _lowered(round: Round, said: Said) -> None:
    late = 0.9 * round.job.rounds.deadline_s
    close_s(said["bound_s"], late)
    assert said["share"] == "90" and round.slack * _median(round) > late and round.scene.fleet.known


def _taking(round: Round, said: Said) -> None:
    assert (int(said["taking"]), int(said["candidates"])) == (len(round.works), len(round.scene.planned.record.infos))


def _head(round: Round, said: Said) -> None:
    close_s(said["longest_s"], max(round.scene.planned.record.plan.predicted_s.values()))


def _exactly(round: Round, said: Said) -> None:
    assert said["how"] == ("exactly" if len(round.works) <= 32 else "greedily")


def _depths(round: Round, said: Said) -> None:
    chosen = round.chosen
    depths = chosen.best.depths
    close_s(said["target_s"], chosen.best.round_s)
    assert (int(said["least"]), int(said["most"])) == (min(depths), max(depths))
    equal(said["blocks"], len(chosen.ladder))
    close(said["mean"], sum(depths) / len(depths))
    close_s(said["utility"], chosen.best.utility)
    tried = {took for place in chosen.places for took in place.times[: min(place.held, place.in_time)]}
    # Two devices alike in all give the same deadlines, but for the last digit.
    assert abs(int(said["deadlines"]) - len(tried)) <= 2


def _waiting(round: Round, said: Said) -> None:
    chosen = round.chosen
    assert abs(int(said["waiting"]) - 100 * chosen.best.waiting / chosen.best.round_s) <= 0.5 + 1e-6
    bound, relaxed = 15.0, int(said["bound"]) > 15
    while relaxed and round_half(bound) < int(said["bound"]):
        bound *= 1.25
    assert round_half(bound) == int(said["bound"]) and ("strict" in said) == relaxed
    assert 100 * chosen.best.waiting / chosen.best.round_s <= bound * (1 + 1e-9)


def _at_batch(round: Round, said: Said) -> None:
    equal(said["batch"], round.job.strategy.batch)


def _batches(round: Round, said: Said) -> None:
    close_s(said["target_s"], round.chosen.target_s)


def round_half(value: float) -> int:
    return int(f"{value:.0f}")


def _coverage(round: Round, said: Said) -> None:
    share = 100 * round.chosen.best.coverage
    assert abs(int(said["share"]) - share) <= 0.5 + 1e-6 and int(said["asked"]) <= 10
    assert share >= int(said["asked"]) - 0.5


def _shapes(round: Round) -> set[str]:
    return {f"depth {len(work.ranks)}, width {max(work.ranks.values())}" for work in round.works.values()}


def _seen(round: Round, said: Said) -> None:
    assert _shapes(round) == {said["shape"]}
    assert int(said["rounds"]) <= len(round.scene.planned.past)


def _trial(round: Round, said: Said) -> None:
    shapes = re.findall(rf"\(({SHAPE})\)", said["shapes"])
    assert _shapes(round) <= set(shapes) and len(shapes) <= 3 and said["rounds"] == "3"
    firsts = []
    for done in round.scene.planned.past:
        told = [(facts.samples, facts.loss_first) for facts in done.results.values()]
        firsts.append(sum(count * loss for count, loss in told) / sum(count for count, _ in told) if told else 0.0)
    firsts = [loss for loss in firsts if loss]
    assert abs(float(said["now"]) - firsts[-1]) < 1e-3 and abs(float(said["before"]) - firsts[-4]) < 1e-3


CHECKS: dict[str, Callable[[Round, Said], None]] = {
    "target": _target, "alike": _alike, "lowered": _lowered, "taking": _taking, "head": _head, "exactly": _exactly,
    "depths": _depths, "batches": _batches, "at batch": _at_batch, "waiting": _waiting, "coverage": _coverage,
    "seen": _seen, "trial": _trial,
}  # fmt: skip


def check_left_out(round: Round, device: str, text: str) -> str:
    """The kind of reason why `device` takes no part, its numbers checked."""
    kind, said = matched(LEFT_OUT, text, text)
    info, task = round.scene.planned.record.infos[device], round.job.task
    match kind:
        case "memory":
            seat = next(seat for seat in seats(round.scene) if seat.device == device)
            check_refused(round, seat, round.least, said)
        case "not proven":
            assert int(said["bits"]) == round.job.strategy.bits and int(said["bits"]) not in info.bits
            assert [int(bits) for bits in said["proven"].split(", ")] == sorted(info.bits)
        case "no rows":
            assert int(said["rows"]) == info.datasets[said["data"]].rows == 0 and said["data"] == task.dataset
        case _:
            assert said["data"] == task.dataset not in info.datasets and said["has"] in info.datasets
    return kind


def check_refused(round: Round, seat: Seat, need: Need, said: Said) -> None:
    """Every precision with what `need` would take, none of which the memory holds."""
    least, tried = min(sizes_of(round.job)[0], seat.rows), []
    equal(said["batch"], least)
    budget_of(seat, said)
    for part in parts(said["told"]):
        if match := _TAKES.fullmatch(part):
            size = round.scene.fleet.memory(seat.device, seat.info, need, int(match["bits"]), least)
            close_mib(match["size_mib"], size)
            assert size > seat.budget
        else:
            match = _RAN_OUT.fullmatch(part)
            assert match, part
            equal(match["limit"], limit_of(round.scene, seat, int(match["bits"])))
            assert int(match["limit"]) < least
        tried.append(int(match["bits"]))
    asked = round.job.strategy.bits
    assert tried == (sorted(seat.info.bits, reverse=True) if asked == "auto" else [asked])
