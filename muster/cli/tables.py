"""What the commands print about jobs, rounds and devices."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.table import Table
from rich.text import Text

from coordinator.core.facts import Metrics
from coordinator.web.views import DeviceView, JobView, ParticipantView, RoundView
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
    """How a job ended, from its base to its best round."""
    before = f", before training {quality(job.baseline)}" if job.baseline else ""
    return status_line(job) + before


def jobs(found: Sequence[JobView]) -> Table:
    """All jobs."""
    table = new_table("job", "state", "round", "strategy", "before", "best", "reason")
    for job in found:
        table.add_row(
            job.id, job.state, f"{job.round}/{job.rounds_total}", job.strategy, quality(job.baseline),
            quality(job.best), job.reason,
        )  # fmt: skip
    return table


def rounds(job: JobView) -> Table:
    """The rounds of a job."""
    table = new_table("round", "phase", "quality", "gate", "devices", "updates", "seconds", "overhead", "adapter")
    for view in job.rounds:
        counted = sum(part.status == "done" for part in view.participants)
        gate = "-" if view.accepted is None else "accepted" if view.accepted else f"refused: {view.gate_reason}"
        table.add_row(
            str(view.round), view.phase, quality(view.metrics), gate, str(len(view.participants)), str(counted),
            f"{view.seconds:.1f}", f"{view.overhead_s:.1f}", size(view.adapter_bytes),
        )  # fmt: skip
    return table


def round_in_full(view: RoundView) -> Iterator[Table | Text]:
    """One round: the plan against reality, then the reason of each number."""
    yield Text(f"\nround {view.round}: {view.plan_reason}", style="bold")
    table = new_table(
        "device", "status", "rank", "batch", "bits", "steps", "predicted", "trained", "loss", "sent", "reason"
    )
    for part in view.participants:
        table.add_row(*_plan_and_reality(part))
    yield table
    for part in view.participants:
        for name, reason in part.work.reasons.items():
            yield Text(f"{part.device} {name}: {reason}")
    for refused in view.refused_updates:
        yield Text(f"refused update: {refused}")
    if view.closed_reason:
        yield Text(f"closed: {view.closed_reason}")


def devices(found: Sequence[DeviceView]) -> Table:
    """The devices and their load."""
    table = new_table(
        "device", "state", "seen", "cores", "own", "foreign", "throttled", "memory free", "heat", "GPUs", "work"
    )
    for device in found:
        load = device.load
        cells = ["-"] * 6
        if load is not None:
            cells = [
                f"{load.cores:.2f}", f"{load.own_cores:.2f}", f"{load.foreign_cores:.2f}", f"{load.throttled:.0%}",
                f"{size(load.memory_available)} of {size(load.memory_limit)}",
                "-" if load.temperature_c is None else f"{load.temperature_c:.0f} °C",
            ]  # fmt: skip
        gpus = len(device.info.gpus) if device.info else 0
        problem = device.info.problem if device.info else ""
        table.add_row(device.device, device.state, f"{device.age_s:.0f} s", *cells, str(gpus), problem or device.work)
    return table


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


def size(count: int) -> str:
    """Bytes in the largest unit that leaves a whole number before the point."""
    left = float(count)
    for unit in ("B", "kB", "MB"):
        if left < 1000:
            return f"{left:.0f} {unit}" if unit == "B" or left >= 100 else f"{left:.1f} {unit}"
        left /= 1000
    return f"{left:.2f} GB"


def new_table(*columns: str) -> Table:
    """A table as all of them look."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in columns:
        table.add_column(name, overflow="fold")
    return table
