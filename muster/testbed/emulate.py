"""`muster emulate`: a whole fleet on this machine works on one job; then a report and the adapter.

All goes through the HTTP API, as an operator would do it. What can be wrong with the input is found before anything
is started or written.
"""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from msgspec.structs import replace

from coordinator.core.aggregation import registry as aggregators
from coordinator.web.views import JobView
from muster.cli import tables as tables_of
from muster.client import ENDED, Client, Unreachable
from muster.testbed import inputs, live, partition, profiles, replay, report, toml
from muster.testbed.broker import find_mosquitto
from muster.testbed.cgroups import Available, GroupsFailed
from muster.testbed.fleet import AGENTS, Agent, DeviceSpec, Fleet, is_fleet
from muster.testbed.runs import RunFailed, clear, status, whole_or_nothing
from shared.errors import UserError
from shared.files import write_whole
from shared.jobs import JobSpec, StrategySpec

DEMO_JOB = Path(__file__).parents[2] / "examples" / "demo.toml"
LOOK_EVERY_S = 0.5


@dataclass(frozen=True)
class Emulation:
    """What the operator asks for; the fields are the options of the command."""

    devices: int = 4
    profile: str = "mixed"
    data: str = inputs.DOCSTRINGS
    """Folder, name in `MUSTER_DATA`, or "docstrings"."""
    job: Path | None = None
    """None: the demo's."""
    strategy: str = ""
    aggregator: str = ""
    alpha: float = 1.0
    """0: shares at random."""
    by_field: str = ""
    models: tuple[str, ...] = ()
    """NAME=FOLDER each."""
    out: Path | None = None
    """None: `runs/<job>-<time>`."""
    keep: bool = False
    agent: str = "torch"
    rounds: int = 0
    """0: as the job says."""
    seed: int | None = None
    """Of the shares and the job; None: the job's."""
    secure: bool = False
    """Mutual TLS with an authority of its own, and the access list, as a real fleet has them."""
    lm: Path | None = None
    """Folder of the texts for the small GPT-2; None: `MUSTER_DATA/lm`."""


@dataclass
class Outcome:
    """What came of a run."""

    job: JobView
    spec: JobSpec
    out: Path
    shapes: list[profiles.Shape]
    shares: dict[str, Path]
    """Device -> its share of the training rows."""
    train: Path
    """All training rows."""
    model: str
    """Folder of the base."""
    seconds: float
    committed_s: Mapping[int, float] = field(default_factory=dict)


@dataclass(frozen=True)
class _Ready:
    """Everything that is needed to start."""

    spec: JobSpec
    tables: toml.Table
    agent: Agent
    models: dict[str, str]
    shapes: list[profiles.Shape]
    train: Path
    shares: dict[str, Path]
    rows: dict[str, int]


def run(emulation: Emulation, *, command: str = "") -> int:
    """Carry it out. 0: the job finished; 1: it did not; 130: interrupted. Raises `UserError` for bad input."""
    return status(lambda: carry_out(emulation, command=command).job.state, "job cancelled, everything stopped")


def carry_out(emulation: Emulation, *, command: str = "", screen: live.Screen | None = None) -> Outcome:
    """Carry it out and write the report. Raises `UserError` for bad input; then nothing is left behind."""
    tables, agent, given = _checked(emulation)
    out = emulation.out or Path("runs") / f"{tables.get('name', 'job')}-{time.strftime('%Y%m%d-%H%M%S')}"
    started = time.monotonic()
    with screen or live.screen() as shown, whole_or_nothing(out, "emulation"):
        ready = _prepare(emulation, tables, agent, given, out, shown)
        specs = [
            DeviceSpec(s.name, s.cores, s.memory_bytes, {ready.spec.task.dataset: ready.shares[s.name]})
            for s in ready.shapes
        ]
        clear(out)
        guarded = " (mutual TLS 1.3, access list)" if emulation.secure else ""
        shown.say(f"starting mosquitto{guarded}, the coordinator and {len(specs)} devices")
        logs = out / "logs"
        fleet = Fleet(out / "fleet", specs, ready.models, agent=ready.agent, secure=emulation.secure, logs=logs)
        try:
            with fleet:
                if unlimited := _unlimited(fleet.available):
                    shown.say(unlimited)
                late = fleet.wait_until_able()
                if late:
                    shown.say(f"not ready yet: {', '.join(late)}")
                followed = _Followed(fleet, shown, toml.dumps(ready.tables))
                job = followed.to_the_end()
                exported = _export(fleet.client, job, out)
                write_whole(out / replay.FILE, replay.lines(followed.readings))
        except GroupsFailed as error:
            raise UserError(f"the devices can't be limited: {error}") from error
        finally:
            _tidy(fleet, keep=emulation.keep)
        outcome = Outcome(
            job, ready.spec, out, ready.shapes, ready.shares, ready.train, ready.models[ready.spec.base.model],
            time.monotonic() - started, followed.committed_s,
        )  # fmt: skip
        written = _report(outcome, ready, fleet.available, command, exported)
        shown.say(tables_of.outcome(_told(job)))
        shown.say(f"report: {written}" + (f", adapter: {out / 'adapter'}" if exported else ""))
    return outcome


def _checked(emulation: Emulation) -> tuple[toml.Table, Agent, dict[str, str]]:
    """Job tables, agent and named models, checked as far as that goes without writing anything."""
    if emulation.agent not in ("torch", "numpy"):
        raise UserError(f"--agent {emulation.agent}: there are numpy, torch")
    agent: Agent = "numpy" if emulation.agent == "numpy" else "torch"
    if agent == "numpy" and emulation.data == inputs.DOCSTRINGS:
        raise UserError(
            "--agent numpy works on points (rows with x and y), not on docstrings: name their folder, --data"
        )
    profiles.kinds(emulation.profile)
    find_mosquitto()
    path = emulation.job or DEMO_JOB
    over: toml.Table = {}
    strategy = {"name": emulation.strategy, "aggregator": emulation.aggregator}
    over["strategy"] = {key: value for key, value in strategy.items() if value}
    if over["strategy"] and aggregators.name_of(StrategySpec(**over["strategy"])) not in aggregators.MOVES_FURTHER:
        over["strategy"]["server_lr"] = 1.0  # the job's is for a strategy that has one
    if emulation.rounds:
        over["rounds"] = {"count": emulation.rounds}
    if emulation.seed is not None:
        over["seed"] = emulation.seed
    tables = inputs.with_time(inputs.job_tables(path, over))
    inputs.check_job(tables, str(path), emulation.devices)
    inputs.check_data(emulation.data)
    given = inputs.named_folders(emulation.models)
    kind = tables["task"]["kind"]
    if (kind == "least_squares") != (agent == "numpy"):
        raise UserError(f"{path}: task.kind {kind}: the numpy agent does least_squares and nothing else does")
    if agent == "torch":
        inputs.check_base(tables.get("base", {}).get("model", inputs.MINILM), given, emulation.lm)
    return tables, agent, given


def _prepare(
    emulation: Emulation, tables: toml.Table, agent: Agent, given: Mapping[str, str], out: Path, shown: live.Screen
) -> _Ready:
    data = inputs.data_files(emulation.data, out / "data", shown.say)
    source = str(emulation.job or DEMO_JOB)
    whole, spec = inputs.filled(tables, data, emulation.devices, source)
    rows = inputs.rows_for(spec.task, data.train)
    inputs.held_out(spec, source, data)
    if remark := inputs.remark(spec, data):
        shown.say(remark)
    model = spec.base.model
    folder = model if agent == "numpy" else str(inputs.base_model(model, given, emulation.lm, shown.say))
    dealt = inputs.shares(
        rows, spec.task, emulation.devices, alpha=emulation.alpha, by_field=emulation.by_field, seed=spec.seed,
        source=str(data.train),
    )  # fmt: skip
    names = [shape.name for shape in profiles.shapes(emulation.profile, emulation.devices, 0)]
    paths = partition.write_shares(rows, dealt, out / "shares", names)
    size = profiles.measure_agent(AGENTS[agent], {spec.task.dataset: str(profiles.largest(paths))})
    return _Ready(
        spec=spec, tables=whole, agent=agent, models={model: folder},
        shapes=profiles.shapes(emulation.profile, emulation.devices, size),
        train=data.train,
        shares=dict(zip(names, paths, strict=True)),
        rows={name: len(share) for name, share in zip(names, dealt, strict=True)},
    )  # fmt: skip


class _Followed:
    """A job on a fleet, from its submission to its end."""

    def __init__(self, fleet: Fleet, shown: live.Screen, text: str) -> None:
        self._fleet = fleet
        self._shown = shown
        self._submitted = time.monotonic()
        self._id = fleet.client.submit(text).id
        self.committed_s: dict[int, float] = {}
        self.readings: list[replay.Reading] = []

    def to_the_end(self) -> JobView:
        """Show the job until it ends or pauses. Interrupted, it is cancelled first."""
        client, recorder = self._fleet.client, replay.Recorder()
        try:
            while True:
                job, devices = client.job(self._id), client.devices()
                now = time.monotonic() - self._submitted
                for view in job.rounds:
                    if view.metrics is not None or view.phase == "committed":
                        self.committed_s.setdefault(view.round, now)
                self.readings += recorder.note(devices, now) + recorder.links(job, now)
                self._shown.show(_told(job), devices)
                if job.state in ENDED or job.state == "paused":
                    return job
                if self._fleet.ended:
                    raise RunFailed(self._fleet.ended)
                time.sleep(LOOK_EVERY_S)
        except Unreachable as error:
            raise RunFailed(self._fleet.ended or str(error)) from error
        except KeyboardInterrupt:
            with contextlib.suppress(UserError):
                client.cancel(self._id)
            raise


def _unlimited(available: Available) -> str:
    """That the devices are not limited, where they are not, and what that means; else ""."""
    if available.cpu and available.memory:
        return ""
    missing = " and ".join(name for name, there in (("CPU", available.cpu), ("memory", available.memory)) if not there)
    speed = "" if available.cpu else "; they share this machine's cores, unequal by niceness alone"
    return f"no limits on {missing} here, root could set them ({available.reason}){speed}"


def _told(job: JobView) -> JobView:
    """The job as it is shown: the coordinator's folder of the export goes with the fleet, ours is named at the end."""
    return replace(job, reason="") if job.exported else job


def _export(client: Client, job: JobView, out: Path) -> bool:
    if not job.exported:
        return False
    client.export(job.id, out / "adapter")
    return True


def _report(outcome: Outcome, ready: _Ready, available: Available, command: str, exported: bool) -> Path:
    return report.write(
        report.Run(
            command=command or "muster emulate", spec=outcome.spec, job=outcome.job, shapes=outcome.shapes,
            rows=ready.rows, available=available, committed_s=outcome.committed_s, seconds=outcome.seconds,
            adapter="adapter" if exported else "",
        ),
        outcome.out,
    )  # fmt: skip


def _tidy(fleet: Fleet, *, keep: bool) -> None:
    """Logs stay; what the programs kept for themselves goes."""
    if not is_fleet(fleet.folder):
        return  # it has not even begun
    fleet.logs.mkdir(parents=True, exist_ok=True)
    for path in fleet.log_paths:
        shutil.copyfile(path, fleet.logs / path.name)
    if not keep:
        shutil.rmtree(fleet.folder, ignore_errors=True)
