"""The durable state of a job, as the fold of its records. Pure; a restart replays the log through `apply`."""

from __future__ import annotations

from typing import Literal

import msgspec
from msgspec.structs import replace
from typing_extensions import assert_never

from coordinator.core import records as rec
from coordinator.core.facts import Metrics, ModelFacts
from coordinator.core.gate import comparable, reached
from coordinator.core.planning import registry
from coordinator.core.planning.base import Plan, Planner, RoundReport
from shared.errors import MusterError
from shared.jobs import JobSpec
from shared.messages import BlobRef, DeviceInfo, Load, UpdateFacts

Phase = Literal[
    "queued", "preparing", "baseline", "waiting", "open", "folding", "evaluating", "exporting",
    "paused", "finished", "cancelled", "failed",
]  # fmt: skip
TERMINAL: frozenset[str] = frozenset({"finished", "cancelled", "failed"})
"""Nothing happens to a job any more."""
IDLE: frozenset[str] = TERMINAL | {"queued", "paused"}
"""The job does not hold the fleet."""

Outcome = Literal["assigned", "done", "refused", "failed"]
UPDATE_REFUSED = "update refused: "
"""Before the reason of a participant whose update, not whose answer, was."""


class Participant(msgspec.Struct, frozen=True, kw_only=True):
    """One device in the current round, as far as it is written down."""

    outcome: Outcome = "assigned"
    reason: str = ""
    blob: BlobRef | None = None
    facts: UpdateFacts | None = None
    out_of_memory: bool = False
    batch_limit: int = 0
    """Largest batch that fits, where memory ran out; 0: none did."""


class Round(msgspec.Struct, frozen=True, kw_only=True):
    """The current round from its plan to its commit."""

    number: int
    attempt: int
    plan: Plan
    digest: str
    loads: dict[str, Load]
    participants: dict[str, Participant]
    planned_ts: float = 0.0
    """Wall-clock seconds; a restart takes what is left of the deadline from it."""
    counted: tuple[str, ...] = ()
    """Devices whose updates are folded, once closed."""
    folded: BlobRef | None = None
    lower: BlobRef | None = None
    """Of `folded`, what devices of a split model need."""
    residual: BlobRef | None = None
    top: tuple[rec.TopUpdate, ...] = ()
    """Of the top worker, once its steps are done (split learning)."""

    @property
    def split(self) -> bool:
        """Whether the devices have the lower part of the model alone."""
        return any(work.split is not None for work in self.plan.participants.values())


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """One job. Bounded in size: committed rounds live in the log, not here."""

    id: str
    spec: JobSpec
    phase: Phase
    planner: Planner
    reason: str = ""
    facts: ModelFacts | None = None
    adapter: BlobRef | None = None
    lower: BlobRef | None = None
    """Of `adapter`, what devices of a split model need; None: all."""
    residual: BlobRef | None = None
    committed: int = 0
    """Rounds that are over."""
    attempt: int = 0
    """Of the next or current round; rises when a round is repeated."""
    round: Round | None = None
    baseline: Metrics | None = None
    """Of the untuned base."""
    judged: tuple[Metrics, ...] = ()
    """What the gate needs: the best accepted metrics, of models as small as the last one."""
    metrics: Metrics | None = None
    """Of `adapter`; the best may be those of an earlier round."""
    refusals: int = 0
    resume_to: Phase = "waiting"
    """Where a paused job goes on."""
    settled: frozenset[tuple[int, str, str]] = frozenset()
    """(round, device, sha) of the updates that the last committed round counted; asked again, they are stored."""
    export_path: str = ""
    told: dict[str, DeviceInfo] = {}
    """What the records of its plans tell of each device, as last told."""

    @property
    def fetched(self) -> BlobRef | None:
        """What a device fetches of the global adapter."""
        return self.lower or self.adapter


class BrokenLog(MusterError):
    """The event log contradicts itself; an operator must look at it."""


def apply(job: Job | None, record: rec.JobRecord) -> Job:
    """`job` after `record`. Raises `BrokenLog` for a record that does not fit the state it meets."""
    if isinstance(record, rec.JobSubmitted):
        if job is not None:
            raise BrokenLog(f"job {record.job} submitted twice")
        planner = registry.create(record.spec.strategy)
        return Job(id=record.job, spec=record.spec, phase="queued", planner=planner)
    if job is None:
        raise BrokenLog(f"{type(record).__name__} of the unknown job {record.job}")
    match record:
        case rec.JobStarted():
            return replace(job, phase="preparing")
        case rec.JobPrepared():
            phase: Phase = "baseline" if job.spec.evaluation.data else "waiting"
            return replace(job, phase=phase, facts=record.facts, adapter=record.adapter, lower=record.lower)
        case rec.BaselineEvaluated():
            return replace(
                job, phase="waiting", baseline=record.metrics, judged=(record.metrics,), metrics=record.metrics
            )
        case rec.RoundPlanned():
            told = {**job.told, **record.infos}
            return replace(job, phase="open", attempt=record.attempt, round=_planned(record), told=told)
        case rec.DeviceAnswered() | rec.UpdateAdmitted() | rec.UpdateRefused() | rec.TopTrained():
            return replace(job, round=_answered(_current(job, record.round), record))
        case rec.RoundClosed():
            closed = replace(_current(job, record.round), counted=tuple(record.devices))
            return replace(job, phase="folding", round=closed)
        case rec.RoundRepeated():
            learned = job.planner.learn(report(job, _current(job, record.round)))
            return replace(
                job, phase="waiting", round=None, attempt=record.attempt, reason=record.reason, planner=learned
            )
        case rec.RoundFolded():
            current = _current(job, record.round)
            folded = replace(current, folded=record.adapter, lower=record.lower, residual=record.residual)
            return replace(job, phase="evaluating", round=folded)
        case rec.RoundCommitted():
            return _committed(job, record)
        case rec.JobExported():
            return replace(job, export_path=record.path)
        case rec.JobEnded():
            return _ended(job, record)
        case rec.JobResumed():
            return replace(job, phase=job.resume_to, reason="", refusals=0)
        case _:
            assert_never(record)


def _planned(record: rec.RoundPlanned) -> Round:
    return Round(
        number=record.round,
        attempt=record.attempt,
        plan=record.plan,
        digest=record.digest,
        loads=record.loads,
        planned_ts=record.ts,
        participants={device: Participant() for device in sorted(record.plan.participants)},
    )


def _current(job: Job, number: int) -> Round:
    if job.round is None or job.round.number != number:
        raise BrokenLog(f"job {job.id}: a record of round {number} in phase {job.phase}")
    return job.round


def _answered(
    round: Round, record: rec.DeviceAnswered | rec.UpdateAdmitted | rec.UpdateRefused | rec.TopTrained
) -> Round:
    if isinstance(record, rec.TopTrained):
        return replace(round, top=tuple(record.updates))
    if record.device not in round.participants:
        raise BrokenLog(f"round {round.number}: {record.device} takes no part")
    if round.participants[record.device].outcome == "done":
        raise BrokenLog(f"round {round.number}: {record.device} has already delivered")
    match record:
        case rec.DeviceAnswered():
            part = Participant(
                outcome=record.verdict,
                reason=record.reason,
                out_of_memory=record.out_of_memory,
                batch_limit=record.batch_limit,
            )
        case rec.UpdateRefused():
            part = Participant(outcome="refused", reason=UPDATE_REFUSED + record.reason)
        case rec.UpdateAdmitted():
            limit = record.facts.batch_limit
            part = Participant(
                outcome="done", blob=record.blob, facts=record.facts, out_of_memory=limit > 0, batch_limit=limit
            )
        case _:
            assert_never(record)
    return replace(round, participants={**round.participants, record.device: part})


def _ended(job: Job, record: rec.JobEnded) -> Job:
    if record.state != "paused":
        return replace(job, phase=record.state, reason=record.reason, round=None)
    resume_to: Phase = job.phase if job.phase in ("folding", "evaluating", "exporting") else "waiting"
    return replace(job, phase="paused", reason=record.reason, resume_to=resume_to)


def _committed(job: Job, record: rec.RoundCommitted) -> Job:
    round = _current(job, record.round)
    rounds = job.spec.rounds
    last = record.round >= rounds.count or bool(record.accepted and reached(record.metrics, rounds.target))
    done: Phase = "exporting" if last else "waiting"
    parts = ((device, round.participants[device].blob) for device in round.counted)
    counted = {(round.number, device, blob.sha) for device, blob in parts if blob}
    job = replace(
        job, settled=frozenset(counted), phase=done, round=None, committed=record.round, attempt=0,
        reason=record.reason, planner=job.planner.learn(report(job, round, accepted=record.accepted)),
    )  # fmt: skip
    if record.accepted:
        judged = job.judged if record.metrics is None else _best(job.judged, record.metrics)
        return replace(
            job, adapter=round.folded, lower=round.lower, residual=round.residual, refusals=0, judged=judged,
            metrics=record.metrics,
        )  # fmt: skip
    return replace(job, refusals=job.refusals + 1)


def _best(judged: tuple[Metrics, ...], new: Metrics) -> tuple[Metrics, ...]:
    """The accepted metrics with the lowest loss, alone: all the gate compares with, for no model grows again."""
    return (min((*comparable(judged, new), new), key=lambda metrics: metrics.loss),)


def report(job: Job, round: Round, *, accepted: bool = True) -> RoundReport:
    """What the planner learns from `round`. `accepted`: whether the gate let its aggregate pass."""
    counted = set(round.counted)
    results = {d: p.facts for d, p in round.participants.items() if p.facts is not None and d in counted}
    limits = {d: p.batch_limit for d, p in round.participants.items() if p.out_of_memory}
    return RoundReport(
        round=round.number,
        works=round.plan.participants,
        results=results,
        batch_limits=limits,
        infos={device: job.told[device] for device in round.plan.participants if device in job.told},
        loads=round.loads,
        facts=job.facts,
        job=job.spec,
        adapter_bytes=job.fetched.size if job.fetched else 0,
        accepted=accepted,
    )
