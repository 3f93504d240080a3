"""`muster simulate`: many virtual devices work on one job, on a virtual clock and with real gradients.

Coordinator, planners, aggregators and daemons are those of a real fleet; only the devices' time, memory and links are
the device model's. What can be wrong with the input is found before anything is started or written.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path

import msgspec

from coordinator.core.aggregation.registry import PRUNING, SPLIT, create, name_of
from coordinator.core.job import TERMINAL
from coordinator.core.records import RoundPlanned
from coordinator.web.history import job_view
from coordinator.web.views import JobView
from muster.testbed import device_model as dm
from muster.testbed import (
    inputs,
    live,
    oracle,
    partition,
    profiles,
    report,
    simulated,
    toml,
    virtual_fleets,
)
from muster.testbed.cgroups import Available
from muster.testbed.gradients import Workers
from muster.testbed.rows import Row
from muster.testbed.runs import RunFailed, clear, status, whole_or_nothing
from muster.testbed.virtual_device import Base, Clockwork, VirtualDevice
from muster.testbed.virtual_nodes import SimulatedFleet, evaluator
from shared.errors import UserError
from shared.files import write_whole
from shared.jobs import JobSpec

JOB = Path(__file__).parents[2] / "examples" / "simulate.toml"
STEPS = Path(__file__).parent / "profiles" / "steps.json"
RESULT = "result.json"
INTERRUPTED = "interrupted"
"""State of a job whose run was interrupted after some round."""
SLICE_S = 5.0
"""Virtual seconds between two looks at the job."""
STUCK_S = 3600.0
"""A job that commits nothing for so long is given up."""


@dataclass(frozen=True)
class Simulation:
    """What the operator asks for; the fields are the options of the command."""

    devices: int = 0
    """0: 80, or all that were recorded."""
    profile: str = "jetson"
    data: str = inputs.DOCSTRINGS
    """Folder, name in `MUSTER_DATA`, or "docstrings"."""
    job: Path | None = None
    """None: the example's."""
    strategy: str = ""
    aggregator: str = ""
    rounds: int = 0
    """0: as the job says."""
    seed: int | None = None
    """Of devices, shares and the job; None: the job's."""
    alpha: float = 1.0
    """0: shares at random."""
    models: tuple[str, ...] = ()
    """NAME=FOLDER each."""
    out: Path | None = None
    """None: `runs/<job>-<time>`."""
    replay: Path | None = None
    """Recorded telemetry in place of the device model's foreign load and bandwidth; of the profile `recorded`, the
    devices too."""
    workers: int = 2
    """Processes that compute gradients; 0: this one."""
    lm: Path | None = None
    oracle: bool = False
    """Whether planners know the clock's device model: an ablation (`oracle`)."""
    over: toml.Table = field(default_factory=dict)
    """More of the job's tables, for programs."""


@dataclass(frozen=True)
class Finished:
    """What came of a run."""

    result: simulated.Result
    out: Path
    spec: JobSpec
    seconds: float
    """Of this machine's clock."""


class Session:
    """What many runs share: `workers` processes that compute gradients and the coordinator's evaluator, which keep
    the base from run to run. A context manager."""

    def __init__(self, workers: int) -> None:
        self.workers = Workers(workers)
        self.evaluator = evaluator()

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.workers.__exit__()


@dataclass(frozen=True)
class _Ready:
    spec: JobSpec
    model: str
    """Folder of the base."""
    devices: list[VirtualDevice]
    paths: dict[str, Path]
    rows: dict[str, int]
    labels: dict[str, dict[str, int]] | None
    """Of each device's rows; None: nobody asks for them."""


def run(simulation: Simulation, *, command: str = "") -> int:
    """Carry it out. 0: the job finished; 1: it did not; 130: interrupted. Raises `UserError` for bad input."""
    return status(lambda: carry_out(simulation, command=command).result.state, "everything stopped")


def carry_out(simulation: Simulation, *, command: str = "", tell: inputs.Tell | None = None) -> Finished:
    """Carry it out and write report, result and plots. Raises `UserError` for bad input; then nothing is left.

    Interrupted, it writes them of the rounds so far, then raises `KeyboardInterrupt`.
    """
    simulation = _sized(simulation)
    tables, given = _checked(simulation)
    out = simulation.out or Path("runs") / f"{tables.get('name', 'job')}-{time.strftime('%Y%m%d-%H%M%S')}"
    started = time.monotonic()
    shown = live.Lines(sys.stdout)
    tell = tell or shown.say
    with whole_or_nothing(out, "simulation"), tempfile.TemporaryDirectory(prefix="muster-simulate-") as scratch:
        ready = _prepare(simulation, tables, given, Path(scratch), tell)
        clear(out)
        with Session(simulation.workers) as session:
            result, job, planned = _simulated(simulation, ready, session, Path(scratch), tell)
        write_whole(out / RESULT, msgspec.json.format(msgspec.json.encode(result), indent=1) + b"\n")
        written = _report(simulation, ready, result, job, out, command, planned)
    tell(f"{job.state}: {len(result.rounds)} rounds in {_last(result):.0f} virtual seconds; report: {written}")
    if job.state == INTERRUPTED:
        raise KeyboardInterrupt
    return Finished(result, out, ready.spec, time.monotonic() - started)


def result_of(simulation: Simulation, session: Session, tell: inputs.Tell) -> simulated.Result:
    """Carry out one of many runs: its result alone; nothing is written. Raises `UserError` for bad input."""
    simulation = _sized(simulation)
    tables, given = _checked(simulation)
    with tempfile.TemporaryDirectory(prefix="muster-simulate-") as scratch:
        ready = _prepare(simulation, tables, given, Path(scratch), tell)
        result = _simulated(simulation, ready, session, Path(scratch), tell)[0]
    if result.state == INTERRUPTED:
        raise KeyboardInterrupt
    return result


def _simulated(
    simulation: Simulation, ready: _Ready, session: Session, scratch: Path, tell: inputs.Tell
) -> tuple[simulated.Result, JobView, int]:
    """(result, job, rounds planned)."""
    fleet = SimulatedFleet(
        scratch / "fleet", ready.devices, data=ready.paths, rows=ready.rows, dataset=ready.spec.task.dataset,
        models={ready.spec.base.model: ready.model}, workers=session.workers, evaluator=session.evaluator,
        seed=ready.spec.seed, labels=ready.labels,
    )  # fmt: skip
    knowing = oracle.known_to_planners(ready.devices) if simulation.oracle else nullcontext()
    try:
        with fleet, knowing:
            followed = _Followed(fleet, ready.spec, tell)
            job = followed.to_the_end()
            records = fleet.records(followed.id)
    finally:
        # The next run asks for work of the same names.
        session.workers.forget_all()
    planned = {record.round for record in records if isinstance(record, RoundPlanned)}
    return _result(simulation, ready, fleet, job), job, len(planned)


def _checked(simulation: Simulation) -> tuple[toml.Table, dict[str, str]]:
    """Job tables and named models, checked as far as that goes without writing anything."""
    if simulation.profile not in virtual_fleets.names():
        known = ", ".join(virtual_fleets.names())
        raise UserError(f"unknown profile {simulation.profile!r}; there are {known}")
    path = simulation.job or JOB
    strategy = {"name": simulation.strategy, "aggregator": simulation.aggregator}
    over: toml.Table = {
        "strategy": {name: value for name, value in strategy.items() if value},
        "rounds": {"count": simulation.rounds} if simulation.rounds else {},
    }
    if simulation.seed is not None:
        over["seed"] = simulation.seed
    tables = toml.merged(inputs.job_tables(path, over), simulation.over)
    inputs.check_job(tables, str(path), simulation.devices)
    if tables["task"]["kind"] == "least_squares":
        raise UserError(f"{path}: task.kind least_squares: a simulation trains real models")
    name = tables.get("strategy", {}).get("name", "")
    inputs.check_data(simulation.data)
    given = inputs.named_folders(simulation.models)
    inputs.check_base(tables.get("base", {}).get("model", inputs.MINILM), given, simulation.lm)
    if simulation.oracle and (simulation.replay is not None or name in {"legend", *SPLIT}):
        raise UserError(
            "--oracle knows nothing of --replay's links; legend and split learning keep averages of their own"
        )
    if simulation.replay is not None:
        virtual_fleets.replayed(simulation.profile, simulation.devices, simulation.replay, 0, 0)
    return tables, given


def _sized(simulation: Simulation) -> Simulation:
    count = virtual_fleets.device_count(simulation.profile, simulation.devices, simulation.replay)
    return replace(simulation, devices=count)


def _prepare(
    simulation: Simulation, tables: toml.Table, given: Mapping[str, str], scratch: Path, tell: inputs.Tell
) -> _Ready:
    data = inputs.data_files(simulation.data, scratch / "data", tell)
    source = str(simulation.job or JOB)
    _, spec = inputs.filled(tables, data, simulation.devices, source)
    rows = inputs.rows_for(spec.task, data.train)
    inputs.held_out(spec, source, data)
    if remark := inputs.remark(spec, data):
        tell(remark)
    folder = inputs.base_model(spec.base.model, given, simulation.lm, tell)
    steps = load_steps()
    models, told, left_out = virtual_fleets.replayed(
        simulation.profile, simulation.devices, simulation.replay, steps.agent_bytes, spec.seed
    )
    if left_out:
        tell(f"left out, for nothing was proven there when it was recorded: {', '.join(left_out)}")
    names = [model.name for model in models]
    paths, counts, labels = _shares(simulation, spec, rows, names, scratch, str(data.train))
    clock = Clockwork(dm.StepTable(steps), dm.MemoryTable.of(steps), _base(folder, spec), told)
    untold = dict[str, dict[str, int]]((name, {}) for name in names)
    asked = (untold if spec.task.kind == "causal" else labels) if spec.strategy.name in SPLIT else None
    return _Ready(spec, str(folder), [VirtualDevice(model, clock) for model in models], paths, counts, asked)


def _shares(
    simulation: Simulation, spec: JobSpec, rows: list[Row], names: list[str], scratch: Path, source: str
) -> tuple[dict[str, Path], dict[str, int], dict[str, dict[str, int]]]:
    """Of each device: the file of its rows, how many there are, and how many of each label."""
    dealt = inputs.shares(
        rows, spec.task, simulation.devices, alpha=simulation.alpha, by_field="", seed=spec.seed, source=source
    )
    paths = partition.write_shares(rows, dealt, scratch / "shares", names)
    field = spec.task.label_field
    mine = dict(zip(names, dealt, strict=True))
    labels = {name: dict(Counter(str(rows[row].get(field, "")) for row in share)) for name, share in mine.items()}
    return dict(zip(names, paths, strict=True)), {name: len(share) for name, share in mine.items()}, labels


def load_steps() -> dm.Steps:
    """What the real agent was measured at."""
    return msgspec.json.decode(STEPS.read_bytes(), type=dm.Steps)


def _base(folder: Path, spec: JobSpec) -> Base:
    from shared.modeling import base_model, bottleneck, pruning

    base = base_model.load(folder, spec.task)
    linear, other = base_model.count_parameters(base)
    blocks = 1 + max(one.block for one in base.linears.values())
    start = create(spec.strategy).start
    linears = {name: (one.out, one.inp, one.block) for name, one in base.linears.items()}
    lora = sum(out + inp for out, inp, _ in linears.values())
    prunes = spec.strategy.name in PRUNING
    if start == "bottleneck":
        linears = {one.block: (one.hidden, one.hidden, one.index) for one in bottleneck.sites(base).values()}
    return Base(
        dm.Shape(blocks, spec.task.max_tokens, linear, other), linears,
        sum(tensor.numel() for tensor in base.head.values()), lora, whole=start == "dense",
        groups=tuple(pruning.chosen(pruning.groups_of(base), heads=spec.strategy.prune_heads)) if prunes else (),
    )  # fmt: skip


class _Followed:
    """A job on a simulated fleet, from its submission to its end."""

    def __init__(self, fleet: SimulatedFleet, spec: JobSpec, tell: inputs.Tell) -> None:
        self._fleet = fleet
        self._tell = tell
        self._told = 0
        self._last = time.monotonic()
        self.id = fleet.submit(spec, spec.name)

    def to_the_end(self) -> JobView:
        """Let time pass until the job ends, pauses, or is interrupted after a round, and say what happened."""
        try:
            return self._to_the_end()
        except KeyboardInterrupt:
            if not self._told:
                raise
            return msgspec.structs.replace(self._view(), state=INTERRUPTED, reason="the rounds so far")

    def _to_the_end(self) -> JobView:
        fleet, network = self._fleet, self._fleet.network
        moved = network.now
        while True:
            fleet.run(SLICE_S)
            job = fleet.job(self.id)
            if job is None:
                continue
            if job.committed > self._told:
                self._say_rounds(self._view())
                moved = network.now
            if job.phase in TERMINAL or job.phase == "paused":
                return self._view()
            if network.now - moved > STUCK_S:
                raise RunFailed(f"nothing happens any more: {fleet.coordinator.runtime.state.notices.get(self.id, '')}")

    def _view(self) -> JobView:
        job = self._fleet.job(self.id)
        assert job is not None
        notice = self._fleet.coordinator.runtime.state.notices.get(self.id, "")
        return job_view(self._fleet.records(self.id), job, notice)

    def _say_rounds(self, job: JobView) -> None:
        now = time.monotonic()
        new = [view for view in job.rounds if view.phase == "committed" and view.round > self._told]
        for view in new:
            self._told = view.round
            self._tell(f"{live.committed(view)} (virtual; {(now - self._last) / len(new):.1f} s here)")
        self._last = now


def _result(simulation: Simulation, ready: _Ready, fleet: SimulatedFleet, job: JobView) -> simulated.Result:
    kinds = {device.model.name: device.model.kind.name for device in ready.devices}
    carried = fleet.network.carried
    return simulated.Result(
        job=ready.spec.name, state=job.state, strategy=ready.spec.strategy.name,
        aggregator=name_of(ready.spec.strategy), profile=simulation.profile, devices=simulation.devices,
        data=ready.spec.task.dataset, alpha=simulation.alpha, seed=ready.spec.seed, lr=ready.spec.training.lr,
        baseline=job.baseline, rounds=simulated.round_results(job, fleet.watched(), kinds, fleet.expected),
        bytes_by_device={name: (carried.get((name, "up"), 0), carried.get((name, "down"), 0)) for name in kinds},
        happened=[(round(at, 3), name, what) for at, name, what in fleet.happened],
    )  # fmt: skip


def _last(result: simulated.Result) -> float:
    return result.rounds[-1].at if result.rounds else 0.0


def _report(
    simulation: Simulation, ready: _Ready, result: simulated.Result, job: JobView, out: Path, command: str, planned: int
) -> Path:
    shapes = [profiles.Shape(device.model.name, device.model.kind.cores, device.limit) for device in ready.devices]
    given = report.Run(
        command=command or "muster simulate", spec=ready.spec, job=job, shapes=shapes, rows=ready.rows,
        available=Available(cpu=True, memory=True), committed_s={one.round: one.at for one in result.rounds},
        seconds=_last(result),
    )  # fmt: skip
    path = report.write(given, out)
    text = path.read_text(encoding="utf-8")
    head, sign, rest = text.partition("## Devices\n")
    write_whole(path, (head + "\n".join(_figures(simulation, result, planned)) + "\n\n" + sign + rest).encode())
    return path


def _figures(simulation: Simulation, result: simulated.Result, planned: int) -> list[str]:
    """The section of a report that only a simulation has."""
    up = sum(one.bytes_up for one in result.rounds)
    down = sum(one.bytes_down for one in result.rounds)
    best = simulated.best_quality(result.rounds)
    lines = [
        "## Simulation",
        "",
        f"- {simulation.devices} virtual devices of profile {simulation.profile}, alpha {simulation.alpha:g}, seed "
        f"{result.seed}; all seconds are virtual; {planned} rounds planned, {len(result.rounds)} committed",
        f"- waiting share {simulated.mean_waiting(result.rounds):.1%} in the mean round; "
        f"{up / 1e6:.1f} MB up, {down / 1e6:.1f} MB down over all links",
        f"- best quality {best:.4f}" if best is not None else "- nothing was evaluated",
        "",
        "| round | at s | seconds | waiting | prediction error | up MB | down MB |",
        "|---|---|---|---|---|---|---|",
    ]
    for one in result.rounds:
        lines.append(
            f"| {one.round} | {one.at:.1f} | {one.seconds:.1f} | {one.waiting:.1%} | {_share(one.prediction_error)} "
            f"| {one.bytes_up / 1e6:.2f} | {one.bytes_down / 1e6:.2f} |"
        )
    return lines


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"
