"""Several agents, one a GPU, that the session takes for one. Pure: `(team, message) -> Turn`.

Three rules:
1. An order goes to every agent that it concerns; the team answers it once, when all of them have.
2. A sign of life is passed on once every agent at work gave one: a hang of one is not hidden by the others.
3. Work that some could not do counts with what the others did.

Each agent does the same work on its own share of the rows, from the same start. Their updates become one: the mean of
what they add to the model, weighted by samples (`edge_daemon.training.merging`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import msgspec

from edge_daemon.protocol import (
    Beat,
    Evaluate,
    Evaluated,
    Failed,
    FromAgent,
    Merge,
    Merged,
    Partial,
    Pause,
    Probe,
    Probed,
    Progressed,
    Resume,
    Shutdown,
    StepIn,
    StepOut,
    Stop,
    ToAgent,
    Train,
    Trained,
    Unfit,
)
from shared.messages import UpdateFacts

CPU = "cpu"
"""In the place of a GPU's UUID: an agent on the CPU."""


@dataclass(frozen=True, kw_only=True)
class Member:
    """One agent. `busy`: an answer is due from it."""

    gpu: str
    busy: bool = True
    heard: bool = False
    """It gave a sign of life since the team last did."""
    probed: Probed | None = None
    progress: Progressed | None = None
    news: bool = False
    """It told its progress since the team last did."""
    answer: Trained | Failed | None = None

    @property
    def fit(self) -> bool:
        """Whether it has proven that it can train."""
        return self.probed is not None and bool(self.probed.bits)


@dataclass(frozen=True, kw_only=True)
class Team:
    """All agents of a device. `order`: the work under way."""

    members: tuple[Member, ...]
    order: Train | None = None
    discarding: bool = False
    merging: bool = False


class Turn(NamedTuple):
    """What follows from a message: what to tell which agents, and what the team says to the session."""

    team: Team
    orders: list[tuple[int, ToAgent]] = []
    said: FromAgent | None = None


def assemble(probe: Probe, gpus: Sequence[str]) -> Turn:
    """Begin with an agent for each of `gpus` (`CPU`: one on the CPU), at least one; they share the threads."""
    names = list(gpus) or [CPU]
    threads = max(1, probe.threads // len(names))
    orders: list[tuple[int, ToAgent]] = [
        (
            index,
            # All of them read the same files: one description is enough.
            msgspec.structs.replace(
                probe, gpu="" if gpu == CPU else gpu, threads=threads, datasets=probe.datasets if index == 0 else {}
            ),
        )
        for index, gpu in enumerate(names)
    ]
    return Turn(Team(members=tuple(Member(gpu=gpu) for gpu in names)), orders)


def tell(team: Team, message: ToAgent) -> Turn:
    """An order of the session to the team."""
    match message:
        case Train():
            return _begin(team, message)
        case Evaluate():
            return _evaluate(team, message)
        case StepIn():
            return Turn(team, [(index, message) for index, member in enumerate(team.members) if member.busy])
        case Stop() | Pause() | Resume():
            busy = [(index, message) for index, member in enumerate(team.members) if member.busy]
            discarding = team.discarding or (isinstance(message, Stop) and message.discard)
            return Turn(replace(team, discarding=discarding), [*busy])
        case Shutdown():
            return Turn(team, [(index, message) for index in range(len(team.members))])
        case Probe() | Merge():
            raise TypeError(f"{type(message).__name__} is the team's own business")


def hear(team: Team, index: int, message: FromAgent) -> Turn:
    """What agent `index` said."""
    match message:
        case Beat():
            return _signs(_with(team, index, heard=True))
        case StepOut():
            return Turn(_with(team, index, heard=True), [], message)
        case Progressed():
            return _signs(_with(team, index, heard=True, news=True, progress=message))
        case Probed():
            return _probed(_with(team, index, busy=False, probed=message))
        case Trained():
            return _answered(_with(team, index, busy=False, answer=message))
        case Failed():
            if team.merging:
                return Turn(_idle(team), [], message)
            return _answered(_with(team, index, busy=False, answer=message))
        case Merged():
            return Turn(_idle(team), [], _merged(team, message))
        case Evaluated() | Unfit():
            return Turn(_idle(team), [], message)


def _begin(team: Team, order: Train) -> Turn:
    """Give every agent that is to work its part; a single one gets the order as it is."""
    workers = [index for index, member in enumerate(team.members) if member.fit][: order.assignment.work.agents]
    if len(workers) < 2:
        workers = workers or [0]
        orders: list[tuple[int, ToAgent]] = [(workers[0], order)]
    else:
        orders = [
            (
                index,
                msgspec.structs.replace(
                    order, part=part, parts=len(workers), update_path=_part_path(order, part, "update.adapter"),
                    checkpoint_dir=_part_path(order, part, ""),
                ),
            )
            for part, index in enumerate(workers)
        ]  # fmt: skip
    members = tuple(
        replace(member, busy=index in workers, heard=False, news=False, progress=None, answer=None)
        for index, member in enumerate(team.members)
    )
    return Turn(Team(members=members, order=order), orders)


def _evaluate(team: Team, order: Evaluate) -> Turn:
    """One agent measures a release; the others rest."""
    worker = next((index for index, member in enumerate(team.members) if member.fit), 0)
    members = tuple(replace(member, busy=index == worker) for index, member in enumerate(_idle(team).members))
    return Turn(Team(members=members), [(worker, order)])


def _part_path(order: Train, part: int, name: str) -> str:
    return f"{order.checkpoint_dir}/part-{part}/{name}".rstrip("/")


def _answered(team: Team) -> Turn:
    """One more agent is through: wait for the others, then answer or have the updates merged."""
    if any(member.busy for member in team.members):
        return _signs(team)
    answers = [member.answer for member in team.members if member.answer is not None]
    trained = [(index, m.answer) for index, m in enumerate(team.members) if isinstance(m.answer, Trained)]
    order = team.order
    if len(answers) == 1 or order is None:
        return Turn(_idle(team), [], answers[0])
    if team.discarding:
        return Turn(_idle(team), [], _discarded(order))
    if not trained:
        return Turn(_idle(team), [], _gravest(answer for answer in answers if isinstance(answer, Failed)))
    merge = Merge(
        assignment=order.assignment,
        partials=[
            Partial(update_path=_part_path(order, part, "update.adapter"), samples=member.answer.facts.samples)
            for part, member in enumerate(member for member in team.members if member.answer is not None)
            if isinstance(member.answer, Trained)
        ],
        adapter_path=order.adapter_path,
        update_path=order.update_path,
    )
    first = trained[0][0]
    return Turn(replace(_with(team, first, busy=True, heard=False), merging=True), [(first, merge)])


def _gravest(failures: Iterable[Failed]) -> Failed:
    """Out of memory tells the planner most, and the smallest batch binds; any other failure as it came."""
    return min(failures, key=lambda failed: (failed.kind != "memory", failed.batch_limit))


def _discarded(order: Train) -> Failed:
    work = order.assignment
    return Failed(job=work.job, round=work.round, attempt=work.attempt, kind="stopped", reason="discarded as asked")


def _merged(team: Team, merged: Merged) -> Trained:
    """The team's answer: the merged file, and what all that are in it measured."""
    assert team.order is not None
    work = team.order.assignment
    parts = [member.answer.facts for member in team.members if isinstance(member.answer, Trained)]
    failures = [member.answer for member in team.members if isinstance(member.answer, Failed)]
    # What did not fit one of them must not be asked of any again.
    limits = [max(1, failed.batch_limit) for failed in failures if failed.kind == "memory"]
    facts = msgspec.structs.replace(combine(parts, limits), norm=merged.norm)
    return Trained(
        job=work.job, round=work.round, attempt=work.attempt, sha=merged.sha, size=merged.size, facts=facts
    )  # fmt: skip


def combine(parts: Sequence[UpdateFacts], limits: Sequence[int] = ()) -> UpdateFacts:
    """The facts of a merged update, its norm left out: samples summed, losses and importance weighted by them, the
    rest as of the slowest agent, memory as of the largest. `limits`: batches that fit agents whose part is missing."""
    # Not by the time of all steps: where they end together a faster agent has done more of them.
    slowest = max(parts, key=lambda facts: facts.train_s / facts.steps if facts.steps else facts.step_s)
    samples = sum(facts.samples for facts in parts)
    limits = [*limits, *(facts.batch_limit for facts in parts if facts.batch_limit)]
    return msgspec.structs.replace(
        slowest,
        samples=samples,
        agents=len(parts),
        batch_limit=min(limits, default=0),
        loss_first=sum(facts.loss_first * facts.samples for facts in parts) / samples,
        loss_last=sum(facts.loss_last * facts.samples for facts in parts) / samples,
        load_s=max(facts.load_s for facts in parts),
        peak_bytes=max(facts.peak_bytes for facts in parts),
        base_bytes=max(facts.base_bytes for facts in parts),
        cores_used=sum(facts.cores_used for facts in parts) / len(parts),
        ended=next((facts.ended for facts in parts if facts.ended != "complete"), "complete"),
        norm=0.0,
        importance=_mean_importance(parts),
    )


def _mean_importance(parts: Sequence[UpdateFacts]) -> dict[str, float]:
    """Mean share of each module over the agents that scored, by samples; one that lacks the module has 0."""
    scored = [facts for facts in parts if facts.importance and facts.samples]
    samples = sum(facts.samples for facts in scored)
    return {
        name: min(1.0, sum(facts.samples * facts.importance.get(name, 0.0) for facts in scored) / samples)
        for name in sorted({name for facts in scored for name in facts.importance})
    }


def _signs(team: Team) -> Turn:
    """Pass a sign of life on, if every agent at work gave one."""
    busy = [member for member in team.members if member.busy]
    if not busy or not all(member.heard for member in busy):
        return Turn(team)
    quiet = replace(team, members=tuple(replace(member, heard=False, news=False) for member in team.members))
    if not any(member.news for member in team.members):
        return Turn(quiet, [], Beat(what="working"))
    told = [member.progress for member in team.members if member.progress is not None]
    return Turn(
        quiet,
        [],
        Progressed(
            step=min(progress.step for progress in told),
            steps=told[0].steps,
            samples=sum(progress.samples for progress in told),
            loss=sum(progress.loss for progress in told) / len(told),
            samples_per_s=sum(progress.samples_per_s for progress in told),
            batch=max(progress.batch for progress in told),
        ),
    )


def _probed(team: Team) -> Turn:
    """Once all are probed: what every agent that can train at all has proven."""
    if any(member.busy for member in team.members):
        return _signs(team)
    found = [(member.gpu, member.probed) for member in team.members if member.probed is not None]
    if len(found) == 1:
        return Turn(team, [], found[0][1])
    fit = [probed for _, probed in found if probed.bits]
    names = [probed.hardware for probed in fit]
    return Turn(
        team,
        [],
        Probed(
            bits=[bits for bits in fit[0].bits if all(bits in other.bits for other in fit)] if fit else [],
            notes={
                # The first one's stand for the data sets, too, by their names.
                (f"{gpu}: {name}" if index else name): note
                for index, (gpu, probed) in enumerate(found)
                for name, note in probed.notes.items()
            },
            datasets=found[0][1].datasets,
            agents=max(1, len(fit)),
            agent_bytes=max(probed.agent_bytes for _, probed in found),
            flops=min((probed.flops for probed in fit), default=0.0),
            hardware=", ".join(f"{names.count(name)} x {name}" for name in dict.fromkeys(names)),
        ),
    )


def _with(team: Team, index: int, **changes: Any) -> Team:
    members = list(team.members)
    members[index] = replace(members[index], **changes)
    return replace(team, members=tuple(members))


def _idle(team: Team) -> Team:
    members = tuple(
        replace(member, busy=False, heard=False, news=False, progress=None, answer=None) for member in team.members
    )
    return Team(members=members)
