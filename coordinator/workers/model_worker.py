"""The worker that knows the model: facts of a base, round 0's adapter, evaluation on held-out data.

`python -m coordinator.workers.model_worker --read-fd R --write-fd W`; keeps the base and the data loaded.
"""

from __future__ import annotations

import argparse
import logging
import math
import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from coordinator.core.aggregation.registry import PRUNING, SPLIT, create
from coordinator.core.facts import ActivationFacts, Metrics, ModelFacts, ModuleSpec
from coordinator.workers.protocol import (
    Evaluate,
    Evaluated,
    Exit,
    Prepare,
    Prepared,
    ToWorker,
    WorkerFailed,
)
from coordinator.workers.pulse import Pulse
from shared import logs, units
from shared.errors import DecodeError, UserError
from shared.fields import MAX_BLOB_BYTES
from shared.files import write_whole
from shared.frames import FrameReader, FrameWriter
from shared.jobs import Bits, JobSpec
from shared.starts import START_NOTE, Start
from shared.tensors import Array
from shared.units import Group

log = logging.getLogger(__name__)
PRECISIONS: tuple[Bits, ...] = (32, 16)
"""What bases compute in: fp32, and bf16 at 16 bits and fewer."""


@dataclass
class _Held:
    """What stays loaded: one base, its digest, its tokenised data, and what was counted of its activations."""

    key: tuple[object, ...] = ()
    base: Any = None
    digest: str = ""
    store: Any = None
    counted: dict[str, ActivationFacts] = field(default_factory=dict)
    counted_gpu: dict[str, ActivationFacts] = field(default_factory=dict)


@dataclass
class ModelWorker:
    """Answers requests with the answer to send; `beat` is called now and then while one is served."""

    writer: FrameWriter
    _held: _Held = field(default_factory=_Held)

    def __post_init__(self) -> None:
        self._pulse = Pulse(self.writer)

    def answer(self, request: Prepare | Evaluate) -> Prepared | Evaluated | WorkerFailed:
        """Serve one request. The operator's faults become `WorkerFailed`, one line each."""
        try:
            if isinstance(request, Prepare):
                return Prepared(facts=self._prepare(request), packed=self._pack(request))
            return Evaluated(metrics=self._evaluate(request))
        except (UserError, DecodeError) as error:
            return WorkerFailed(reason=str(error), operator=isinstance(error, UserError))
        except MemoryError:
            return WorkerFailed(reason="out of memory while the model was loaded or evaluated", operator=True)

    def beat(self, what: str) -> None:
        """Say that work goes on, now and then."""
        self._pulse(what)

    def _prepare(self, request: Prepare) -> ModelFacts:
        from shared import adapter
        from shared.modeling import base_model, lora, pruning, split, stored_form

        job = request.job
        base = self._base(job, request.base_path)
        lora.detach(base)
        if base.cuts:  # by the last evaluation, perhaps of another job
            pruning.prune(base, {})
        if job.evaluation.data:
            self._data(job)
        start = create(job.strategy).start
        modules = _modules(base, job, start)
        covered, others = base_model.count_parameters(base)
        dense = base_model.fresh_head(base, job.seed)
        if start in ("dense", "sides"):
            dense = _stored(base, _trained(base, job, start)) | dense
        first = adapter.Adapter(
            kind="global", job=job.name, round=0, base_digest=self._held.digest, factors={}, dense=dense,
            notes={START_NOTE: start},
        )  # fmt: skip
        write_whole(Path(request.adapter_path), adapter.write(first))
        config = base.model.config
        if not self._held.counted:
            self._held.counted, self._held.counted_gpu = (self._counted(base, job, gpu=gpu) for gpu in (False, True))
        return ModelFacts(
            modules=modules,
            largest=max(one.out * one.inp for one in base.linears.values()) if start == "bottleneck" else 0,
            dense={name: list(tensor.shape) for name, tensor in sorted(dense.items())},
            dense_blocks=split.places(base, dense) if job.strategy.name in SPLIT else {},
            base_digest=self._held.digest,
            linear_params=covered,
            other_params=others,
            blocks=1 + max(linear.block for linear in base.linears.values()),
            activations=dict(self._held.counted),
            activations_gpu=dict(self._held.counted_gpu),
            groups=_groups(base, heads=job.strategy.prune_heads) if job.strategy.name in PRUNING else [],
            config=stored_form.whole_config(base, job.task) if start in ("dense", "sides") else "",
            features=[math.prod(config.shape_after(block + 1)) for block in range(len(config.channels))]
            if job.task.kind == "image"
            else [],
            hidden=int(config.hidden_size),
            heads=int(getattr(config, "num_attention_heads", 1)),
            intermediate=int(getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None) or 0),
        )

    def _counted(self, base: Any, job: JobSpec, *, gpu: bool) -> dict[str, ActivationFacts]:
        from shared.modeling import activations

        counted = {}
        for bits in PRECISIONS:
            self.beat("counting activations")
            found = activations.count(base.folder, job.task, bits, gpu=gpu)
            counted[str(bits)] = ActivationFacts(fixed=found.fixed, block=found.block)
        return counted

    def _pack(self, request: Prepare) -> dict[str, str]:
        """The base at each bit width for devices to fetch; what was packed for an earlier job is used again."""
        from shared.modeling import packing, weights

        if not request.pack_into:
            return {}
        job = request.job
        folder = weights.resolve(request.base_path, job.base.revision, hub=True)
        into = Path(request.pack_into)
        asked = job.strategy.bits
        wanted = packing.PACKED_BITS if asked == "auto" else (asked,)
        try:
            return {str(bits): packing.pack(folder, job.task, bits, into, self.beat) for bits in wanted}
        except (OSError, UserError) as error:
            # Devices that have the base can do the job all the same.
            log.warning("the base is not served: %s", error)
            return {}

    def _evaluate(self, request: Evaluate) -> Metrics:
        from shared import adapter
        from shared.modeling import evaluation, lora, pruning
        from shared.modeling.faults import AdapterFault

        job = request.job
        if not job.evaluation.data:
            raise UserError("evaluation.data: not set, so there is nothing to evaluate on")
        base = self._base(job, request.base_path)
        data = self._data(job, request.rows)
        path = Path(request.adapter_path)
        if not path.is_file():
            raise AdapterFault(f"{path}: no such adapter file")
        given = adapter.read_file(path)
        if given.base_digest != self._held.digest:
            raise AdapterFault(f"{path}: made for another base than {request.base_path}")
        lora.merge(base, given)
        found = evaluation.evaluate(base, data, job.evaluation.batch, self.beat)
        return Metrics(
            loss=found.loss, rows=found.rows, accuracy=found.accuracy, perplexity=found.perplexity,
            seconds=found.seconds, pruned=pruning.gone(base, given.kept),
        )  # fmt: skip

    def _base(self, job: JobSpec, base_path: str) -> Any:
        from shared.modeling import base_model, data, weights

        _check_task(job)
        folder = weights.resolve(base_path, job.base.revision, hub=True)
        digest = weights.base_digest(folder, _digest_cache())
        key = (str(folder), digest, job.task.kind, len(job.task.labels), job.task.max_tokens)
        if key != self._held.key:
            self._held = _Held()
            base = base_model.load(folder, job.task, beat=self.beat)
            self._held = _Held(key, base, digest, data.DataStore())
        return self._held.base

    def _data(self, job: JobSpec, rows: int = 0) -> Any:
        return self._held.store.load(
            job.evaluation.data, job.task, self._held.base.tokenizer, self._held.digest, rows=rows, beat=self.beat
        )


def _modules(base: Any, job: JobSpec, start: Start) -> list[ModuleSpec]:
    """The linear layers that the job tunes; for bottleneck adapters the blocks, hidden x hidden."""
    if start == "bottleneck":
        from shared.modeling import bottleneck

        found = bottleneck.sites(base).values()
        return [ModuleSpec(name=one.block, out=one.hidden, inp=one.hidden, block=one.index) for one in found]
    tuned = base.tunable(job.base.targets)
    return [ModuleSpec(name=one.name, out=one.out, inp=one.inp, block=one.block) for one in tuned]


def _groups(base: Any, *, heads: bool) -> list[Group]:
    """What can be pruned of the whole base. Raises `UserError` naming the architectures where this is none."""
    from shared.modeling import pruning

    known = pruning.chosen(pruning.groups_of(base), heads=heads)
    if reason := units.too_many(known):
        raise UserError(f"base.model: too large for a strategy that prunes: {reason}")
    return known


def _trained(base: Any, job: JobSpec, start: Start) -> list[str]:
    """The parameters that are trained themselves: all, or of a split model those of one side. Raises `UserError` where
    no blob holds that much."""
    from shared.modeling import split

    names, setting, asked = list(base.shapes), "strategy.name full", job.strategy.split
    some, bound = "", "a device can send"
    if job.strategy.name in SPLIT:
        setting = f"strategy.split.{'tuning' if asked.tuning == 'full' else 'top_tuning'} full"
    if start == "sides":
        places, upper = split.places(base, names), asked.above == "full"
        shared = split.tied(base)
        names = [name for name in names if (places[name] >= asked.block) == upper and name not in shared]
        some, bound = " on that side", "an adapter can hold"
    size = 4 * sum(math.prod(base.shapes[name]) for name in names)
    if size > MAX_BLOB_BYTES:
        raise UserError(
            f"{setting}: {base.folder} has {size >> 20} MiB of parameters{some} in fp32, {bound} {MAX_BLOB_BYTES >> 20}"
        )
    return names


def _stored(base: Any, names: Iterable[str]) -> dict[str, Array]:
    """Parameters of the base as stored."""
    from shared.modeling import lora

    lora.detach(base)
    base.restore()
    return {name: base.model.get_parameter(name).detach().numpy() for name in names}


def _check_task(job: JobSpec) -> None:
    if job.task.kind == "classification" and len(job.task.labels) < 2:
        raise UserError("task.labels: a classification needs two labels at least")
    if job.task.kind == "image" and len(job.task.labels) < 2:
        raise UserError("task.labels: pictures need two labels at least")
    if job.task.kind == "least_squares":
        raise UserError("task.kind least_squares: served by the least-squares worker, not by this one")


def _digest_cache() -> Path | None:
    folder = os.environ.get("MUSTER_WORKER_CACHE", "")
    return Path(folder) / "digests.json" if folder else None


def serve(read: BinaryIO, write: BinaryIO) -> int:
    """Answer requests until `Exit` or the end of the pipe; the exit status."""
    writer = FrameWriter(write)
    reader: FrameReader[ToWorker] = FrameReader(read, ToWorker)  # type: ignore[arg-type]  # a union is no class
    worker = ModelWorker(writer)
    while True:
        request = reader.read()
        match request:
            case Prepare() | Evaluate():
                try:
                    answer = worker.answer(request)
                except Exception as error:  # noqa: BLE001  # the request loop: a fault of ours becomes an answer
                    log.exception("request failed")
                    answer = WorkerFailed(reason=f"{type(error).__name__}: {error}"[:300])
                writer.write(answer)
            case Exit() | None:
                return 0


def main(argv: list[str] | None = None) -> int:
    """Entry point of the subprocess."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--read-fd", type=int, required=True)
    parser.add_argument("--write-fd", type=int, required=True)
    arguments = parser.parse_args(argv)
    logs.set_up("muster-worker", os.environ.get("MUSTER_LOG_LEVEL", "INFO"))
    threads = max(1, int(os.environ.get("MUSTER_WORKER_THREADS", "1")))
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true" if threads > 1 else "false")
    # Nothing here is compiled, and bitsandbytes would load the compiler: 40 MB.
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    with os.fdopen(arguments.read_fd, "rb") as read, os.fdopen(arguments.write_fd, "wb") as write:
        import torch

        torch.set_num_threads(threads)
        try:
            return serve(read, write)
        except BrokenPipeError:
            return 0


if __name__ == "__main__":
    sys.exit(main())
