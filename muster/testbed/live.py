"""What an emulation shows while it runs: a live table on a terminal, else a line for each change."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Protocol, TextIO

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from coordinator.web.views import DeviceView, JobView, ParticipantView, RoundView
from muster.cli import tables


class Screen(Protocol):
    """Where a run is shown; a context manager."""

    def __enter__(self) -> Screen: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None: ...

    def say(self, line: str) -> None:
        """Show a line that stays."""

    def show(self, job: JobView, devices: Sequence[DeviceView]) -> None:
        """Show where the run stands now."""


def screen(stream: TextIO | None = None) -> Screen:
    """A table on a terminal, lines elsewhere."""
    stream = stream or sys.stdout
    return LiveTable(Console(file=stream)) if stream.isatty() else Lines(stream)


class Lines:
    """One line for each change of phase, of a device's part, and for each committed round."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._phase = ""
        self._parts: dict[str, str] = {}
        self._done: set[int] = set()

    def __enter__(self) -> Lines:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stream.flush()

    def say(self, line: str) -> None:
        """Print it."""
        print(line, file=self._stream, flush=True)  # noqa: T201 - a command's output

    def show(self, job: JobView, devices: Sequence[DeviceView]) -> None:  # noqa: ARG002 - a table shows their load
        """Print what changed."""
        for view in job.rounds:
            if view.metrics is not None and view.round not in self._done:
                self._done.add(view.round)
                self.say(committed(view))
        phase = f"round {job.round}: {job.state}" if job.round else job.state
        if phase != self._phase:
            self._phase = phase
            self.say(f"{phase} ({job.reason})" if job.reason else phase)
        for part in job.rounds[-1].participants if job.rounds else ():
            line = f"  round {job.rounds[-1].round} {part.device}: {plan(part)}, {part.status}{_outcome(part)}"
            if self._parts.get(part.device) != line:
                self._parts[part.device] = line
                self.say(line)


class LiveTable:
    """A table that is drawn anew with every look."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live = Live(console=console, refresh_per_second=4, transient=False)
        self._done: set[int] = set()

    def __enter__(self) -> LiveTable:
        self._live.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._live.__exit__(kind, error, at)

    def say(self, line: str) -> None:
        """Print it above the table."""
        self._live.console.print(Text(line))

    def show(self, job: JobView, devices: Sequence[DeviceView]) -> None:
        """Draw the table; a committed round stays above it."""
        for view in job.rounds:
            if view.metrics is not None and view.round not in self._done:
                self._done.add(view.round)
                self.say(committed(view))
        self._live.update(Group(Text(tables.status_line(job), style="bold"), table(job, devices)))


def table(job: JobView, devices: Sequence[DeviceView]) -> Table:
    """The last round, device by device."""
    made = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("device", "rank", "batch", "bits", "phase", "steps", "", "loss", "samples/s", "load", "heat"):
        made.add_column(name, justify="right" if name in ("rank", "batch", "bits", "loss", "samples/s") else "left")
    parts: Mapping[str, ParticipantView] = {p.device: p for p in job.rounds[-1].participants} if job.rounds else {}
    for device in devices:
        part = parts.get(device.device)
        heat = f"{t:.0f} °C" if device.load and (t := device.load.temperature_c) is not None else "-"
        if part is None:
            made.add_row(device.device, *["-"] * 3, device.state, "", "", "-", "-", _load(device), heat)
            continue
        work, step = part.work, part.facts.steps if part.facts else part.step
        paused = f" (paused: {device.load.paused})" if device.load and device.load.paused else ""
        made.add_row(
            device.device, tables.ranks(work), str(work.batch), str(work.bits), part.status + paused,
            ProgressBar(total=work.steps, completed=step, width=16), f"{step}/{work.steps}",
            _loss(part), _speed(part), _load(device), heat,
        )  # fmt: skip
    return made


def plan(part: ParticipantView) -> str:
    """What a device was asked, in few words."""
    work = part.work
    return f"rank {tables.ranks(work)}, batch {work.batch}, {work.bits} bits, {work.steps} steps"


def committed(view: RoundView) -> str:
    """A finished round in one line."""
    counted = sum(part.status == "done" for part in view.participants)
    gate = "" if view.accepted else f", refused: {view.gate_reason}"
    return (
        f"round {view.round} committed: {tables.quality(view.metrics)}, {counted} of {len(view.participants)} updates, "
        f"{view.seconds:.1f} s{gate}"
    )


def _outcome(part: ParticipantView) -> str:
    if part.facts is None:
        return f" ({part.reason})" if part.reason else ""
    facts = part.facts
    return f", loss {facts.loss_first:.3f} -> {facts.loss_last:.3f} in {facts.train_s:.1f} s"


def _loss(part: ParticipantView) -> str:
    loss = part.facts.loss_last if part.facts else part.loss
    return "-" if loss is None else f"{loss:.3f}"


def _speed(part: ParticipantView) -> str:
    if part.facts:
        return f"{part.facts.samples / part.facts.train_s:.1f}" if part.facts.train_s > 0 else "-"
    return f"{part.samples_per_s:.1f}" if part.samples_per_s else "-"


def _load(device: DeviceView) -> str:
    load = device.load
    if load is None:
        return "-"
    return f"{load.own_cores:.2f} + {load.foreign_cores:.2f} of {load.cores:.2f} cores"
