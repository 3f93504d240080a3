"""What the coordinator and its model worker say to each other over the pipe (`shared.frames`).

The coordinator starts `<worker command> --read-fd R --write-fd W`; the worker keeps base and held-out data loaded.
"""

from __future__ import annotations

import msgspec

from shared.jobs import JobSpec


class PipeMessage(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """A message on the worker's pipe."""


class ModuleSpec(msgspec.Struct, frozen=True, kw_only=True):
    """A linear layer that can be tuned: W is (out x in). `block`: index of its transformer block, -1 outside."""

    name: str
    out: int
    inp: int
    block: int = -1


class ModelFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What planners need to know of the base; counts are parameters, sizes are per sample where it says so."""

    modules: list[ModuleSpec]
    dense: dict[str, list[int]] = {}
    """Tensors tuned densely (the head): name -> shape."""
    base_digest: str
    linear_params: int
    """Parameters in linear layers that quantization covers."""
    other_params: int
    """Parameters kept at full precision (embeddings, norms, head)."""
    blocks: int
    hidden: int
    """Width of the model: features of a token between the blocks."""
    heads: int = 1
    intermediate: int = 0
    """Width of the feed-forward layer; 0: not known."""


class Prepare(PipeMessage, frozen=True, kw_only=True):
    """Look at the base, write the global adapter of round 0 (fresh head, no factors) to `adapter_path`."""

    job: JobSpec
    base_path: str
    adapter_path: str


class Evaluate(PipeMessage, frozen=True, kw_only=True):
    """Evaluate the base with the global adapter at `adapter_path` on the job's held-out data."""

    job: JobSpec
    base_path: str
    adapter_path: str
    rows: int = 0
    """0: all."""


class Exit(PipeMessage, frozen=True, kw_only=True):
    """Leave."""


ToWorker = Prepare | Evaluate | Exit


class Prepared(PipeMessage, frozen=True, kw_only=True):
    """Answer to `Prepare`."""

    facts: ModelFacts


class Metrics(msgspec.Struct, frozen=True, kw_only=True):
    """Of one evaluation: accuracy for classification, `perplexity` = exp(loss per completion token) for causal."""

    loss: float
    rows: int
    accuracy: float | None = None
    perplexity: float | None = None
    seconds: float = 0.0


class Evaluated(PipeMessage, frozen=True, kw_only=True):
    """Answer to `Evaluate`."""

    metrics: Metrics


class WorkerFailed(PipeMessage, frozen=True, kw_only=True):
    """The request can't be served; one line. `operator`: the job file or the machine is at fault, not the worker."""

    reason: str
    operator: bool = False


class WorkerBeat(PipeMessage, frozen=True, kw_only=True):
    """Still at it."""

    what: str = ""


FromWorker = Prepared | Evaluated | WorkerFailed | WorkerBeat
