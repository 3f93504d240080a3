"""What the commands print about jobs and rounds; of devices: `device_tables`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.table import Table
from rich.text import Text

from coordinator.core.facts import Metrics
from coordinator.web.views import JobView, ParticipantView, RoundView
from shared.messages import Work


def quality(metrics: Metrics | None) -> str:
    """Accuracy or perplexity, and the loss; "-" where nothing was evaluated."""
    if metrics is None:
        return "-"
    if metrics.accuracy is not None:
        return f"accuracy {metrics.accuracy:.3f}, loss {metrics.loss:.3f}"
    if metrics.perplexity is not None:
        return f"perplexity {metrics.perplexity:.2f}"
    return f"loss {metrics.loss:.4f}"


def ranks(work: Work) -> str:
    """The ranks of a device's modules, from the lowest to the highest."""
    tuned = [rank for rank in work.ranks.values() if rank]
    if not tuned:
        return "0"
    low, high = min(tuned), max(tuned)
    return str(low) if low == high else f"{low}-{high}"


def status_line(job: JobView) -> str:
    """A job in one line."""
    line = f"{job.id}: {job.state}, round {job.round} of {job.rounds_total}"
    if job.best is not None:
        line += f", best {quality(job.best)}"
    return f"{line} ({job.reason})" if job.reason else line


def outcome(job: JobView) -> str:
    """How a job ended: from its base to its best round, and to the last accepted one, whose adapter is the job's."""
    before = f", before training {quality(job.baseline)}" if job.baseline else ""
    return status_line(job) + before + (f"; the adapter is {kept(job)}" if kept(job) else "")


def kept(job: JobView) -> str:
    """Which round the job's adapter is of, with its quality; "" where no round was accepted."""
    accepted = [view for view in job.rounds if view.accepted]
    return f"round {accepted[-1].round}'s, {quality(accepted[-1].metrics)}" if accepted else ""


def jobs(found: Sequence[JobView]) -> Table:
    """All jobs."""
    made = table("job", "state", "round", "strategy", "before", "best", "reason")
    for job in found:
        made.add_row(
            job.id, job.state, f"{job.round}/{job.rounds_total}", job.strategy, quality(job.baseline),
            quality(job.best), job.reason,
        )  # fmt: skip
    return made


def rounds(job: JobView) -> Table:
    """The rounds of a job."""
    made = table("round", "phase", "quality", "gate", "devices", "updates", "seconds", "overhead", "adapter")
    for view in job.rounds:
        counted = sum(part.status == "done" for part in view.participants)
        gate = "-" if view.accepted is None else "accepted" if view.accepted else f"refused: {view.gate_reason}"
        made.add_row(
            str(view.round), view.phase, quality(view.metrics), gate, str(len(view.participants)), str(counted),
            f"{view.seconds:.1f}", f"{view.overhead_s:.1f}", size(view.adapter_bytes),
        )  # fmt: skip
    return made


def round_in_full(view: RoundView) -> Iterator[Table | Text]:
    """One round: the plan against reality, then the reason of each number."""
    yield Text(f"\nround {view.round}: {view.plan_reason}", style="bold")
    made = table("device", "status", "rank", "batch", "bits", "steps", "predicted", "trained", "loss", "sent", "reason")
    for part in view.participants:
        made.add_row(*_plan_and_reality(part))
    yield made
    for part in view.participants:
        for name, reason in part.work.reasons.items():
            yield Text(f"{part.device} {name}: {reason}")
    for note in notes(view):
        yield Text(note)
    for refused in view.refused_updates:
        yield Text(f"refused update: {refused}")
    if view.closed_reason:
        yield Text(f"closed: {view.closed_reason}")


def notes(view: RoundView) -> list[str]:
    """What came of the plan that no column of its table tells."""
    told = [(part.device, part.facts.requantized) for part in view.participants if part.facts is not None]
    top = [f"top worker: {view.top}"] if view.top else []
    return top + [
        f"{device} prune: quantizing its smaller layers anew leaves their weights {error:.2%} off the stored ones"
        for device, error in told
        if error
    ]


def _plan_and_reality(part: ParticipantView) -> list[str]:
    work, facts = part.work, part.facts
    batch = str(work.batch) if facts is None or facts.batch == work.batch else f"{work.batch} -> {facts.batch}"
    steps = str(work.steps) if facts is None or facts.steps == work.steps else f"{work.steps} -> {facts.steps}"
    return [
        part.device, part.status, ranks(work), batch, str(work.bits), steps,
        f"{part.predicted_s:.1f} s" if part.predicted_s else "-",
        f"{facts.train_s:.1f} s" if facts else "-",
        f"{facts.loss_first:.3f} -> {facts.loss_last:.3f}" if facts else "-",
        size(part.update_bytes) if part.update_bytes else "-",
        part.reason,
    ]  # fmt: skip


def size(count: int | None) -> str:
    """Bytes in the largest unit that leaves a whole number before the point; "-" where they are not known."""
    if count is None:
        return "-"
    amount = float(count)
    for unit in ("B", "kB", "MB"):
        if amount < 1000:
            return f"{amount:.0f} {unit}" if unit == "B" or amount >= 100 else f"{amount:.1f} {unit}"
        amount /= 1000
    return f"{amount:.2f} GB"


def table(*columns: str) -> Table:
    """An empty table of these columns."""
    made = Table(box=None, pad_edge=False, header_style="bold")
    for name in columns:
        made.add_column(name, overflow="fold")
    return made
