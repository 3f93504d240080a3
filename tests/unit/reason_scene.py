"""A plan with all that its planner was given, as the checks of reasons see it; and when a number is told right."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from msgspec.structs import replace as with_fields

from shared.jobs import JobSpec
from shared.messages import Work
from tests.unit.reason_grammar import Reason
from tests.unit.second import fedpipe, legend
from tests.unit.second.costs import MIB, Need, need_of, tuned
from tests.unit.second.seats import Scene, Seat, first_step, lefts, moved, seats

Said = Mapping[str, str]


ONE_BATCH = {"fedlora", "ffa", "fedex", "hetlora", "flexlora", "flora", "full", "fedadapter"}
"""Strategies that give every device the job's batch."""


def close(told: str, value: float) -> None:
    """`told` is `value`, rounded to the digits that are told."""
    digits = len(told.partition(".")[2]) if "e" not in told else 0
    assert abs(float(told) - value) <= 0.5 * 10**-digits + 1e-9, (told, value)


def close_s(told: str, value: float) -> None:
    """Seconds: whole ones from 100 on, else three digits."""
    assert abs(float(told) - value) <= (0.51 if value >= 100 else 0.0051 * value + 1e-12), (told, value)


def close_mib(told: str, size: float) -> None:
    assert abs(int(told) - size / MIB) <= 0.5 + 1e-6, (told, size / MIB)


def equal(told: str, value: float) -> None:
    assert float(told) == value, (told, value)


@dataclass
class Round:
    """A plan with all that its planner was given. `scene.job` is as asked, `job` as the planner turns it."""

    scene: Scene
    name: str

    @property
    def works(self) -> dict[str, Work]:
        return self.scene.planned.record.plan.participants

    @cached_property
    def seats(self) -> dict[str, Seat]:
        """The participants, at their bits."""
        found = {seat.device: seat for seat in seats(self.scene)}
        return {
            device: Seat(**{**vars(found[device]), "bits": work.bits}) for device, work in sorted(self.works.items())
        }

    @property
    def over_all(self) -> bool:
        """Of `fedpipe`: whether all modules are tuned."""
        return self.name == "fedpipe" and fedpipe.over_all(self.scene)

    @cached_property
    def scores(self) -> tuple[dict[str, float], int]:
        return fedpipe.scores_of(self.scene.planned.past, self.scene.job.strategy.max_share)

    @cached_property
    def job(self) -> JobSpec:
        """`full` has one precision, a round over all modules of `fedpipe` a low rank."""
        strategy = self.scene.job.strategy
        if self.name == "full":
            strategy = with_fields(strategy, bits=32)
        if self.over_all:
            strategy = with_fields(strategy, rank=min(8, strategy.rank))
        return with_fields(self.scene.job, strategy=strategy)

    @cached_property
    def task(self) -> fedpipe.Task:
        """Of `fedpipe` in a round over the chosen modules."""
        modules, (scores, _) = tuned(self.scene.facts, self.job), self.scores
        known = {one.name: scores[one.name] for one in modules if scores.get(one.name, 0) > 0}
        return fedpipe.task_of(self.scene, fedpipe.smallest(known, modules), scores)

    @cached_property
    def chosen(self) -> legend.Choice:
        return legend.choose(self.scene)

    @property
    def bound(self) -> int:
        """Of the global adapter's rank."""
        return self.scene.global_rank(self.job.strategy.rank)

    def ranks(self, device: str) -> dict[str, int]:
        """That costs are counted with; `head` is planned as if LoRA were trained."""
        rank = self.job.strategy.rank
        if self.name == "head":
            return {one.name: min(rank, one.out, one.inp) for one in tuned(self.scene.facts, self.job)}
        return self.works[device].ranks

    def need(self, device: str) -> Need:
        bound = 0 if self.name in ("fedadapter", "full") else self.bound
        if self.name == "legend":
            bound = self.scene.global_rank(self.chosen.by_block[-1])
        return need_of(self.scene.facts, self.job, self.ranks(device), bound)

    @cached_property
    def needs(self) -> list[Need]:
        """That the round target is made of, by participant."""
        if self.name == "fedpipe" and not self.over_all:
            need = need_of(self.scene.facts, self.job, self.task.most, self.task.bound)
            return [need] * len(self.seats)
        return [self.need(device) for device in self.seats]

    @property
    def slack(self) -> float:
        """What of the median's time the target is: no more of it where work ends with its round."""
        return 1.0 if self.name == "fedpipe" else 1.2

    @cached_property
    def least(self) -> Need:
        """What a device must hold at least to take part."""
        if self.name == "legend":
            return self.chosen.needs[0]
        if self.name == "fedpipe" and not self.over_all:
            return self.task.need
        device = min(self.works, key=lambda one: sum(self.works[one].ranks.values()))
        if self.name in ("hetlora", "flexlora", "flora"):
            rank = min(2, self.job.strategy.rank)
            ranks = {one.name: min(rank, one.out, one.inp) for one in tuned(self.scene.facts, self.job)}
            return need_of(self.scene.facts, self.job, ranks, self.bound)
        return self.need(device)

    @cached_property
    def lefts(self) -> dict[str, float]:
        """Seconds that each participant has for its steps."""
        taking = list(self.seats.values())
        if self.name == "fedpipe" and not self.over_all:
            found = fedpipe.lefts_of(self.scene, self.task, taking)
        elif self.name == "legend":
            pairs = zip(self.chosen.places, self.chosen.best.depths, strict=True)
            found = [legend.left(self.chosen, place, depth) for place, depth in pairs]
        else:
            ranks = [self.ranks(one) for one in self.seats]
            found = lefts(self.scene, taking, self.needs, ranks, self.bound, self.slack)
        return dict(zip(self.seats, found, strict=True))


@dataclass
class Spot:
    """One number of one device, about to be checked."""

    round: Round
    device: str
    reason: Reason

    @property
    def scene(self) -> Scene:
        return self.round.scene

    @property
    def job(self) -> JobSpec:
        return self.round.job

    @property
    def work(self) -> Work:
        return self.round.works[self.device]

    @property
    def seat(self) -> Seat:
        return self.round.seats[self.device]

    @property
    def place(self) -> legend.Place:
        return next(one for one in self.round.chosen.places if one.seat.device == self.device)

    def step_s(self, need: Need, batch: int) -> float:
        if self.round.name == "legend":
            return legend.step_s(self.scene, self.place, need, batch)
        fixed, sample = self.scene.fleet.pace(self.device, need, self.work.bits, self.seat.free)
        return fixed + sample * batch

    @property
    def depth(self) -> int:
        """Blocks that the work tunes."""
        return len({one.block for one in self.scene.facts.modules if one.name in self.work.ranks})

    @property
    def begins_s(self) -> float:
        """When the first step should begin, of methods whose work ends with its round."""
        scene, of = self.scene, self.round
        if not scene.fleet.measured or of.name not in ("fedpipe", "legend"):
            return 0.0
        if of.name == "legend":
            return first_step(scene, self.seat, self.place.moved[self.depth - 1])
        ranks, bound = (of.ranks(self.device), of.bound) if of.over_all else (of.task.most, of.task.bound)
        return first_step(scene, self.seat, moved(scene, self.seat, ranks, bound))

    def size(self, need: Need, bits: int, batch: int) -> float:
        return self.scene.fleet.memory(self.device, self.seat.info, need, bits, batch)

    @property
    def batch_need(self) -> Need:
        """What batches are judged by: of `legend` that of the depth."""
        return self.round.need(self.device) if self.round.name == "legend" else self.bits_need

    @property
    def bits_need(self) -> Need:
        """What bits are judged by."""
        if self.round.name == "legend":
            return self.round.chosen.needs[0]
        if self.round.name == "fedpipe" and not self.round.over_all:
            return self.round.task.need
        return self.round.need(self.device)
