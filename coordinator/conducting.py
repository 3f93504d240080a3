"""The coordinator's use of the top worker: what it is asked to conduct, and its updates as blobs."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from msgspec.structs import replace

from coordinator.adapters.worker import Answer
from coordinator.core import commands as cmd
from coordinator.core import events as ev
from coordinator.core.aggregation.registry import merges
from coordinator.core.job import Job
from coordinator.settings import CoordinatorSettings
from coordinator.workers import protocol as wire
from shared.errors import UserError
from shared.settings import BrokerSettings
from shared.topics import top_name

if TYPE_CHECKING:
    from coordinator.runtime import Runtime

FOLDER = "top"
"""Below `work`: a folder for each round that the top worker conducts."""


def run_top(runtime: Runtime, job: Job, base_path: str) -> None:
    """Have the steps of the job's round conducted; the answer comes as an event."""
    round = job.round
    assert round is not None and job.facts is not None and job.adapter is not None

    def failed(reason: str) -> None:
        runtime.step(
            ev.TopFailed(job=job.id, round=round.number, attempt=round.attempt, reason=reason, **runtime.now())
        )

    def reply(answer: Answer) -> None:
        if round.top:
            return
        if not isinstance(answer, wire.TopTrained):
            failed(answer.reason if isinstance(answer, wire.WorkerFailed) else type(answer).__name__)
            return
        blobs = runtime.ports.blobs
        updates = tuple((one.of, blobs.adopt(Path(one.path)), one.samples) for one in answer.updates)
        runtime.step(
            ev.TopDone(
                job=job.id, round=round.number, attempt=round.attempt, updates=updates, steps=answer.steps,
                loss=answer.loss, dropped=answer.dropped, waited_s=answer.waited_s, **runtime.now(),
            )
        )  # fmt: skip

    top, adapter = runtime.ports.top, runtime.ports.blobs.path(job.adapter.sha)
    if top is None or adapter is None:
        failed("there is no top worker here" if top is None else "the global adapter is not in the blob store")
        return
    try:
        order = _order(runtime.settings, job, base_path, adapter)
    except UserError as error:
        failed(str(error))
        return
    top.drop()
    top.ask(order, reply)


def tell_top(runtime: Runtime, command: cmd.TellTop | cmd.FinishTop | cmd.StopTop) -> None:
    """Pass on what the top worker must know."""
    top = runtime.ports.top
    if top is None:
        return
    match command:
        case cmd.TellTop():
            top.tell(wire.TopWithout(devices=list(command.devices)))
        case cmd.FinishTop():
            top.tell(wire.TopFinish())
        case cmd.StopTop():
            top.drop()
            top.stop()  # idle, too: it holds half a model


def _order(settings: CoordinatorSettings, job: Job, base_path: str, adapter: Path) -> wire.TopRound:
    round = job.round
    assert round is not None and job.facts is not None
    works = {device: work for device, work in round.plan.participants.items() if work.split is not None}
    first = next(iter(works.values()))
    assert first.split is not None and job.fetched is not None
    place = Path(settings.state_dir) / "work" / FOLDER
    folder = place / f"{job.id}-{round.number}-{round.attempt}"
    # What a round before left can't be asked for again.
    for other in place.glob("*") if place.is_dir() else ():
        if other != folder:
            shutil.rmtree(other, ignore_errors=True)
    return wire.TopRound(
        job=job.spec, job_id=job.id, round=round.number, attempt=round.attempt, fleet=settings.fleet,
        name=top_name(settings.name), broker=_broker(settings), base_path=base_path,
        base_digest=job.facts.base_digest, adapter_path=str(adapter), update_path=str(folder / "update"),
        folder=str(folder), batches={device: work.batch for device, work in works.items()},
        steps=max(work.steps for work in works.values()), split=first.split,
        merges=merges(job.spec.strategy.name), over=bool(round.top), fetched=job.fetched.size,
        regulation=round.plan.regulation,
    )  # fmt: skip


def _broker(settings: CoordinatorSettings) -> BrokerSettings:
    """How the top worker reaches the broker. Raises `UserError` where it lacks a certificate that it needs."""
    broker, top = settings.broker, settings.top
    if broker.certfile and not top.certfile:
        name = top_name(settings.name)
        raise UserError(f"[top] certfile and keyfile are not set: issue a certificate for {name} (muster pki issue)")
    return replace(broker, certfile=top.certfile, keyfile=top.keyfile) if top.certfile else broker
