"""What the coordinator and its model worker say to each other over the pipe (`shared.frames`).

The coordinator starts `<worker command> --read-fd R --write-fd W`; the worker keeps base and held-out data loaded.
"""

from __future__ import annotations

import msgspec

from coordinator.core.facts import Metrics, ModelFacts
from shared.jobs import JobSpec


class PipeMessage(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """A message on the worker's pipe."""


class Prepare(PipeMessage, frozen=True, kw_only=True):
    """Look at the base, write the global adapter of round 0 (fresh head, no factors) to `adapter_path`."""

    job: JobSpec
    base_path: str
    adapter_path: str
    pack_into: str = ""
    """Folder for the base at each bit width, to be served; empty: none is made."""


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
    packed: dict[str, str] = {}
    """Bits as text -> digest of the manifest of the packed base."""


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
