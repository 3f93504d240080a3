"""What the HTTP API asks of the coordinator, each call carried out on the coordinator's own loop."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import TypeVar

from msgspec.structs import replace

from coordinator.core import events as ev
from coordinator.core import strategies
from coordinator.core.collecting import statuses
from coordinator.core.fleet import Presence
from coordinator.core.job import TERMINAL, Job
from coordinator.runtime import Call, Runtime
from coordinator.web import history
from coordinator.web.refusals import Conflict, NotFound
from coordinator.web.release_desk import ReleaseDesk
from coordinator.web.views import DeviceView, JobView, ParticipantView, RoundView
from shared.errors import SettingsError
from shared.files import rows_fault
from shared.jobs import JobSpec
from shared.settings import check, parse_toml

T = TypeVar("T")
ANSWER_WITHIN_S = 30.0


class Desk:
    """The API's view of a runtime. Its methods may be called from any thread but the runtime's."""

    def __init__(self, runtime: Runtime, post: Callable[[Call], None]) -> None:
        self._runtime = runtime
        self._post = post
        self.releases = ReleaseDesk(runtime, self._on_loop)

    def submit(self, text: str) -> JobView:
        """Check a job file whole and queue it. Raises `SettingsError` with every fault."""
        spec = check(JobSpec, parse_toml(text, "job"), "job")
        faults = self._faults(spec)
        if faults:
            raise SettingsError("job", faults)
        job_id = f"{spec.name}-{secrets.token_hex(3)}"

        def submit() -> JobView:
            self._runtime.step(ev.JobRequested(job=job_id, spec=spec, **self._runtime.now()))
            if job_id not in self._runtime.state.jobs:
                raise Conflict(f"the job can't be written down, nothing was queued: {self._runtime.problem}")
            return history.summary(self._runtime.state.jobs[job_id])

        return self._on_loop(submit)

    def jobs(self) -> list[JobView]:
        """Every job, in the order of submission."""
        return self._on_loop(self._jobs)

    def job(self, job_id: str) -> JobView:
        """One job with all its rounds."""

        def snapshot() -> tuple[Job, str, Mapping[str, str], dict[str, Presence]]:
            job = self._find(job_id)
            state = self._runtime.state
            live: Mapping[str, str] = statuses(state, job, self._runtime.ports.clock()) if job.phase == "open" else {}
            return job, state.notices.get(job_id, ""), live, state.fleet

        job, notice, live, fleet = self._on_loop(snapshot)
        view = history.job_view(self._runtime.ports.log.of_job(job_id), job, notice)
        if not live or not view.rounds:
            return view
        return replace(view, rounds=[*view.rounds[:-1], _with_live(view.rounds[-1], job, live, fleet)])

    def cancel(self, job_id: str) -> JobView:
        """Cancel a job that has not ended."""
        return self._request(job_id, ev.CancelRequested(job=job_id, **self._runtime.now()), "has ended")

    def resume(self, job_id: str) -> JobView:
        """Resume a paused job."""
        return self._request(job_id, ev.ResumeRequested(job=job_id, **self._runtime.now()), "is not paused")

    def export_folder(self, job_id: str) -> Path:
        """The finished PEFT folder of a job."""

        def find() -> Path:
            job = self._find(job_id)
            if not job.export_path:
                raise Conflict(f"job {job_id} is {job.phase}: there is no export yet")
            return Path(job.export_path)

        return self._on_loop(find)

    def devices(self) -> list[DeviceView]:
        """Every known device, by id."""

        def look() -> list[DeviceView]:
            now = self._runtime.ports.clock()
            return [_device(known, now) for _, known in sorted(self._runtime.state.fleet.items())]

        return self._on_loop(look)

    def forget(self, device: str) -> None:
        """Take a device out of the fleet. One that still runs, and that the broker still lets in, comes back."""

        def act() -> None:
            if device not in self._runtime.state.fleet:
                raise NotFound(f"no device {device!r}; `muster devices` shows all")
            self._runtime.forget(device)

        self._on_loop(act)

    def health(self) -> dict[str, object]:
        """Whether the broker is reached, how much was refused."""

        def look() -> dict[str, object]:
            runtime = self._runtime
            return {
                "broker": "connected" if runtime.connected else f"disconnected: {runtime.problem}",
                "term": runtime.term,
                "devices": len(runtime.state.fleet),
                "counters": dict(runtime.state.counters),
            }

        return self._on_loop(look)

    def _faults(self, spec: JobSpec) -> list[str]:
        faults = strategies.job_faults(spec)
        if spec.evaluation.data and (fault := rows_fault(Path(spec.evaluation.data))):
            faults.append(f"evaluation.data: on the coordinator: {fault}")
        if spec.task.kind == "classification" and len(spec.task.labels) < 2:
            faults.append("task.labels: a classification needs the names of its classes, in the order of their numbers")
        if spec.task.kind != "least_squares":
            faults += self._base_faults(spec)
        return faults

    def _base_faults(self, spec: JobSpec) -> list[str]:
        model = self._runtime.settings.models.get(spec.base.model, spec.base.model)
        folder = Path(model)
        try:
            if folder.is_dir():
                return [] if (folder / "config.json").is_file() else [f"base.model: {model} has no config.json"]
        except OSError as error:
            return [f"base.model: {model}: can't be read: {error.strerror}"]
        if folder.is_absolute() or model.startswith("."):
            return [f"base.model: {model}: no such folder"]
        if "/" in model:
            return []  # a hub id: the worker tries it
        known = ", ".join(sorted(self._runtime.settings.models)) or "none"
        return [f"base.model: unknown model {model!r}; in [models] of the coordinator: {known}"]

    def _request(self, job_id: str, event: ev.CancelRequested | ev.ResumeRequested, refusal: str) -> JobView:
        def act() -> JobView:
            job = self._find(job_id)
            allowed = job.phase == "paused" if isinstance(event, ev.ResumeRequested) else job.phase not in TERMINAL
            other = self._runtime.state.active
            if isinstance(event, ev.ResumeRequested) and allowed and other is not None:
                raise Conflict(f"job {other.id} holds the fleet; resume {job_id} when it has ended")
            if not allowed:
                raise Conflict(f"job {job_id} {refusal}: it is {job.phase}")
            if not self._runtime.step(event):
                raise Conflict(f"this can't be written down, job {job_id} goes on as it was: {self._runtime.problem}")
            return history.summary(self._runtime.state.jobs[job_id])

        return self._on_loop(act)

    def _jobs(self) -> list[JobView]:
        state = self._runtime.state
        return [history.summary(job, state.notices.get(job.id, "")) for job in state.jobs.values()]

    def _find(self, job_id: str) -> Job:
        job = self._runtime.state.jobs.get(job_id)
        if job is None:
            raise NotFound(f"no job {job_id!r}; `muster list` shows all")
        return job

    def _on_loop(self, run: Callable[[], T]) -> T:
        future: Future[T] = Future()

        def carry_out() -> None:
            try:
                future.set_result(run())
            except BaseException as error:  # noqa: BLE001 - it belongs to the caller's thread
                future.set_exception(error)

        self._post(Call(carry_out))
        return future.result(timeout=ANSWER_WITHIN_S)


def _device(known: Presence, now: float) -> DeviceView:
    load = known.load
    work = f"{load.job}/{load.round}/{load.attempt} {load.phase}" if load and load.job else ""
    return DeviceView(
        device=known.device, state=known.state.s if known.state else "unknown", age_s=max(0.0, now - known.heard_at),
        epoch=known.epoch, info=known.info, load=load, work=work,
    )  # fmt: skip


def _with_live(round: RoundView, job: Job, live: Mapping[str, str], fleet: dict[str, Presence]) -> RoundView:
    """`round` with what the devices say right now."""
    assert job.round is not None

    def look(part: ParticipantView) -> ParticipantView:
        if part.status != "assigned":
            return part
        part = replace(part, status=live.get(part.device, part.status))
        known = fleet.get(part.device)
        progress = known.progress if known else None
        if progress is None or (progress.job, progress.round, progress.attempt) != (job.id, round.round, part.attempt):
            return part
        status = "training" if part.status == "accepted" else part.status
        return replace(
            part, status=status, step=progress.step, loss=progress.loss, samples_per_s=progress.samples_per_s
        )

    return replace(round, participants=[look(part) for part in round.participants])
