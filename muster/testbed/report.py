"""The report of an emulated run: `report.md` and two plots beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coordinator.core.aggregation.registry import name_of
from coordinator.core.facts import Metrics
from coordinator.core.planning.base import Weights
from coordinator.web.views import JobView, ParticipantView, RoundView
from muster.cli import tables
from muster.testbed.cgroups import Available
from muster.testbed.profiles import MIB, Shape
from shared.files import write_whole
from shared.jobs import JobSpec

QUALITY_PNG, DEVICES_PNG = "quality.png", "devices.png"


@dataclass(frozen=True)
class Run:
    """What the report tells of a run besides its job."""

    command: str
    spec: JobSpec
    job: JobView
    shapes: Sequence[Shape]
    rows: Mapping[str, int]
    """Rows of each device's share."""
    available: Available
    committed_s: Mapping[int, float]
    """Round -> seconds from the job's submission until its commit was seen."""
    seconds: float
    """The whole run, from starting the broker to the end of the job."""
    adapter: str = ""
    """Folder of the exported adapter, as the report should name it; empty: none."""


def write(run: Run, folder: Path) -> Path:
    """Write the report and its plots into `folder`; the path of the report."""
    plots = _plots(run, folder)
    write_whole(folder / "report.md", render(run, plots).encode())
    return folder / "report.md"


def render(run: Run, plots: bool = True) -> str:
    """The report as Markdown."""
    job = run.job
    lines = [f"# {job.name}: {job.state}", ""]
    if job.reason and job.state != "finished":
        lines += [f"**{job.reason}**", ""]
    lines += [f"`{run.command}`", "", *_summary(run), "", "## Devices", "", *_devices(run), "", "## Rounds", ""]
    lines += _rounds(run)
    if plots:
        lines += ["", f"![Quality by round and by seconds]({QUALITY_PNG})", ""]
        lines += [f"![Plan against reality, and bytes, by device]({DEVICES_PNG})"]
    else:
        lines += ["", "No plots: matplotlib is not installed (pip install 'muster[demo]')."]
    lines += _weights(job.rounds)
    for view in job.rounds:
        lines += ["", f"## Round {view.round}: plan and reality", "", view.plan_reason, "", *_round(view)]
    return "\n".join(lines) + "\n"


def _summary(run: Run) -> list[str]:
    job, spec = run.job, run.spec
    lines = [
        f"- base {spec.base.model}, task {spec.task.kind} on {spec.task.dataset}, planner {spec.strategy.name}, "
        f"aggregator {name_of(spec.strategy)}",
        f"- before training: {tables.quality(job.baseline)}; best round: {tables.quality(job.best)}"
        + (f"; the adapter is {tables.kept(job)}" if run.adapter and tables.kept(job) else ""),
        f"- {len(job.rounds)} of {job.rounds_total} rounds in {run.seconds:.0f} s, start included",
    ]
    if run.adapter:
        lines.append(f"- adapter: [{run.adapter}]({run.adapter}), for `PeftModel.from_pretrained`")
    return lines


def _devices(run: Run) -> list[str]:
    lines = ["| device | cores | memory | rows |", "|---|---|---|---|"]
    for shape in run.shapes:
        cores = f"{shape.cores:g}" if run.available.cpu else "not limited"
        memory = f"{shape.memory_bytes / MIB:.0f} MiB" if run.available.memory else "not limited"
        lines.append(f"| {shape.name} | {cores} | {memory} | {run.rows.get(shape.name, 0)} |")
    if not run.available.memory:
        lines += ["", f"**The devices are not unequal in memory**: no limit can be set here ({run.available.reason})."]
    if not run.available.cpu:
        why = run.available.reason
        lines += ["", f"**The devices are unequal in speed by niceness alone**: no CPU quota can be set here ({why})."]
    return lines


def _rounds(run: Run) -> list[str]:
    lines = [
        "| round | quality | gate | updates | seconds | committed after | adapter | lost energy |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for view in run.job.rounds:
        done = sum(part.status == "done" for part in view.participants)
        gate = "-" if view.accepted is None else "accepted" if view.accepted else f"refused: {_cell(view.gate_reason)}"
        after = f"{run.committed_s[view.round]:.1f} s" if view.round in run.committed_s else "-"
        lines.append(
            f"| {view.round} | {tables.quality(view.metrics)} | {gate} | {done} of {len(view.participants)} "
            f"| {view.seconds:.1f} | {after} | {view.adapter_bytes / 1e6:.2f} MB | {view.lost_energy:.2%} |"
        )
    return lines


def _weights(rounds: Sequence[RoundView]) -> list[str]:
    """Importance of the modules, as measured in each scoring round and used after it; none: no lines."""
    told = {w.scored: w for view in rounds if (w := view.weights) is not None and w.scores and _chooses(w)}
    if not told:
        return []
    head = " | ".join(f"score of round {scored}" for scored in told)
    lines = ["", "## Weights", "", f"| module | {head} |", f"|---|{'---|' * len(told)}"]
    last = list(told.values())[-1].scores
    for name in sorted(
        {name for w in told.values() for name in w.scores}, key=lambda name: (-last.get(name, 0.0), name)
    ):
        cells = [f"{w.scores.get(name, 0.0):.3f}{', tuned' if name in w.selected else ''}" for w in told.values()]
        lines.append(f"| {_cell(name)} | {' | '.join(cells)} |")
    return lines


def _chooses(weights: Weights) -> bool:
    """Whether the plan left modules out by their scores: not so in a round that measures all anew."""
    return set(weights.selected) < set(weights.scores) or len(weights.scores) == 1


def _round(view: RoundView) -> list[str]:
    lines = [
        "| device | rank | batch | bits | steps | predicted | trained | loss | peak memory | down | up | status |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for part in view.participants:
        lines.append(f"| {' | '.join(_cells(part))} |")
    reasons = [f"- {p.device} {name}: {why}" for p in view.participants for name, why in p.work.reasons.items()]
    reasons += [f"- {note}" for note in tables.notes(view)]
    return [*lines, "", *reasons, *(f"- refused update: {line}" for line in view.refused_updates)]


def _cells(part: ParticipantView) -> list[str]:
    work, facts = part.work, part.facts
    status = f"{part.status}: {_cell(part.reason)}" if part.reason else part.status
    plan = [part.device, tables.ranks(work), str(work.batch), str(work.bits)]
    sizes = [f"{part.adapter_bytes / 1e6:.2f} MB", f"{part.update_bytes / 1e6:.2f} MB"]
    predicted = f"{part.predicted_s:.1f} s"
    if facts is None:
        return [*plan, str(work.steps), predicted, "-", "-", "-", *sizes, status]
    if facts.batch != work.batch:
        plan[2] = f"{work.batch} -> {facts.batch}"
    steps = str(work.steps) if facts.steps == work.steps else f"{facts.steps} of {work.steps}"
    if facts.steps > work.steps:
        steps = f"{work.steps} + {facts.steps - work.steps}"
    loss = f"{facts.loss_first:.3f} -> {facts.loss_last:.3f}"
    return [
        *plan,
        steps,
        predicted,
        f"{facts.train_s:.1f} s",
        loss,
        f"{facts.peak_bytes / MIB:.0f} MiB",
        *sizes,
        status,
    ]


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def value(metrics: Metrics) -> tuple[str, float]:
    """(name, number) of what is plotted: accuracy, perplexity, or loss."""
    if metrics.accuracy is not None:
        return "accuracy", metrics.accuracy
    if metrics.perplexity is not None:
        return "perplexity", metrics.perplexity
    return "loss", metrics.loss


def _plots(run: Run, folder: Path) -> bool:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return False
    for name, draw in ((QUALITY_PNG, _draw_quality), (DEVICES_PNG, _draw_devices)):
        figure = Figure(figsize=(10, 4), layout="constrained")
        FigureCanvasAgg(figure)
        draw(run, figure)
        figure.savefig(folder / name, dpi=110)
    return True


def _draw_quality(run: Run, figure: Any) -> None:
    left, right = figure.subplots(1, 2, sharey=True)
    name, points = "", []
    if run.job.baseline is not None:
        name, base = value(run.job.baseline)
        points.append((0, 0.0, base))
    for view in run.job.rounds:
        if view.metrics is not None:
            name, found = value(view.metrics)
            points.append((view.round, run.committed_s.get(view.round, 0.0), found))
    left.plot([p[0] for p in points], [p[2] for p in points], marker="o")
    right.plot([p[1] for p in points], [p[2] for p in points], marker="o")
    left.set(xlabel="round", ylabel=f"{name} (held out)", title="by round", xticks=[p[0] for p in points])
    right.set(xlabel="seconds since submission", title="by seconds")
    for axes in (left, right):
        axes.grid(alpha=0.3)


def _draw_devices(run: Run, figure: Any) -> None:
    names = [shape.name for shape in run.shapes]
    left, right = figure.subplots(1, 2)
    count = max(1, len(run.job.rounds))
    for place, view in enumerate(run.job.rounds):
        parts = {part.device: part for part in view.participants}
        at = [i - 0.4 + 0.8 * (place + 0.5) / count for i in range(len(names))]
        planned = [parts[n].predicted_s if n in parts else 0.0 for n in names]
        real = [facts.train_s if n in parts and (facts := parts[n].facts) else 0.0 for n in names]
        first = place == 0
        left.bar(at, real, 0.7 / count, color="tab:blue", label="trained" if first else None)
        left.scatter(at, planned, marker="_", color="black", s=120, label="predicted" if first else None, zorder=3)
    left.set(title="seconds of training, by device and round", ylabel="seconds")
    down, up = _bytes(run.job.rounds, names)
    right.bar([i - 0.2 for i in range(len(names))], down, 0.4, label="down")
    right.bar([i + 0.2 for i in range(len(names))], up, 0.4, label="up")
    right.set(title="bytes of adapters, all rounds", ylabel="MB")
    for axes in (left, right):
        axes.set_xticks(range(len(names)), names, rotation=30 if len(names) > 4 else 0)
        if axes.get_legend_handles_labels()[0]:
            axes.legend()
        axes.grid(alpha=0.3, axis="y")


def _bytes(rounds: Sequence[RoundView], names: Sequence[str]) -> tuple[list[float], list[float]]:
    """MB down and up of each device over all rounds."""
    down, up = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0.0)
    for view in rounds:
        for part in view.participants:
            down[part.device] = down.get(part.device, 0.0) + part.adapter_bytes / 1e6
            up[part.device] = up.get(part.device, 0.0) + part.update_bytes / 1e6
    return [down[name] for name in names], [up[name] for name in names]
