"""`fedspine` (FedSpine, arXiv 2501.02438): how much each device prunes and at which rank it tunes, learned by a bandit.

**The paper's** (a public note): a pair (pruning ratio, rank) per device and round is an arm of an online bandit that
knows nothing of the devices beforehand; its reward is made of the gain in local loss, the progress of pruning, the
importance of the LoRA update and the completion time relative to the others. **Our reading**:

* an arm is (share that goes in this round, rank): dp in [0, `strategy.prune_step`], rank 2 to `strategy.rank` by its
  logarithm. There is a bandit (`bandit`) for each class of machine, whose devices share what they learn.
* a device that has less left to prune than an arm would is offered the arms up to that; at the target the rank alone.
* reward = (0.5 dF + 0.3 dp/dp_max + 0.2 Q) / (1 + 2 |T - T_med| / T_med): dF the share of the local loss that the
  round took away and Q the norm of what the update changes in the weights, whatever its rank, both over the 90 %
  quantile of those seen; dp what was really pruned; T seconds of training, T_med the round's median: one device's
  claim moves no reference. In a round that the gate refuses every reward is 0, and nothing counts as pruned.
* a class has one ratio, which never falls: that of its devices in their last round, the mean. A device that joins
  late, or was away, begins there: what it lacks goes by the fleet's scores, so that it holds what the others hold.
* what is left of a device is what it told with its last update, where its order can leave that (`pruned.sound`). The
  fleet's scores are the mean of the devices' by their shares, smoothed over rounds; they lie in the global adapter and
  count as much as what the device finds.
* batch by speed and live load, bits by memory: as `uniform`, over the model that is left. Of several GPUs one trains:
  their models would not be alike.

The rivals are this planner without the bandit (`fedspine-fixed`: an equal share a round, the job's rank), without
iteration (`fedspine-once`: all of it in a device's first round, the rank by the bandit), and others' ways to prune,
all with the job's rank and batch: LoRAPrune (arXiv 2305.18403: uniform ratios that rise over the first half of the
job), LLM-Pruner (arXiv 2305.11627: at once, by first-order importance) and magnitude (at once, by the smallest
weights).
"""

from __future__ import annotations

import hashlib
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Protocol

import msgspec
from msgspec.structs import replace

from coordinator.core.facts import ModelFacts
from coordinator.core.planning.bandit import Bandit, Choice, Point, Pulls
from coordinator.core.planning.base import Candidate, FleetView, Plan, RoundReport
from coordinator.core.planning.common import global_rank, nobody
from coordinator.core.planning.cost_model import CostModel
from coordinator.core.planning.demand import demand
from coordinator.core.planning.drafts import Draft, batches_to_the_jobs
from coordinator.core.planning.pruned import Sound, class_of, facts_at, sound
from coordinator.core.planning.ranks import LEAST, Ranked, of_modules
from coordinator.core.planning.reasons import word
from coordinator.core.planning.sizing import Seat, choose_bits, seat
from coordinator.core.planning.uniform import Seated, plan_of
from shared.errors import UserError
from shared.jobs import Bits, JobSpec
from shared.messages import UpdateFacts, Work
from shared.pruning_order import Pruning

GAIN, PROGRESS, NORM, LATENESS = 0.5, 0.3, 0.2, 2.0
SEEN, QUANTILE = 100, 0.9
"""Gains and norms that the quantile is taken of, and which."""
_AT_ONCE = ("fedspine-once", "llmpruner", "magprune")
_BANDIT = ("fedspine", "fedspine-once")
_ONE_BATCH = ("loraprune", "llmpruner", "magprune")


class Arm(NamedTuple):
    """What a device is to do: from ratio to ratio, at a rank, and why."""

    own: float
    """Share that is gone on the device itself."""
    before: float
    ratio: float
    rank: int
    choice: Choice | None


class Left(NamedTuple):
    """The units of a device's model that are left, and the share that is gone."""

    units: dict[str, bytes]
    ratio: float


_WHOLE = Left({}, 0.0)


class FedSpinePlanner(msgspec.Struct, frozen=True, kw_only=True):
    """See the module."""

    name: str = "fedspine"
    model: CostModel = CostModel()
    bandits: dict[str, Bandit] = {}
    """Class -> what is known of its arms."""
    ratios: dict[str, float] = {}
    """Class -> the share that is gone."""
    kept: dict[str, Left] = {}
    """Device -> what is left of its model, as it told last."""
    gains: tuple[float, ...] = ()
    norms: tuple[float, ...] = ()
    """Of what updates changed."""

    # ---- learning

    def learn(self, report: RoundReport) -> FedSpinePlanner:
        """The planner that also knows this round."""
        planner = replace(self, model=self.model.learn(report))
        if report.facts is None or report.job is None:
            return planner
        told = sound(report.facts.groups, report.works, report.results)
        if not told:
            return planner
        by_class: dict[str, list[str]] = {}
        for device in told:
            by_class.setdefault(class_of(report.infos[device]), []).append(device)
        if report.accepted:
            planner = planner._pruned(report.job.strategy.prune, told, by_class)
        return replace(planner, bandits=planner._rewarded(report, told, by_class))

    def _pruned(self, most: float, told: Mapping[str, Sound], by_class: Mapping[str, list[str]]) -> FedSpinePlanner:
        """What a round that counts left of the devices, and how far they went."""
        ratios = dict(self.ratios)
        for kind, devices in by_class.items():
            mean = statistics.fmean(told[device].ratio for device in devices)
            ratios[kind] = max(ratios.get(kind, 0.0), min(mean, most))
        last = [one.facts for one in told.values()][-SEEN:]
        left = {device: Left(one.facts.kept, one.ratio) for device, one in told.items()}
        return replace(
            self, ratios=ratios, kept={**self.kept, **left},
            gains=(*self.gains, *map(_gain, last))[-SEEN:], norms=(*self.norms, *(one.change for one in last))[-SEEN:],
        )  # fmt: skip

    def _rewarded(
        self, report: RoundReport, told: Mapping[str, Sound], by_class: Mapping[str, list[str]]
    ) -> dict[str, Bandit]:
        """All bandits a round later: those whose devices took no part forget as fast as the others."""
        assert report.job is not None
        step, most = report.job.strategy.prune_step, self.most()
        median_s = statistics.median(one.facts.train_s for one in told.values())
        bandits = {}
        for kind in sorted(self.bandits.keys() | by_class.keys()):
            seen = []
            for device in by_class.get(kind, ()):
                work, one = report.works[device], told[device]
                assert work.prune is not None  # or what it told would not be sound
                at = _point(report.job, work.prune.ratio - one.begun, max(work.ranks.values(), default=1))
                done = min(1.0, max(0.0, (one.ratio - one.begun) / step))
                seen.append((at, self.reward(one.facts, done, median_s, most) if report.accepted else 0.0))
            bandits[kind] = self.bandits.get(kind, Bandit()).learn(seen)
        return bandits

    def most(self) -> tuple[float, float]:
        """The quantiles of the gains and of the norms that were seen."""
        return _quantile(self.gains), _quantile(self.norms)

    @staticmethod
    def reward(facts: UpdateFacts, progress: float, median_s: float, most: tuple[float, float]) -> float:
        """In [0, 1]; `progress`: share of the largest pruning; `median_s`: seconds of training of the round's
        devices; `most`: gain and norm that count as 1."""
        lateness = abs(facts.train_s - median_s) / median_s if median_s > 0 else 0.0
        gain, change = _of_most(_gain(facts), most[0]), _of_most(facts.change, most[1])
        return (GAIN * gain + PROGRESS * progress + NORM * change) / (1.0 + LATENESS * lateness)

    # ---- planning

    def plan(self, view: FleetView, job: JobSpec) -> Plan:
        """The next round. Raises `UserError` where no candidate can take part, with the reason per device."""
        bound = global_rank(view, job, job.strategy.rank)
        needs, sizes = Needs(view.facts, job, bound), batches_to_the_jobs(job)
        seated: list[Seated] = []
        arms: dict[str, Arm] = {}
        left_out: dict[str, str] = {}
        pulls: dict[str, Pulls] = {}
        for candidate in sorted(view.candidates, key=lambda candidate: candidate.device):
            place = seat(_alone(candidate), job, view.fresh_s, self.model)
            found = place if isinstance(place, str) else self._seated(place, candidate, view, job, needs, pulls, sizes)
            if isinstance(found, str):
                left_out[candidate.device] = found
                continue
            arms[candidate.device], one = found
            seated.append(one)
        if not seated:
            raise UserError(nobody(job, left_out))
        plan = plan_of(view, job, self.model, seated, left_out, bound, one_batch=self.name in _ONE_BATCH)
        works = {device: self._pruning(work, arms[device], device, job) for device, work in plan.participants.items()}
        classes = ", ".join(f"{kind} {ratio:.0%}" for kind, ratio in sorted(self.ratios.items()))
        return replace(plan, participants=works, reason=f"{plan.reason}; pruned so far: {classes or 'nothing'}")

    def _seated(
        self, place: Seat, candidate: Candidate, view: FleetView, job: JobSpec, needs: Needs,
        pulls: dict[str, Pulls], sizes: tuple[int, ...],
    ) -> tuple[Arm, Seated] | str:  # fmt: skip
        """A participant with its arm; a text: why it takes no part. `sizes`: batches up to the job's."""
        kind = class_of(candidate.info)
        own = self.kept.get(place.device, _WHOLE).ratio
        # By the smallest weights every device prunes the same units by itself.
        before = own if self.name == "magprune" else max(own, self.ratios.get(kind, 0.0))
        least = min((sizes[-1] if self.name in _ONE_BATCH else sizes[0]), place.rows)
        bits: dict[int, tuple[Bits, str] | str] = {}

        def held(rank: int) -> tuple[Bits, str] | str:
            if rank not in bits:
                bits[rank] = choose_bits(place, needs.of(before, rank).need, job, self.model, least)
            return bits[rank]

        arm = self._arm(place.device, kind, (own, before), view, job, held, pulls)
        chosen = held(arm.rank) if arm is not None else held(LEAST)
        if arm is None or isinstance(chosen, str):
            return chosen if isinstance(chosen, str) else "no arm of its bandit fits its memory"
        # Its speed is that of the model in the middle of the round.
        ranked = needs.of((arm.before + arm.ratio) / 2, arm.rank)
        return arm, Seated(Draft(place, *chosen, least), ranked, _rank_reason(arm, job, kind))

    def _arm(
        self, device: str, kind: str, gone: tuple[float, float], view: FleetView, job: JobSpec, held: Held,
        pulls: dict[str, Pulls],
    ) -> Arm | None:  # fmt: skip
        """What the device is to do; None where its memory holds nothing of it. `gone`: on itself, and of its class."""
        own, before = gone
        target, strategy = max(before, job.strategy.prune), job.strategy
        choice, most = None, min(1.0, (target - before) / strategy.prune_step)
        rank, dp = strategy.rank, strategy.prune_step / 2
        if self.name in _BANDIT:
            if kind not in pulls:
                pulls[kind] = Pulls(self.bandits.get(kind, Bandit()))
            span = (most if self.name in _AT_ONCE else 0.0, most)
            choice = pulls[kind].choose(_draw(job.seed, view.round, device), _fits_by_rank(job, held), span)
            if choice is None:
                return None
            rank, dp = _rank(job, choice.at[1]), choice.at[0] * strategy.prune_step
        if self.name in _AT_ONCE:
            ratio = target
        elif self.name == "loraprune":
            done = min(1.0, view.round / max(1.0, job.rounds.count / 2))
            ratio = max(before, target * (1.0 - (1.0 - done) ** 3))
        else:
            ratio = min(target, before + dp)
        return Arm(own, before, ratio, rank, choice)

    def _pruning(self, work: Work, arm: Arm, device: str, job: JobSpec) -> Work:
        """`work` with what it prunes."""
        every = job.rounds.local_steps if self.name in _AT_ONCE else job.strategy.prune_every
        order = Pruning(
            ratio=round(arm.ratio, 6), kept=self.kept.get(device, _WHOLE).units,
            begin=round(arm.before, 6) if arm.before > arm.own else 0.0, every=every,
            criterion="magnitude" if self.name == "magprune" else "lora", heads=job.strategy.prune_heads,
        )  # fmt: skip
        return replace(work, prune=order, agents=1, reasons={**work.reasons, "prune": _prune_reason(arm, job)})


class Held(Protocol):
    """Bits that hold a rank, with the reason; a text: none do."""

    def __call__(self, rank: int) -> tuple[Bits, str] | str:
        """For this rank."""


class Needs:
    """Costs by ratio and rank, each worked out once in a plan."""

    def __init__(self, facts: ModelFacts, job: JobSpec, bound: int) -> None:
        self._facts, self._job, self._bound = facts, job, bound
        self._left: dict[float, ModelFacts] = {}
        self._known: dict[tuple[float, int], Ranked] = {}

    def of(self, ratio: float, rank: int) -> Ranked:
        """What a model with `ratio` gone and factors of `rank` asks."""
        key = round(ratio, 2), rank
        if key not in self._known:
            left = self._left.setdefault(key[0], facts_at(self._facts, key[0]))
            ranks, note = of_modules(left.modules, rank)
            self._known[key] = Ranked(rank, ranks, demand(left, self._job, ranks, self._bound), note)
        return self._known[key]


def _gain(facts: UpdateFacts) -> float:
    """dF: the share of its loss that a device's round took away."""
    first, last = facts.loss_first, facts.loss_last
    return min(1.0, max(0.0, (first - last) / first)) if first > 0 else 0.0


def _of_most(value: float, most: float) -> float:
    """`value` over `most`, at most 1."""
    return min(1.0, value / most) if most > 0 else 0.0


def _quantile(seen: Sequence[float]) -> float:
    return sorted(seen)[math.ceil(QUANTILE * len(seen)) - 1] if seen else 0.0


def _alone(candidate: Candidate) -> Candidate:
    """The device as the one agent of it that trains sees it."""
    if candidate.info.agents == 1:
        return candidate
    return replace(candidate, info=replace(candidate.info, agents=1))


def _fits_by_rank(job: JobSpec, held: Held) -> Callable[[float], bool]:
    """Whether the device holds an arm: its rank decides, and that is its height."""
    return lambda height: not isinstance(held(_rank(job, height)), str)


def _rank(job: JobSpec, height: float) -> int:
    """The rank at a height of the unit square: 2 at its bottom, the job's at its top, by the logarithm."""
    most = max(LEAST, job.strategy.rank)
    return min(most, round(LEAST * math.pow(most / LEAST, height)))


def _point(job: JobSpec, dp: float, rank: int) -> Point:
    """Where an arm lies in the unit square."""
    most = max(LEAST, job.strategy.rank)
    height = math.log(max(rank, LEAST) / LEAST) / math.log(most / LEAST) if most > LEAST else 0.0
    return min(1.0, max(0.0, dp / job.strategy.prune_step)), min(1.0, height)


def _draw(seed: int, round: int, device: str) -> tuple[float, float, float]:
    """Three numbers in [0, 1) for a device and round."""
    digest = hashlib.sha256(f"{seed}/{round}/{device}/arm".encode()).digest()
    one, two, three = (int.from_bytes(digest[start : start + 6], "little") / 2**48 for start in (0, 6, 12))
    return one, two, three


def _why(arm: Arm, kind: str) -> str:
    if arm.choice is None:
        return "the same for every device"
    bonus = "unknown" if math.isinf(arm.choice.bonus) else f"{arm.choice.bonus:.3f}"
    at = f"({arm.choice.at[0]:.2f}, {arm.choice.at[1]:.2f})"
    return f"arm {at} of {kind}: estimate {arm.choice.estimate:.3f} + bonus {bonus}"


def _rank_reason(arm: Arm, job: JobSpec, kind: str) -> str:
    return word("rank", arm.rank, _why(arm, kind), f"{max(LEAST, job.strategy.rank)} at most")


def _prune_reason(arm: Arm, job: JobSpec) -> str:
    reading = f"{arm.before:.1%} was gone, {arm.ratio - arm.before:.1%} goes"
    return word("prune", round(100 * arm.ratio), reading, f"{max(arm.before, job.strategy.prune):.0%} in the end")
