"""The coordinator's use of aggregation: admission of a stored update, and the fold of a closed round, on its blobs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from coordinator.core.aggregation import registry
from coordinator.core.aggregation.base import Expectation
from coordinator.core.aggregation.registry import SPLIT
from coordinator.core.facts import ModelFacts
from coordinator.core.job import Job
from coordinator.core.planning import pruned
from coordinator.fold import Reported, fold_round
from shared import adapter as adapter_files
from shared import units
from shared.blob_folder import BlobFolder
from shared.errors import DecodeError, MusterError
from shared.messages import BlobRef, UpdateFacts
from shared.starts import averages_factors


class MissingBlob(MusterError):
    """The log refers to a blob that is not in the store."""


@dataclass(frozen=True)
class Made:
    """A folded round on disk."""

    adapter: BlobRef
    lower: BlobRef | None
    residual: BlobRef | None
    ranks: dict[str, int]
    lost_energy: float
    norm: float


def check_update(job: Job, device: str, path: Path, facts: UpdateFacts, blobs: BlobFolder) -> str:
    """Why the update at `path`, of which `device` tells `facts`, must be refused; empty: it is admitted."""
    aggregator = registry.create(job.spec.strategy)
    assert job.round is not None and job.facts is not None and job.adapter is not None
    groups, order = job.facts.groups, job.round.plan.participants[device].prune
    if order is not None and (fault := pruned.fault(groups, order, facts)):
        return fault
    expected = Expectation(
        job=job.id,
        round=job.round.number,
        attempt=job.round.attempt,
        device=device,
        base_digest=job.facts.base_digest,
        ranks=job.round.plan.participants[device].ranks,
        modules={module.name: module for module in job.facts.modules},
        alpha_ratio=job.spec.training.alpha_ratio,
        before=adapter_files.read_file(_path(job.adapter, blobs)),
        stacked=1 if averages_factors(aggregator.start) else facts.agents,
        seed=job.spec.seed,
        places=units.places(groups, units.unpack(groups, facts.kept)) if order is not None else {},
        dense=_dense_of(job, device),
    )
    try:
        update = adapter_files.read_file(path)
        units.scores_of(groups if order is not None else (), update.scores)
    except DecodeError as error:
        return str(error)
    return aggregator.admit(update, expected) or ""


def _dense_of(job: Job, device: str) -> frozenset[str] | None:
    """The dense tensors that an update of `device` must hold; None: all that the global adapter has."""
    assert job.round is not None and job.facts is not None
    work = job.round.plan.participants[device]
    if work.split is None:
        return None
    if work.split.tuning == "lora":
        return frozenset()
    names = (name for name, block in job.facts.dense_blocks.items() if block < work.split.block)
    return frozenset(names)


def fold_job(job: Job, blobs: BlobFolder) -> Made:
    """Fold the counted updates of the job's current round. Repeated after a crash it makes the same bytes."""
    assert job.round is not None and job.facts is not None and job.adapter is not None
    reported = []
    for device in job.round.counted:
        part = job.round.participants[device]
        assert part.blob is not None and part.facts is not None
        reported.append(Reported(device, part.facts.samples, _path(part.blob, blobs)))
    for top in job.round.top:
        # A slash is in no device's id.
        reported.append(Reported(f"top/{top.of}", top.samples, _path(top.blob, blobs)))
    result = fold_round(
        registry.create(job.spec.strategy),
        job.facts.modules,
        adapter_files.read_file(_path(job.adapter, blobs)),
        adapter_files.read_file(_path(job.residual, blobs)) if job.residual else None,
        reported,
        round=job.round.number,
        max_share=job.spec.strategy.max_share,
        server_lr=job.spec.strategy.server_lr,
        codec=job.spec.strategy.global_codec,
    )
    adapter = result.adapter
    if job.facts.groups:
        kept, scores = _units_left(job, reported, result.weights, blobs)
        adapter = replace(adapter, kept=kept, scores=scores)
    made = blobs.put(adapter_files.write(adapter, job.spec.strategy.global_codec))
    cuts = [work.split.block for work in job.round.plan.participants.values() if work.split is not None]
    return Made(
        adapter=made,
        lower=lower_blob(job, job.facts, made, max(cuts, default=0), blobs),
        residual=blobs.put(adapter_files.write(result.residual)) if result.residual else None,
        ranks={name: stats.rank for name, stats in result.modules.items()},
        lost_energy=result.lost_energy,
        norm=result.norm,
    )


def lower_blob(job: Job, facts: ModelFacts, adapter: BlobRef, block: int, blobs: BlobFolder) -> BlobRef | None:
    """What of a global adapter devices need that run the lower `block` blocks; None: all of it, or it is not known yet
    where the cut will be."""
    if job.spec.strategy.name not in SPLIT or not block:
        return None
    whole = adapter_files.read_file(_path(adapter, blobs))
    below = {module.name for module in facts.modules if module.block < block}
    cut = replace(
        whole,
        factors={name: part for name, part in whole.factors.items() if name in below},
        dense={name: one for name, one in whole.dense.items() if facts.dense_blocks.get(name, block) < block},
    )
    return blobs.put(adapter_files.write(cut))


def _units_left(
    job: Job, reported: list[Reported], weights: dict[str, float], blobs: BlobFolder
) -> tuple[dict[str, bytes], dict[str, bytes]]:
    """`kept` and `scores` of the global adapter after a round of devices that prune."""
    assert job.round is not None and job.facts is not None and job.adapter is not None
    facts = {one.device: job.round.participants[one.device].facts for one in reported}
    results = {device: told for device, told in facts.items() if told is not None}
    sound = pruned.sound(job.facts.groups, job.round.plan.participants, results)
    parts = [
        pruned.Told(weights[one.device], sound[one.device].facts.kept, adapter_files.read_file(one.path).scores)
        for one in reported
        if one.device in sound
    ]
    before = adapter_files.read_file(_path(job.adapter, blobs))
    return pruned.model_left(job.facts.groups, before, parts, job.spec.strategy.prune)


def _path(ref: BlobRef, blobs: BlobFolder) -> Path:
    path = blobs.path(ref.sha)
    if path is None:
        raise MissingBlob(f"blob {ref.sha[:12]} is not in the store")
    return path
