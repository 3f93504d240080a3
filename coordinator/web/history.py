"""Views of jobs, built from their records: what was planned, what came of it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from msgspec.structs import replace

from coordinator.core import records as rec
from coordinator.core.gate import comparable
from coordinator.core.job import Job
from coordinator.web.views import JobView, ParticipantView, RoundView


@dataclass
class _Story:
    """What the records tell of one job so far."""

    view: JobView
    rounds: dict[int, RoundView] = field(default_factory=dict)
    adapter_bytes: int = 0
    folded_bytes: int = 0
    planned_ts: float = 0.0


def job_view(records: Iterable[rec.AnyRecord], job: Job, notice: str = "") -> JobView:
    """The whole story of `job`, with all its rounds."""
    story = _Story(JobView(id=job.id, name=job.spec.name, state=job.phase))
    for record in records:
        _tell(story, record)
    rounds = [story.rounds[number] for number in sorted(story.rounds)]
    return replace(
        story.view, reason=notice or job.reason, strategy=job.spec.strategy.name, rounds_total=job.spec.rounds.count,
        round=job.round.number if job.round else job.committed, rounds=rounds, exported=bool(job.export_path),
    )  # fmt: skip


def summary(job: Job, notice: str = "") -> JobView:
    """`job` without its rounds, from the live state alone."""
    return JobView(
        id=job.id, name=job.spec.name, state=job.phase, reason=notice or job.reason,
        strategy=job.spec.strategy.name, round=job.round.number if job.round else job.committed,
        rounds_total=job.spec.rounds.count, baseline=job.baseline, best=job.judged[0] if job.judged else None,
        exported=bool(job.export_path),
    )  # fmt: skip


def _tell(story: _Story, record: rec.AnyRecord) -> None:
    match record:
        case rec.JobSubmitted():
            story.view = replace(story.view, submitted=record.ts)
        case rec.JobPrepared():
            story.adapter_bytes = record.adapter.size
        case rec.BaselineEvaluated():
            story.view = replace(story.view, baseline=record.metrics, best=record.metrics)
        case rec.RoundPlanned():
            _tell_plan(story, record)
        case rec.DeviceAnswered():
            _tell_device(story, record.round, record.device, status=record.verdict, reason=record.reason)
        case rec.UpdateAdmitted():
            _tell_device(
                story, record.round, record.device, status="done", reason="", facts=record.facts,
                update_bytes=record.blob.size,
            )  # fmt: skip
        case rec.UpdateRefused():
            _tell_device(story, record.round, record.device, status="refused", reason=f"update: {record.reason}")
            old = story.rounds[record.round]
            refused = [*old.refused_updates, f"{record.device}: {record.reason}"]
            story.rounds[record.round] = replace(old, refused_updates=refused)
        case rec.TopTrained():
            _tell_round(story, record.round, top=_of_top(record))
        case rec.RoundClosed():
            _tell_round(story, record.round, phase="folding", closed_reason=record.reason)
            for part in story.rounds[record.round].participants:
                if part.status == "assigned":
                    _tell_device(
                        story, record.round, part.device, status="silent", reason="nothing came before the close"
                    )
        case rec.RoundRepeated():
            _tell_round(story, record.round, phase="repeated", closed_reason=record.reason)
        case rec.RoundFolded():
            story.folded_bytes = record.adapter.size
            _tell_round(
                story, record.round, phase="evaluating", adapter=record.adapter.sha, adapter_bytes=record.adapter.size,
                lost_energy=record.lost_energy,
            )  # fmt: skip
        case rec.RoundCommitted():
            _tell_commit(story, record)
        case _:
            pass


def _tell_plan(story: _Story, record: rec.RoundPlanned) -> None:
    story.planned_ts = record.ts
    participants = [
        ParticipantView(
            device=device,
            work=work,
            attempt=record.attempt,
            predicted_s=record.plan.predicted_s.get(device, 0.0),
            adapter_bytes=story.adapter_bytes,
        )  # fmt: skip
        for device, work in sorted(record.plan.participants.items())
    ]
    story.rounds[record.round] = RoundView(
        round=record.round, phase="open", plan_digest=record.digest, plan_reason=record.plan.reason,
        participants=participants, weights=record.plan.weights,
    )  # fmt: skip


def _of_top(record: rec.TopTrained) -> str:
    samples = sum(update.samples for update in record.updates)
    tops = "" if len(record.updates) == 1 else f", {len(record.updates)} top models"
    late = f", {record.dropped} times without a device that was late" if record.dropped else ""
    return (
        f"{record.steps} steps, {samples} samples, loss {record.loss:.3f}{tops}{late}; "
        f"it waited {record.waited_s:.1f} s for features"
    )


def _tell_commit(story: _Story, record: rec.RoundCommitted) -> None:
    old = story.rounds[record.round]
    seconds = record.ts - story.planned_ts
    slowest = max(
        (p.facts.train_s + p.facts.paused_s + p.facts.load_s for p in old.participants if p.facts is not None),
        default=0.0,
    )
    _tell_round(
        story, record.round, phase="committed", metrics=record.metrics, accepted=record.accepted,
        gate_reason=record.reason, seconds=seconds, overhead_s=max(0.0, seconds - slowest),
    )  # fmt: skip
    if not record.accepted:
        return
    story.adapter_bytes = story.folded_bytes
    if record.metrics is not None:
        best = [] if story.view.best is None else comparable([story.view.best], record.metrics)
        story.view = replace(story.view, best=min((*best, record.metrics), key=lambda metrics: metrics.loss))


def _tell_round(story: _Story, number: int, **changes: object) -> None:
    story.rounds[number] = replace(story.rounds[number], **changes)


def _tell_device(story: _Story, number: int, device: str, **changes: object) -> None:
    old = story.rounds[number]
    participants = [replace(p, **changes) if p.device == device else p for p in old.participants]
    story.rounds[number] = replace(old, participants=participants)
