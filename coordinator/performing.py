"""Performs the commands of the coordinator's machine through its edges, and turns the outcomes into events."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from msgspec.structs import replace
from typing_extensions import assert_never

from coordinator import conducting, exporting, folding, releasing
from coordinator.adapters.worker import Answer
from coordinator.core import commands as cmd
from coordinator.core import events as ev
from coordinator.core import records as rec
from coordinator.core import release_records as release_rec
from coordinator.core.facts import ModelFacts
from coordinator.core.job import Job
from coordinator.workers import protocol as wire
from shared import bases, logs, topics
from shared.blob_folder import NoRoom
from shared.errors import MusterError, RemoteError
from shared.fields import MAX_TEXT
from shared.messages import BaseSource, BlobRef, Done

if TYPE_CHECKING:
    from coordinator.runtime import Runtime

log = logging.getLogger(__name__)


class Performer:
    """Carries out commands. Slow work goes off the loop and comes back as an event."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime

    def perform(self, command: cmd.Command) -> None:
        """Carry out one command; every one may be repeated after a crash."""
        runtime = self._runtime
        match command:
            case cmd.PublishAssign():
                runtime.send(topics.ASSIGN, command.assign, device=command.device)
            case cmd.PublishRound():
                runtime.send(topics.ROUND, command.info)
            case cmd.AskRebirth() | cmd.AskDelivery():
                runtime.send(topics.COMMAND, command.message, device=command.device)
            case cmd.Settle():
                reason = command.reason[:MAX_TEXT]  # or the device could not read it
                done = Done(sha=command.sha, verdict=command.verdict, reason=reason)  # type: ignore[arg-type]  # from the machine
                runtime.send(topics.DOWN_BLOB, done, device=command.device)
            case cmd.Pull():
                self._pull(command)
            case cmd.StopPull():
                runtime.receiver.cancel(command.device, command.sha)
            case cmd.CheckUpdate():
                self._check(command)
            case cmd.FoldRound():
                self._fold(command.job)
            case cmd.ExportJob():
                self._export(command.job)
            case cmd.PrepareBase():
                self._prepare(command.job)
            case cmd.EvaluateAdapter():
                self._evaluate(command)
            case cmd.RunTop():
                conducting.run_top(runtime, command.job, self._base(command.job))
            case cmd.TellTop() | cmd.FinishTop() | cmd.StopTop():
                conducting.tell_top(runtime, command)
            case cmd.PublishRelease():
                self._say_release(command)
            case cmd.PackRelease():
                self._pack(command)
            case _:
                assert_never(command)

    def _pull(self, command: cmd.Pull) -> None:
        runtime = self._runtime
        try:
            complete = runtime.receiver.want(command.device, command.ref, command.chunk, runtime.ports.clock())
        except NoRoom as error:
            log.error("no room for the update of %s, it will be announced again: %s", command.device, error)
            return
        except RemoteError as error:
            lost = ev.UpdateLost(device=command.device, sha=command.ref.sha, reason=str(error), **runtime.now())
            runtime.step(lost)
            return
        if complete:
            runtime.step(ev.UpdateStored(device=command.device, sha=command.ref.sha, **runtime.now()))

    def _check(self, command: cmd.CheckUpdate) -> None:
        job, device, sha = command.job, command.device, command.ref.sha
        assert job.round is not None
        number, attempt, path = job.round.number, job.round.attempt, self._path(command.ref)

        def checked(reason: str) -> ev.AnyEvent:
            return ev.UpdateChecked(
                job=job.id, round=number, attempt=attempt, device=device, sha=sha, reason=reason, **self._runtime.now()
            )

        def work() -> ev.AnyEvent:
            if path is None:
                return checked("the blob vanished")
            return checked(folding.check_update(job, device, path, command.facts, self._runtime.ports.blobs))

        # What can't be checked doesn't count; it is no reason to stop the job.
        self._offload(work, f"the check of {device}'s update of job {job.id}", checked)

    def _fold(self, job: Job) -> None:
        blobs = self._runtime.ports.blobs
        assert job.round is not None
        number = job.round.number

        def work() -> ev.AnyEvent:
            made = folding.fold_job(job, blobs)
            return ev.Folded(
                job=job.id, round=number, adapter=made.adapter, lower=made.lower, residual=made.residual,
                ranks=made.ranks, lost_energy=made.lost_energy, norm=made.norm, **self._runtime.now(),
            )  # fmt: skip

        self._offload_of(work, job, "aggregation")

    def _export(self, job: Job) -> None:
        runtime = self._runtime
        folder = Path(runtime.settings.state_dir) / "exports" / job.id
        assert job.adapter is not None
        adapter = self._path(job.adapter)

        def work() -> ev.AnyEvent:
            if adapter is None:
                return self._failed(job, "export", "the global adapter is not in the blob store")
            exporting.export_job(job, adapter, self._base(job), folder)
            return ev.Exported(job=job.id, path=str(folder), **runtime.now())

        self._offload_of(work, job, "export")

    def _say_release(self, command: cmd.PublishRelease) -> None:
        if command.message is None:
            self._runtime.clear(topics.RELEASE, device=command.device)
        else:
            self._runtime.send(topics.RELEASE, command.message, device=command.device)

    def _pack(self, command: cmd.PackRelease) -> None:
        runtime, release, job = self._runtime, command.release, command.job
        work, adapter = Path(runtime.settings.state_dir) / "work", self._path(release.adapter)

        def failed(reason: str) -> ev.AnyEvent:
            return ev.PackingFailed(release=release.id, reason=reason, **runtime.now())

        def make() -> ev.AnyEvent:
            if adapter is None:
                return failed("the adapter is not in the blob store any more")
            try:
                target, kind = releasing.pack_release(release, job, adapter, self._base(job), work)
                blob = runtime.ports.blobs.adopt(target)
            except (MusterError, OSError, MemoryError, ValueError) as error:
                log.exception("packing of release %s failed", release.id)
                return failed(str(error) or type(error).__name__)
            return ev.Packed(release=release.id, blob=blob, kind=kind, **runtime.now())

        runtime.ports.offload(make, runtime.ports.post)

    def _prepare(self, job: Job) -> None:
        runtime = self._runtime
        target = Path(runtime.settings.state_dir) / "work" / f"{job.id}-round-0.adapter"
        target.parent.mkdir(parents=True, exist_ok=True)

        def reply(answer: Answer) -> None:
            if isinstance(answer, wire.Prepared):
                ref = runtime.ports.blobs.adopt(target)
                facts = replace(answer.facts, served=self._served(answer.packed))
                self._offload_of(lambda: self._prepared(job, facts, ref), job, "preparing the base")
            else:
                self._worker_failed(job, "preparing the base", answer)

        into = str(Path(runtime.settings.state_dir) / bases.FOLDER) if runtime.settings.api.public_url else ""
        question = wire.Prepare(job=job.spec, base_path=self._base(job), adapter_path=str(target), pack_into=into)
        runtime.ports.worker.ask(question, reply)

    def _prepared(self, job: Job, facts: ModelFacts, ref: BlobRef) -> ev.AnyEvent:
        block = job.spec.strategy.split.block
        lower = folding.lower_blob(job, facts, ref, block, self._runtime.ports.blobs)
        return ev.BasePrepared(job=job.id, facts=facts, adapter=ref, lower=lower, **self._runtime.now())

    def _served(self, packed: Mapping[str, str]) -> dict[str, BaseSource]:
        """Where devices find what the worker packed."""
        url = self._runtime.settings.api.public_url.rstrip("/")
        return {bits: BaseSource(url=f"{url}/v1/bases/{sha}", sha=sha) for bits, sha in packed.items()}

    def _evaluate(self, command: cmd.EvaluateAdapter) -> None:
        runtime, job = self._runtime, command.job
        path = self._path(command.adapter)
        if path is None:
            runtime.step(self._failed(job, "evaluation", "the adapter is not in the blob store"))
            return

        def reply(answer: Answer) -> None:
            if isinstance(answer, wire.Evaluated):
                done = ev.Evaluated(job=job.id, round=command.round, metrics=answer.metrics, **runtime.now())
                runtime.step(done)
            else:
                self._worker_failed(job, "evaluation", answer)

        question = wire.Evaluate(
            job=job.spec, base_path=self._base(job), adapter_path=str(path), rows=job.spec.evaluation.rows
        )
        runtime.ports.worker.ask(question, reply)

    def _offload_of(self, work: Callable[[], ev.AnyEvent], job: Job, what: str) -> None:
        """Have `work` done off the loop; where it fails, so does what `job` is about."""
        self._offload(work, f"{what} of job {job.id}", lambda reason: self._failed(job, what, reason))

    def _offload(self, work: Callable[[], ev.AnyEvent], what: str, failed: Callable[[str], ev.AnyEvent]) -> None:
        def safely() -> ev.AnyEvent:
            try:
                return work()
            except Exception as error:  # noqa: BLE001  # nobody reads the future: what is not told is waited for
                log.exception("%s failed", what)
                return failed(f"{type(error).__name__}: {error}")

        self._runtime.ports.offload(safely, self._runtime.ports.post)

    def _worker_failed(self, job: Job, what: str, answer: Answer) -> None:
        reason = answer.reason if isinstance(answer, wire.WorkerFailed) else f"unexpected {type(answer).__name__}"
        self._runtime.step(self._failed(job, what, reason))

    def _failed(self, job: Job, what: str, reason: str) -> ev.WorkFailed:
        return ev.WorkFailed(job=job.id, what=what, reason=reason, **self._runtime.now())

    def _path(self, ref: BlobRef) -> Path | None:
        return self._runtime.ports.blobs.path(ref.sha)

    def _base(self, job: Job) -> str:
        return self._runtime.settings.models.get(job.spec.base.model, job.spec.base.model)


def referenced(job: Job) -> set[str]:
    """Digests of the blobs that the live state of `job` refers to."""
    refs = [job.adapter, job.lower, job.residual]
    if job.round is not None:
        refs += [job.round.folded, job.round.lower, job.round.residual, *(top.blob for top in job.round.top)]
        refs += [*(part.blob for part in job.round.participants.values())]
    return {ref.sha for ref in refs if ref is not None}


def line(record: rec.AnyRecord) -> str:
    """A record as one line of the log."""
    return _release_line(record) if isinstance(record, release_rec.ReleaseRecord) else _job_line(record)


def _release_line(record: release_rec.AnyReleaseRecord) -> str:
    head = f"release {record.release}"
    match record:
        case release_rec.DeviceReleased():
            told = [f"loss {score.loss:.3f}" for score in (record.before, record.after) if score is not None]
            return f"{head}: {record.device} {record.state} {' -> '.join(told)} {record.reason}".rstrip()
        case release_rec.CanariesChosen():
            return f"{head} goes to {', '.join(record.devices)}: {record.reason}"
        case release_rec.ReleaseWidened():
            return f"{head} goes to {len(record.devices)} devices: {record.reason}"
        case release_rec.ReleaseWithdrawn():
            return f"{head} is withdrawn from {len(record.devices)} devices: {record.reason}"
        case release_rec.ReleaseEnded():
            return f"{head} {record.state}: {record.reason}"
        case _:
            return f"{head}: {type(record).__name__}"


def _job_line(record: rec.JobRecord) -> str:
    head = f"job {record.job}"
    match record:
        case rec.RoundPlanned():
            return f"{head} round {record.round}.{record.attempt} planned: {record.plan.reason}"
        case rec.DeviceAnswered():
            return f"{head} round {record.round}: {record.device} {record.verdict}: {record.reason}"
        case rec.UpdateAdmitted():
            facts = record.facts
            return (
                f"{head} round {record.round}: update of {record.device} admitted, {facts.samples} samples, "
                f"loss {facts.loss_first:.3f} -> {facts.loss_last:.3f}, {record.blob.size} bytes"
            )
        case rec.UpdateRefused():
            return f"{head} round {record.round}: update of {record.device} refused: {record.reason}"
        case rec.RoundClosed():
            return f"{head} round {record.round} closed over {len(record.devices)} updates: {record.reason}"
        case rec.RoundCommitted():
            word = "accepted" if record.accepted else "refused"
            return f"{head} round {record.round} committed, {word}: {record.reason}"
        case rec.RoundRepeated():
            return f"{head} round {record.round} repeats: {record.reason}"
        case rec.JobEnded():
            return f"{head} {record.state}: {record.reason}"
        case _:
            return f"{head}: {type(record).__name__}"


def fields(record: rec.AnyRecord) -> dict[str, str]:
    """What the record's line in the log is about: its class, job, round, attempt, device."""
    about = {name: getattr(record, name, None) for name in ("job", "round", "attempt", "device")}
    word = re.sub(r"(?<=[a-z])(?=[A-Z])", "-", type(record).__name__).lower()
    return logs.event(word, **about)
